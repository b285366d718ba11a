"""The vLLM engine against the transformers engine, on the same tiny real models.

Legend: S scored positions, K top-k entries, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from protos.arrays import ScoreArrays
from teacher_service.engine.base import Engine
from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm.fast import probe
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import EngineInfo, ScoreJob
from tests.support.engines import Started, job, random_tokens, score_all
from tests.support.models import MAX_LEN, VOCAB_ROWS

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),  # one vLLM start takes 20 s alone, minutes on a busy machine
    pytest.mark.usefixtures("socket_base"),
    # vLLM's imports still use what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    # vLLM never closes its ZeroMQ context.
    pytest.mark.filterwarnings("ignore:.*unclosed context <zmq:ResourceWarning"),
]

V = VOCAB_ROWS
START_TIMEOUT_S = 240.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's name for it, not a temporary file


def random_jobs(*, count: int, seed: int) -> list[ScoreJob]:
    """Random sequences, lengths, starts and K, with both ends of each among them."""
    rng = np.random.default_rng(seed)
    edges = [
        job(random_tokens(rng, 2), num_logprobs=3),
        job(random_tokens(rng, 2), num_logprobs=0),
        job(random_tokens(rng, 50), score_start=1, num_logprobs=V),
        job(random_tokens(rng, 50), score_start=49, num_logprobs=V),
        job(random_tokens(rng, 50), score_start=1, num_logprobs=0),
        job(random_tokens(rng, 50), score_start=49, num_logprobs=1),
    ]
    lengths = rng.integers(2, 200, count)
    return edges + [
        job(
            random_tokens(rng, int(length)),
            score_start=int(rng.integers(1, length)),
            num_logprobs=int(rng.integers(0, V + 1)),
            request_id=f"random-{i}",
        )
        for i, length in enumerate(lengths)
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(float32_checkpoint: Path, socket_base: Path) -> AsyncIterator[Started]:
    """The vLLM engine on the float32 checkpoint, of a version that the fast route does not know."""
    engine = build_engine(
        "vllm", EngineOptions(model=str(float32_checkpoint), max_num_logprobs=V, kv_cache_bytes=64 << 20)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SUPPORTED_VERSIONS", ("0.1",))
        yield Started(engine, await asyncio.wait_for(engine.start(), START_TIMEOUT_S))
    await engine.close()


@pytest.mark.parametrize("name", ["transformers", "vllm"])
async def test_a_model_that_is_none_stops_the_start(name: str, tmp_path: Path) -> None:
    """A missing path and a folder of an unknown architecture are errors that name the path."""
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture", "dtype": "float32"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for model in ("/no/such/model", str(tmp_path)):
        engine = build_engine("vllm" if name == "vllm" else "transformers", EngineOptions(model=model))
        with pytest.raises(EngineStartError) as caught:
            await engine.start()
        assert model in str(caught.value)
        await engine.close()


async def test_scoring_needs_a_started_engine(float32_checkpoint: Path) -> None:
    """Before `start` and after `close`, which may be called at any time, a job fails as with a dead engine."""
    for name in ("transformers", "vllm"):
        engine = build_engine(
            "vllm" if name == "vllm" else "transformers", EngineOptions(model=str(float32_checkpoint))
        )
        await engine.close()
        with pytest.raises(EngineDeadError):
            await engine.score(job(np.int32([1, 2])))


async def test_vllm_float32_equals_the_reference(vllm: Started, reference: Started) -> None:
    """Sampled logprobs within 1e-4, the same top-k up to ties, the same tail, over random sequences at once."""
    assert (vllm.info.dtype, vllm.info.weights_digest) == ("float32", reference.info.weights_digest)
    jobs = random_jobs(count=200, seed=4)
    for asked, ours, theirs in zip(
        jobs, await score_all(vllm.engine, jobs), await score_all(reference.engine, jobs), strict=True
    ):
        np.testing.assert_allclose(ours.sampled_logprobs, theirs.sampled_logprobs, rtol=0, atol=1e-4)
        await assert_same_topk(ours, asked, reference.engine, atol=1e-4)
        if asked.num_logprobs == V:
            np.testing.assert_array_equal(ours.log_tail_mass, theirs.log_tail_mass)
        elif asked.num_logprobs:
            assert ours.log_tail_mass is not None
            assert theirs.log_tail_mass is not None
            # vLLM's tail is a difference of float32 sums: compare masses, not their logs.
            np.testing.assert_allclose(np.exp(ours.log_tail_mass), np.exp(theirs.log_tail_mass), rtol=0, atol=1e-4)


async def assert_same_topk(ours: ScoreArrays, asked: ScoreJob, oracle: Engine, *, atol: float) -> None:
    """Every id in our top-k has the oracle's logprob, and none outside is likelier than the least inside."""
    if ours.topk_token_ids is None or ours.topk_logprobs is None:
        assert asked.num_logprobs == 0
        return
    full = await oracle.score(job(asked.token_ids, score_start=asked.score_start, num_logprobs=V))
    assert full.topk_token_ids is not None
    assert full.topk_logprobs is not None
    oracle_SV = np.empty_like(full.topk_logprobs)
    np.put_along_axis(oracle_SV, full.topk_token_ids.astype(np.int64), full.topk_logprobs, axis=1)
    chosen_SK = np.take_along_axis(oracle_SV, ours.topk_token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(ours.topk_logprobs, chosen_SK, rtol=0, atol=atol)
    assert (np.diff(ours.topk_logprobs, axis=1) <= 0).all()
    assert all(len(set(row)) == asked.num_logprobs for row in ours.topk_token_ids.tolist())
    cut_S = full.topk_logprobs[:, asked.num_logprobs - 1]
    assert (chosen_SK.min(axis=1) >= cut_S - 2 * atol).all()


async def test_vllm_says_what_it_is(vllm: Started, reference: Started) -> None:
    """It takes sequences of the model's whole length; it took the public route, and says why."""
    info = vllm.info
    assert info.route == "flat"
    assert info.route_reason is not None
    assert "is not among the tested versions 0.1" in info.route_reason
    assert info.route_reason in info.warnings[0]
    assert (info.name, info.vocab_rows, info.max_num_logprobs) == ("vllm", V, V)
    assert (info.max_model_len, info.max_request_tokens) == (MAX_LEN, MAX_LEN)
    assert info.capabilities == frozenset()
    assert info.tokenizer == reference.info.tokenizer
    assert info.version[0].isdigit()


async def test_vllm_scores_the_longest_request_and_not_one_more(vllm: Started, reference: Started) -> None:
    """The model's length is exact, and a longer sequence fails alone."""
    rng = np.random.default_rng(5)
    longest = job(random_tokens(rng, MAX_LEN), num_logprobs=V)
    expected = (await reference.engine.score(longest)).sampled_logprobs
    for _ in range(2):
        ours = (await vllm.engine.score(longest)).sampled_logprobs
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
        with pytest.raises(EngineError, match=str(MAX_LEN + 1)):
            await vllm.engine.score(job(random_tokens(rng, MAX_LEN + 1)))


async def test_vllm_forgets_cancelled_requests(vllm: Started, reference: Started) -> None:
    """Cancelled jobs leave the engine, and those beside and after them are right."""
    rng = np.random.default_rng(6)
    jobs = [job(random_tokens(rng, 400), num_logprobs=V, request_id=f"c{i}") for i in range(12)]
    tasks = [asyncio.create_task(vllm.engine.score(one)) for one in jobs]
    await asyncio.sleep(0.01)  # some are in the engine, some are not: any mixture must do
    for task in tasks[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(one, asyncio.CancelledError) for one in outcomes)
    expected = await score_all(reference.engine, jobs)
    for one, right in zip(outcomes[1::2], expected[1::2], strict=True):
        assert isinstance(one, ScoreArrays)
        np.testing.assert_allclose(one.sampled_logprobs, right.sampled_logprobs, rtol=0, atol=1e-4)


async def test_vllm_leaves_nothing_behind(vllm: Started, socket_base: Path) -> None:
    """After `close`, which fails what is in flight: no process, no shared memory, no socket; closing twice is fine."""
    children = psutil.Process().children(recursive=True)
    engine_processes = [one for one in children if "resource_tracker" not in " ".join(one.cmdline())]
    segments = set().union(*map(shared_memory_of, engine_processes))
    assert engine_processes
    in_flight = asyncio.create_task(vllm.engine.score(job(random_tokens(np.random.default_rng(7), 400))))
    await asyncio.sleep(0)
    await vllm.engine.close()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(in_flight, 10)
    await vllm.engine.close()
    assert [one for one in engine_processes if one.is_running()] == []
    assert segments.isdisjoint(names_in(SHARED_MEMORY))
    assert names_in(socket_base) == set()


async def test_vllm_bfloat16_equals_the_reference_and_its_death_is_noticed(
    bfloat16_checkpoint: Path, socket_base: Path
) -> None:
    """bf16 is within 2e-2 in the median. Killed while idle, it tells within seconds, fails jobs, and cleans up."""
    oracle = build_engine("transformers", EngineOptions(model=str(bfloat16_checkpoint)))
    engine = build_engine(
        "vllm", EngineOptions(model=str(bfloat16_checkpoint), max_num_logprobs=16, kv_cache_bytes=64 << 20)
    )
    loop = asyncio.get_running_loop()
    try:
        await oracle.start()
        started_at = loop.time()
        loading = asyncio.create_task(engine.start())
        longest_pause_s = await longest_pause(loading)
        loading_s = loop.time() - started_at
        info = await asyncio.wait_for(loading, START_TIMEOUT_S)
        assert (info.dtype, info.max_num_logprobs) == ("bfloat16", 16)
        # Health checks are answered while the model loads. A share, as a busy machine stretches both.
        assert longest_pause_s < 0.2 * loading_s

        rng = np.random.default_rng(8)
        jobs = [job(random_tokens(rng, 100), num_logprobs=16) for _ in range(20)]
        pairs = zip(await score_all(engine, jobs), await score_all(oracle, jobs), strict=True)
        differences = np.concatenate([np.abs(a.sampled_logprobs - b.sampled_logprobs) for a, b in pairs])
        assert np.median(differences) <= 2e-2

        waiting = asyncio.create_task(engine.wait_dead())
        core = psutil.Process(next(one.pid for one in multiprocessing.active_children() if "EngineCore" in one.name))
        segments = shared_memory_of(core)
        killed_at = loop.time()
        os.kill(core.pid, signal.SIGKILL)
        cause = await asyncio.wait_for(waiting, 10)
        assert loop.time() - killed_at < 3
        assert "SIGKILL" in str(cause)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await engine.score(jobs[0])
    finally:
        await engine.close()
        await oracle.close()
    assert segments.isdisjoint(names_in(SHARED_MEMORY))
    assert names_in(socket_base) == set()


@pytest.mark.parametrize(("dtype", "is_refused"), [(torch.bfloat16, True), (torch.float32, False)])
async def test_vllm_is_stopped_where_the_kernel_would_kill_it(
    restored_environment: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_refused: bool
) -> None:
    """Where the kernel denies the processor's AMX, bfloat16 is an error that names a way out, and float32 goes on."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from teacher_service.engine.vllm.cpu_worker import TeacherCPUWorker

    started = []
    monkeypatch.setattr(CPUWorker, "init_device", lambda self: started.append(self))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    worker = object.__new__(TeacherCPUWorker)
    worker.model_config = SimpleNamespace(dtype=dtype)
    with pytest.raises(RuntimeError, match="serve with --dtype float32") if is_refused else contextlib.nullcontext():
        worker.init_device()
    assert started == ([] if is_refused else [worker])


async def test_a_load_that_is_given_up_leaves_no_process(float32_checkpoint: Path, socket_base: Path) -> None:
    """`close` during `start` ends the load and whatever it had started."""
    engine = build_engine("vllm", EngineOptions(model=str(float32_checkpoint), kv_cache_bytes=64 << 20))
    loading = asyncio.create_task(engine.start())
    while not any("EngineCore" in one.name() or "spawn_main" in str(one.cmdline()) for one in own_children()):
        assert not loading.done()
        await asyncio.sleep(0.05)
    started = own_children()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await asyncio.wait_for(engine.close(), 60)
    leftover = [one for one in own_children() if one in started and "resource_tracker" not in str(one.cmdline())]
    assert leftover == []
    assert names_in(socket_base) == set()


async def longest_pause(task: asyncio.Task[EngineInfo]) -> float:
    """Seconds of the longest time for which the event loop did not run, while the task did."""
    loop, longest = asyncio.get_running_loop(), 0.0
    last = loop.time()
    while not task.done():
        await asyncio.wait({task}, timeout=0.02)
        longest, last = max(longest, loop.time() - last), loop.time()
    return longest


def own_children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def shared_memory_of(process: psutil.Process) -> set[str]:
    paths = [Path(mapped.path) for mapped in process.memory_maps()]
    return {path.name for path in paths if path.parent == SHARED_MEMORY and path.name.startswith("psm_")}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
