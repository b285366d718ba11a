"""A micro-batch as verl's engine hands it to a loss, built row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu


@dataclass
class Row:
    """One sequence: its logits, its mask, and the teacher's top-k at its response tokens."""

    prompt_len: int
    token_ids: Tensor
    logits: Tensor
    mask: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor

    @property
    def response_len(self) -> int:
        """S."""
        return self.token_ids.shape[0] - self.prompt_len

    @classmethod
    def random(cls, prompt_len: int, response_len: int, *, vocab_rows: int, k: int, generator: torch.Generator) -> Row:
        """Random logits, tokens and teacher."""
        length = prompt_len + response_len
        teacher = torch.log_softmax(torch.randn(response_len, vocab_rows, generator=generator), -1)
        logprobs, ids = teacher.topk(k, -1)
        return cls(
            prompt_len=prompt_len,
            token_ids=torch.randint(0, vocab_rows, (length,), generator=generator),
            logits=torch.randn(length, vocab_rows, generator=generator).requires_grad_(),
            mask=torch.ones(response_len, dtype=torch.int64),
            teacher_ids=ids.int(),
            teacher_logprobs=logprobs,
        )

    def packed_logprobs(self) -> Tensor:
        """[S, K + 2]: top-k, tail, sampled (unused here)."""
        tail = torch.log1p(-self.teacher_logprobs.exp().sum(-1, keepdim=True))
        return torch.cat([self.teacher_logprobs, tail, torch.zeros_like(tail)], -1)

    def sampled_logprobs(self) -> Tensor:
        """[S]: the student's own logprobs of its response tokens."""
        logprobs = torch.log_softmax(self.logits.detach()[self.prompt_len - 1 : -1], -1)
        return logprobs.gather(-1, self.token_ids[self.prompt_len :].unsqueeze(-1)).squeeze(-1)


def pack_rows(rows: Sequence[Row], *, batch_num_tokens: int, global_batch_size: int) -> TensorDict:
    """The nested fields and the numbers that verl's engine adds for normalisation."""
    fields = {
        "input_ids": [row.token_ids for row in rows],
        "prompts": [row.token_ids[: row.prompt_len] for row in rows],
        "responses": [row.token_ids[row.prompt_len :] for row in rows],
        "response_mask": [row.mask for row in rows],
        "rollout_log_probs": [row.sampled_logprobs() for row in rows],
        "teacher_ids": [row.teacher_ids for row in rows],
        "teacher_logprobs": [row.packed_logprobs() for row in rows],
    }
    nested = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in fields.items()}
    data = TensorDict(nested, batch_size=len(rows))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=batch_num_tokens, global_batch_size=global_batch_size)
    return data
