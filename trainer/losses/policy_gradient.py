"""Distillation as a policy gradient.

Legend: B responses, R tokens of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import NumericsError, ShapeError


def teacher_advantages(teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Each sampled token's advantage log p - log q, detached, float32 `[B, R]`; 0 where the mask is 0.

    Under the student's own samples its mean is minus the reverse KL per token, and the policy gradient with it is that
    of the sampled reverse KL with discount 0. To back-propagate log q - log p itself would be wrong: the teacher drops
    out of that gradient. Source: Lu and Thinking Machines Lab 2025, "On-Policy Distillation".

    Args:
        teacher_logprobs: `[B, R]` nats of the sampled tokens.
        student_logprobs: `[B, R]` nats, of the policy that the ratio is taken to.
        mask: `[B, R]`, non-zero where a token is learned from the teacher.

    Raises:
        ShapeError: the shapes differ.
        NumericsError: a learned token has no finite logprob on one of the sides.
    """
    if not teacher_logprobs.shape == student_logprobs.shape == mask.shape:
        raise ShapeError(
            f"teacher_logprobs {list(teacher_logprobs.shape)}, student_logprobs {list(student_logprobs.shape)} and "
            f"mask {list(mask.shape)} must have one shape"
        )
    learned = mask.bool()
    advantages = torch.where(learned, teacher_logprobs.detach().float() - student_logprobs.detach().float(), 0.0)
    if not bool(torch.isfinite(advantages).all()):
        row, token = (int(one) for one in (~torch.isfinite(advantages)).nonzero()[0])
        raise NumericsError(
            f"token {token} of response {row} has the logprob {float(teacher_logprobs[row, token])} under the teacher "
            f"and {float(student_logprobs[row, token])} under the student; both must be finite"
        )
    return advantages
