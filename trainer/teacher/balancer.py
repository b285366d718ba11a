"""Which replica gets the next attempt. Pure: the caller brings the time.

Work is counted in tokens, plus a constant per request for what doesn't grow with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_OVERHEAD_TOKENS = 64
"""What a request costs beside its tokens, in tokens, so that a short one does not make its replica look slow."""
_DECAY_S = 10.0
"""Time in which an estimate that nothing confirms falls to 1/e."""
_STALE_S = 5.0
"""What is known of an idle replica is forgotten once it is so much older than what is known of another: one that was
slow once, or missed a deadline, is not passed over for long."""
_FAIR_FACTOR = 1.25
"""Expected waits within this factor of the best are equal: noise shall not draw all traffic to one replica."""
_STICKY_FACTOR = 1.5
_STICKY_REQUESTS = 4
"""A request leaves its own replica where the wait is above 1.5 times the best one's plus four requests like it."""


@dataclass(slots=True)
class PeakEwma:
    """An estimate that jumps up at once and comes down slowly: slowness is believed at once, speed after a while."""

    value: float = 0.0
    updated_s: float = -math.inf

    def at(self, now_s: float) -> float:
        """The estimate; 0 before the first observation."""
        return self.value * math.exp(-max(now_s - self.updated_s, 0.0) / _DECAY_S) if self.value else 0.0

    def observe(self, value: float, now_s: float) -> None:
        """Take a new observation in."""
        old = self.at(now_s)
        weight = math.exp(-max(now_s - self.updated_s, 0.0) / _DECAY_S)
        self.value = value if value >= old else weight * self.value + (1 - weight) * value
        self.updated_s = now_s


def work_of(num_tokens: int) -> int:
    """The work of a request of so many tokens."""
    return num_tokens + _OVERHEAD_TOKENS


@dataclass(slots=True)
class Load:
    """What is known of one replica's speed, and what it has to do."""

    num_inflight: int = 0
    """Attempts under way."""
    work: int = 0
    """Their work, together."""
    pace: PeakEwma = field(default_factory=PeakEwma)
    """Seconds per unit of work that was outstanding when an attempt began, its own included."""
    latency: PeakEwma = field(default_factory=PeakEwma)
    """Seconds per attempt."""
    busy_until_s: float = -math.inf
    """When it wants to be asked again, where it refused as overloaded."""
    picked: int = 0
    """Number of the last pick: the lowest was left alone for longest."""

    def begin(self, work: int) -> int:
        """Count an attempt, and return all work outstanding with it."""
        self.num_inflight += 1
        self.work += work
        return self.work

    def end(self, work: int) -> None:
        """An attempt is over, however it ended."""
        self.num_inflight -= 1
        self.work -= work

    def answered(self, elapsed_s: float, outstanding: int, now_s: float) -> None:
        """Learn from an attempt that was answered after `elapsed_s`.

        Args:
            elapsed_s: what it took.
            outstanding: what `begin` returned for it.
            now_s: the time.
        """
        self.pace.observe(elapsed_s / outstanding, now_s)
        self.latency.observe(elapsed_s, now_s)

    def forget(self) -> None:
        """What was learnt is of no use any more: the replica was ill, and is well."""
        self.pace, self.latency, self.busy_until_s = PeakEwma(), PeakEwma(), -math.inf

    def unanswered(self, elapsed_s: float, outstanding: int, now_s: float) -> None:
        """Learn from an attempt that had no answer after `elapsed_s`: it would have taken at least that long."""
        if elapsed_s / outstanding > self.pace.at(now_s):
            self.answered(elapsed_s, outstanding, now_s)


class Balancer:
    """Least expected wait, the one left alone for longest among equals; equal affinities stay together."""

    def __init__(self) -> None:
        self._num_picked = 0

    def pick(self, loads: Mapping[str, Load], *, work: int, affinity: str | None, now_s: float) -> str | None:
        """The name of the replica for a request.

        Args:
            loads: of the replicas that may be asked now.
            work: of the request.
            affinity: requests that share it go to one replica where it is not clearly worse; None: any.
            now_s: the time.
        """
        if not loads:
            return None
        _forget_what_is_stale(loads)
        waits = _expected_waits(loads, work, now_s)
        best_s = min(waits.values())
        picked = min((name for name in loads if waits[name] <= _FAIR_FACTOR * best_s), key=lambda n: loads[n].picked)
        if affinity is not None:
            own = max(loads, key=lambda name: _rendezvous(affinity, name))
            best = min(waits, key=lambda name: waits[name])
            allowance_s = _STICKY_REQUESTS * best_s * work / (loads[best].work + work)
            if waits[own] <= _STICKY_FACTOR * best_s + allowance_s:
                picked = own
        self._num_picked += 1
        loads[picked].picked = self._num_picked
        return picked


def _forget_what_is_stale(loads: Mapping[str, Load]) -> None:
    newest_s = max(load.pace.updated_s for load in loads.values())
    for load in loads.values():
        if not load.num_inflight and newest_s - load.pace.updated_s > _STALE_S:
            load.pace = PeakEwma()


def _expected_waits(loads: Mapping[str, Load], work: int, now_s: float) -> dict[str, float]:
    paces = {name: load.pace.at(now_s) for name, load in loads.items()}
    known = [pace for pace in paces.values() if pace > 0]
    # A replica that nothing is known of is taken for a usual one: as the fastest it would draw all traffic.
    usual = sum(known) / len(known) if known else 1.0
    return {name: (load.work + work) * (paces[name] or usual) for name, load in loads.items()}


def _rendezvous(affinity: str, name: str) -> bytes:
    """A replica's claim on an affinity: the highest wins, so a replica that comes or goes moves only its own share."""
    return hashlib.sha256(f"{affinity}\0{name}".encode()).digest()
