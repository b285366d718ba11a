"""How an engine tells of its death."""

from __future__ import annotations

import asyncio


class Death:
    """Whether an engine is dead, and of what. Happens once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._cause: BaseException | None = None

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine; None while it lives."""
        return self._cause

    def declare(self, cause: BaseException) -> None:
        """Be dead from now on; a later cause changes nothing."""
        if self._cause is None:
            self._cause = cause
            self._event.set()

    async def wait(self) -> BaseException:
        """Return the cause, once there is one."""
        while self._cause is None:
            await self._event.wait()
        return self._cause
