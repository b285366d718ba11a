"""A client's calls side by side: joined, hedged, kept together, waiting, cancelled, closed."""

from __future__ import annotations

import asyncio
import gc
import random

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.teacher_stub import Context, TeacherStub, hangs, running_stub, stub_manifest, uniform_answer
from tests.support.waiting import until
from trainer.errors import TeacherAnswerError, TeacherClosedError, TeacherUnavailableError
from trainer.teacher import RetryPolicy, TeacherClient
from trainer.teacher.channel import Endpoint
from trainer.types import TeacherScores

QUICK = RetryPolicy(max_attempts=1000, initial_delay_s=0.01, max_delay_s=0.05)


async def score(teacher: TeacherClient, number: int = 0, affinity: str | None = None) -> TeacherScores:
    """Score a sequence that differs by its number."""
    tokens = [5, 6, number % 32, number // 32]
    return await teacher.score(tokens, score_start=1, num_logprobs=3, affinity=affinity)


async def test_equal_calls_at_the_same_time_are_one() -> None:
    """Siblings that say the same are scored once; a later call is scored anew."""
    async with running_stub() as stub, TeacherClient(endpoints=[stub.endpoint]) as teacher:
        stub.gate.clear()
        calls = [asyncio.create_task(score(teacher)) for _ in range(5)]
        await stub.arrived.wait()
        assert teacher.num_inflight == 1
        calls[0].cancel()
        stub.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert all(isinstance(one, TeacherScores) for one in results[1:])
        assert len(stub.requests) == 1
        await score(teacher)
        assert len(stub.requests) == 2
        assert stub.num_cancelled == 0


async def test_a_joined_call_has_its_own_time() -> None:
    """Where the call that it joined runs out of time, it goes on alone."""
    async with running_stub() as stub, TeacherClient(endpoints=[stub.endpoint], total_timeout_s=1.0) as teacher:
        stub.script.append(hangs)
        first = asyncio.create_task(score(teacher))
        await stub.arrived.wait()
        await asyncio.sleep(0.5)
        second = asyncio.create_task(score(teacher))
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], Exception)
        assert isinstance(results[1], TeacherScores)


async def slow_answer(request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
    """So slow that a busy machine makes no replica look slower than the others."""
    await asyncio.sleep(0.1)
    return uniform_answer(request, stub_manifest())


async def test_siblings_share_a_replica() -> None:
    """Calls of one affinity go to one replica one after the other, and all of them over many affinities to all."""
    async with (
        running_stub() as first,
        running_stub() as second,
        running_stub() as third,
        TeacherClient(endpoints=[one.endpoint for one in (first, second, third)]) as teacher,
    ):
        for stub in (first, second, third):
            stub.script.extend([slow_answer] * 48)
        homes = {}
        for prompt in range(12):
            found = {(await score(teacher, 40 * prompt + i, affinity=str(prompt))).endpoint for i in range(4)}
            assert len(found) == 1
            homes[prompt] = found.pop()
        assert len(set(homes.values())) > 1


async def test_a_slow_attempt_is_made_a_second_time_elsewhere() -> None:
    """The first good answer counts, the slow attempt is taken back, and a fast client makes no second attempts."""
    async with running_stub() as first, running_stub() as second:
        endpoints = [first.endpoint, second.endpoint]
        async with TeacherClient(endpoints=endpoints, hedge_percentile=0.99, health_period_s=60.0) as teacher:
            for number in range(30):
                await score(teacher, number)
            first.gate.clear()
            second.gate.clear()
            call = asyncio.create_task(score(teacher, 100))
            await until(lambda: first.num_running == second.num_running == 1)
            first.gate.set()
            scores = await call
            assert scores.endpoint == first.endpoint
            assert scores.timings.num_attempts == 2
            await until(lambda: second.num_cancelled == 1)
            assert first.num_cancelled == 0


async def test_without_a_second_replica_there_is_no_second_attempt() -> None:
    """Nothing would come of it."""
    async with running_stub() as stub, TeacherClient(endpoints=[stub.endpoint], hedge_percentile=0.9) as teacher:
        for number in range(30):
            await score(teacher, number)
        stub.gate.clear()
        call = asyncio.create_task(score(teacher, 100))
        await until(lambda: stub.num_running == 1)
        await asyncio.sleep(0.2)
        stub.gate.set()
        assert (await call).timings.num_attempts == 1


async def test_waiting_calls_are_reported_once_for_all_of_them() -> None:
    """How many wait, since when, for whom and why, and when they give up: one line per period."""
    async with running_stub() as stub:
        with capture_logs() as logs:
            async with TeacherClient(
                endpoints=[stub.endpoint], retry=QUICK, report_period_s=0.5, total_timeout_s=60.0
            ) as teacher:
                await stub.stop()
                await until(lambda: not teacher.is_serving)
                calls = [asyncio.create_task(score(teacher, i)) for i in range(20)]

                def lines() -> list[dict[str, object]]:
                    return [dict(log) for log in logs if log["event"] == "calls wait for a teacher"]

                await until(lambda: len(lines()) >= 2)
                await stub.start()
                await asyncio.gather(*calls)
    first, second, *_ = lines()  # a slow machine may write a third before the teacher is back
    assert first["num_waiting"] == second["num_waiting"] == 20
    assert 0.4 < float(str(first["waited_s"])) <= float(str(second["waited_s"])) - 0.4
    assert 50 < float(str(first["first_gives_up_in_s"])) < 60
    assert f"{stub.endpoint} is connecting (no teacher answers at {stub.endpoint}" in str(first["replicas"])


async def test_a_call_that_waited_in_vain_says_for_whom() -> None:
    """The error is that of the replicas, with the remedy."""
    async with (
        running_stub() as stub,
        TeacherClient(endpoints=[stub.endpoint], retry=QUICK, total_timeout_s=0.5) as teacher,
    ):
        await stub.stop()
        await until(lambda: not teacher.is_serving)
        with pytest.raises(TeacherUnavailableError) as caught:
            await score(teacher)
    message = str(caught.value)
    assert f"no replica of the teacher serves: {stub.endpoint} is connecting" in message
    assert "after 0 attempts in 0.5 s; start one with" in message
    assert caught.value.reason == "UNREACHABLE"


async def nonsense(request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
    answer = uniform_answer(request, TeacherStub().manifest)
    answer.sampled_logprobs = np.full(3, np.nan, dtype="<f4").tobytes()
    answer.ClearField("payload_crc32")
    return answer


async def test_a_wrong_answer_is_asked_for_elsewhere_first() -> None:
    """The second attempt never meets the replica that answered nonsense."""
    async with running_stub() as first, running_stub() as second:
        endpoints = [first.endpoint, second.endpoint]
        async with TeacherClient(endpoints=endpoints, retry=QUICK) as teacher:
            for number in range(4):
                first.script.append(nonsense)
                scores = await score(teacher, number)
                first.script.clear()
                assert np.isfinite(scores.sampled_logprobs).all()
                assert scores.timings.num_attempts == 1 or scores.endpoint == second.endpoint


class _Garbage(grpc.GenericRpcHandler):
    """Answers every method with bytes that are no message."""

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """See gRPC."""

        async def answer(_request: bytes, _context: Context) -> bytes:
            return b"\xff\xff\xff"

        return grpc.unary_unary_rpc_method_handler(answer)


async def test_bytes_that_are_no_message_are_a_wrong_answer() -> None:
    """Damaged on the way, say: gRPC hands out None with no error. For health any answer is a sign of life."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Garbage(),))
    name = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with Endpoint.for_manifest(name, connect_timeout_s=5.0) as endpoint:
            with pytest.raises(TeacherAnswerError, match=f"teacher at {name} is no message of the contract"):
                await endpoint.score(pb.ScoreRequest(token_ids=[1, 2], score_start=1), timeout_s=10.0)
            with pytest.raises(TeacherAnswerError, match="no message of the contract"):
                await endpoint.get_manifest(timeout_s=10.0)
            assert await endpoint.is_serving(timeout_s=10.0)
    finally:
        await server.stop(grace=0)


async def test_closing_under_load_leaves_nothing_behind() -> None:
    """Calls end with an error that says so; no task, and no complaint of asyncio, is left."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    async with running_stub() as first, running_stub() as second:
        before = asyncio.all_tasks()
        teacher = TeacherClient(
            endpoints=[first.endpoint, second.endpoint], max_inflight=20, hedge_percentile=0.9, retry=QUICK
        )
        await teacher.__aenter__()
        await asyncio.gather(*(score(teacher, i) for i in range(30)))
        first.gate.clear()
        second.gate.clear()
        calls = [asyncio.create_task(score(teacher, i)) for i in range(50)]
        await until(lambda: first.num_running + second.num_running >= 20)
        await second.stop()
        async with asyncio.timeout(10):
            await teacher.close()
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(one) for one in results} == {TeacherClosedError}
        assert teacher.num_inflight == 0
        assert teacher.replicas == ()
        first.gate.set()
        await until(lambda: first.num_running == 0)
        left = {task for task in asyncio.all_tasks() - before if "TeacherStub" not in repr(task.get_coro())}
        del calls, results
        gc.collect()
        await asyncio.sleep(0)
        assert [task for task in left if "trainer/teacher" in repr(task)] == []
        assert complaints == []


async def test_calls_may_be_cancelled_anywhere() -> None:
    """Two hundred calls, most cancelled at some moment, while a replica goes down: the rest are answered."""
    rng = random.Random(0)  # noqa: S311 no secret
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    async with running_stub() as first, running_stub() as second:
        endpoints = [first.endpoint, second.endpoint]
        async with TeacherClient(endpoints=endpoints, max_inflight=8, hedge_percentile=0.6, retry=QUICK) as teacher:
            await asyncio.gather(*(score(teacher, i) for i in range(30)))
            calls = [asyncio.create_task(score(teacher, i % 150)) for i in range(200)]
            for i, call in enumerate(calls):
                if i == 100:
                    await first.stop()
                await asyncio.sleep(0.004 * rng.random())
                if i % 4:
                    call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(one, (TeacherScores, asyncio.CancelledError)) for one in results)
            assert sum(isinstance(one, TeacherScores) for one in results) >= 50
            await until(lambda: teacher.num_inflight == 0)
            assert all(one.num_inflight == 0 for one in teacher.replicas)
            await score(teacher, 999)
    gc.collect()
    assert complaints == []
