"""Equal calls at the same time, made once."""

from __future__ import annotations

import asyncio
import gc

import pytest

from trainer.teacher.joining import JoinedCalls


class Work:
    """A call that ends when told to."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.num_cancelled = 0
        self.result: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> int:
        """Begin."""
        self.num_begun += 1
        try:
            return await asyncio.shield(self.result)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


async def begin(calls: JoinedCalls[int], work: Work, number: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(calls.run("key", work)) for _ in range(number)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_equal_calls_share_one_computation() -> None:
    """All get the result; the next one after it computes again."""
    calls, work = JoinedCalls[int](), Work()
    tasks = await begin(calls, work, 3)
    assert "key" in calls
    work.result.set_result(7)
    assert await asyncio.gather(*tasks) == [7, 7, 7]
    assert work.num_begun == 1
    assert "key" not in calls
    assert await calls.run("key", work) == 7
    assert work.num_begun == 2


async def test_cancelling_one_leaves_the_result_to_the_other() -> None:
    """Also where the first one is cancelled, which began the work."""
    calls, work = JoinedCalls[int](), Work()
    first, second = await begin(calls, work, 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.result.set_result(7)
    assert await second == 7
    assert work.num_cancelled == 0


async def test_cancelling_all_cancels_the_work() -> None:
    """Whoever comes in the same moment begins anew."""
    calls, work = JoinedCalls[int](), Work()
    tasks = await begin(calls, work, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert "key" not in calls
    await calls.wait_ended()
    assert work.num_cancelled == 1


async def test_a_failure_is_told_to_all_and_lost_on_nobody() -> None:
    """Where all are cancelled as it fails, asyncio has no complaint about an exception never retrieved."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    calls, work = JoinedCalls[int](), Work()
    tasks = await begin(calls, work, 2)
    work.result.set_exception(RuntimeError("broken"))
    assert [str(one) for one in await asyncio.gather(*tasks, return_exceptions=True)] == ["broken"] * 2
    work = Work()
    tasks = await begin(calls, work, 2)
    work.result.set_exception(RuntimeError("broken"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await calls.wait_ended()
    del tasks, work
    gc.collect()
    assert complaints == []
