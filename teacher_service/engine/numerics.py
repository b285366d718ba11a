"""Arithmetic that every engine shares: rounding, and the mass outside the top-k.

Legend: S scored positions, K top-k entries.
"""

from __future__ import annotations

import numpy as np

from protos.arrays import LOGPROB_SLACK, Float32Array, ScoreArrays, ScoreArraysError, check_score_arrays
from teacher_service.errors import EngineError
from teacher_service.types import ScoreJob


def clip_rounding(logprobs: Float32Array) -> Float32Array:
    """The same logprobs with what rounding lifted a few ulp above 0 put back to 0; worse values stay, to be caught."""
    return np.where((logprobs > 0) & (logprobs <= LOGPROB_SLACK), np.float32(0), logprobs).astype(np.float32)


def log_tail_mass_from_topk(topk_logprobs_SK: Float32Array) -> Float32Array:
    """Log of one minus the top-k's mass, `[S]`; -inf where rounding leaves nothing.

    Tails below about 1e-6 are the rounding of the float32 logprobs, not a measurement.
    """
    topk_mass_S = np.exp(topk_logprobs_SK, dtype=np.float64).sum(axis=1)
    log_tail_S = np.full(topk_mass_S.shape, -np.inf)
    np.log1p(-topk_mass_S, out=log_tail_S, where=topk_mass_S < 1.0)
    return log_tail_S.astype(np.float32)


def checked(scores: ScoreArrays, job: ScoreJob, *, vocab_rows: int) -> ScoreArrays:
    """The scores themselves, once they are known to keep the contract and to be what the job asked for.

    Raises:
        EngineError: NaN, a probability above 1, a wrong shape, or something unasked; usually a broken checkpoint.
    """
    metadata = {"request_id": job.request_id}
    try:
        check_score_arrays(scores, num_scored=job.num_scored, num_logprobs=job.num_logprobs, vocab_rows=vocab_rows)
    except ScoreArraysError as exc:
        raise EngineError(
            f"the engine's answer to {job.num_tokens} tokens from {job.score_start} on breaks the contract: {exc}; "
            "check the teacher's weights, dtype and engine",
            metadata=metadata,
        ) from exc
    asked = None if job.candidate_token_ids is None else job.candidate_token_ids.shape
    answered = None if scores.candidate_logprobs is None else scores.candidate_logprobs.shape
    if asked != answered or job.return_entropy != (scores.entropy is not None):
        raise EngineError(
            f"the engine's answer breaks the contract: candidates {answered}, asked {asked}; entropy "
            f"{scores.entropy is not None}, asked {job.return_entropy}",
            metadata=metadata,
        )
    return scores
