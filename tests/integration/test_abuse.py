"""2,048 requests of all kinds, 512 at once, on a real service with a real vLLM: right answers, named refusals, no leak.

Legend: N tokens, S scored positions, K top-k entries, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from protos.arrays import ScoreArrays
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.vllm.fast import kernel
from teacher_service.errors import all_error_classes
from tests.support.abuse import (
    HELD_BYTES,
    MAX_REQUEST_BYTES,
    MAX_RESPONSE_BYTES,
    Case,
    Door,
    Kind,
    Known,
    V,
    burst,
    token_pool,
)
from tests.support.abusers import CALL_TIMEOUT_S, Callers, Reply
from tests.support.engines import Started, job
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240.0
BURST_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 30.0
NUM_BURSTS, BURST_SIZE = 4, 512
NUM_SEQUENCES = 64
SEED = 20
MEMORY_BUDGET_BYTES = kernel.scratch_bytes("cpu", vocab_rows=V) + HELD_BYTES
FLAGS = {
    "engine": "vllm",
    "grpc-port": 0,
    "http-port": 0,
    "max-num-logprobs": V,
    "max-num-batched-tokens": 256,
    "kv-cache-bytes": 2 << 20,  # 1 KiB a token: room for three of the longest sequences, so that others wait
    "max-inflight-requests": 32,
    "max-queued-requests": 128,
    "max-stream-inflight": 16,
    "max-request-bytes": MAX_REQUEST_BYTES,
    "max-response-bytes": MAX_RESPONSE_BYTES,
    "memory-budget-bytes": MEMORY_BUDGET_BYTES,
}
PEAK_ALLOWANCE_BYTES = 128 << 20
"""What the budget does not count: the bodies of a burst as they arrive (512 of 128 KiB are 64 MiB), its connections,
and answers being sent."""
GROWTH_BYTES = 64 << 20
"""From the end of the first burst to the end of the last: what the allocators keep, and no more."""
ATOL = 1e-4
TAIL_ATOL = 1e-3
RTOL = {pb.WIRE_DTYPE_FLOAT16: 2.0**-11, pb.WIRE_DTYPE_BFLOAT16: 2.0**-8}
"""Half a unit in the last place of a short wire type."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory of the service's processes together, in bytes."""

    idle: int
    """After the warm-up."""
    first: int
    """After the first burst."""
    last: int
    """After the last."""
    peak: int


@dataclass(frozen=True, kw_only=True, repr=False)  # pytest would take minutes to write one out
class Abused:
    """A service that went through all bursts and still runs."""

    process: Process
    callers: Callers
    log: Path
    pool: list[Known]
    results: list[tuple[Case, Reply]]
    settled_in_s: float
    """Seconds from the last reply of a burst until nothing was in the engine or waited, at most."""
    memory: Memory


class MemoryWatch:
    """Samples the memory of a process and everything below it until left."""

    INTERVAL_S = 0.2

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.peak = 0

    def now(self) -> int:
        """Proportional set size: a page that several map counts once."""
        total = 0
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        self.peak = max(self.peak, total)
        return total

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._stop.wait(self.INTERVAL_S):
                self.now()


def log_softmax(values_SV: NDArray[np.float64]) -> NDArray[np.float64]:
    return values_SV - np.logaddexp.reduce(values_SV, axis=1, keepdims=True)


def assert_right(case: Case, scores: ScoreArrays) -> None:
    """Every array that was asked for, and no other, against what the reference knows of the sequence."""
    request, known = case.request, case.known
    assert isinstance(request, pb.ScoreRequest)
    assert known is not None
    start, temperature = request.score_start, request.temperature if request.HasField("temperature") else 1.0
    expected_SV = log_softmax(known.logprobs_NV[start - 1 :] / temperature)
    rtol = RTOL.get(request.wire_dtype, 0.0) if case.door is not Door.JSON else 0.0
    sampled = np.take_along_axis(expected_SV, known.token_ids[start:, None], axis=1)[:, 0]
    np.testing.assert_allclose(scores.sampled_logprobs, sampled, rtol=0, atol=ATOL)
    assert_right_topk(scores, expected_SV, request.num_logprobs, rtol)
    assert (scores.entropy is not None) == request.return_entropy
    if scores.entropy is not None:
        entropy = -(np.exp(expected_SV) * expected_SV).sum(axis=1)
        np.testing.assert_allclose(scores.entropy, entropy, rtol=0, atol=ATOL)
    assert (scores.candidate_logprobs is not None) == request.HasField("candidates")
    if scores.candidate_logprobs is not None:
        ids = np.frombuffer(request.candidates.token_ids, dtype="<i4").reshape(len(sampled), -1)
        chosen = np.take_along_axis(expected_SV, ids, axis=1)
        np.testing.assert_allclose(scores.candidate_logprobs, chosen, rtol=rtol, atol=ATOL)


def assert_right_topk(scores: ScoreArrays, expected_SV: NDArray[np.float64], k: int, rtol: float) -> None:
    """Distinct tokens, each with its logprob, likeliest first, none outside likelier; the tail is all the others'."""
    ids, logprobs, tail = scores.topk_token_ids, scores.topk_logprobs, scores.log_tail_mass
    if k == 0:
        assert (ids, logprobs, tail) == (None, None, None)
        return
    assert ids is not None
    assert logprobs is not None
    assert tail is not None
    chosen_SK = np.take_along_axis(expected_SV, ids, axis=1)
    np.testing.assert_allclose(logprobs, chosen_SK, rtol=rtol, atol=ATOL)
    assert (np.diff(logprobs, axis=1) <= 0).all()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    likeliest_SV = -np.sort(-expected_SV, axis=1)
    assert (chosen_SK.min(axis=1) >= likeliest_SV[:, k - 1] - 2 * ATOL).all()
    if k == V:
        assert (tail == -np.inf).all()
    else:
        np.testing.assert_allclose(tail, np.logaddexp.reduce(likeliest_SV[:, k:], axis=1), rtol=0, atol=TAIL_ATOL)


@contextlib.asynccontextmanager
async def running_service(model: Path, log: Path) -> AsyncIterator[Process]:
    """The service as a process; its log goes to a file, since a pipe that nobody reads would stop it."""
    flags = [part for name, value in ({"model": model} | FLAGS).items() for part in (f"--{name}", f"{value}")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
    with log.open("wb") as file:
        command = (sys.executable, "-m", "teacher_service", "serve", *flags)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=PIPE, stderr=file, cwd=ROOT, env=clean, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        await process.communicate()


async def addresses_of(process: Process, log: Path) -> tuple[str, str]:
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)).decode()
    if not line:
        pytest.fail(f"the service ended before it was ready: {await asyncio.to_thread(log.read_text)}")
    _, _, grpc_address, _, http_address = line.split()
    return grpc_address, http_address


async def known_sequences(reference: Started, rng: np.random.Generator) -> list[Known]:
    """By the transformers engine."""
    pool = []
    for tokens in token_pool(rng, NUM_SEQUENCES):
        scores = await reference.engine.score(job(tokens, num_logprobs=V))
        logprobs_NV = np.empty((len(tokens) - 1, V))
        np.put_along_axis(logprobs_NV, scores.topk_token_ids, scores.topk_logprobs, axis=1)
        pool.append(Known(token_ids=tokens, logprobs_NV=logprobs_NV))
    return pool


async def settle(callers: Callers) -> float:
    """Seconds until nothing is in the engine, waits for it or is reserved."""
    gauges = ("inflight_requests", "inflight_tokens", "queued_requests", "queued_tokens", "memory_reserved_bytes")
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while True:
            metrics = await callers.metrics()
            if not any(metrics[f"teacher_{name}"] for name in gauges):
                return loop.time() - began_s
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def abused(
    float32_checkpoint: Path, reference: Started, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Abused]:
    """All bursts, one after another."""
    rng = np.random.default_rng(SEED)
    log = tmp_path_factory.mktemp("abused") / "log"
    async with running_service(float32_checkpoint, log) as process:
        pool = await known_sequences(reference, rng)
        async with Callers(*await addresses_of(process, log)) as callers:
            with MemoryWatch(process.pid) as watch:
                warm_up = [case for case in burst(rng, pool, 128) if case.kind is Kind.GOOD]
                async with asyncio.timeout(BURST_TIMEOUT_S):
                    await callers.send_all(warm_up)
                levels, results, settled_in_s = [watch.now()], [], 0.0
                for _ in range(NUM_BURSTS):
                    async with asyncio.timeout(BURST_TIMEOUT_S):
                        results += await callers.send_all(burst(rng, pool, BURST_SIZE))
                    settled_in_s = max(settled_in_s, await settle(callers))
                    levels.append(watch.now())
            memory = Memory(idle=levels[0], first=levels[1], last=levels[-1], peak=watch.peak)
            yield Abused(
                process=process,
                callers=callers,
                log=log,
                pool=pool,
                results=results,
                settled_in_s=settled_in_s,
                memory=memory,
            )


def of_kind(abused: Abused, kind: Kind) -> list[tuple[Case, Reply]]:
    return [(case, reply) for case, reply in abused.results if case.kind is kind]


async def test_every_good_request_is_answered_right(abused: Abused) -> None:
    """Whatever its size and options, and whatever was beside it."""
    good = of_kind(abused, Kind.GOOD)
    assert len(good) > 900
    for case, reply in good:
        assert reply.outcome.reason == "OK", (case.door, reply.outcome)
        assert reply.scores is not None
        assert_right(case, reply.scores)


async def test_every_bad_request_is_refused_with_its_reason(abused: Abused) -> None:
    """Reason and code of the service's table, no delay after which it might do; every refusal occurred."""
    codes = {cls.reason: cls.grpc_code for cls in all_error_classes()}
    bad = of_kind(abused, Kind.BAD)
    for case, reply in bad:
        told = (reply.outcome.reason, reply.outcome.code, reply.outcome.retry_delay_s)
        assert told == (case.reason, codes[case.reason], None), (case.door, case.request, reply.outcome)
    refused = {reason for reason, code in codes.items() if code in ("INVALID_ARGUMENT", "UNIMPLEMENTED")}
    too_large = {"REQUEST_TOO_LARGE", "ANSWER_TOO_LARGE", "OVER_MEMORY_BUDGET"}
    # a reused key takes two requests: see tests/contract/test_idempotency.py
    assert {case.reason for case, _ in bad} == refused - {"INVALID_REQUEST", "IDEMPOTENCY_KEY_REUSED"} | too_large


async def test_an_overloaded_teacher_says_when_to_come_back(abused: Abused) -> None:
    """Bursts overfill the queue; each refusal has a delay > 0, and whoever waits as told is answered in the end."""
    overloads = [one for _, reply in of_kind(abused, Kind.GOOD) for one in reply.overloads]
    assert overloads
    for one in overloads:
        assert one.code == "RESOURCE_EXHAUSTED"
        assert one.retry_delay_s is not None
        assert one.retry_delay_s > 0


async def test_expired_requests_are_told_or_answered_right(abused: Abused) -> None:
    """Some are too late, and are told so; one that was quick enough is right."""
    expired = of_kind(abused, Kind.EXPIRED)
    codes = Counter(reply.outcome.code for _, reply in expired)
    assert set(codes) <= {"DEADLINE_EXCEEDED", "OK", "RESOURCE_EXHAUSTED"}
    assert codes["DEADLINE_EXCEEDED"] > 100
    for case, reply in expired:
        if reply.scores is not None:
            assert_right(case, reply.scores)
        elif reply.outcome.code == "RESOURCE_EXHAUSTED":
            assert reply.outcome.reason == "OVERLOADED"
        elif case.door is not Door.UNARY:  # gRPC's own timer ends a unary call, without a reason
            assert reply.outcome.reason == "DEADLINE_EXCEEDED"


async def test_cancelled_requests_leave(abused: Abused) -> None:
    """Nothing stays in the queue, the engine or the budget; one that was answered before it was cancelled is right."""
    assert abused.settled_in_s < SETTLE_TIMEOUT_S
    outcomes = Counter()
    for case, reply in of_kind(abused, Kind.CANCELLED):
        outcomes[reply.outcome.reason] += 1
        if reply.scores is not None:
            assert_right(case, reply.scores)
    assert set(outcomes) <= {"CANCELLED", "OK", "OVERLOADED"}
    metrics = await abused.callers.metrics()
    noticed = sum(value for name, value in metrics.items() if 'reason="CANCELLED"' in name)
    assert outcomes["CANCELLED"] > 100
    assert noticed > 100


async def test_memory_is_bounded(abused: Abused) -> None:
    """The peak keeps within the budget and what the budget does not count, and no burst leaves anything behind."""
    memory = abused.memory
    assert memory.peak - memory.idle < MEMORY_BUDGET_BYTES + PEAK_ALLOWANCE_BYTES
    assert memory.last - memory.first < GROWTH_BYTES


async def test_the_service_is_alive(abused: Abused) -> None:
    """Healthy on both ports, it answers on, and nothing failed inside."""
    callers = abused.callers
    assert abused.process.returncode is None
    health = health_pb2_grpc.HealthStub(callers.channels[0])
    status = (await health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)).status
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert [(await callers.https[0].get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    rng = np.random.default_rng(SEED + 1)
    one_more = [case for case in burst(rng, abused.pool, 32) if case.kind is Kind.GOOD]
    for case, reply in await callers.send_all(one_more):
        assert reply.scores is not None
        assert_right(case, reply.scores)
    failed = [name for name in await callers.metrics() if "INTERNAL" in name or "ENGINE_ERROR" in name]
    assert failed == []
    log = abused.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


async def test_it_ends_in_order(abused: Abused) -> None:
    """SIGTERM, exit code 0, no traceback to the end."""
    abused.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(abused.process.wait(), STOP_TIMEOUT_S) == 0
    assert "Traceback" not in abused.log.read_text()
