"""Names of everything the trainer logs, and the reductions behind them: one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TEACHER_KL_LOSS = "actor/teacher_kl_loss"
"""Divergence in nats per token, averaged as `loss_agg_mode` says, before its coefficient."""
TEACHER_KL_COEF = "actor/teacher_kl_coef"
"""Its weight in the loss."""
IS_ON_POLICY = "data/is_on_policy"
"""1.0 where the student wrote the batch's responses, 0.0 where they are ground-truth answers."""
SELECT_RATIO = "gkd/select_ratio"
"""Responses scored by the teacher over all responses of the batch."""
SELECT_STRATEGY = "gkd/select_strategy"
"""`gkd_select_strategy` as its number in STRATEGY_NUMBERS, since most loggers take only numbers."""
STRATEGY_NUMBERS: Mapping[str, float] = {"all": 0.0, "random": 1.0, "best": 2.0, "worst": 3.0}
TEACHER_KNOWLEDGE = "timing/teacher_knowledge"
"""Seconds that the step waited for the teacher: from when all responses were there, or the step began to want them if
that was later, to the last answer or to when the last call was given up."""
TEACHER_LATENCY_MEAN = "timing/teacher_latency/mean"
TEACHER_LATENCY_MAX = "timing/teacher_latency/max"
"""Seconds from a request to its answer, retries included."""
TEACHER_INFLIGHT = "gkd/teacher_inflight"
"""Most teacher calls that one agent-loop worker had under way when one of the batch's was answered."""
TEACHER_COVERAGE = "gkd/teacher_coverage"
"""Responses that the teacher scored over those that it was asked about."""
PER_TEACHER = "gkd/teacher/"
"""Prefix of what is logged of each teacher where there are several."""
SCORED_TOKENS = "gkd/scored_tokens"
"""Response tokens that the teacher scored for the batch."""
TEACHER_TAIL_MASS = "gkd/teacher_tail_mass"
"""Mean teacher probability outside the top-k."""
TOP1_AGREEMENT = "gkd/top1_agreement"
"""Share of the scored tokens at which student and teacher find the same token likeliest."""
TEACHER_ENTROPY = "gkd/teacher_entropy"
"""Mean entropy in nats of the teacher's top-k and one event for the rest: a lower bound of its full entropy."""
STUDENT_ENTROPY = "gkd/student_entropy"
"""Mean entropy in nats of the student's full distribution at the scored tokens, at `teacher_kl_temperature`."""
PEARSON_CORR = "training/rollout_actor_probs_pearson_corr"
"""Correlation of the rollout's and the trainer's probabilities of the sampled tokens: below 0.99, weights are stale."""

LOSS_SUMS = "actor/gkd_sums/"
"""Prefix of the sums over tokens that the loss reports; the metrics above are made of them, they are not logged."""
ROLLOUT_PROBS = LOSS_SUMS + "rollout_probs/"
"""Prefix of those that PEARSON_CORR is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCall:
    """What one response cost at the teacher; times are seconds since the epoch."""

    teacher: str
    """Name of the teacher, see `teacher.routes`."""
    asked_at_s: float
    """When it was sent."""
    scored_at_s: float
    """When its scores were there."""
    latency_s: float
    """From the request to its answer."""
    scored_tokens: int
    """S."""
    tail_mass: float
    """Mean teacher probability outside the top-k."""
    num_inflight: int
    """Calls that its worker had under way when it was answered, itself included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCalls:
    """A batch's responses and what they cost at the teacher."""

    calls: Mapping[str, TeacherCall]
    """By the key of each scored response."""
    failed: Mapping[str, str]
    """Of each response that the teacher was asked about in vain, by its key: the teacher's name."""
    num_responses: int
    """Scored or not."""
    waited_s: float
    """What the step waited for the teacher."""

    @property
    def coverage(self) -> float | None:
        """Scored responses over those that were to be scored; None where none was."""
        asked = len(self.calls) + len(self.failed)
        return len(self.calls) / asked if asked else None


def merge(batches: Sequence[BatchCalls]) -> BatchCalls:
    """The batches of one step as one."""
    return BatchCalls(
        calls={key: call for one in batches for key, call in one.calls.items()},
        failed={key: name for one in batches for key, name in one.failed.items()},
        num_responses=sum(one.num_responses for one in batches),
        waited_s=sum(one.waited_s for one in batches),
    )


def waited_s(ended_at_s: Iterable[float], *, generated_at_s: float, wanted_at_s: float) -> float:
    """Seconds that a step waited for the teacher.

    Args:
        ended_at_s: when each call that the step needs was answered or given up.
        generated_at_s: when the last response was complete, in seconds since the epoch.
        wanted_at_s: when the step began to want them; what came before cost it nothing.
    """
    last_s = max(ended_at_s, default=-math.inf)
    return max(0.0, last_s - max(generated_at_s, wanted_at_s))


def teacher_metrics(batch: BatchCalls) -> dict[str, float]:
    """What a step's teacher calls amount to; latencies and masses are absent where nothing was scored."""
    calls = tuple(batch.calls.values())
    tokens = sum(one.scored_tokens for one in calls)
    metrics = {SELECT_RATIO: len(calls) / batch.num_responses, SCORED_TOKENS: float(tokens)}
    if batch.coverage is not None:
        metrics |= {TEACHER_COVERAGE: batch.coverage, TEACHER_KNOWLEDGE: batch.waited_s}
    if tokens:
        metrics |= {
            TEACHER_LATENCY_MEAN: sum(one.latency_s for one in calls) / len(calls),
            TEACHER_LATENCY_MAX: max(one.latency_s for one in calls),
            TEACHER_TAIL_MASS: sum(one.tail_mass * one.scored_tokens for one in calls) / tokens,
            TEACHER_INFLIGHT: float(max(one.num_inflight for one in calls)),
        }
    return metrics


def metrics_per_teacher(batch: BatchCalls) -> dict[str, float]:
    """The figures that tell several teachers apart; those without a value are absent."""
    metrics: dict[str, float] = {}
    for name in sorted({one.teacher for one in batch.calls.values()} | set(batch.failed.values())):
        calls = [one for one in batch.calls.values() if one.teacher == name]
        num_failed = sum(one == name for one in batch.failed.values())
        tokens = sum(one.scored_tokens for one in calls)
        prefix = f"{PER_TEACHER}{name}/"
        metrics |= {
            prefix + "scored_tokens": float(tokens),
            prefix + "coverage": len(calls) / (len(calls) + num_failed),
        }
        if tokens:
            metrics |= {
                prefix + "latency_mean_s": sum(one.latency_s for one in calls) / len(calls),
                prefix + "latency_max_s": max(one.latency_s for one in calls),
                prefix + "tail_mass": sum(one.tail_mass * one.scored_tokens for one in calls) / tokens,
            }
    return metrics


def loss_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics that the loss's sums make; those without a token are absent.

    Args:
        sums: by name without LOSS_SUMS, or any common multiple of them.
    """
    metrics = {}
    tokens = sums.get("tokens", 0.0)
    if tokens > 0:
        for name in (TOP1_AGREEMENT, TEACHER_ENTROPY, STUDENT_ENTROPY):
            metrics[name] = sums[name] / tokens
    prefix = ROLLOUT_PROBS.removeprefix(LOSS_SUMS)
    probs = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
    correlation = pearson_correlation(probs) if probs else None
    if correlation is not None:
        metrics[PEARSON_CORR] = correlation
    return metrics


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
