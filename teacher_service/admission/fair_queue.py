"""A queue in which nobody waits behind another client's backlog.

Start-time fair queueing (Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996, section 2), with equal
weights: virtual time stands at the start tag of what was taken last, a client's next entry starts at the later of
virtual time and the end of the client's last one, and the earliest start is taken first. Among the entries of one
client: first in, first out. Tags are given when an entry becomes its client's first, so that one which left costs
nothing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """What waits."""

    client: str
    """Whose it is."""
    cost: int
    """What it will take of the engine's time, in any unit, >= 0."""
    item: T
    number: int
    """In order of arrival."""
    is_waiting: bool = True
    """Whether it is in the queue."""


@dataclass(slots=True)
class _Line(Generic[T]):
    entries: deque[Entry[T]] = field(default_factory=deque)
    cost: int = 0
    finish: float = 0.0
    """End tag of what was taken last."""


class FairQueue(Generic[T]):
    """Entries of many clients. Not bounded by itself: see `longest`."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._virtual_time = 0.0
        self._numbers = itertools.count()
        self._length = 0
        self.cost = 0
        """Of all entries."""

    def __len__(self) -> int:
        return self._length

    def push(self, client: str, cost: int, item: T) -> Entry[T]:
        """Append to a client's line."""
        entry = Entry(client, cost, item, next(self._numbers))
        line = self._lines.setdefault(client, _Line())
        line.entries.append(entry)
        line.cost += cost
        self.cost += cost
        self._length += 1
        return entry

    def first(self, *, may_go: Callable[[T], bool] = lambda _: True) -> Entry[T] | None:
        """The entry whose turn it is; None where nothing waits.

        Args:
            may_go: whether a client's first entry counts; where it does not, the client is passed over.
        """
        heads = (head for head in self._heads() if may_go(head.item))
        return min(heads, key=lambda one: (self._start(one), one.number), default=None)

    def take(self, entry: Entry[T]) -> None:
        """Take the first entry out: its client's turn was used."""
        line = self._lines[entry.client]
        start = self._start(entry)
        line.finish, self._virtual_time = start + entry.cost, start
        self.remove(entry)
        # whose last turn ended before now stands like one who was never here
        self._lines = {
            client: one for client, one in self._lines.items() if one.entries or one.finish > self._virtual_time
        }

    def remove(self, entry: Entry[T]) -> None:
        """Take an entry out wherever it stands; without effect if it has left."""
        if not entry.is_waiting:
            return
        entry.is_waiting = False
        line = self._lines[entry.client]
        line.entries.remove(entry)
        line.cost -= entry.cost
        self.cost -= entry.cost
        self._length -= 1

    def length_of(self, client: str) -> int:
        """Entries of one client."""
        return len(self._lines[client].entries) if client in self._lines else 0

    def cost_of(self, client: str) -> int:
        """Cost of one client's entries."""
        return self._lines[client].cost if client in self._lines else 0

    def longest(self, *, by_cost: bool) -> Entry[T] | None:
        """The last entry of the client who has most waiting, by cost or by number; None where nothing waits."""
        lines = [line for line in self._lines.values() if line.entries]
        if not lines:
            return None
        return max(lines, key=lambda line: line.cost if by_cost else len(line.entries)).entries[-1]

    def _heads(self) -> Iterator[Entry[T]]:
        return (line.entries[0] for line in self._lines.values() if line.entries)

    def _start(self, entry: Entry[T]) -> float:
        return max(self._virtual_time, self._lines[entry.client].finish)
