"""The public client of the teacher service; needs neither verl nor torch."""

from protos.codec import WireDtype
from trainer.teacher.client import TeacherClient
from trainer.teacher.compatibility import ScoringPlan, StudentInfo, check_compatibility
from trainer.teacher.credentials import Credentials, TlsFiles
from trainer.teacher.replica import ReplicaState, ReplicaStatus
from trainer.teacher.retry import RetryPolicy

__all__ = [
    "Credentials",
    "ReplicaState",
    "ReplicaStatus",
    "RetryPolicy",
    "ScoringPlan",
    "StudentInfo",
    "TeacherClient",
    "TlsFiles",
    "WireDtype",
    "check_compatibility",
]
