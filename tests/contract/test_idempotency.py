"""One idempotency key through every door: computed once, and cancelled only when nobody waits any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.fake import FakeEngine
from tests.support.service import (
    DOORS,
    Door,
    Outcome,
    Service,
    by_http_protobuf,
    by_json,
    by_stream,
    by_unary,
    gated_engine,
    json_of,
    running_service,
    score_request,
)
from tests.support.waiting import TIMEOUT_S, until

KEYED = score_request(range(8), 5, num_logprobs=1, idempotency_key="k")
OTHER = score_request(range(8), 4, num_logprobs=1, idempotency_key="k")
PAIRS = [(by_unary, by_json), (by_stream, by_http_protobuf), (by_json, by_stream), (by_http_protobuf, by_unary)]

each_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
each_pair = pytest.mark.parametrize(
    ("first", "second"), PAIRS, ids=[f"{one.__name__}-{two.__name__}" for one, two in PAIRS]
)


async def deduplicated(service: Service) -> tuple[float, float]:
    """Requests that joined, and those answered from the cache."""
    metrics = await service.metrics()
    name = "teacher_deduplicated_requests_total"
    return metrics[f'{name}{{source="joined"}}'], metrics[f'{name}{{source="cache"}}']


async def start_two(
    service: Service, engine: FakeEngine, first: Door, second: Door
) -> tuple[asyncio.Task[Outcome], asyncio.Task[Outcome]]:
    """Equal requests through two doors; the one is in the engine, the other has joined it."""
    one: asyncio.Task[Outcome] = asyncio.create_task(first(service, KEYED))  # type: ignore[arg-type]
    await until(lambda: len(engine.running) == 1)
    other: asyncio.Task[Outcome] = asyncio.create_task(second(service, KEYED))  # type: ignore[arg-type]
    async with asyncio.timeout(TIMEOUT_S):
        while not (await service.metrics())["teacher_joined_requests"]:  # noqa: ASYNC110 - as in `until`
            await asyncio.sleep(0.002)
    return one, other


@each_pair
async def test_two_equal_requests_at_a_time_are_computed_once(first: Door, second: Door) -> None:
    """Both are answered, whichever doors they took."""
    engine = gated_engine()
    async with running_service(engine) as service:
        tasks = await start_two(service, engine, first, second)
        metrics = await service.metrics()
        assert (metrics["teacher_inflight_requests"], metrics["teacher_queued_requests"]) == (1, 0)
        engine.scoring_gate.set()
        for outcome in await asyncio.gather(*tasks):
            assert (outcome.reason, outcome.topk_token_ids) == ("OK", [5, 6, 7])
        assert len(engine.finished) == 1
        assert await deduplicated(service) == (1, 0)


@each_pair
async def test_one_of_two_may_hang_up(first: Door, second: Door) -> None:
    """The other is answered: what was begun for the one goes on for it."""
    engine = gated_engine()
    async with running_service(engine) as service:
        leaver, stayer = await start_two(service, engine, first, second)
        leaver.cancel()
        await until(lambda: "CANCELLED" in service.log.getvalue())
        assert engine.cancelled == []
        engine.scoring_gate.set()
        assert (await stayer).reason == "OK"
        assert len(engine.finished) == 1


@each_pair
async def test_the_work_is_dropped_once_both_have_hung_up(first: Door, second: Door) -> None:
    """The engine is rid of it, and the key is free for other content."""
    engine = gated_engine()
    async with running_service(engine) as service:
        for task in await start_two(service, engine, first, second):
            task.cancel()
        await until(lambda: len(engine.cancelled) == 1)
        assert engine.running == set()
        engine.scoring_gate.set()
        assert (await by_unary(service, OTHER)).reason == "OK"
        assert len(engine.finished) == 1


async def test_one_of_two_may_run_out_of_time() -> None:
    """Its deadline is its own."""
    engine = gated_engine()
    async with running_service(engine) as service:
        hasty = asyncio.create_task(by_stream(service, KEYED, timeout_s=0.05))  # type: ignore[arg-type]
        patient = asyncio.create_task(by_json(service, KEYED))  # type: ignore[arg-type]
        assert (await hasty).reason == "DEADLINE_EXCEEDED"
        engine.scoring_gate.set()
        assert (await patient).reason == "OK"


@each_door
async def test_a_retry_after_the_answer_is_not_computed_again(door: Door) -> None:
    """As after a connection that was lost while the answer was on its way."""
    engine = FakeEngine()
    async with running_service(engine) as service:
        assert (await by_unary(service, KEYED)).reason == "OK"
        assert (await service.metrics())["teacher_answer_cache_bytes"] > 0
        outcome = await door(service, KEYED)
        assert (outcome.reason, outcome.topk_token_ids) == ("OK", [5, 6, 7])
        assert len(engine.finished) == 1
        assert await deduplicated(service) == (0, 1)


async def test_a_kept_answer_took_no_time_in_queue_and_engine() -> None:
    """As message and as JSON; it may have another element type than the first."""
    async with running_service(FakeEngine()) as service:
        first = await service.stub.Score(KEYED, timeout=TIMEOUT_S)
        short = pb.ScoreRequest()
        short.CopyFrom(KEYED)
        short.wire_dtype = pb.WIRE_DTYPE_BFLOAT16
        again = await service.stub.Score(short, timeout=TIMEOUT_S)
        headers = {"content-type": "application/json"}
        as_json = (await service.http.post("/v1/score", content=json_of(KEYED), headers=headers)).json()
    assert first.timings.engine_s > 0
    assert (again.timings.queue_s, again.timings.engine_s) == (0.0, 0.0)
    assert (as_json["timings"]["queue_s"], as_json["timings"]["engine_s"]) == (0.0, 0.0)
    assert (again.wire_dtype, len(again.topk_logprobs)) == (pb.WIRE_DTYPE_BFLOAT16, 6)
    assert again.sampled_logprobs == first.sampled_logprobs


@each_door
async def test_a_key_of_another_request_is_refused(door: Door) -> None:
    """While that is under way and after; it goes on as if nothing had been."""
    engine = gated_engine()
    async with running_service(engine) as service:
        first = asyncio.create_task(by_unary(service, KEYED))  # type: ignore[arg-type]
        await until(lambda: len(engine.running) == 1)
        outcomes = [await door(service, OTHER)]
        engine.scoring_gate.set()
        assert (await first).reason == "OK"
        outcomes.append(await door(service, OTHER))
    for outcome in outcomes:
        assert (outcome.reason, outcome.code) == ("IDEMPOTENCY_KEY_REUSED", "INVALID_ARGUMENT")
        assert outcome.metadata == {"field": "idempotency_key", "value": "k", "limit": "one content per key"}
        assert outcome.retry_delay_s is None
    assert len(engine.finished) == 1


async def test_http_tells_a_reused_key_by_its_status() -> None:
    """422, as the IETF's draft of the Idempotency-Key header has it."""
    async with running_service(FakeEngine()) as service:
        headers = {"content-type": "application/json"}
        for request, status in ((KEYED, 200), (OTHER, 422)):
            answer = await service.http.post("/v1/score", content=json_of(request), headers=headers)
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("settings", "num_computed"),
    [
        ({}, 2),
        ({"answer_cache_seconds": 0}, 3),
        ({"answer_cache_bytes": 0}, 3),
        ({"answer_cache_bytes": 3000}, 3),  # one answer takes 2 KiB and some
    ],
)
async def test_the_bounds_of_what_is_kept_are_the_operators(settings: dict[str, Any], num_computed: int) -> None:
    """Two requests, then the first again."""
    engine = FakeEngine()
    async with running_service(engine, **settings) as service:
        for key in ("a", "b", "a"):
            request = score_request(range(8), 5, num_logprobs=1, idempotency_key=key)
            assert (await by_unary(service, request)).topk_token_ids == [5, 6, 7]
    assert len(engine.finished) == num_computed


async def test_a_failure_is_not_kept() -> None:
    """The same request is computed anew, and fails anew."""
    engine = FakeEngine(failing_token_id=30)
    async with running_service(engine) as service:
        request = score_request([1, 2, 30], 1, idempotency_key="k")
        for _ in range(2):
            assert (await by_unary(service, request)).reason == "ENGINE_ERROR"
        assert await deduplicated(service) == (0, 0)
        assert (await service.metrics())["teacher_answer_cache_bytes"] == 0
