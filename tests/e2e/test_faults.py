"""Faults between a real client and real services: every call of a steady stream is answered, and right.

Nothing is trained here: these tests need neither verl nor vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from protos.arrays import ScoreArrays
from protos.codec import WireDtype, scores_to_pb
from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.faults import BlackHole, Corrupt, Fault, Part, Reset, Truncate, faulty_proxy
from tests.support.service_process import ServiceProcess, services
from tests.support.steady_calls import NUM_INFLIGHT, Predict, SteadyCalls, analytic, steady_calls, uniform
from tests.support.teacher_stub import Context, fails, running_stub, stub_manifest
from tests.support.waiting import until
from trainer.teacher import RetryPolicy, TeacherClient

LATENCY_S = 0.05
"""Of a sequence in the engine: with several in flight, whatever happens happens in mid-call."""
TIMEOUT_S = 40.0
"""Bound of a test."""
BROKEN_S = 2.0
OVERLOADED_S = 30.0
RETRY_DELAY_S = 0.5
MANY = 100_000
"""More steps of a script than a test can use up."""
DOWN, UP = "teacher replica is not serving", "teacher replica serves"
QUARANTINED, EJECTED = "teacher replica quarantined", "teacher replica ejected"
GONE = "teacher replica is gone from the addresses"
RETRY, PROGRESS = "teacher call failed, trying again", "calls wait for a teacher"

Logs = list[Any]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServiceProcess]]:
    """Two services, each on its port."""
    with services(tmp_path_factory.mktemp("services"), 2, "--fake-latency-s", f"{LATENCY_S}") as both:
        yield both


@pytest.fixture
def two_services(started: list[ServiceProcess]) -> list[ServiceProcess]:
    """Both serve, also after a test that failed while one was down."""
    for one in started:
        if not one.is_running:
            one.start()
    return started


@pytest.fixture
def service(two_services: list[ServiceProcess]) -> ServiceProcess:
    """One that serves."""
    return two_services[0]


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What the client logged so far."""
    with capture_logs() as entries:
        yield entries


@asynccontextmanager
async def calling(
    endpoints: Sequence[str] | str, *, predict: Predict = analytic, bound_s: float = TIMEOUT_S, **settings: Any
) -> AsyncIterator[SteadyCalls]:
    """A steady stream of calls by a client that looks after its replicas more often than by default."""
    client = TeacherClient(
        endpoints=endpoints,
        timeout_s=3.0,
        total_timeout_s=bound_s,
        connect_timeout_s=3.0,
        health_period_s=1.0,
        canary_period_s=2.0,
        report_period_s=1.0,
        retry=RetryPolicy(max_delay_s=0.5),
        **settings,
    )
    async with asyncio.timeout(bound_s), client, steady_calls(client, predict=predict) as calls:
        await calls.more(8)
        yield calls


def reasons(logs: Logs, event: str, endpoint: str) -> list[str]:
    """The reasons of every such line about a replica, in order; an empty one where the line gives none."""
    return [
        line.get("reason", "")
        for line in logs
        if (line["event"], line.get("endpoint")) == (event, endpoint) and line["log_level"] != "debug"
    ]


async def logged(logs: Logs, event: str, endpoint: str, *, times: int = 1) -> None:
    """Return once there are so many such lines."""
    await until(lambda: len(reasons(logs, event, endpoint)) >= times)


async def test_calls_wait_for_the_only_teacher_to_come_back(service: ServiceProcess, logs: Logs) -> None:
    """Killed in mid-call and started again a while later: one line says what died, one per period what waits for it."""
    async with calling([service.endpoint]) as calls:
        service.kill()
        await until(lambda: any(line["event"] == PROGRESS for line in logs))
        await asyncio.to_thread(service.start)
        await calls.more(32)
    assert reasons(logs, DOWN, service.endpoint) == ["UNREACHABLE"]
    assert len(reasons(logs, UP, service.endpoint)) == 2
    progress = next(line for line in logs if line["event"] == PROGRESS)
    assert progress["num_waiting"] == NUM_INFLIGHT
    assert service.endpoint in progress["replicas"][0]


async def test_one_of_two_is_killed(two_services: list[ServiceProcess], logs: Logs) -> None:
    """The other takes over, and shares the work again once the first is back."""
    first, second = two_services
    async with calling([first.endpoint, second.endpoint]) as calls:
        first.kill()
        await calls.more(32, endpoint=second.endpoint)
        await asyncio.to_thread(first.start)
        await calls.more(8, endpoint=first.endpoint)
    assert reasons(logs, DOWN, first.endpoint) == ["UNREACHABLE"]
    assert reasons(logs, DOWN, second.endpoint) == []


async def test_one_of_two_is_paused(two_services: list[ServiceProcess], logs: Logs) -> None:
    """Its connections stay open and say nothing: the calls on it move to the other, and come back with it."""
    first, second = two_services
    async with calling([first.endpoint, second.endpoint]) as calls:
        first.pause()
        try:
            await logged(logs, DOWN, first.endpoint)
            await calls.more(32, endpoint=second.endpoint)
        finally:
            first.resume()
        await calls.more(8, endpoint=first.endpoint)
    assert set(reasons(logs, DOWN, first.endpoint)) == {"DEADLINE_EXCEEDED"}


@pytest.mark.parametrize(
    ("fault", "known_reasons"),
    [
        pytest.param(Reset(), {"UNREACHABLE"}, id="reset"),
        pytest.param(BlackHole(), set(), id="black-hole"),
        pytest.param(Truncate(), {"UNREACHABLE"}, id="truncated"),
        pytest.param(Corrupt(Part.FRAME_LENGTH), {"UNKNOWN", "UNREACHABLE"}, id="corrupt-frame-length"),
        pytest.param(Corrupt(Part.PREFIX), {"INVALID_ANSWER"}, id="corrupt-prefix"),
        pytest.param(Corrupt(Part.MESSAGE), {"INVALID_ANSWER", "MANIFEST_CHANGED"}, id="corrupt-message"),
    ],
)
async def test_a_broken_path_to_one_of_two(
    two_services: list[ServiceProcess], logs: Logs, fault: Fault, known_reasons: set[str]
) -> None:
    """What breaks on the one path is asked for on the other, and the first is used again once it is whole."""
    first, second = two_services
    with faulty_proxy(first.endpoint) as proxy:
        async with calling([proxy.endpoint, second.endpoint]) as calls:
            await calls.more(1, endpoint=proxy.endpoint)
            proxy.set_fault(fault)
            await logged(logs, RETRY, proxy.endpoint)
            await calls.more(64, endpoint=second.endpoint)
            proxy.set_fault(None)
            await calls.more(8, endpoint=proxy.endpoint)
    assert proxy.num_strikes > 0
    # the attempt's own time or the health check may be over before the fault is understood
    assert set(reasons(logs, RETRY, proxy.endpoint)) <= known_reasons | {"DEADLINE_EXCEEDED", "WENT_DOWN"}
    assert reasons(logs, RETRY, second.endpoint) == []


@pytest.mark.parametrize("fault", [Reset(), BlackHole(), Truncate(every=4)], ids=lambda fault: type(fault).__name__)
async def test_a_broken_path_to_the_only_teacher(service: ServiceProcess, logs: Logs, fault: Fault) -> None:
    """It is waited for; a connection that is dead without a word is given up for a new one."""
    with faulty_proxy(service.endpoint) as proxy:
        async with calling([proxy.endpoint]) as calls:
            proxy.set_fault(fault)
            await asyncio.sleep(BROKEN_S)
            assert proxy.num_strikes > 0
            proxy.set_fault(None)
            await calls.more(32)
    assert reasons(logs, RETRY, proxy.endpoint)


async def nan_answer(request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
    """As many rows as asked for, of NaN."""
    num_scored = len(request.token_ids) - request.score_start
    scores = ScoreArrays(
        sampled_logprobs=np.full(num_scored, np.nan, np.float32),
        topk_token_ids=np.tile(np.arange(request.num_logprobs, dtype=np.int32), (num_scored, 1)),
        topk_logprobs=np.full((num_scored, request.num_logprobs), np.nan, np.float32),
        log_tail_mass=np.full(num_scored, np.nan, np.float32),
    )
    return scores_to_pb(scores, wire_dtype=WireDtype.FLOAT32, manifest_digest=stub_manifest().digest)


async def test_a_teacher_that_answers_nan_is_left_alone_until_it_is_well(logs: Logs) -> None:
    """Not one NaN reaches a caller."""
    async with (
        running_stub() as ill,
        running_stub() as well,
        calling([ill.endpoint, well.endpoint], predict=uniform) as calls,
    ):
        ill.script.extend([nan_answer] * MANY)
        await logged(logs, EJECTED, ill.endpoint)
        await calls.more(64, endpoint=well.endpoint)
        ill.script.clear()
        await calls.more(8, endpoint=ill.endpoint)
    assert set(reasons(logs, EJECTED, ill.endpoint)) == {"INVALID_ANSWER"}
    assert reasons(logs, EJECTED, well.endpoint) == []
    # while it is ejected it is sent the canary: no call is spent on finding out that it is still ill
    assert len(reasons(logs, RETRY, ill.endpoint)) < 2 * NUM_INFLIGHT


async def test_another_model_after_a_restart_is_refused(service: ServiceProcess, logs: Logs) -> None:
    """Nothing is asked of it; the calls wait, and go on with the right one."""
    async with calling([service.endpoint]) as calls:
        service.kill()
        await asyncio.to_thread(service.start, "--model", "another")
        await logged(logs, QUARANTINED, service.endpoint)
        num_answered = calls.answered.total()
        await until(lambda: any(line["event"] == PROGRESS for line in logs))
        assert calls.answered.total() == num_answered
        service.kill()
        await asyncio.to_thread(service.start)
        await calls.more(16)
    line = next(line for line in logs if line["event"] == QUARANTINED)
    assert line["reason"] == "MANIFEST_CHANGED"
    assert "another" in line["error"]


async def test_a_teacher_that_is_overloaded_for_seconds(logs: Logs) -> None:
    """Its delay is kept, so that it is asked seldom; it is not taken for ill."""
    overloaded = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=RETRY_DELAY_S)
    async with (
        running_stub() as stub,
        calling([stub.endpoint], predict=uniform, bound_s=OVERLOADED_S + TIMEOUT_S) as calls,
    ):
        stub.script.extend([overloaded] * MANY)
        await asyncio.sleep(OVERLOADED_S)
        num_refused = MANY - len(stub.script)
        stub.script.clear()
        await calls.more(16)
    assert NUM_INFLIGHT <= num_refused <= NUM_INFLIGHT * OVERLOADED_S / RETRY_DELAY_S
    assert reasons(logs, EJECTED, stub.endpoint) == []
    assert reasons(logs, DOWN, stub.endpoint) == []


async def test_a_name_that_moves_to_another_address(two_services: list[ServiceProcess], logs: Logs) -> None:
    """The calls follow it; those under way at the old address are answered there."""
    first, second = two_services
    addresses = [first.endpoint]

    async def resolve(name: str) -> list[str]:
        assert name == "teacher.example:15555"
        return list(addresses)

    async with calling("teacher.example:15555", resolve=resolve, resolve_period_s=1.0) as calls:
        assert set(calls.answered) == {first.endpoint}
        addresses[:] = [second.endpoint]
        await logged(logs, GONE, first.endpoint)
        num_answered = calls.answered[first.endpoint]
        await calls.more(64, endpoint=second.endpoint)
        assert calls.answered[first.endpoint] <= num_answered + NUM_INFLIGHT
    assert reasons(logs, DOWN, first.endpoint) == []
