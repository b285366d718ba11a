"""Scores the vocabulary in shards, one per tensor-parallel rank: K entries per row go to the first rank, not logits.

Every rank scores its own tokens as if they were the whole vocabulary. The first rank merges these answers: a shard's
logprobs plus the log of its share of the probability are logprobs of the whole. All numbers that are added are near 0,
so that nothing is lost to rounding, whatever the logits' size.

Legend: R rows, T ranks, W columns of a rank's part of the LM head, N tokens of a shard, V tokens, K top-k entries,
C given tokens of a row, H hidden size, L numbers that a rank sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from teacher_service.engine.vllm.fast.kernel import Scored, logprobs_of
from teacher_service.engine.vllm.fast.scorer import Asked, ScoreRows


class Shard(NamedTuple):
    """The tokens of one rank."""

    first_token: int
    num_tokens: int
    """Without padding; 0: the rank holds padding alone."""


class ShardAnswer(NamedTuple):
    """A shard's tokens as if they were the whole vocabulary."""

    scored: Scored
    """Ids of the whole vocabulary. Where the shard holds fewer than K tokens, entries of id 0 and -inf follow."""
    given: list[Tensor]
    """`[r, C]` of each given part; -inf: another shard's token."""


class ShardError(RuntimeError):
    """The model's logits do not come in shards."""


def shards_of(*, num_ranks: int, width: int, vocab_rows: int) -> list[Shard]:
    """All ranks' shards: each holds `width` columns, and what lies beyond the vocabulary is padding."""
    starts = [rank * width for rank in range(num_ranks)]
    return [Shard(start, max(0, min(vocab_rows - start, width))) for start in starts]


def score_shard(logits: Tensor, shard: Shard, asked: Asked, score_rows: ScoreRows) -> ShardAnswer:
    """Score a shard's `[R, N]` logits."""
    scored = _score_tokens(logits, shard, asked, score_rows) if shard.num_tokens else _no_tokens(logits, asked)
    temperatures = asked.temperatures
    return ShardAnswer(
        scored,
        [
            _own_logprobs(
                logits[rows],
                ids - shard.first_token,
                scored.log_total[rows],
                None if temperatures is None else temperatures[rows],
            )
            for rows, ids in asked.given
        ],
    )


def pack(answer: ShardAnswer) -> Tensor:
    """A shard's answer as `[L]` float32: per row 2K + 2 numbers, and one if the entropy is asked for; then the given.

    Nothing is computed with the numbers that stand for ids, which are denormal or NaN as floats.
    """
    scored = answer.scored
    columns = [scored.topk, scored.topk_ids.view(torch.float32), scored.log_tail.unsqueeze(-1)]
    columns.append(scored.log_total.unsqueeze(-1))
    if scored.entropy is not None:
        columns.append(scored.entropy.unsqueeze(-1))
    return torch.cat([torch.cat(columns, -1).flatten(), *(one.flatten() for one in answer.given)])


def unpack(packed: Tensor, num_rows: int, asked: Asked) -> ShardAnswer:
    """What `pack` made of a shard's answer for R = num_rows."""
    k = asked.num_logprobs
    width = 2 * k + 2 + int(asked.entropy)
    columns = packed[: num_rows * width].view(num_rows, width)
    given = packed[num_rows * width :].split_with_sizes([ids.numel() for _, ids in asked.given])
    return ShardAnswer(
        Scored(
            topk=columns[:, :k],
            topk_ids=columns[:, k : 2 * k].view(torch.int32),
            log_tail=columns[:, 2 * k],
            log_total=columns[:, 2 * k + 1],
            entropy=columns[:, 2 * k + 2] if asked.entropy else None,
        ),
        [part.view(ids.shape) for part, (_, ids) in zip(given, asked.given, strict=True)],
    )


def merge(shards: Sequence[Shard], answers: Sequence[ShardAnswer], asked: Asked) -> tuple[Scored, list[Tensor]]:
    """The whole vocabulary's answer from those of its shards, in their order."""
    totals_TR = torch.stack([one.scored.log_total for one in answers])
    largest = totals_TR.amax(0)
    log_sum = (totals_TR - largest).logsumexp(0)
    shares_TR = totals_TR - largest - log_sum
    topk, ids, log_tail = _merge_topk(shards, answers, shares_TR, asked.num_logprobs)
    scored = Scored(
        topk_ids=ids,
        topk=topk,
        log_tail=log_tail,
        log_total=largest + log_sum,
        entropy=_merge_entropy(answers, shares_TR) if asked.entropy else None,
    )
    given = [
        torch.stack([one.given[i] + share[rows].unsqueeze(-1) for one, share in zip(answers, shares_TR, strict=True)])
        for i, (rows, _) in enumerate(asked.given)
    ]
    return scored, [one.amax(0) for one in given]


def merge_packed(shards: Sequence[Shard], gathered: Tensor, num_rows: int, asked: Asked) -> tuple[Scored, list[Tensor]]:
    """The whole vocabulary's answer from `[T, L]` numbers that the ranks sent."""
    return merge(shards, [unpack(one, num_rows, asked) for one in gathered], asked)


class LocalLogits:
    """Makes this rank's logits, by the model's own `compute_logits`.

    vLLM's `LogitsProcessor` calls `_gather_logits`, then cuts the padding off, scales and caps; some models then change
    the logits of single tokens (Gemma 4 rules out image tokens). A tensor of the gathered width, of which only this
    rank's columns are written, takes the place of the gathered logits, so that all of that stays right, ids included.
    """

    def __init__(self, model: Any, *, rank: int, num_ranks: int) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        self._model, self._rank, self._num_ranks = model, rank, num_ranks
        self._processors = [one for one in model.modules() if isinstance(one, LogitsProcessor)]

    def __call__(self, hidden: Tensor) -> tuple[Tensor, list[Shard]]:
        """`[R, N]` logits of `[R, H]` hidden states, a view with gaps between its rows; and the shards of all ranks.

        Raises:
            ShardError: the model gathers its logits elsewhere, or not once.
        """
        with self._ungathered() as widths:
            logits = self._model.compute_logits(hidden)
        if len(widths) != 1:
            raise ShardError(f"{type(self._model).__name__} gathers its logits {len(widths)} times, not once")
        shards = shards_of(num_ranks=self._num_ranks, width=widths[0], vocab_rows=logits.shape[-1])
        shard = shards[self._rank]
        return logits[:, shard.first_token : shard.first_token + shard.num_tokens], shards

    @contextmanager
    def _ungathered(self) -> Iterator[list[int]]:
        """Until it ends, nothing is gathered; gives the list of the widths that would have been."""
        widths: list[int] = []

        def place(logits: Tensor) -> Tensor:
            width = logits.shape[-1]
            widths.append(width)
            wide = logits.new_empty((*logits.shape[:-1], width * self._num_ranks))
            wide[..., self._rank * width : (self._rank + 1) * width] = logits
            return wide

        for one in self._processors:
            one._gather_logits = place
        try:
            yield widths
        finally:
            for one in self._processors:
                del one._gather_logits  # the class has its own


class ShardScorer:
    """A `scorer.ScoreBlock` for tensor parallelism: one exchange per block. All ranks call it with the same block."""

    def __init__(self, model: Any, score_rows: ScoreRows) -> None:
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.platforms import current_platform

        self._group = get_tp_group()
        self._use_all_gather = current_platform.use_all_gather()
        self._score_rows = score_rows
        self.model = model
        self.local_logits = LocalLogits(model, rank=self._group.rank_in_group, num_ranks=self._group.world_size)

    def __call__(self, hidden: Tensor, asked: Asked) -> tuple[Scored, list[Tensor]] | None:
        """The answer on the first rank, None on the others."""
        logits, shards = self.local_logits(hidden)
        gathered = self.to_first_rank(self.pack(logits, shards, asked))
        return None if gathered is None else merge_packed(shards, gathered, len(hidden), asked)

    def pack(self, logits: Tensor, shards: Sequence[Shard], asked: Asked) -> Tensor:
        """What this rank sends, `[L]`."""
        return pack(score_shard(logits, shards[self._group.rank_in_group], asked, self._score_rows))

    def to_first_rank(self, sent: Tensor) -> Tensor | None:
        """`[T, L]` of the ranks' `[L]`; None on all but the first.

        It takes the collective with which vLLM gathers logits, in the same form: that one is set up and known to work.
        """
        if self._use_all_gather:
            gathered = self._group.all_gather(sent.unsqueeze(0), dim=-1)
        else:
            gathered = self._group.gather(sent.unsqueeze(0), dst=0, dim=-1)
        return gathered.view(-1, sent.shape[0]) if self._group.is_first_rank else None

    def all_succeeded(self, success: bool, device: torch.device) -> bool:
        """Whether all ranks did."""
        flag = torch.full((1, 1), float(success), device=device)
        return bool(self._group.all_gather(flag, dim=-1).min() == 1)


def _score_tokens(logits: Tensor, shard: Shard, asked: Asked, score_rows: ScoreRows) -> Scored:
    k = min(asked.num_logprobs, shard.num_tokens)
    scored = score_rows(logits, k, asked.temperatures, entropy=asked.entropy)
    # a row without any probability in this shard has no distribution here, and what the scoring says of it is open
    empty_R = logits.amax(-1).isneginf()
    any_ids = torch.arange(k, dtype=torch.int32, device=logits.device)
    ids = torch.where(empty_R.unsqueeze(-1), any_ids, scored.topk_ids) + shard.first_token
    missing = (0, asked.num_logprobs - k)
    return Scored(
        topk_ids=pad(ids, missing),
        topk=pad(scored.topk.masked_fill(empty_R.unsqueeze(-1), -torch.inf), missing, value=-torch.inf),
        log_tail=scored.log_tail.masked_fill(empty_R, -torch.inf),
        log_total=scored.log_total.masked_fill(empty_R, -torch.inf),
        entropy=None if scored.entropy is None else scored.entropy.masked_fill(empty_R, 0),
    )


def _no_tokens(logits: Tensor, asked: Asked) -> Scored:
    num_rows, k, device = logits.shape[0], asked.num_logprobs, logits.device
    nothing = torch.full((num_rows,), -torch.inf, device=device)
    return Scored(
        topk_ids=torch.zeros((num_rows, k), dtype=torch.int32, device=device),
        topk=torch.full((num_rows, k), -torch.inf, device=device),
        log_tail=nothing,
        log_total=nothing,
        entropy=torch.zeros(num_rows, device=device) if asked.entropy else None,
    )


def _own_logprobs(logits: Tensor, ids: Tensor, log_total: Tensor, temperatures: Tensor | None) -> Tensor:
    """Logprobs of `[r, C]` ids that count from the shard's first token; -inf for those outside."""
    num_tokens = logits.shape[-1]
    if not num_tokens:
        return torch.full(ids.shape, -torch.inf, device=ids.device)
    nothing = (ids < 0) | (ids >= num_tokens) | log_total.isneginf().unsqueeze(-1)
    found = logprobs_of(logits, ids.clamp(0, num_tokens - 1), log_total, temperatures)
    return found.masked_fill(nothing, -torch.inf)


def _merge_topk(
    shards: Sequence[Shard], answers: Sequence[ShardAnswer], shares_TR: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best K of the shards' entries, their ids, and the log of the mass of all else."""
    # a shard's entries beyond its tokens are none: they must not stand for a token, not even for one of logit -inf
    counts = [min(k, one.num_tokens) for one in shards]
    entries = [
        one.scored.topk[:, :count] + share.unsqueeze(-1)
        for one, share, count in zip(answers, shares_TR, counts, strict=True)
    ]
    values = torch.cat(entries, -1)
    ids = torch.cat([one.scored.topk_ids[:, :count] for one, count in zip(answers, counts, strict=True)], -1)
    topk, at = values.topk(k, dim=-1)
    tails = [one.scored.log_tail + share for one, share in zip(answers, shares_TR, strict=True)]
    losers = values.scatter(-1, at, -torch.inf)
    log_tail = torch.cat([torch.stack(tails, -1), losers], -1).logsumexp(-1)
    return topk, ids.gather(-1, at), log_tail


def _merge_entropy(answers: Sequence[ShardAnswer], shares_TR: Tensor) -> Tensor:
    """By the chain rule: what is open is the shard, and within it the token."""
    # a share of 0 adds nothing, but 0 * -inf is NaN
    surprise = -shares_TR.clamp_min(torch.finfo(shares_TR.dtype).min)
    within = torch.stack([one.scored.entropy for one in answers if one.scored.entropy is not None])
    return (shares_TR.exp() * (surprise + within)).sum(0)
