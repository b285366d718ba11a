"""All replicas of a teacher: which there are, which may be asked, and the wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from trainer.errors import TeacherError, TeacherMismatchError, TeacherUnavailableError
from trainer.teacher.balancer import Balancer, work_of
from trainer.teacher.replica import Replica, ReplicaState, ReplicaStatus
from trainer.teacher.request import CheckedRequest
from trainer.teacher.resolver import Naming
from trainer.teacher.retry import is_retryable
from trainer.teacher.supervision import Checks, Supervisor

_log = structlog.get_logger(__name__)

_SHORTEST_RESOLVE_S = 1.0
"""Least time between two lookups: a replica that flaps shall not become a burden to the name server."""
_SETTLE_S = 1.0
"""How long entering waits for a second replica once it has one, so that the first calls are spread."""


@dataclass(slots=True, eq=False)
class _Wait:
    """A call that waits for a replica."""

    since_s: float
    give_up_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    replica: Replica
    supervision: asyncio.Task[None]


class Pool:
    """Supervised replicas, and the choice among them. Made in the event loop that the calls run in."""

    def __init__(
        self,
        names: Iterable[str],
        checks: Checks,
        *,
        naming: Naming | None,
        report_period_s: float,
    ) -> None:
        """Begin to connect.

        Args:
            names: `host:port` of the replicas that are known.
            checks: what each must pass.
            naming: where to look for others; None: these are all.
            report_period_s: time between two progress lines while calls wait.
        """
        self._checks = checks
        self._balancer = Balancer()
        self._members: dict[str, _Member] = {}
        self._draining: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: set[_Wait] = set()
        self._changed = asyncio.Event()
        self._went_down = asyncio.Event()
        self._someone_waits = asyncio.Event()
        self._report_period_s = report_period_s
        for name in names:
            self._add(name)
        self._spawn(self._report_waits())
        if naming is not None:
            self._spawn(self._follow_name(naming))

    @property
    def replicas(self) -> list[Replica]:
        """Every replica, those that drain last."""
        return [*(member.replica for member in self._members.values()), *self._draining]

    @property
    def is_serving(self) -> bool:
        """Whether some replica is checked, there, and not ejected."""
        return any(replica.state is ReplicaState.SERVING for replica in self.replicas)

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Every replica at this moment."""
        return tuple(replica.status(monotonic()) for replica in self.replicas)

    async def wait_serving(self, timeout_s: float) -> None:
        """Wait until a replica was admitted, and for a moment until the others were or failed.

        Raises:
            TeacherError: none was within the time, or each failed for good; the first one's failure.
        """
        give_up_s = monotonic() + timeout_s
        while not any(replica.is_admitted for replica in self.replicas):
            errors = [replica.last_error for replica in self.replicas if replica.last_error is not None]
            all_lasting = len(errors) == len(self._members) and not any(is_retryable(error) for error in errors)
            left_s = give_up_s - monotonic()
            if errors and (all_lasting or left_s <= 0):
                raise errors[0]
            if left_s <= 0:
                raise self.nobody_serves()
            await self._next_change(left_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while not all(replica.is_admitted or replica.last_error for replica in self.replicas):
                    await self._changed.wait()

    def may_ask(self, *, besides: Set[str]) -> bool:
        """Whether a replica other than these admits an attempt now."""
        now_s = monotonic()
        return any(one.replica.admits(now_s) for name, one in self._members.items() if name not in besides)

    async def acquire(
        self, asked: CheckedRequest, *, affinity: str | None, avoid: Set[str], give_up_s: float
    ) -> Replica:
        """The replica for an attempt, as soon as one admits it. To be asked at once, before anything else is awaited.

        Args:
            asked: what it will be asked.
            affinity: requests that share it go to one replica where they can.
            avoid: replicas to ask only where no other admits an attempt.
            give_up_s: when the call's time is over, for the progress line.
        """
        if (replica := self._pick(asked, affinity, avoid)) is not None:
            return replica
        with self._waiting(give_up_s):
            while True:
                await self._next_change(self._next_opening_s())
                if (replica := self._pick(asked, affinity, avoid)) is not None:
                    return replica

    def nobody_serves(self) -> TeacherError:
        """The error of a call that waited for a replica in vain."""
        replicas = self.replicas
        words = "; ".join(_in_words(one) for one in self.statuses()) or "no replica is known"
        errors = [replica.last_error for replica in replicas if replica.last_error is not None]
        last = errors[0] if errors else None
        is_other = bool(replicas) and all(replica.state is ReplicaState.QUARANTINED for replica in replicas)
        cls = TeacherMismatchError if is_other else TeacherUnavailableError
        return cls(
            f"no replica of the teacher serves: {words}",
            endpoint=", ".join(replica.name for replica in replicas),
            reason="NO_REPLICA" if last is None else last.reason,
            metadata=None if last is None else last.metadata,
        )

    async def close(self) -> None:
        """End all supervision and close every channel."""
        tasks = [*self._tasks, *(member.supervision for member in self._members.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def update(self, names: Iterable[str]) -> None:
        """Take these as the replicas from now on: new ones are connected, those that are gone are drained."""
        wanted = list(names)
        gone = [name for name in self._members if name not in wanted]
        for name in wanted:
            if name not in self._members:
                self._add(name)
        for name in gone:
            self._spawn(self._drain(self._members.pop(name)))
        self._notify()

    def _add(self, name: str) -> None:
        replica = Replica(
            name,
            read=self._checks.read,
            timeout_s=self._checks.timeout_s,
            on_change=self._notify,
            on_down=self._went_down.set,
        )
        supervisor = Supervisor(replica, self._checks, has_elsewhere=lambda: self._serves_besides(replica))
        supervision = asyncio.create_task(supervisor.run())
        supervision.add_done_callback(_report_crash)
        self._members[name] = _Member(replica=replica, supervision=supervision)

    async def _drain(self, member: _Member) -> None:
        _log.info("teacher replica is gone from the addresses", endpoint=member.replica.name)
        member.replica.drain()
        self._draining.add(member.replica)
        try:
            await member.replica.idle.wait()
        finally:
            member.supervision.cancel()
            await asyncio.gather(member.supervision, return_exceptions=True)
            self._draining.discard(member.replica)

    def _serves_besides(self, replica: Replica) -> bool:
        return any(other.is_admitted for other in self.replicas if other is not replica)

    def _pick(self, asked: CheckedRequest, affinity: str | None, avoid: Set[str]) -> Replica | None:
        now_s = monotonic()
        admitting = {name: one.replica.load for name, one in self._members.items() if one.replica.admits(now_s)}
        others = {name: load for name, load in admitting.items() if name not in avoid}
        name = self._balancer.pick(others or admitting, work=work_of(asked.num_tokens), affinity=affinity, now_s=now_s)
        return None if name is None else self._members[name].replica

    def _next_opening_s(self) -> float | None:
        """Seconds until time alone lets a replica admit an attempt; None where that takes a change."""
        now_s = monotonic()
        openings = [one.replica.opens_at_s() for one in self._members.values()]
        return min((max(at_s - now_s, 0.0) for at_s in openings if at_s is not None), default=None)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    @contextmanager
    def _waiting(self, give_up_s: float) -> Iterator[None]:
        wait = _Wait(since_s=monotonic(), give_up_s=give_up_s)
        self._waits.add(wait)
        self._someone_waits.set()
        try:
            yield
        finally:
            self._waits.discard(wait)
            if not self._waits:
                self._someone_waits.clear()

    async def _report_waits(self) -> None:
        """One line per period for all calls that wait, however many they are."""
        while True:
            await self._someone_waits.wait()
            await asyncio.sleep(self._report_period_s)
            if not self._waits:
                continue
            now_s = monotonic()
            waited_s = now_s - min(wait.since_s for wait in self._waits)
            if waited_s < 0.9 * self._report_period_s:  # others wait now than when the line fell due
                continue
            gives_up_s = [wait.give_up_s - now_s for wait in self._waits]
            _log.warning(
                "calls wait for a teacher",
                num_waiting=len(self._waits),
                waited_s=round(waited_s, 1),
                first_gives_up_in_s=round(min(gives_up_s), 1),
                last_gives_up_in_s=round(max(gives_up_s), 1),
                replicas=[_in_words(status) for status in self.statuses()],
            )

    async def _follow_name(self, naming: Naming) -> None:
        """Look the name up each period, and soon after a replica went down."""
        while True:
            await asyncio.sleep(min(_SHORTEST_RESOLVE_S, naming.period_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(naming.period_s):
                    await self._went_down.wait()
            self._went_down.clear()
            try:
                found = await naming.resolve(naming.name)
            except TeacherUnavailableError as error:
                _log.warning("the teacher's name does not resolve; its replicas stay as they are", error=str(error))
                continue
            if found:
                self.update(found)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report_crash)


def _in_words(status: ReplicaStatus) -> str:
    why = "" if status.state is ReplicaState.SERVING or status.last_error is None else f" ({status.last_error})"
    return f"{status.name} is {status.state}{why}"


def _report_crash(task: asyncio.Task[None]) -> None:
    """A supervision ends by cancellation alone; anything else is a defect that must not pass in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("supervision of the teacher's replicas crashed", error=repr(error), exc_info=error)
