"""Teachers that are spread, replicated or quantised: loaded for real, and scored by the fast route.

On a CPU the parts are processes that share its cores, joined by gloo: exactness is shown here, not speed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.types import ScoreJob
from tests.integration import test_engines
from tests.integration.test_engines import START_TIMEOUT_S
from tests.support.engines import Started, job, random_tokens, score_all
from tests.support.variants import write_int8

pytestmark = test_engines.pytestmark  # whatever starts vLLM needs the same
TOLERANCE = 1e-4


@asynccontextmanager
async def started(model: Path, **options: Any) -> AsyncIterator[Started]:
    """vLLM by the fast route."""
    engine = build_engine("vllm", EngineOptions(model=str(model), kv_cache_bytes=64 << 20, **options))
    try:
        info = await asyncio.wait_for(engine.start(), START_TIMEOUT_S)
        assert (info.route, info.warnings) == ("fast", ())
        yield Started(engine, info)
    finally:
        await engine.close()


def some_jobs() -> list[ScoreJob]:
    rng = np.random.default_rng(5)
    return [
        job(
            random_tokens(rng, 60 + 10 * number),
            score_start=20,
            temperature=(0.7, 1.0)[number % 2],
            request_id=f"{number}",
        )
        for number in range(8)
    ]


async def largest_error(ours: Started, theirs: Started) -> float:
    """In the sampled and the top-k logprobs of several sequences at once."""
    jobs = some_jobs()
    pairs = zip(await score_all(ours.engine, jobs), await score_all(theirs.engine, jobs), strict=True)
    return max(
        float(np.abs(getattr(a, name) - getattr(b, name)).max())
        for a, b in pairs
        for name in ("sampled_logprobs", "topk_logprobs", "log_tail_mass")
    )


@pytest.mark.parametrize("axis", ["pipeline", "data"])
async def test_a_spread_teacher_equals_one_in_one_piece(
    float32_checkpoint: Path, reference: Started, axis: str
) -> None:
    """Layers over two processes; two replicas behind one engine."""
    async with started(float32_checkpoint, **{f"{axis}_parallel_size": 2}) as engine:
        assert await largest_error(engine, reference) <= TOLERANCE


async def test_a_quantised_teacher_is_near_the_whole_one(
    float32_checkpoint: Path, reference: Started, tmp_path: Path
) -> None:
    """8-bit weights and activations, read from the checkpoint: the sampled logprobs move by a few hundredths."""
    async with started(write_int8(float32_checkpoint, tmp_path / "int8")) as engine:
        jobs = some_jobs()
        pairs = zip(await score_all(engine.engine, jobs), await score_all(reference.engine, jobs), strict=True)
        errors = np.concatenate([np.abs(a.sampled_logprobs - b.sampled_logprobs) for a, b in pairs])
    assert 1e-3 < np.median(errors) < 0.2
