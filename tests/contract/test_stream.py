"""ScoreStream: many sequences in flight, each failing alone, none outliving its caller."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.fake import FakeEngine
from tests.support.service import (
    Outcome,
    gated_engine,
    outcome_of_rpc_error,
    outcome_of_stream_answer,
    raw_stream,
    running_service,
    score_request,
)
from tests.support.waiting import TIMEOUT_S, until

EMPTY_SEQUENCE = Outcome(
    "EMPTY_SEQUENCE",
    "INVALID_ARGUMENT",
    "token_ids holds 0 tokens; send between 2 and 4096",
    {"field": "token_ids", "value": "0", "limit": "2..4096"},
)


def message(stream_id: str, token_ids: Any = range(8), **more: Any) -> pb.ScoreStreamRequest:
    return pb.ScoreStreamRequest(id=stream_id, request=score_request(token_ids, 5, 1), **more)


async def read(call: Any) -> tuple[str, Outcome]:
    answer = await asyncio.wait_for(call.read(), TIMEOUT_S)
    assert answer is not grpc.aio.EOF
    return answer.id, outcome_of_stream_answer(answer)


async def read_all(call: Any) -> dict[str, str]:
    """Id -> reason, of every answer until the stream ends."""
    return {answer.id: outcome_of_stream_answer(answer).reason async for answer in call}


async def test_one_bad_sequence_among_good_ones_fails_alone() -> None:
    """Bad values, engine faults, NaN and a missing request each cost their own sequence and no other."""
    engine = FakeEngine(failing_token_id=30, nan_token_id=31)
    async with running_service(engine) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        for i in range(20):
            await call.write(message(f"good {i}", [i % 8, 1, 2, 3, 4, 5, 6]))
        await call.write(message("bad id", [0, 1, 2, 3, 4, 5, -6]))
        await call.write(message("engine", [0, 1, 2, 3, 4, 5, 30]))
        await call.write(message("nan", [0, 1, 2, 3, 4, 5, 31]))
        await call.write(pb.ScoreStreamRequest(id="no request"))
        await call.write(message("last"))
        await call.done_writing()
        reasons = await read_all(call)
    bad = {
        "bad id": "TOKEN_ID_OUT_OF_RANGE",
        "engine": "ENGINE_ERROR",
        "nan": "ENGINE_ERROR",
        "no request": "MALFORMED_REQUEST",
    }
    assert reasons == {f"good {i}": "OK" for i in range(20)} | {"last": "OK"} | bad


async def test_garbage_on_a_stream_fails_alone() -> None:
    """Bytes that are no message are answered without an id, and the stream goes on."""
    async with running_service(FakeEngine()) as service:
        call = raw_stream(service)
        await call.write(b"\xff\x00garbage")
        await call.write(message("good").SerializeToString())
        await call.done_writing()
        answers = [pb.ScoreStreamResponse.FromString(payload) async for payload in call]
    reasons = {answer.id: outcome_of_stream_answer(answer).reason for answer in answers}
    assert reasons == {"": "MALFORMED_REQUEST", "good": "OK"}


async def test_answers_come_in_completion_order() -> None:
    """A sequence that is refused is answered while an earlier one is still in the engine."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        await call.write(message("slow"))
        await until(lambda: len(engine.running) == 1)
        await call.write(message("refused", []))
        assert await read(call) == ("refused", EMPTY_SEQUENCE)
        engine.scoring_gate.set()
        assert (await read(call))[0] == "slow"
        await call.done_writing()


async def test_a_duplicate_or_missing_id_is_refused_for_that_message_alone() -> None:
    """The first holder of an id is answered; an id may be used again once it was answered."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        await call.write(message("a"))
        await until(lambda: len(engine.running) == 1)
        refused = []
        for stream_id in ("a", "", "x" * 129):
            await call.write(message(stream_id))
            answered_id, outcome = await read(call)
            refused.append((answered_id[:4], outcome.reason))
        assert refused == [("a", "INVALID_STREAM_ID"), ("", "INVALID_STREAM_ID"), ("xxxx", "INVALID_STREAM_ID")]
        engine.scoring_gate.set()
        assert [(i, o.reason) for i, o in [await read(call)]] == [("a", "OK")]
        await call.write(message("a"))
        assert [(i, o.reason) for i, o in [await read(call)]] == [("a", "OK")]
        await call.done_writing()


async def test_the_server_stops_reading_while_too_many_are_in_flight() -> None:
    """The bound holds for what reaches the engine; the rest waits outside and is answered later."""
    engine = gated_engine()
    async with running_service(engine, max_stream_inflight=3) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        for i in range(8):
            await call.write(message(str(i)))
        await until(lambda: len(engine.running) == 3)
        # a full round trip on the same connection: had the server read on, a fourth would be in the engine
        await service.stub.GetManifest(pb.GetManifestRequest(), timeout=TIMEOUT_S)
        assert len(engine.running) == 3
        engine.scoring_gate.set()
        await call.done_writing()
        assert await read_all(call) == {str(i): "OK" for i in range(8)}


async def test_each_sequence_has_its_own_deadline() -> None:
    """timeout_s ends one sequence and takes it out of the engine; the stream and the others go on."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        await call.write(message("patient"))
        await call.write(message("hasty", timeout_s=0.05))
        answered_id, outcome = await read(call)
        assert (answered_id, outcome.reason, outcome.code) == ("hasty", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert len(engine.cancelled) == 1
        engine.scoring_gate.set()
        assert (await read(call))[1].reason == "OK"
        await call.done_writing()


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_bad_timeout_is_refused(timeout_s: float) -> None:
    """A timeout that is no number of seconds > 0 is not taken for none."""
    async with running_service(FakeEngine()) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        await call.write(message("a", timeout_s=timeout_s))
        assert (await read(call))[1].reason == "INVALID_TIMEOUT"
        await call.done_writing()


async def test_cancelling_a_stream_cancels_all_its_work() -> None:
    """Nothing of a stream stays in the engine or in the queue once its caller is gone."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=2) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        for i in range(5):
            await call.write(message(str(i)))
        await until(lambda: len(engine.running) == 2)
        call.cancel()
        await until(lambda: len(engine.running) == 0)
        engine.scoring_gate.set()
        metrics = await service.metrics()
        assert (metrics["teacher_queued_requests"], metrics["teacher_inflight_requests"]) == (0, 0)
        assert engine.finished == []


async def test_drain_refuses_new_sequences_on_an_open_stream_and_then_ends_it() -> None:
    """What is in flight is answered, what comes after is refused with DRAINING, and the stream ends UNAVAILABLE."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.ScoreStream(timeout=TIMEOUT_S)
        await call.write(message("old"))
        await until(lambda: len(engine.running) == 1)
        service.stop.set()
        await until(lambda: "draining" in service.log.getvalue())
        await call.write(message("new"))
        assert [(i, o.reason, o.code) for i, o in [await read(call)]] == [("new", "DRAINING", "UNAVAILABLE")]
        engine.scoring_gate.set()
        assert [(i, o.reason) for i, o in [await read(call)]] == [("old", "OK")]
        await service.life
        await service.close_ports()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert outcome_of_rpc_error(caught.value).reason == "DRAINING"
