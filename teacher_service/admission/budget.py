"""Memory that may be taken, and what is taken of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from teacher_service.types import Price


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """Bytes for everything in the engine together, beyond the loaded model."""

    main_bytes: int
    """Of main memory."""
    device_bytes: int | None = None
    """Of the device, for what is held there and for the peaks. None: the engine computes in main memory, and both are
    taken from there."""

    def excess(self, price: Price) -> tuple[int, int] | None:
        """What a sequence needs and the limit, where it could not be scored even alone; else None."""
        on_device = price.held_device_bytes + price.peak_bytes
        if self.device_bytes is None:
            together = price.held_bytes + on_device
            return (together, self.main_bytes) if together > self.main_bytes else None
        if price.held_bytes > self.main_bytes:
            return price.held_bytes, self.main_bytes
        return (on_device, self.device_bytes) if on_device > self.device_bytes else None


class MemoryAccount:
    """What is taken. Held bytes add up; of the peaks one is there at a time."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        """The limits."""
        self._held_bytes = 0
        self._held_device_bytes = 0
        self._peaks = Counter[int]()

    @property
    def main_bytes(self) -> int:
        """Taken of main memory."""
        on_device = self._held_device_bytes + max(self._peaks, default=0)
        return self._held_bytes + (on_device if self.budget.device_bytes is None else 0)

    def fits(self, price: Price) -> bool:
        """Whether one more may be taken."""
        held_bytes = self._held_bytes + price.held_bytes
        on_device = self._held_device_bytes + price.held_device_bytes + max(*self._peaks, price.peak_bytes, 0)
        if self.budget.device_bytes is None:
            return held_bytes + on_device <= self.budget.main_bytes
        return held_bytes <= self.budget.main_bytes and on_device <= self.budget.device_bytes

    def take(self, price: Price) -> None:
        """Count one in."""
        self._held_bytes += price.held_bytes
        self._held_device_bytes += price.held_device_bytes
        self._peaks[price.peak_bytes] += 1

    def give_back(self, price: Price) -> None:
        """Count one out."""
        self._held_bytes -= price.held_bytes
        self._held_device_bytes -= price.held_device_bytes
        self._peaks[price.peak_bytes] -= 1
        if not self._peaks[price.peak_bytes]:
            del self._peaks[price.peak_bytes]
