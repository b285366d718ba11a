"""How teacher scores travel through verl: the two per-response fields that its TransferQueue carries on its own.

Legend: S response tokens, K top-k entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import ShapeError
from trainer.types import TeacherScores

TEACHER_IDS = "teacher_ids"
"""`[S, K]` int32: the top-k token ids."""
TEACHER_LOGPROBS = "teacher_logprobs"
"""`[S, K + 2]` float32: the top-k logprobs, then the tail's, then the sampled token's."""


class TeacherColumns(NamedTuple):
    """The columns of both fields."""

    topk_token_ids: Tensor
    """`[S, K]`."""
    topk_logprobs: Tensor
    """`[S, K]` nats."""
    log_tail_mass: Tensor
    """`[S]` nats."""
    sampled_logprobs: Tensor
    """`[S]` nats."""


def pack(scores: TeacherScores) -> tuple[Tensor, Tensor]:
    """The two fields of one scored response.

    Raises:
        ShapeError: the scores hold no top-k.
    """
    if scores.topk_token_ids is None or scores.topk_logprobs is None or scores.log_tail_mass is None:
        raise ShapeError("the teacher's answer holds no top-k; ask for num_logprobs >= 1")
    logprobs = torch.cat(
        [
            torch.from_numpy(scores.topk_logprobs.copy()),
            torch.from_numpy(scores.log_tail_mass.copy()).unsqueeze(-1),
            torch.from_numpy(scores.sampled_logprobs.copy()).unsqueeze(-1),
        ],
        dim=-1,
    )
    return torch.from_numpy(scores.topk_token_ids.copy()), logprobs


def unscored(num_logprobs: int) -> tuple[Tensor, Tensor]:
    """The two fields of a response that the teacher was not asked about: no rows."""
    return torch.empty((0, num_logprobs), dtype=torch.int32), torch.empty((0, num_logprobs + 2))


def unpack(ids: Tensor, logprobs: Tensor) -> TeacherColumns:
    """The columns of `[S, K]` ids and `[S, K + 2]` logprobs."""
    return TeacherColumns(ids, logprobs[:, :-2], logprobs[:, -2], logprobs[:, -1])


def response_rows(
    sequence_lens: Tensor,
    prompt_lens: Tensor,
    teacher_lens: Tensor,
    response_mask: Tensor,
    mask_lens: Tensor,
    *,
    unscored_allowed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Where the tokens that are learned from the teacher lie in a packed micro-batch.

    A packed micro-batch of B sequences is their tokens one after the other. The token at position j of a response
    is predicted by the logits one position before it.

    Args:
        sequence_lens: `[B]` prompt plus response lengths.
        prompt_lens: `[B]`.
        teacher_lens: `[B]` rows of the teacher's fields.
        response_mask: `[sum of mask_lens]`, non-zero where a token is learned.
        mask_lens: `[B]` response lengths.
        unscored_allowed: leave out sequences without teacher rows, which were not selected.

    Returns:
        For each learned token, the index of the logits that predict it and of its row in the teacher's fields.

    Raises:
        ShapeError: a sequence has learned tokens but another number of teacher rows than response tokens.
    """
    num_sequences = sequence_lens.shape[0]
    sequence = torch.repeat_interleave(torch.arange(num_sequences, device=mask_lens.device), mask_lens)
    learned = response_mask.bool()
    if unscored_allowed:
        learned = learned & (teacher_lens > 0)[sequence]
    # verl pads a batch with sequences whose mask is all zero; their teacher rows mean nothing
    wrong = torch.zeros(num_sequences, dtype=torch.bool, device=mask_lens.device)
    wrong[sequence[learned]] = (teacher_lens != mask_lens)[sequence[learned]]
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ShapeError(
            f"sequence {first} has {int(mask_lens[first])} response tokens but {int(teacher_lens[first])} teacher rows"
        )
    offset = torch.arange(sequence.shape[0], device=mask_lens.device) - _starts(mask_lens)[sequence]
    logits_row = _starts(sequence_lens)[sequence] + prompt_lens[sequence] - 1 + offset
    teacher_row = _starts(teacher_lens)[sequence] + offset
    return logits_row[learned], teacher_row[learned]


def _starts(lens: Tensor) -> Tensor:
    return lens.cumsum(0) - lens
