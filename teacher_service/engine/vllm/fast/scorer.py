"""Scores the response rows of a step, all requests together, and writes each request's answer. Both runners share it.

Answers are on the device, and so is all arithmetic: how they leave it is the runner's part.

Legend: P tokens of a request, S = P - score_start scored ones, K top-k entries, C candidates, R rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from teacher_service.engine.vllm.fast.kernel import Scored, logprobs_of, num_lm_head_rows
from teacher_service.engine.vllm.fast.parameters import Parameters

SAMPLED = 0
"""Place of the sampled tokens among the given ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request's rows are written to as its chunks come; NaN where nothing came."""

    parameters: Parameters
    num_logprobs: int
    topk_ids: Tensor
    """`[S, K]` int32."""
    columns: Tensor
    """`[S, Parameters.num_columns]` float32."""

    @classmethod
    def empty(cls, parameters: Parameters, num_logprobs: int, *, prompt_len: int, device: torch.device) -> Answer:
        """An answer without rows yet."""
        num_scored = prompt_len - parameters.score_start
        return cls(
            parameters,
            num_logprobs,
            torch.full((num_scored, num_logprobs), -1, dtype=torch.int32, device=device),
            torch.full((num_scored, parameters.num_columns(num_logprobs)), torch.nan, device=device),
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one request that a step computes."""

    answer: Answer
    hidden: int
    """Index of the first in the step's hidden states."""
    at: slice
    """Where they lie in the answer."""

    def __len__(self) -> int:
        return int(self.at.stop - self.at.start)

    @property
    def first_token(self) -> int:
        """Position of the token that the first row predicts."""
        return int(self.answer.parameters.score_start + self.at.start)


def rows_of_step(answer: Answer, *, prompt_len: int, computed: int, num_tokens: int, offset: int) -> Rows | None:
    """A request's scored rows of a step; None: the step has none.

    Args:
        answer: where they are written.
        prompt_len: P.
        computed: tokens whose rows earlier steps computed.
        num_tokens: tokens whose rows this step computes.
        offset: index of the request's first row in the step's hidden states.
    """
    # the row that predicts token i is that of token i - 1
    first, end = answer.parameters.score_start - 1, prompt_len - 1
    start, stop = max(first, computed), min(end, computed + num_tokens)
    if start >= stop:
        return None
    return Rows(answer, hidden=offset + start - computed, at=slice(start - first, stop - first))


class Asked(NamedTuple):
    """What is asked of a block of rows."""

    num_logprobs: int
    """K: the largest of the block's requests."""
    temperatures: Tensor | None
    """`[R]` float32; None: 1 for all."""
    entropy: bool
    given: Sequence[tuple[slice, Tensor]]
    """Tokens whose logprobs are asked for: some rows of the block, and their `[r, C]` int64 ids. The first are the
    sampled ones, of all rows."""


class ScoreBlock(Protocol):
    """Scores `[R, H]` hidden states: the block's top-k and sums, and the `[r, C]` logprobs of each given part.

    None on a rank that gives no answer.
    """

    def __call__(self, hidden: Tensor, asked: Asked) -> tuple[Scored, list[Tensor]] | None:
        """Score one block."""
        ...


class ScoreRows(Protocol):
    """`kernel.score_rows`, or another form of it."""

    def __call__(self, logits: Tensor, num_logprobs: int, temperatures: Tensor | None, *, entropy: bool) -> Scored:
        """See `kernel.score_rows`."""
        ...


def score_from_logits(
    compute_logits: Callable[[Tensor], Tensor | None], score_rows: ScoreRows, *, answers: bool
) -> ScoreBlock:
    """Score blocks by the logits of the whole vocabulary.

    Args:
        compute_logits: the model's; all ranks call it.
        score_rows: scores rows of them.
        answers: whether anybody reads what this rank returns.
    """

    def score_block(hidden: Tensor, asked: Asked) -> tuple[Scored, list[Tensor]] | None:
        logits = compute_logits(hidden)
        if logits is None or not answers:
            return None
        scored = score_rows(logits, asked.num_logprobs, asked.temperatures, entropy=asked.entropy)
        return scored, [
            logprobs_of(
                logits[rows],
                ids,
                scored.log_total[rows],
                None if asked.temperatures is None else asked.temperatures[rows],
            )
            for rows, ids in asked.given
        ]

    return score_block


class RowScorer:
    """Scores the rows of a step, as many at a time as the LM head may make logits of."""

    def __init__(self, score_block: ScoreBlock, *, vocab_rows: int) -> None:
        self.score_block = score_block
        """How a block is scored."""
        self._vocab_rows = vocab_rows

    def __call__(self, hidden_states: Tensor, rows: Sequence[Rows], hidden_at: Tensor, targets: Tensor) -> None:
        """Score `rows` and write their answers.

        Args:
            hidden_states: the step's, `[tokens of the step, H]`.
            rows: at least one request's.
            hidden_at: `[R]` int64, on the device: where the rows lie in the hidden states, request after request.
            targets: `[R]` int64, on the device: the tokens that they predict.
        """
        device = hidden_states.device
        size = num_lm_head_rows(device.type, vocab_rows=self._vocab_rows, itemsize=hidden_states.element_size())
        for start in range(0, len(targets), size):
            block = slice(start, min(start + size, len(targets)))
            pieces = list(_pieces(rows, block))
            asked = _asked(pieces, targets[block], device)
            scored = self.score_block(hidden_states[hidden_at[block]], asked)
            if scored is not None:
                _write(pieces, asked, *scored)


class _Piece(NamedTuple):
    """A request's rows of one block."""

    answer: Answer
    at: slice
    """Where they lie in the answer."""
    here: slice
    """Where they lie in the block."""


def index_of(rows: Sequence[Rows]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`[R]`: where the rows of all requests lie in the step's hidden states."""
    return np.concatenate([np.arange(one.hidden, one.hidden + len(one)) for one in rows])


def _pieces(rows: Sequence[Rows], block: slice) -> Iterator[_Piece]:
    begin = 0
    for one in rows:
        start, stop = max(begin, block.start), min(begin + len(one), block.stop)
        if start < stop:
            moved = one.at.start - begin
            yield _Piece(one.answer, slice(start + moved, stop + moved), slice(start - block.start, stop - block.start))
        begin += len(one)


def _asked(pieces: Sequence[_Piece], targets: Tensor, device: torch.device) -> Asked:
    parameters = [one.answer.parameters for one in pieces]
    temperatures = None
    if any(one.temperature != 1 for one in parameters):
        lengths = [one.here.stop - one.here.start for one in pieces]
        values = np.repeat(np.array([one.temperature for one in parameters], dtype=np.float32), lengths)
        temperatures = torch.from_numpy(values).to(device, non_blocking=True)
    given = [(slice(0, len(targets)), targets.unsqueeze(-1))]
    for one in pieces:
        candidates = one.answer.parameters.candidates
        if candidates is not None:
            given.append(
                (one.here, torch.from_numpy(candidates[one.at].astype(np.int64)).to(device, non_blocking=True))
            )
    return Asked(
        num_logprobs=max(one.answer.num_logprobs for one in pieces),
        temperatures=temperatures,
        entropy=any(one.entropy for one in parameters),
        given=given,
    )


def _write(pieces: Sequence[_Piece], asked: Asked, scored: Scored, given: list[Tensor]) -> None:
    """Write a block's rows to the answers, in the columns of `Parameters.num_columns`."""
    candidates = iter(given[SAMPLED + 1 :])
    tables: dict[tuple[int, bool], Tensor] = {}
    for answer, at, here in pieces:
        k, entropy = answer.num_logprobs, answer.parameters.entropy
        if (k, entropy) not in tables:
            tables[k, entropy] = _table(scored, given[SAMPLED], k, entropy=entropy)
        table = tables[k, entropy]
        answer.topk_ids[at] = scored.topk_ids[here, :k]
        answer.columns[at, : table.shape[1]] = table[here]
        if answer.parameters.candidates is not None:
            answer.columns[at, table.shape[1] :] = next(candidates)


def _table(scored: Scored, sampled: Tensor, k: int, *, entropy: bool) -> Tensor:
    """The columns of a block before the candidates, for requests of K = k."""
    tail = scored.log_tail
    if (
        k < scored.topk.shape[1]
    ):  # another request of the block has a larger K: its further entries are part of this tail
        tail = torch.logaddexp(tail, scored.topk[:, k:].logsumexp(-1))
    columns = [sampled, scored.topk[:, :k], tail.unsqueeze(-1)]
    if entropy and scored.entropy is not None:
        columns.append(scored.entropy.unsqueeze(-1))
    return torch.cat(columns, 1)
