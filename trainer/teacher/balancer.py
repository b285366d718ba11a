"""Which endpoint gets the next attempt. Pure: the caller brings the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Load:
    num_inflight: int = 0
    num_picked: int = 0
    cool_until_s: float = float("-inf")


class Balancer:
    """Least in flight among the endpoints that did not just fail.

    The cool-down keeps an endpoint that fails fast, and so is always the least loaded, from drawing all traffic.
    """

    def __init__(self, endpoints: Sequence[str], *, cool_down_s: float) -> None:
        self._loads = {endpoint: _Load() for endpoint in endpoints}
        self._cool_down_s = cool_down_s

    @contextmanager
    def attempt(self, now_s: float) -> Iterator[str]:
        """Pick an endpoint, and count an attempt on it for as long as the context lasts.

        Where every endpoint is cooling down, the one that cools down first is picked: waiting is the retry
        policy's business.
        """

        def rank(endpoint: str) -> tuple[float, int, int]:
            load = self._loads[endpoint]
            return (max(load.cool_until_s - now_s, 0.0), load.num_inflight, load.num_picked)

        picked = min(self._loads, key=rank)
        self._loads[picked].num_inflight += 1
        self._loads[picked].num_picked += 1
        try:
            yield picked
        finally:
            self._loads[picked].num_inflight -= 1

    def report_failure(self, endpoint: str, now_s: float, *, retry_delay_s: float | None = None) -> None:
        """Avoid an endpoint for the cool-down, or for as long as it asked for where that is longer."""
        load = self._loads[endpoint]
        load.cool_until_s = max(load.cool_until_s, now_s + max(self._cool_down_s, retry_delay_s or 0.0))

    def report_success(self, endpoint: str) -> None:
        """End an endpoint's cool-down."""
        self._loads[endpoint].cool_until_s = float("-inf")

    def has_available(self, now_s: float) -> bool:
        """Whether some endpoint is not cooling down."""
        return any(load.cool_until_s <= now_s for load in self._loads.values())
