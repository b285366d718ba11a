"""Waiting for what nobody announces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TIMEOUT_S = 20.0
"""Bound of every wait in a test."""


async def until(condition: Callable[[], bool]) -> None:
    """Yield to the loop until a condition holds; fails after the bound of a test."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody when it changes
            await asyncio.sleep(0.002)
