"""Equal calls at the same time, made once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Joined(Generic[T]):
    task: asyncio.Task[T]
    num_waiting: int = 0


class JoinedCalls(Generic[T]):
    """Runs one call per key; whoever asks for the same meanwhile gets the same result."""

    def __init__(self) -> None:
        self._calls: dict[str, _Joined[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._calls

    async def run(self, key: str, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the call under way with this key, or of `call`, which is then begun.

        Cancelling one of several that wait leaves the call to the others; cancelling the last one cancels it.
        """
        joined = self._calls.get(key)
        if joined is None:
            joined = self._calls[key] = _Joined(asyncio.create_task(call()))
            self._tasks.add(joined.task)
            joined.task.add_done_callback(lambda task: self._ended(key, task))
        joined.num_waiting += 1
        try:
            return await asyncio.shield(joined.task)
        finally:
            joined.num_waiting -= 1
            if not joined.num_waiting and not joined.task.done():
                joined.task.cancel()
                self._forget(key, joined.task)  # whoever comes now must not join what is being cancelled

    async def wait_ended(self) -> None:
        """Wait until every call has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, key: str, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # where all that waited were cancelled, nobody else picks it up

    def _forget(self, key: str, task: asyncio.Task[T]) -> None:
        joined = self._calls.get(key)
        if joined is not None and joined.task is task:
            del self._calls[key]
