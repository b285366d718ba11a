"""Rows as token ids, in the form in which the trainer and the teacher see them.

Legend: B rows, P prompt tokens, A answer tokens with the end-of-turn token, N = P + A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.sort_digits.task import Row


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedRows:
    """Rows of one length, so that nothing is padded."""

    token_ids: Tensor
    """[B, N] int64: chat prompt, answer, end of turn."""
    prompt_tokens: int
    """P."""

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @property
    def prompts(self) -> Tensor:
        """[B, P]: what the model is asked."""
        return self.token_ids[:, : self.prompt_tokens]

    @property
    def answers(self) -> Tensor:
        """[B, A]: what it should say, end of turn included."""
        return self.token_ids[:, self.prompt_tokens :]


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> EncodedRows:
    """Tokenise question and answer as one turn of a chat each.

    Raises:
        ValueError: there are no rows, or they differ in length.
    """
    if not rows:
        raise ValueError("no rows to encode; at least 1 is needed")
    chats = [[{"role": "user", "content": row.question}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    answers = [row.answer + tokenizer.eos_token for row in rows]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    for name, sequences in (("questions", prompt_ids), ("answers", answer_ids)):
        lengths = sorted({len(sequence) for sequence in sequences})
        if len(lengths) > 1:
            raise ValueError(f"{name} have {lengths} tokens; rows must be of one length")
    # Prompt and answer are tokenised apart, as the trainer does: merging across their border would hide a mismatch.
    return EncodedRows(
        token_ids=torch.cat([torch.tensor(prompt_ids), torch.tensor(answer_ids)], dim=1),
        prompt_tokens=len(prompt_ids[0]),
    )
