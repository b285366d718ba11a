"""Jobs for tests that talk to an engine directly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.arrays import ScoreArrays
from teacher_service.admission import AdmissionLimits
from teacher_service.engine.base import Engine
from teacher_service.scoring import ScoringLimits
from teacher_service.types import EngineInfo, ScoreJob
from tests.support.models import VOCAB_ROWS

LIMITS = ScoringLimits(
    admission=AdmissionLimits(
        max_inflight_requests=4, max_inflight_tokens=1000, max_queued_requests=4, max_queued_tokens=1000
    ),
    max_num_logprobs=16,
    max_request_bytes=1 << 20,
    max_response_bytes=1 << 20,
    memory_budget_bytes=1 << 20,
    answer_cache_bytes=1 << 20,
    answer_cache_s=60.0,
    max_timeout_s=20.0,
)
"""Of a small service."""


@dataclass(frozen=True)
class Started:
    """An engine and what it said of itself."""

    engine: Engine
    info: EngineInfo


def job(
    token_ids: NDArray[np.int32],
    *,
    score_start: int = 1,
    num_logprobs: int = 8,
    temperature: float = 1.0,
    candidates: NDArray[np.int32] | None = None,
    return_entropy: bool = False,
    request_id: str = "r",
) -> ScoreJob:
    return ScoreJob(
        request_id=request_id,
        token_ids=token_ids,
        score_start=score_start,
        num_logprobs=num_logprobs,
        temperature=temperature,
        candidate_token_ids=candidates,
        return_entropy=return_entropy,
    )


def random_tokens(rng: np.random.Generator, length: int) -> NDArray[np.int32]:
    return rng.integers(0, VOCAB_ROWS, length).astype(np.int32)


async def score_all(engine: Engine, jobs: list[ScoreJob]) -> list[ScoreArrays]:
    return list(await asyncio.gather(*(engine.score(one) for one in jobs)))
