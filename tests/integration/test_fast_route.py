"""vLLM's fast route against the transformers engine: everything it can do, under everything that may disturb it.

Legend: S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from protos.arrays import ScoreArrays
from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import launch
from teacher_service.engine.vllm.arguments import CPU_BLOCK_TOKENS
from teacher_service.types import Capability, ScoreJob
from tests.integration import test_engines
from tests.integration.test_engines import START_TIMEOUT_S, assert_same_topk
from tests.support.engines import Started, job, random_tokens, score_all
from tests.support.models import MAX_LEN, VOCAB_ROWS
from tests.support.preempting_scheduler import COUNT_FILE, PreemptingScheduler

pytestmark = test_engines.pytestmark  # whatever starts vLLM needs the same
V = VOCAB_ROWS
TOLERANCE = 1e-4
ALIGNED = 4 * CPU_BLOCK_TOKENS
"""Tokens that fill blocks of the cache."""
CACHE_TOKENS = 5 * ALIGNED
TOKEN_BYTES = 2 * 2 * 2 * 32 * 4
"""Of the cache: layers, keys and values, heads, dimensions of each, float32."""


@pytest.fixture(scope="module")
def preemptions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with a byte for each preemption of this module's engine."""
    counted = tmp_path_factory.mktemp("preemptions") / "count"
    counted.touch()
    with pytest.MonkeyPatch.context() as patch:
        name = f"{PreemptingScheduler.__module__}.{PreemptingScheduler.__name__}"
        patch.setattr(launch, "SCHEDULERS", {False: name})
        patch.setenv(COUNT_FILE, str(counted))
        yield counted


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fast(float32_checkpoint: Path, socket_base: Path, preemptions: Path) -> AsyncIterator[Started]:
    """Steps of 96 tokens, 16 of each sequence, a cache of 640 tokens: chunks, waits, preemptions."""
    options = EngineOptions(
        model=str(float32_checkpoint),
        max_num_logprobs=V,
        kv_cache_bytes=CACHE_TOKENS * TOKEN_BYTES,
        max_num_batched_tokens=96,
        fast_route=True,
    )
    engine = build_engine("vllm", options)
    started = Started(engine, await asyncio.wait_for(engine.start(), START_TIMEOUT_S))
    assert (started.info.route, started.info.warnings) == ("fast", ())
    yield started
    await engine.close()


async def assert_equals_the_reference(fast: Started, reference: Started, jobs: list[ScoreJob]) -> None:
    """All at once, every field."""
    answers = await score_all(fast.engine, jobs)
    for asked, ours, theirs in zip(jobs, answers, await score_all(reference.engine, jobs), strict=True):
        np.testing.assert_allclose(ours.sampled_logprobs, theirs.sampled_logprobs, rtol=0, atol=TOLERANCE)
        _assert_optional(ours, theirs, asked)
        if asked.temperature == 1:
            await assert_same_topk(ours, asked, reference.engine, atol=TOLERANCE)
        elif asked.num_logprobs:
            np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, rtol=0, atol=TOLERANCE)


def _assert_optional(ours: ScoreArrays, theirs: ScoreArrays, asked: ScoreJob) -> None:
    for name, atol in (("log_tail_mass", 1e-3), ("entropy", TOLERANCE), ("candidate_logprobs", TOLERANCE)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), (name, asked.request_id)
        if mine is not None:
            np.testing.assert_allclose(mine, other, rtol=0, atol=atol, err_msg=name)


def _num_bytes(path: Path) -> int:
    return path.stat().st_size


def _random_jobs(count: int, *, seed: int) -> list[ScoreJob]:
    rng = np.random.default_rng(seed)
    jobs = []
    for number in range(count):
        length = int(rng.integers(2, 300))
        start = int(rng.integers(1, length))
        jobs.append(
            job(
                random_tokens(rng, length),
                score_start=start,
                num_logprobs=int(rng.choice([0, 1, 8, 64, V])),
                temperature=float(rng.choice([0.7, 1.0, 2.0])),
                candidates=(
                    rng.integers(0, V, (length - start, int(rng.integers(1, 6)))).astype(np.int32)
                    if number % 3 == 0
                    else None
                ),
                return_entropy=number % 2 == 0,
                request_id=f"random-{seed}-{number}",
            )
        )
    return jobs


async def test_it_says_what_it_can_do(fast: Started) -> None:
    """All that an engine can do, on the runner that this run of the tests is for."""
    assert fast.info.runner == ("V2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "V1")
    assert fast.info.capabilities == {
        Capability.TEMPERATURE, Capability.CANDIDATES, Capability.ENTROPY, Capability.EXACT_TAIL_MASS
    }  # fmt: skip


async def test_a_sequence_of_exactly_the_models_length(fast: Started, reference: Started) -> None:
    """Its last row is scored too: the token that vLLM generates has a place of its own."""
    assert fast.info.max_request_tokens == fast.info.max_model_len == MAX_LEN
    tokens = random_tokens(np.random.default_rng(8), MAX_LEN)
    await assert_equals_the_reference(fast, reference, [job(tokens, score_start=MAX_LEN - 40, num_logprobs=8)])


async def test_random_sequences_at_once(fast: Started, reference: Started, preemptions: Path) -> None:
    """200 of them, 64 at a time: temperatures, K from none to V, candidates, entropies, chunks, preemptions."""
    jobs = _random_jobs(200, seed=11)
    for start in range(0, len(jobs), 64):
        await assert_equals_the_reference(fast, reference, jobs[start : start + 64])
    assert _num_bytes(preemptions) > 0


@pytest.mark.parametrize("prompt_tokens", [ALIGNED, ALIGNED + 37, 2 * ALIGNED, 40])
async def test_siblings_share_their_prompt(fast: Started, reference: Started, prompt_tokens: int) -> None:
    """Aligned with the cache's blocks or not, identical siblings and shared beginnings of responses among them."""
    rng = np.random.default_rng(prompt_tokens)
    prompt = random_tokens(rng, prompt_tokens)
    responses = [random_tokens(rng, 150) for _ in range(4)]
    responses += [responses[0], np.concatenate([responses[1][:ALIGNED], random_tokens(rng, 22)])]
    jobs = [
        job(np.concatenate([prompt, response]), score_start=prompt_tokens, num_logprobs=8, request_id=f"{number}")
        for number, response in enumerate(responses)
    ]
    await assert_equals_the_reference(fast, reference, jobs)
    # now all of it lies in the cache, and each row must be computed all the same
    await assert_equals_the_reference(fast, reference, jobs[::-1])


async def test_a_prompt_scored_from_its_first_token(fast: Started, reference: Started) -> None:
    """score_start = 1 of a cached sequence: nothing may be taken from the cache."""
    tokens = random_tokens(np.random.default_rng(3), 2 * ALIGNED + 9)
    whole = job(tokens, score_start=1, num_logprobs=4, request_id="whole")
    end = job(tokens, score_start=2 * ALIGNED, num_logprobs=4, request_id="end")
    await assert_equals_the_reference(fast, reference, [end])
    await assert_equals_the_reference(fast, reference, [whole])
