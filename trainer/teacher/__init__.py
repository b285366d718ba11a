"""The public client of the teacher service; needs neither verl nor torch."""

from protos.codec import WireDtype
from trainer.teacher.client import TeacherClient
from trainer.teacher.compatibility import ScoringPlan, StudentInfo, check_compatibility
from trainer.teacher.retry import RetryPolicy

__all__ = ["RetryPolicy", "ScoringPlan", "StudentInfo", "TeacherClient", "WireDtype", "check_compatibility"]
