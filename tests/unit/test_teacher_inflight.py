"""Calls of one client side by side: how many, cancelled alone, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.support.teacher_stub import TeacherStub, fails, running_stub
from tests.support.waiting import until
from trainer.errors import TeacherClosedError, TeacherDeadlineError
from trainer.teacher import RetryPolicy, TeacherClient
from trainer.types import TeacherScores

CODE = grpc.StatusCode


@pytest.fixture
async def stub() -> AsyncIterator[TeacherStub]:
    async with running_stub() as one:
        yield one


async def score(teacher: TeacherClient, last: int = 9) -> TeacherScores:
    """Score a sequence that ends in `last`; equal calls at the same time are one."""
    return await teacher.score([5, 6, 7, 8, last], score_start=2, num_logprobs=3)


async def test_calls_run_together_up_to_the_limit(stub: TeacherStub) -> None:
    """Ten calls with max_inflight=3 are all answered, three at a time."""
    stub.gate.clear()
    async with TeacherClient(endpoints=[stub.endpoint], max_inflight=3) as teacher:
        calls = [asyncio.ensure_future(score(teacher, last)) for last in range(10)]
        await until(lambda: stub.num_running == 3)
        assert teacher.num_inflight == 10
        stub.gate.set()
        assert len(await asyncio.gather(*calls)) == 10
        assert teacher.num_inflight == 0
    assert stub.max_running == 3


async def test_waiting_for_a_slot_counts_towards_the_deadline(stub: TeacherStub) -> None:
    """A call that never gets its turn fails in time, and says why."""
    stub.gate.clear()
    async with TeacherClient(endpoints=[stub.endpoint], max_inflight=1, total_timeout_s=1.0) as teacher:
        results = await asyncio.gather(score(teacher, 1), score(teacher, 2), return_exceptions=True)
    assert [type(one) for one in results] == [TeacherDeadlineError] * 2
    assert sum("waiting for one of 1 slots" in str(one) for one in results) == 1
    assert len(stub.requests) == 1


async def test_cancelling_one_call_leaves_the_others(stub: TeacherStub) -> None:
    """The service sees one call taken back, its slot is free again, and the other call is answered."""
    stub.gate.clear()
    async with TeacherClient(endpoints=[stub.endpoint], max_inflight=2) as teacher:
        cancelled, kept = (asyncio.ensure_future(score(teacher, last)) for last in range(2))
        await until(lambda: stub.num_running == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        # the call is taken back at once, but the service hears of it later
        await until(lambda: stub.num_cancelled == 1)
        stub.gate.set()
        assert (await kept).num_scored == 3
        await asyncio.gather(score(teacher, 1), score(teacher, 2))
    assert stub.num_cancelled == 1


async def test_closing_ends_calls_under_way(stub: TeacherStub) -> None:
    """A call in the service and one waiting for a slot both end with an error that says so; later calls too."""
    stub.gate.clear()
    teacher = await TeacherClient(endpoints=[stub.endpoint], max_inflight=1).__aenter__()
    calls = [asyncio.ensure_future(score(teacher, last)) for last in range(2)]
    await stub.arrived.wait()
    async with asyncio.timeout(5):
        await teacher.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in results] == [TeacherClosedError] * 2
    with pytest.raises(TeacherClosedError, match="make a new one"):
        await score(teacher)
    await teacher.close()


async def test_closing_ends_the_wait_between_attempts(stub: TeacherStub) -> None:
    """Nobody waits out a backoff of a minute to close."""
    patient = RetryPolicy(initial_delay_s=60.0, max_delay_s=60.0)
    teacher = await TeacherClient(endpoints=[stub.endpoint], retry=patient).__aenter__()
    stub.script.append(fails(CODE.UNAVAILABLE, "DRAINING"))
    call = asyncio.ensure_future(score(teacher))
    await stub.arrived.wait()
    async with asyncio.timeout(5):
        await teacher.close()
        with pytest.raises(TeacherClosedError):
            await call
