"""Distillation losses on a teacher's top-k."""

from trainer.losses.divergence import topk_divergence

__all__ = ["topk_divergence"]
