"""Distillation losses on a teacher's top-k."""

from trainer.losses.comparison import Statistics, compare, compare_with_statistics
from trainer.losses.divergence import topk_divergence
from trainer.losses.forms import DIVERGENCES, TAILS, DivergenceForm, TopK
from trainer.losses.policy_gradient import teacher_advantages
from trainer.losses.vocabulary import VocabShard

__all__ = [
    "DIVERGENCES",
    "TAILS",
    "DivergenceForm",
    "Statistics",
    "TopK",
    "VocabShard",
    "compare",
    "compare_with_statistics",
    "teacher_advantages",
    "topk_divergence",
]
