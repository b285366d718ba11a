"""A second attempt beside a slow first one: after how long, and which of the two counts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_WINDOW = 256
_MIN_SAMPLES = 20
"""Below it a percentile is a guess."""

T = TypeVar("T")


class RecentLatencies:
    """The latencies of the last calls, and a percentile of them. Pure."""

    def __init__(self, percentile: float) -> None:
        """Start empty.

        Args:
            percentile: in (0.5, 1).
        """
        self._percentile = percentile
        self._latencies_s: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, latency_s: float) -> None:
        """Take a call's latency in."""
        self._latencies_s.append(latency_s)

    def delay_s(self) -> float | None:
        """Seconds after which a call is slow; None where too few are known."""
        if len(self._latencies_s) < _MIN_SAMPLES:
            return None
        ordered = sorted(self._latencies_s)
        return ordered[min(int(self._percentile * len(ordered)), len(ordered) - 1)]


async def race(attempt: Callable[[], Coroutine[Any, Any, T]], *, delay_s: float, may_hedge: Callable[[], bool]) -> T:
    """The first good result of an attempt and, where that takes longer than `delay_s`, of a second one beside it.

    The attempt that loses is cancelled and waited for. Where both fail, the first failure is raised.

    Args:
        attempt: makes one attempt.
        delay_s: seconds until the second begins.
        may_hedge: asked then, once, whether it may.
    """
    tasks = [asyncio.create_task(attempt())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=delay_s)
        if not done and may_hedge():
            tasks.append(asyncio.create_task(attempt()))
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and task.exception() is None:
                    return task.result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        # also picks up the loser's exception, which nobody else would
        await asyncio.gather(*tasks, return_exceptions=True)
