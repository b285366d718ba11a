"""Divergences between two distributions over the same few events, with their derivatives in closed form.

Legend: S rows, E events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.types import TopKDivergence

_SERIES_BELOW = 0.25
"""|d| below which exp(d) - 1 - d is summed as a series: the difference would cancel."""
_SERIES = tuple(2.0 / math.factorial(n) for n in range(2, 11))
"""Coefficients of 2 (exp(d) - 1 - d) / d^2."""


@dataclass(frozen=True)
class KLTerm:
    """`weight * KL(x || teacher_share * p + student_share * q)`, x being p or q; the two shares add up to 1."""

    weight: float
    of_teacher: bool
    """x is the teacher's p; else the student's q."""
    teacher_share: float
    student_share: float


def kl_terms(divergence: TopKDivergence, *, beta: float, skew_alpha: float) -> tuple[KLTerm, ...]:
    """A divergence as a sum of KLs to mixtures of the teacher's p and the student's q.

    - forward_kl: KL(p || q); reverse_kl: KL(q || p).
    - jsd, m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m). Agarwal et al. 2024 (GKD,
      arXiv 2306.13649), eq. 1. It tends to 0 at both ends of beta, where forward_kl (beta = 0) and reverse_kl
      (beta = 1) are meant: they are special cases, and there is no continuity.
    - skew_forward_kl: KL(p || alpha p + (1 - alpha) q); skew_reverse_kl: KL(q || alpha q + (1 - alpha) p). Ko et al.
      2024 (DistiLLM, arXiv 2402.03898), section 3.1.

    Raises:
        ValueError: beta is outside [0, 1], skew_alpha outside [0, 1), or the divergence is unknown.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be between 0 (forward KL) and 1 (reverse KL)")
    if not 0 <= skew_alpha < 1:
        raise ValueError(f"skew_alpha is {skew_alpha}; it must be at least 0 (no skew) and below 1 (always 0)")
    forward, reverse = KLTerm(1.0, True, 0.0, 1.0), KLTerm(1.0, False, 1.0, 0.0)
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return (forward,)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        return (reverse,)
    if divergence == "jsd":
        return KLTerm(beta, True, beta, 1 - beta), KLTerm(1 - beta, False, beta, 1 - beta)
    if divergence == "skew_forward_kl":
        return (KLTerm(1.0, True, skew_alpha, 1 - skew_alpha),)
    if divergence == "skew_reverse_kl":
        return (KLTerm(1.0, False, 1 - skew_alpha, skew_alpha),)
    raise ValueError(f"divergence={divergence!r} is unknown")


def divergence_on_events(
    terms: tuple[KLTerm, ...], log_p_SE: Tensor, log_q_SE: Tensor, *, complete: bool
) -> tuple[Tensor, Tensor]:
    """Value `[S]` in nats, and its derivative `[S, E]` by each of the student's log-probabilities.

    A complete set of events (both sides sum to 1) takes each KL in its Bregman form,

        KL(x || m) = sum_e x_e (exp(d_e) - 1 - d_e),  d_e = log m_e - log x_e,

    which adds sum(m) - sum(x) = 0: every summand is >= 0 by itself, and nothing cancels where the two sides nearly
    agree. An incomplete set takes sum_e x_e (log x_e - log m_e) as it stands.

    Args:
        terms: what `kl_terms` gave.
        log_p_SE: the teacher's log-probabilities, finite.
        log_q_SE: the student's, finite.
        complete: whether the events are all there are.
    """
    p, q = log_p_SE.exp(), log_q_SE.exp()
    value = torch.zeros_like(log_q_SE[:, 0])
    derivative = torch.zeros_like(log_q_SE)
    for term in terms:
        a, b = term.teacher_share, term.student_share
        log_m = _log_mixture(a, log_p_SE, b, log_q_SE)
        log_x, x = (log_p_SE, p) if term.of_teacher else (log_q_SE, q)
        d = log_m - log_x
        summands = _bregman(x, log_m.exp(), d) if complete else -x * d
        value = value + term.weight * summands.sum(-1)
        # all in terms of q / m <= 1 / b, which cannot overflow
        q_over_m = (log_q_SE - log_m).exp() if b else torch.zeros_like(q)
        if term.of_teacher:
            slope = b * b * q_over_m * (q - p) if complete else -b * q_over_m * p
        else:
            slope = -q * d + (a * b * q_over_m * (p - q) if complete else q * (1 - b * q_over_m))
        derivative = derivative + term.weight * slope
    return value, derivative


def _log_mixture(a: float, log_p: Tensor, b: float, log_q: Tensor) -> Tensor:
    if not a:
        return log_q
    if not b:
        return log_p
    return torch.logaddexp(log_p + math.log(a), log_q + math.log(b))


def _bregman(x: Tensor, m: Tensor, d: Tensor) -> Tensor:
    """x (exp(d) - 1 - d) with m = x exp(d); neither form is used where it would cancel or overflow."""
    small = d.clamp(-_SERIES_BELOW, _SERIES_BELOW)
    series = torch.full_like(d, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * small + coefficient
    return torch.where(d.abs() < _SERIES_BELOW, x * (0.5 * small * small * series), m - x - x * d)
