"""Names of everything the trainer logs, and the reductions behind them: one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TEACHER_KL_LOSS = "actor/teacher_kl_loss"
"""Divergence in nats per token, averaged as `loss_agg_mode` says, before its coefficient."""
TEACHER_KL_COEF = "actor/teacher_kl_coef"
"""Its weight in the loss."""
IS_ON_POLICY = "data/is_on_policy"
"""1.0 where the student wrote the batch's responses."""
TEACHER_KNOWLEDGE = "timing/teacher_knowledge"
"""Seconds between the last response and the last teacher answer of the batch: what the step waited."""
TEACHER_LATENCY_MEAN = "timing/teacher_latency/mean"
TEACHER_LATENCY_MAX = "timing/teacher_latency/max"
"""Seconds from a request to its answer, retries included."""
SCORED_TOKENS = "gkd/scored_tokens"
"""Response tokens that the teacher scored for the batch."""
TEACHER_TAIL_MASS = "gkd/teacher_tail_mass"
"""Mean teacher probability outside the top-k."""
PEARSON_CORR = "training/rollout_actor_probs_pearson_corr"
"""Correlation of the rollout's and the trainer's probabilities of the sampled tokens: below 0.99, weights are stale."""

ROLLOUT_PROBS = "actor/rollout_probs/"
"""Prefix of the sums that PEARSON_CORR is made of; they are not logged themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCall:
    """What one response cost at the teacher; times are seconds since the epoch."""

    generated_at_s: float
    """When the response was complete."""
    scored_at_s: float
    """When its scores were there."""
    latency_s: float
    """From the request to its answer."""
    scored_tokens: int
    """S."""
    tail_mass: float
    """Mean teacher probability outside the top-k."""


def teacher_metrics(calls: Sequence[TeacherCall]) -> dict[str, float]:
    """What a batch's teacher calls amount to; empty for no calls."""
    if not calls:
        return {}
    waited_s = max(one.scored_at_s for one in calls) - max(one.generated_at_s for one in calls)
    tokens = sum(one.scored_tokens for one in calls)
    return {
        TEACHER_KNOWLEDGE: max(0.0, waited_s),
        TEACHER_LATENCY_MEAN: sum(one.latency_s for one in calls) / len(calls),
        TEACHER_LATENCY_MAX: max(one.latency_s for one in calls),
        SCORED_TOKENS: float(tokens),
        TEACHER_TAIL_MASS: sum(one.tail_mass * one.scored_tokens for one in calls) / max(tokens, 1),
    }


def pearson_correlation(sums: Mapping[str, float]) -> float | None:
    """Pearson's r from sums (or any common multiple of them); None where either side does not vary.

    Args:
        sums: `n`, `x`, `y`, `xx`, `yy`, `xy`.
    """
    n = sums["n"]
    if n <= 0:
        return None
    mean_x, mean_y = sums["x"] / n, sums["y"] / n
    var_x, var_y = sums["xx"] / n - mean_x**2, sums["yy"] / n - mean_y**2
    if var_x <= 0 or var_y <= 0:
        return None
    return (sums["xy"] / n - mean_x * mean_y) / math.sqrt(var_x * var_y)
