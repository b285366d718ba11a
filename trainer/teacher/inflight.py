"""The calls under way: at most so many at once, each with a deadline, all ended together on close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Inflight:
    """Bounds concurrent calls. Made in the event loop that the calls run in."""

    def __init__(self, max_inflight: int) -> None:
        self._slots = asyncio.Semaphore(max_inflight)
        self._scopes: set[asyncio.Timeout] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_calls(self) -> int:
        """Calls that hold a slot or wait for one."""
        return len(self._scopes)

    @asynccontextmanager
    async def slot(self, deadline_s: float) -> AsyncIterator[None]:
        """Hold a slot; waiting for one counts towards the deadline.

        Args:
            deadline_s: time of the running loop's clock.

        Raises:
            TimeoutError: the deadline passed, or `end_all` was called.
        """
        async with asyncio.timeout_at(deadline_s) as scope:
            self._scopes.add(scope)
            self._empty.clear()
            try:
                async with self._slots:
                    yield
            finally:
                self._scopes.discard(scope)
                if not self._scopes:
                    self._empty.set()

    async def end_all(self) -> None:
        """Let every call run into its deadline now, and wait until all have left their slots."""
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())
        await self._empty.wait()
