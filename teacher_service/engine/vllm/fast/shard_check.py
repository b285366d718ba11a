"""Random hidden states scored in shards and by the gathered logits at start: they must agree, whatever the model is.

Legend: R rows, T ranks, V tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from teacher_service.engine.vllm.fast.kernel import Scored, logprobs_of, score_rows
from teacher_service.engine.vllm.fast.scorer import Asked
from teacher_service.engine.vllm.fast.shards import Shard, ShardScorer, merge_packed

logger = logging.getLogger(__name__)
T = TypeVar("T")

ROWS, NUM_LOGPROBS, GIVEN = 4, 8, 32
TOLERANCES = {torch.float32: 1e-4}
"""Of the largest logit; the two forms call the LM head once each."""
HALF_TOLERANCE = 2**-5


@torch.inference_mode()
def find_disagreement(scorer: ShardScorer, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Score random hidden states by the shards and by the gathered logits; returns how they differ.

    All ranks call it, and take part in the same exchanges in the same order. Whatever may fail on one rank alone comes
    before the first, which tells all ranks of it. Then no rank scores in shards, so a reason from any rank must count.
    """
    hidden = torch.randn((ROWS, hidden_size), generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def score_own() -> tuple[Tensor, list[Shard], Tensor, Asked]:
        logits, shards = scorer.local_logits(hidden)
        asked = _asked_in_check(sum(one.num_tokens for one in shards), device)
        return logits, shards, scorer.pack(logits, shards, asked), asked

    own, failure = _attempt(score_own)
    if not scorer.all_succeeded(own is not None, device) or own is None:
        return failure
    logits, shards, packed, asked = own
    whole = scorer.model.compute_logits(hidden)
    all_logits = scorer.to_first_rank(pad(logits, (0, shards[0].num_tokens - logits.shape[-1])).flatten())
    gathered = scorer.to_first_rank(packed)
    if all_logits is None or gathered is None:
        return None

    def compare() -> str | None:
        in_order = all_logits.view(len(shards), ROWS, -1).movedim(0, 1).flatten(1)[:, : whole.shape[-1]]
        return _compare(in_order.cpu(), whole.cpu(), *merge_packed(shards, gathered, ROWS, asked), asked)

    verdict, failure = _attempt(compare)
    return verdict or failure


def _attempt(step: Callable[[], T]) -> tuple[T | None, str | None]:
    """What a step returns, or why it failed."""
    try:
        return step(), None
    except Exception as exc:
        logger.exception("the check of scoring in shards failed")
        return None, f"{type(exc).__name__}: {exc}"


def _asked_in_check(vocab_rows: int, device: torch.device) -> Asked:
    given = torch.linspace(0, vocab_rows - 1, GIVEN).long().expand(ROWS, -1)
    return Asked(
        num_logprobs=min(NUM_LOGPROBS, vocab_rows),
        temperatures=_temperatures().to(device),
        entropy=True,
        given=[(slice(0, ROWS), given.to(device))],
    )


def _temperatures() -> Tensor:
    return torch.linspace(0.5, 2, ROWS)


def _compare(shards: Tensor, whole: Tensor, scored: Scored, given: list[Tensor], asked: Asked) -> str | None:
    """In main memory, where an id out of range is an error that can be reported."""
    temperatures = _temperatures()
    expected = score_rows(whole, asked.num_logprobs, temperatures, entropy=True)
    ids = scored.topk_ids.cpu().long()
    pairs = {
        "logits": (shards, whole),
        "top-k": (scored.topk, expected.topk),
        "top-k ids": (scored.topk, logprobs_of(whole, ids, expected.log_total, temperatures)),
        "tail": (scored.log_tail, expected.log_tail),
        "entropy": (scored.entropy, expected.entropy),
        "given tokens": (given[0], logprobs_of(whole, asked.given[0][1].cpu(), expected.log_total, temperatures)),
    }
    limit = TOLERANCES.get(whole.dtype, HALF_TOLERANCE) * float(whole[whole.isfinite()].abs().max())
    for name, (ours, theirs) in pairs.items():
        if ours is None or theirs is None or not _equal(ours.cpu().float(), theirs.float(), limit):
            return f"the vocabulary's shards give other {name} than the gathered logits (more than {limit:.2g} apart)"
    return None


def _equal(ours: Tensor, theirs: Tensor, limit: float) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=limit)
