"""vLLM's flat prompt logprobs as arrays.

vLLM keeps one run of K + 1 entries per prompt position: the token that stands there, then the K most likely ones
(which may hold it a second time). Position 0 has no prefix and no entries. Position i describes the distribution
that predicted token i, so rows are taken as they are, never shifted.

Legend: N tokens, S scored positions, K top-k entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine.numerics import clip_rounding, log_tail_mass_from_topk
from teacher_service.errors import EngineError
from teacher_service.types import ScoreJob


class FlatLogprobs(Protocol):
    """What is read of `vllm.logprobs.FlatLogprobs`."""

    start_indices: Sequence[int]
    """[N]: where each position's entries start."""
    token_ids: Sequence[int]
    """All entries' ids."""
    logprobs: Sequence[float]
    """All entries' logprobs."""


def score_arrays(flat: FlatLogprobs, job: ScoreJob, *, vocab_rows: int) -> ScoreArrays:
    """The scored positions of one answer.

    Raises:
        EngineError: the entries don't have the layout above, so they can't be told apart safely.
    """
    width = job.num_logprobs + 1
    if len(flat.start_indices) != job.num_tokens:
        raise EngineError(
            f"vLLM described {len(flat.start_indices)} positions of {job.num_tokens}; report this as a bug"
        )
    first = flat.start_indices[job.score_start]
    token_ids = np.asarray(flat.token_ids[first:], dtype=np.int32)
    logprobs = np.asarray(flat.logprobs[first:], dtype=np.float32)
    if token_ids.size != job.num_scored * width:
        raise EngineError(
            f"vLLM gave {token_ids.size} entries for {job.num_scored} positions of {width} each; report this as a bug"
        )
    token_ids_SW = token_ids.reshape(job.num_scored, width)
    logprobs_SW = clip_rounding(logprobs.reshape(job.num_scored, width))
    if not np.array_equal(token_ids_SW[:, 0], job.token_ids[job.score_start :]):
        raise EngineError("vLLM's prompt logprobs are not aligned with the sequence; report this as a bug")
    if job.num_logprobs == 0:
        return ScoreArrays(sampled_logprobs=np.ascontiguousarray(logprobs_SW[:, 0]))
    topk_logprobs_SK = np.ascontiguousarray(logprobs_SW[:, 1:])
    log_tail_S = log_tail_mass_from_topk(topk_logprobs_SK)
    if job.num_logprobs == vocab_rows:
        log_tail_S = np.full_like(log_tail_S, -np.inf)  # nothing is outside; the difference would be rounding
    return ScoreArrays(
        sampled_logprobs=np.ascontiguousarray(logprobs_SW[:, 0]),
        topk_token_ids=np.ascontiguousarray(token_ids_SW[:, 1:]),
        topk_logprobs=topk_logprobs_SK,
        log_tail_mass=log_tail_S,
    )
