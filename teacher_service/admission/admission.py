"""Who may enter the engine, and when: budgets of tokens and memory, a bounded fair queue, and refusal."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from teacher_service.admission.budget import MemoryAccount, MemoryBudget
from teacher_service.admission.fair_queue import Entry, FairQueue
from teacher_service.admission.throughput import Throughput
from teacher_service.errors import (
    DrainingError,
    EngineDeadError,
    NotReadyError,
    OverloadedError,
    OverMemoryBudgetError,
    TeacherServiceError,
)
from teacher_service.types import Price

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
    max_client_inflight_requests: int | None = None
    """Sequences of one account in the engine at a time, >= 1; None: any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one sequence asks of the engine."""

    num_tokens: int
    """Its length; stands for the engine's time."""
    price: Price = Price(held_bytes=0)  # noqa: RUF009 - it is frozen
    """The memory that it takes."""
    client: str = ""
    """Who sends it; clients share the engine's time alike."""
    account: str = ""
    """Whose it is, whatever name the client gives itself; an account's share of the engine is bounded."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    demand: Demand
    granted: asyncio.Future[None]


class Admission:
    """Grants places in the engine: to each client in order of arrival, to clients in turn. Belongs to one event loop.

    A sequence whose turn it is waits until it fits, and nothing overtakes it meanwhile; but an account that has all it
    may have in the engine is passed over. Where the queue is full, the client with most in it loses its last place to
    one who has less.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._queue = FairQueue[_Waiter]()
        self._throughput = Throughput()
        self._memory: MemoryAccount | None = None
        self._inflight_of = Counter[str]()
        self.phase = Phase.LOADING
        """Set by whoever runs the service; only SERVING takes work."""
        self.inflight_requests = 0
        """Sequences in the engine."""
        self.inflight_tokens = 0
        """Tokens in the engine."""

    @property
    def queued_requests(self) -> int:
        """Sequences that wait."""
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._queue.cost

    @property
    def reserved_bytes(self) -> int:
        """Main memory that the sequences in the engine may take."""
        return 0 if self._memory is None else self._memory.main_bytes

    @property
    def budget_bytes(self) -> int | None:
        """The most of it; None where it is not bounded."""
        return None if self._memory is None else self._memory.budget.main_bytes

    @property
    def spare_bytes(self) -> int:
        """What of it no sequence in the engine may take; 0 where it is not bounded."""
        return max(0, (self.budget_bytes or 0) - self.reserved_bytes)

    def bound_memory(self, budget: MemoryBudget) -> None:
        """Hold the engine to a budget from now on; before any work is taken."""
        self._memory = MemoryAccount(budget)

    def check_open(self) -> None:
        """Refuse at once where nothing new is taken.

        Raises:
            NotReadyError, DrainingError, EngineDeadError: by phase.
        """
        refusal = _refusal(self.phase)
        if refusal is not None:
            raise refusal

    @asynccontextmanager
    async def admit(self, demand: Demand) -> AsyncIterator[None]:
        """Hold a place; waits for it. Cancelling leaves the queue.

        Raises:
            NotReadyError, DrainingError, EngineDeadError: by phase.
            OverMemoryBudgetError: it takes more memory than there is, even alone.
            OverloadedError: the queue is full; carries the delay after which it should have room.
        """
        self.check_open()
        self._check_price(demand)
        if self._queue or not self._fits(demand) or not self._has_share(demand):
            await self._wait(demand)
        else:
            self._take(demand)
        finished = False
        try:
            yield
            finished = True
        finally:
            self._release(demand, finished=finished)

    def _check_price(self, demand: Demand) -> None:
        over = None if self._memory is None else self._memory.budget.excess(demand.price)
        if over is not None:
            needed, limit = over
            raise OverMemoryBudgetError(
                f"the sequence of {demand.num_tokens} tokens needs {needed / 1e6:.1f} MB of memory to be scored, limit "
                f"{limit / 1e6:.1f} MB; ask for fewer logprobs or candidates or for fewer positions, or serve on a "
                "machine with more memory (--memory-budget-bytes)",
                metadata={"field": "request", "value": f"{needed}", "limit": f"{limit}"},
            )

    async def _wait(self, demand: Demand) -> None:
        self._make_room(demand)
        waiter = _Waiter(demand, asyncio.get_running_loop().create_future())
        entry = self._queue.push(demand.client, demand.num_tokens, waiter)
        # all that wait may be of accounts without a share left, and this one of another
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._queue.remove(entry)
            elif waiter.granted.exception() is None:
                # granted in the same turn of the loop as the cancellation: the place goes back
                self._give_back(demand)
            # a large sequence at the head may have been what kept smaller ones out
            self._grant()
            raise

    def _make_room(self, demand: Demand) -> None:
        """Let a full queue lose the last of the client who has most in it, unless that is this one."""
        limits, queue = self._limits, self._queue
        if demand.num_tokens > limits.max_queued_tokens or limits.max_queued_requests == 0:
            raise self._overloaded(demand)
        while True:
            too_many = len(queue) >= limits.max_queued_requests
            if not too_many and queue.cost + demand.num_tokens <= limits.max_queued_tokens:
                return
            last = queue.longest(by_cost=not too_many)
            if last is None or not self._has_more(last.client, demand, by_cost=not too_many):
                raise self._overloaded(demand)
            self._evict(last)

    def _has_more(self, client: str, demand: Demand, *, by_cost: bool) -> bool:
        """Whether a client has more waiting, less its last, than another would have with one more."""
        queue = self._queue
        if client == demand.client:
            return False
        if by_cost:
            return queue.cost_of(client) > queue.cost_of(demand.client) + demand.num_tokens
        return queue.length_of(client) > queue.length_of(demand.client) + 1

    def _evict(self, entry: Entry[_Waiter]) -> None:
        error = self._overloaded(entry.item.demand)
        self._queue.remove(entry)
        if not entry.item.granted.done():
            entry.item.granted.set_exception(error)

    def _overloaded(self, demand: Demand) -> OverloadedError:
        limits, delay_s = self._limits, self._retry_delay_s(demand.num_tokens)
        return OverloadedError(
            f"the queue holds {self.queued_requests} sequences ({self.queued_tokens} tokens), limits "
            f"{limits.max_queued_requests} ({limits.max_queued_tokens}); retry in {delay_s:.2f} s",
            metadata={
                "value": f"{self.queued_tokens + demand.num_tokens}",
                "limit": f"{limits.max_queued_tokens}",
                "queued_requests": f"{self.queued_requests}",
                "max_queued_requests": f"{limits.max_queued_requests}",
            },
            retry_delay_s=delay_s,
        )

    def _retry_delay_s(self, num_tokens: int) -> float:
        """Seconds until the work ahead should be through, at the rate of late."""
        tokens_per_s = self._throughput.tokens_per_s
        if tokens_per_s is None:
            return _NOT_READY_RETRY_DELAY_S
        delay_s = (self.inflight_tokens + self.queued_tokens + num_tokens) / tokens_per_s
        return min(max(delay_s, _MIN_RETRY_DELAY_S), _MAX_RETRY_DELAY_S)

    def _fits(self, demand: Demand) -> bool:
        return (
            self.inflight_requests < self._limits.max_inflight_requests
            and self.inflight_tokens + demand.num_tokens <= self._limits.max_inflight_tokens
            and (self._memory is None or self._memory.fits(demand.price))
        )

    def _has_share(self, demand: Demand) -> bool:
        limit = self._limits.max_client_inflight_requests
        return limit is None or self._inflight_of[demand.account] < limit

    def _take(self, demand: Demand) -> None:
        if self.inflight_requests == 0:
            self._throughput.began(time.monotonic())
        self.inflight_requests += 1
        self.inflight_tokens += demand.num_tokens
        self._inflight_of[demand.account] += 1
        if self._memory is not None:
            self._memory.take(demand.price)

    def _give_back(self, demand: Demand) -> None:
        self.inflight_requests -= 1
        self.inflight_tokens -= demand.num_tokens
        self._inflight_of[demand.account] -= 1
        if not self._inflight_of[demand.account]:
            del self._inflight_of[demand.account]
        if self._memory is not None:
            self._memory.give_back(demand.price)

    def _release(self, demand: Demand, *, finished: bool) -> None:
        self._throughput.passed(demand.num_tokens if finished else 0, time.monotonic())
        self._give_back(demand)
        self._grant()

    def _grant(self) -> None:
        while (first := self._queue.first(may_go=self._may_go)) is not None and self._fits(first.item.demand):
            if first.item.granted.cancelled():
                return  # it is about to leave, and grants what comes after it then
            self._queue.take(first)
            self._take(first.item.demand)
            first.item.granted.set_result(None)

    def _may_go(self, waiter: _Waiter) -> bool:
        return self._has_share(waiter.demand)


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
