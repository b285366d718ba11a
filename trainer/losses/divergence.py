"""Divergences between a student's logits and a teacher's top-k.

Legend: S scored positions, K top-k entries, V vocabulary rows of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import ShapeError

DIVERGENCES = ("forward_kl",)
TAILS = ("bucket",)


def topk_divergence(
    student_logits: Tensor,
    topk_token_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    tail: str = "bucket",
    log_tail_mass: Tensor | None = None,
) -> Tensor:
    """Per-position divergence in nats, float32 `[S]`, differentiable in `student_logits`.

    forward_kl with the bucket tail is KL(teacher || student) of the two distributions coarsened to K + 1 events,
    the K tokens and "any other":

        sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)

    By the data-processing inequality it is a lower bound of the full-vocabulary KL, and it is >= 0. Its gradient
    reaches every logit: the tail keeps the student from gathering mass outside the teacher's top-k.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649), eq. 2, for the divergence.

    Args:
        student_logits: `[S, V]`, any float type; the arithmetic is float32 (float64 for float64 logits).
        topk_token_ids: `[S, K]` integers in [0, V).
        topk_logprobs: `[S, K]` nats, of the teacher's full softmax at the same temperature.
        divergence: which divergence.
        temperature: divides the student's logits before the softmax. The result is not multiplied by its square.
        tail: `bucket`: one event for everything outside the top-k.
        log_tail_mass: `[S]` nats, the teacher's log-probability outside the top-k, -inf where there is none.
            None: one minus the sum of the top-k.

    Raises:
        ShapeError: S or K differ between the arguments.
        ValueError: a token id is outside [0, V), temperature is not > 0, or the form is unknown.
    """
    _check(student_logits, topk_token_ids, topk_logprobs, log_tail_mass, temperature)
    if divergence not in DIVERGENCES or tail not in TAILS:
        raise ValueError(
            f"divergence={divergence!r} with tail={tail!r} is unknown; known are {DIVERGENCES} with {TAILS}"
        )
    logits_SV = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    teacher_SK = topk_logprobs.to(logits_SV.dtype)
    if log_tail_mass is None:
        log_tail_mass = torch.log((1.0 - teacher_SK.exp().sum(-1)).clamp_min(0.0))
    teacher_tail_S = log_tail_mass.to(logits_SV.dtype)

    ids_SK = topk_token_ids.long()
    log_normaliser_S = logits_SV.logsumexp(-1)
    student_SK = logits_SV.gather(-1, ids_SK) - log_normaliser_S.unsqueeze(-1)
    student_tail_S = _log_mass_outside(logits_SV, ids_SK) - log_normaliser_S

    support_S = (teacher_SK.exp() * (teacher_SK - student_SK)).sum(-1)
    return support_S + _tail_term(teacher_tail_S, student_tail_S)


def _log_mass_outside(logits_SV: Tensor, ids_SK: Tensor) -> Tensor:
    """Logsumexp `[S]` of the logits outside the given ids; finite even where there are none (a gradient of zero)."""
    if ids_SK.shape[-1] == logits_SV.shape[-1]:
        return torch.zeros_like(logits_SV[:, 0])
    return logits_SV.scatter(-1, ids_SK, -torch.inf).logsumexp(-1)


def _tail_term(teacher_tail_S: Tensor, student_tail_S: Tensor) -> Tensor:
    """p_tail (log p_tail - log q_tail), and its limit 0 where the teacher's tail is empty."""
    has_tail = teacher_tail_S > -torch.inf
    # a finite stand-in keeps 0 * inf out of the gradient
    log_ratio = torch.where(has_tail, teacher_tail_S, student_tail_S.detach()) - student_tail_S
    return torch.where(has_tail, teacher_tail_S.exp() * log_ratio, torch.zeros_like(log_ratio))


def _check(logits: Tensor, ids: Tensor, logprobs: Tensor, log_tail_mass: Tensor | None, temperature: float) -> None:
    if logits.ndim != 2 or ids.ndim != 2 or ids.shape != logprobs.shape or ids.shape[0] != logits.shape[0]:
        raise ShapeError(
            f"student_logits {list(logits.shape)}, topk_token_ids {list(ids.shape)} and topk_logprobs "
            f"{list(logprobs.shape)} must be [S, V], [S, K] and [S, K]"
        )
    if log_tail_mass is not None and log_tail_mass.shape != logits.shape[:1]:
        raise ShapeError(f"log_tail_mass is {list(log_tail_mass.shape)}, not [S] = [{logits.shape[0]}]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be > 0")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= logits.shape[1]):
        raise ValueError(
            f"topk_token_ids spans {int(ids.min())}..{int(ids.max())}, outside the student's {logits.shape[1]} "
            "vocabulary rows; the teacher does not fit this student"
        )
