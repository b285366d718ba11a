"""When a replica that fails is left alone, and when it is probed. Pure: the caller brings the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FAILURES = 5
"""Consecutive failures that eject. More than one request may cause alone: see `retry.MAX_FAULTS`."""
_FIRST_EJECTION_S = 1.0
_LONGEST_EJECTION_S = 60.0


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one attempt. Its outcome counts only while the breaker stands as it did when it was given."""

    era: int


class Breaker:
    """One replica's circuit breaker: closed, or open for a time that doubles with every probe that fails."""

    def __init__(self) -> None:
        self._era = 0
        self._num_failures = 0
        self._ejection_s = 0.0
        self._open_until_s = -math.inf
        self._is_closed = True

    @property
    def is_closed(self) -> bool:
        """Whether the replica is in normal use."""
        return self._is_closed

    @property
    def probe_at_s(self) -> float | None:
        """When the next probe may be made; None while closed."""
        return None if self._is_closed else self._open_until_s

    def begin(self) -> Permit:
        """Begin an attempt, or the one probe when its time has come."""
        return Permit(self._era)

    def succeeded(self, permit: Permit) -> None:
        """The attempt was answered well, or its request was refused for its own sake."""
        if permit.era != self._era:
            return
        self._num_failures = 0
        if not self._is_closed:
            self._is_closed = True
            self._era += 1

    def failed(self, permit: Permit, now_s: float) -> bool:
        """The attempt failed, or its answer was invalid; whether that ejected the replica."""
        if permit.era != self._era:
            return False
        self._num_failures += 1
        if self._is_closed and self._num_failures < _FAILURES:
            return False
        # A replica that served for as long as it was ejected before starts anew.
        forgiven = self._is_closed and now_s - self._open_until_s >= self._ejection_s
        longer_s = _FIRST_EJECTION_S if forgiven else 2 * self._ejection_s
        self._ejection_s = min(max(longer_s, _FIRST_EJECTION_S), _LONGEST_EJECTION_S)
        self._open_until_s = now_s + self._ejection_s
        self._is_closed = False
        self._num_failures = 0
        self._era += 1
        return True
