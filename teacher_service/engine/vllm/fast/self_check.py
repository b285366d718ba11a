"""One sequence scored by both routes at start: they must agree, whatever version, model and device it is."""

from __future__ import annotations

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine.vllm.fast.probe import ProbeError
from teacher_service.types import EngineInfo, ScoreJob

NUM_TOKENS, PROMPT_TOKENS, NUM_LOGPROBS = 48, 17, 8
TOLERANCES = {"float32": 1e-3}
"""Nats by arithmetic type; the two routes call the LM head on different numbers of rows."""
HALF_TOLERANCE = 0.25
"""In half precision a logit near 30 is rounded to 1/8 or 1/64."""


def make_job(info: EngineInfo) -> ScoreJob:
    """A random sequence that the engine can take."""
    num_tokens = min(NUM_TOKENS, info.max_request_tokens)
    return ScoreJob(
        request_id="self-check",
        token_ids=np.random.default_rng(0).integers(0, info.vocab_rows, num_tokens).astype(np.int32),
        score_start=max(1, min(PROMPT_TOKENS, num_tokens - 1)),
        num_logprobs=min(NUM_LOGPROBS, info.max_num_logprobs),
    )


def compare(fast: ScoreArrays, public: ScoreArrays, *, dtype: str) -> None:
    """Compare the sampled and the top-k logprobs, in order.

    Raises:
        ProbeError: they differ by more than the arithmetic explains.
    """
    tolerance = TOLERANCES.get(dtype, HALF_TOLERANCE)
    for name in ("sampled_logprobs", "topk_logprobs"):
        ours, theirs = getattr(fast, name), getattr(public, name)
        if ours is None:
            continue
        error = float(np.abs(ours - theirs).max())
        if not error <= tolerance:
            raise ProbeError(
                f"the fast route's {name} differ from the public route's by {error:.3g} nats, more than {tolerance}"
            )
