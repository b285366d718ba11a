"""Who may enter the engine, and when: a token budget, a bounded first-in-first-out queue, and refusal."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from teacher_service.errors import DrainingError, EngineDeadError, NotReadyError, OverloadedError, TeacherServiceError

# How much the newest sequence weighs in the mean time that a sequence stays in the engine.
_HOLD_WEIGHT = 0.1
_MIN_RETRY_DELAY_S = 0.05
_MAX_RETRY_DELAY_S = 30.0
_NOT_READY_RETRY_DELAY_S = 1.0


class Phase(enum.Enum):
    """Where the service stands in its life; it only moves forward."""

    LOADING = 0
    """The model is not loaded yet."""
    SERVING = 1
    """Work is taken."""
    DRAINING = 2
    """Work in flight is finished, new work is refused."""
    DEAD = 3
    """The engine is dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """Bounds of what is in the engine and of what waits for it."""

    max_inflight_requests: int
    """Sequences in the engine at a time, >= 1."""
    max_inflight_tokens: int
    """Tokens in the engine at a time; the caller keeps every sequence at or below it."""
    max_queued_requests: int
    """Sequences that may wait; 0: none."""
    max_queued_tokens: int
    """Tokens that may wait."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    num_tokens: int
    granted: asyncio.Future[None]


class Admission:
    """Grants places in the engine in order of arrival. Belongs to one event loop."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._waiting: deque[_Waiter] = deque()
        self._mean_hold_s: float | None = None
        self.phase = Phase.LOADING
        """Set by whoever runs the service; only SERVING takes work."""
        self.inflight_requests = 0
        """Sequences in the engine."""
        self.inflight_tokens = 0
        """Tokens in the engine."""
        self.queued_tokens = 0
        """Tokens that wait."""

    @property
    def queued_requests(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def check_open(self) -> None:
        """Refuse at once where nothing new is taken.

        Raises:
            NotReadyError, DrainingError, EngineDeadError: by phase.
        """
        refusal = _refusal(self.phase)
        if refusal is not None:
            raise refusal

    @asynccontextmanager
    async def admit(self, num_tokens: int) -> AsyncIterator[None]:
        """Hold `num_tokens` of the budget; waits for them in order of arrival. Cancelling leaves the queue.

        Raises:
            NotReadyError, DrainingError, EngineDeadError: by phase.
            OverloadedError: the queue is full; carries the delay after which it should have room.
        """
        self.check_open()
        if self._waiting or not self._fits(num_tokens):
            await self._wait(num_tokens)
        else:
            self._take(num_tokens)
        entered_s = time.monotonic()
        try:
            yield
        finally:
            self._release(num_tokens, hold_s=time.monotonic() - entered_s)

    async def _wait(self, num_tokens: int) -> None:
        self._check_room(num_tokens)
        waiter = _Waiter(num_tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self.queued_tokens += num_tokens
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():
                # granted in the same turn of the loop as the cancellation: the place goes back
                self._give_back(num_tokens)
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
                self.queued_tokens -= num_tokens
            # a large sequence at the head may have been what kept smaller ones out
            self._grant()
            raise

    def _check_room(self, num_tokens: int) -> None:
        limits = self._limits
        if len(self._waiting) < limits.max_queued_requests and (
            self.queued_tokens + num_tokens <= limits.max_queued_tokens
        ):
            return
        delay_s = self._retry_delay_s(num_tokens)
        raise OverloadedError(
            f"the queue holds {len(self._waiting)} sequences ({self.queued_tokens} tokens), limits "
            f"{limits.max_queued_requests} ({limits.max_queued_tokens}); retry in {delay_s:.2f} s",
            metadata={
                "value": f"{self.queued_tokens + num_tokens}",
                "limit": f"{limits.max_queued_tokens}",
                "queued_requests": f"{len(self._waiting)}",
                "max_queued_requests": f"{limits.max_queued_requests}",
            },
            retry_delay_s=delay_s,
        )

    def _retry_delay_s(self, num_tokens: int) -> float:
        """Seconds until the work ahead should be through: by Little's law from the tokens in the engine."""
        if self._mean_hold_s is None:
            return _NOT_READY_RETRY_DELAY_S
        tokens_per_s = self.inflight_tokens / max(self._mean_hold_s, 1e-6)
        delay_s = (self.queued_tokens + num_tokens) / max(tokens_per_s, 1.0)
        return min(max(delay_s, _MIN_RETRY_DELAY_S), _MAX_RETRY_DELAY_S)

    def _fits(self, num_tokens: int) -> bool:
        return (
            self.inflight_requests < self._limits.max_inflight_requests
            and self.inflight_tokens + num_tokens <= self._limits.max_inflight_tokens
        )

    def _take(self, num_tokens: int) -> None:
        self.inflight_requests += 1
        self.inflight_tokens += num_tokens

    def _give_back(self, num_tokens: int) -> None:
        self.inflight_requests -= 1
        self.inflight_tokens -= num_tokens

    def _release(self, num_tokens: int, *, hold_s: float) -> None:
        self._give_back(num_tokens)
        mean_s = self._mean_hold_s
        self._mean_hold_s = hold_s if mean_s is None else mean_s + _HOLD_WEIGHT * (hold_s - mean_s)
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0].num_tokens):
            waiter = self._waiting.popleft()
            self.queued_tokens -= waiter.num_tokens
            if waiter.granted.cancelled():
                continue
            self._take(waiter.num_tokens)
            waiter.granted.set_result(None)


def _refusal(phase: Phase) -> TeacherServiceError | None:
    match phase:
        case Phase.SERVING:
            return None
        case Phase.LOADING:
            return NotReadyError(
                f"the model is still loading; retry in {_NOT_READY_RETRY_DELAY_S:g} s, or wait until the health check "
                "says SERVING",
                retry_delay_s=_NOT_READY_RETRY_DELAY_S,
            )
        case Phase.DRAINING:
            return DrainingError("the service is shutting down and takes no new work; send it to another replica")
        case Phase.DEAD:
            return EngineDeadError("the engine is dead and the process is ending; send the work to another replica")
