"""The public divergence of a student's logits from a teacher's top-k."""

from __future__ import annotations

from torch import Tensor

from trainer.errors import ShapeError
from trainer.losses.comparison import compare
from trainer.losses.forms import DivergenceForm, TopK
from trainer.types import Tail, TopKDivergence


def topk_divergence(
    student_logits: Tensor,
    topk_token_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    divergence: TopKDivergence = "forward_kl",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    log_tail_mass: Tensor | None = None,
) -> Tensor:
    """Per-position divergence in nats, float32 `[S]`, differentiable in `student_logits`.

    With `tail="bucket"` both sides are coarsened to K + 1 events, the K tokens and "any other", and the divergence is
    that of the events. All five are f-divergences, so by the data-processing inequality the result is a lower bound of
    the full-vocabulary divergence, which grows with K and is reached at K = V. It is >= 0 by construction and 0 only
    where the events agree; its gradient reaches every logit, which keeps mass from gathering outside the top-k.
    `renormalize` conditions both sides on the K tokens (blind to the mass outside them), `none` sums over the K tokens
    what the full-vocabulary sum holds there (not a divergence: it can be negative, and a reverse KL of it drives the
    student away from its teacher).

    forward_kl is sum p log(p/q), p the teacher's; see `trainer.losses.events.kl_terms` for all formulas and their
    sources. Nothing is multiplied by the squared temperature: the gradient shrinks with 1/T as Hinton et al. 2015
    (arXiv 1503.02531), section 2, say, and the T^2 that they put before it belongs into the coefficient.

    A logit or a teacher logprob of -inf is probability 0. Where its logarithm would make the result infinite it is read
    as that of the smallest normal number (-87.3 nats in float32), as a constant: no gradient reaches a logit of -inf.

    Memory beyond the logits and their gradient: one block of rows in float32 and a few `[S, K]`; the gradient is
    written once, in the logits' type.

    Args:
        student_logits: `[S, V]`, any float type; the arithmetic is float32 (float64 for float64 logits).
        topk_token_ids: `[S, K]` integers in [0, V), distinct within a row.
        topk_logprobs: `[S, K]` nats, of the teacher's full softmax at the same temperature.
        divergence: forward_kl, reverse_kl, jsd, skew_forward_kl or skew_reverse_kl.
        beta: the teacher's share of jsd's mixture; 0 is forward_kl and 1 is reverse_kl.
        skew_alpha: share of a skewed KL's first argument in its second.
        temperature: divides the student's logits before the softmax.
        tail: bucket, renormalize or none.
        log_tail_mass: `[S]` nats, the teacher's log-probability outside the top-k, -inf where there is none.
            None: one minus the sum of the top-k; where rounding leaves that below the type's resolution, the tail is
            taken to be what lies within the resolution and nearest to the student's.

    Raises:
        ShapeError: S or K differ between the arguments.
        ValueError: a token id is outside [0, V), a parameter is out of its range, or the form is unknown.
    """
    if student_logits.ndim != 2:
        raise ShapeError(f"student_logits is {list(student_logits.shape)}, not [S, V]")
    form = DivergenceForm(divergence=divergence, beta=beta, skew_alpha=skew_alpha, temperature=temperature, tail=tail)
    return compare(form, student_logits, TopK(topk_token_ids, topk_logprobs, log_tail_mass))
