"""Who may enter the engine, and when: budgets, a bounded queue that is fair among clients, and refusal."""

from teacher_service.admission.admission import Admission, AdmissionLimits, Demand, Phase
from teacher_service.admission.budget import MemoryBudget

__all__ = ["Admission", "AdmissionLimits", "Demand", "MemoryBudget", "Phase"]
