"""Keeps the event loop free of work that grows with the size of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LARGE = 1 << 17
"""Numbers on which a pass takes longer than a thread takes to be asked."""


async def off_loop(num_numbers: int, work: Callable[[], T]) -> T:
    """The work's result; done in a thread where it is on many numbers."""
    return work() if num_numbers < LARGE else await asyncio.to_thread(work)
