"""A second attempt beside a slow first one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from trainer.teacher.hedging import RecentLatencies, race


def test_a_percentile_needs_samples_and_follows_the_last_ones() -> None:
    """Nothing below twenty; then the percentile of the last 256."""
    latencies = RecentLatencies(0.9)
    for i in range(19):
        latencies.observe(float(i))
    assert latencies.delay_s() is None
    latencies.observe(19.0)
    assert latencies.delay_s() == 18.0
    for _ in range(256):
        latencies.observe(0.5)
    assert latencies.delay_s() == 0.5


class Script:
    """Attempts that end when told to."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[str]] = []

    def attempt(self) -> Coroutine[Any, Any, str]:
        """The next one."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.futures.append(future)

        async def wait() -> str:
            return await future

        return wait()

    async def count(self, number: int) -> None:
        """Wait until so many have begun."""
        async with asyncio.timeout(5):
            while len(self.futures) < number:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)


def hedged(script: Script, may_hedge: Callable[[], bool] = lambda: True) -> asyncio.Task[str]:
    return asyncio.create_task(race(script.attempt, delay_s=0.0, may_hedge=may_hedge))


async def test_the_first_good_answer_wins_and_the_other_attempt_is_cancelled() -> None:
    """Here the second one."""
    script = Script()
    call = hedged(script)
    await script.count(2)
    script.futures[1].set_result("second")
    assert await call == "second"
    assert script.futures[0].cancelled()


async def test_where_one_fails_the_other_is_waited_for() -> None:
    """A replica that fails does not end the call that another one is at."""
    script = Script()
    call = hedged(script)
    await script.count(2)
    script.futures[1].set_exception(RuntimeError("second"))
    await asyncio.sleep(0)
    script.futures[0].set_result("first")
    assert await call == "first"


async def test_where_both_fail_the_first_failure_is_raised() -> None:
    """And the other one's is picked up."""
    script = Script()
    call = hedged(script)
    await script.count(2)
    script.futures[1].set_exception(RuntimeError("second"))
    script.futures[0].set_exception(RuntimeError("first"))
    with pytest.raises(RuntimeError, match="first"):
        await call


async def test_no_second_attempt_where_it_is_not_allowed() -> None:
    """No replica free, or the budget spent."""
    script = Script()
    call = hedged(script, lambda: False)
    await script.count(1)
    await asyncio.sleep(0.01)
    script.futures[0].set_result("first")
    assert await call == "first"
    assert len(script.futures) == 1


async def test_cancelling_ends_both_attempts() -> None:
    """Nothing goes on behind the caller's back."""
    script = Script()
    call = hedged(script)
    await script.count(2)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert all(future.cancelled() for future in script.futures)
