"""One replica as its callers see it: its state, its load, its attempts under way. `supervision.py` keeps it alive."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

import structlog

from protos.arrays import ScoreArrays
from protos.teacher.v1 import teacher_pb2 as pb
from trainer.errors import (
    TeacherDeadlineError,
    TeacherError,
    TeacherMismatchError,
    TeacherOverloadedError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from trainer.teacher.balancer import Load, work_of
from trainer.teacher.breaker import Breaker, Permit
from trainer.teacher.channel import Endpoint
from trainer.teacher.failures import WENT_DOWN, went_down
from trainer.teacher.request import CheckedRequest

_log = structlog.get_logger(__name__)

Read = Callable[[pb.ScoreResponse, CheckedRequest, str], ScoreArrays]
"""Checks a replica's answer to a request and unpacks it; raises TeacherAnswerError or TeacherMismatchError."""


class ReplicaState(enum.StrEnum):
    """What a replica is to its client."""

    CONNECTING = "connecting"
    """Not there, not ready, or not checked yet; it is tried again and again."""
    SERVING = "serving"
    """Checked, and asked."""
    EJECTED = "ejected"
    """Checked, but it failed too often: asked again once it answers the canary."""
    QUARANTINED = "quarantined"
    """Another teacher than was checked, or one that answers the canary otherwise; checked again from time to time."""
    DRAINING = "draining"
    """No longer among the addresses: it ends what it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStatus:
    """A replica at one moment."""

    name: str
    """`host:port`."""
    state: ReplicaState
    """What it is to the client."""
    num_inflight: int
    """Attempts under way."""
    latency_s: float | None
    """Seconds that an attempt takes of late; None where none was answered lately."""
    last_error: str | None
    """Why it is not serving, or what failed last; None where it never failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A checked answer."""

    endpoint: str
    """`host:port` that answered."""
    message: pb.ScoreResponse
    """As it came."""
    scores: ScoreArrays
    """Its arrays."""


class Replica:
    """One replica. Made in the event loop that its calls run in."""

    def __init__(
        self, name: str, *, read: Read, timeout_s: float, on_change: Callable[[], None], on_down: Callable[[], None]
    ) -> None:
        """A replica that is not connected yet.

        Args:
            name: `host:port`.
            read: checks answers.
            timeout_s: a full attempt's deadline; missing a shorter one is not the replica's failure.
            on_change: called when it may have become free or been admitted.
            on_down: called when it went out of rotation.
        """
        self.name = name
        self.load = Load()
        self.breaker = Breaker()
        self.idle = asyncio.Event()
        """Set while no attempt is under way."""
        self.suspected = asyncio.Event()
        """Set by an attempt that failed as if nobody were there: the supervision looks at once."""
        self.ejected = asyncio.Event()
        """Set while it is ejected: the supervision probes it."""
        self.impostor: TeacherMismatchError | None = None
        """An answer that came from another teacher, for the supervision."""
        self.last_error: TeacherError | None = None
        """What failed last."""
        self._state = ReplicaState.CONNECTING
        self._endpoint: Endpoint | None = None
        self._attempts: set[asyncio.Timeout] = set()
        self._read, self._timeout_s = read, timeout_s
        self._on_change, self._on_down = on_change, on_down
        self.idle.set()

    @property
    def state(self) -> ReplicaState:
        """What it is to the client."""
        if self._state is ReplicaState.SERVING and not self.breaker.is_closed:
            return ReplicaState.EJECTED
        return self._state

    @property
    def is_admitted(self) -> bool:
        """Whether it was checked and is there, though it may be ejected or busy."""
        return self._state is ReplicaState.SERVING

    def status(self, now_s: float) -> ReplicaStatus:
        """What it is at this moment."""
        return ReplicaStatus(
            name=self.name,
            state=self.state,
            num_inflight=self.load.num_inflight,
            latency_s=self.load.latency.at(now_s) or None,
            last_error=None if self.last_error is None else self.last_error.message,
        )

    def admits(self, now_s: float) -> bool:
        """Whether an attempt may be made now."""
        return self.is_admitted and now_s >= self.load.busy_until_s and self.breaker.is_closed

    def opens_at_s(self) -> float | None:
        """When it will admit an attempt again; None where that is not a matter of time."""
        return self.load.busy_until_s if self.is_admitted and self.breaker.is_closed else None

    def admit(self, endpoint: Endpoint) -> None:
        """It is checked: callers may ask over this channel from now on."""
        if self._state is ReplicaState.DRAINING:
            return
        if not self.breaker.is_closed:
            self._recover(self.breaker.begin())
        self._endpoint = endpoint
        self._state = ReplicaState.SERVING
        self.suspected.clear()
        self.impostor = None
        self._on_change()

    def withdraw(self, error: TeacherError, state: ReplicaState) -> None:
        """It is out of rotation; attempts under way go on until `end_attempts`."""
        self.last_error = error
        if self._state is ReplicaState.DRAINING:
            return
        was_admitted = self.is_admitted
        self._state = state
        if was_admitted:
            self._on_down()
        self._on_change()

    def drain(self) -> None:
        """It gets no new attempts, for good."""
        self._state = ReplicaState.DRAINING
        self._on_change()

    def end_attempts(self) -> None:
        """End every attempt under way with TeacherUnavailableError, so that it is made elsewhere."""
        for scope in self._attempts:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())

    async def probe(self, check: Callable[[], Awaitable[None]]) -> None:
        """Check an ejected replica when its time is up; if it is well, callers may ask again.

        Raises:
            TeacherMismatchError: it has become another teacher.
        """
        probe_at_s = self.breaker.probe_at_s
        if probe_at_s is None:
            raise AssertionError(f"the replica {self.name} was probed while in use")
        await asyncio.sleep(max(probe_at_s - monotonic(), 0.0))
        permit = self.breaker.begin()
        try:
            await check()
        except TeacherMismatchError:
            raise
        except TeacherOverloadedError as error:  # busy, which is no illness: asked again after its delay
            await asyncio.sleep(error.retry_delay_s or 1.0)
        except TeacherError as error:
            self.last_error = error
            self.breaker.failed(permit, monotonic())
        else:
            self._recover(permit)
            _log.info("teacher replica is well again", endpoint=self.name)
            self._on_change()

    def _recover(self, permit: Permit) -> None:
        self.breaker.succeeded(permit)
        self.load.forget()
        self.ejected.clear()

    async def ask(self, asked: CheckedRequest, *, timeout_s: float) -> Answer:
        """Make one attempt, of which `admits` said that it may be made, and learn from its outcome.

        Raises:
            TeacherError: it failed, or the answer is wrong.
        """
        endpoint = self._endpoint
        if endpoint is None:
            raise AssertionError(f"the replica {self.name} was asked before it was admitted")
        work = work_of(asked.num_tokens)
        permit, outstanding, started_s = self.breaker.begin(), self.load.begin(work), monotonic()
        try:
            answer = await self._answer(endpoint, asked, timeout_s)
        except asyncio.CancelledError:
            self.load.unanswered(monotonic() - started_s, outstanding, monotonic())
            raise
        except TeacherError as error:
            if isinstance(error, TeacherDeadlineError):
                self.load.unanswered(monotonic() - started_s, outstanding, monotonic())
            self._learn(error, permit, was_cut_short=timeout_s < self._timeout_s)
            raise
        else:
            self.breaker.succeeded(permit)
            self.load.answered(monotonic() - started_s, outstanding, monotonic())
            return answer
        finally:
            self.load.end(work)
            self._on_change()

    async def _answer(self, endpoint: Endpoint, asked: CheckedRequest, timeout_s: float) -> Answer:
        try:
            async with asyncio.timeout(None) as scope:
                self._attempts.add(scope)
                self.idle.clear()
                try:
                    message = await endpoint.score(asked.message, timeout_s=timeout_s)
                finally:
                    self._attempts.discard(scope)
                    if not self._attempts:
                        self.idle.set()
        except TimeoutError as exc:
            cause = "no cause known" if self.last_error is None else self.last_error.message
            raise went_down(self.name, cause) from exc
        return Answer(endpoint=self.name, message=message, scores=self._read(message, asked, self.name))

    def _learn(self, error: TeacherError, permit: Permit, *, was_cut_short: bool) -> None:
        now_s = monotonic()
        match error:
            case TeacherOverloadedError():
                # It does what it can: it is left alone for as long as it asks, not ejected.
                self.load.busy_until_s = max(self.load.busy_until_s, now_s + (error.retry_delay_s or 0.0))
            case TeacherRefusedError():
                self.breaker.succeeded(permit)
            case TeacherMismatchError():
                self.impostor = error
                self.withdraw(error, ReplicaState.QUARANTINED)
                self.suspected.set()
            case TeacherDeadlineError() if was_cut_short:
                pass
            case TeacherUnavailableError() if error.reason == WENT_DOWN:  # the supervision knows why
                pass
            case _:
                if self.is_admitted:
                    self.last_error = error
                self.suspected.set()
                if self.breaker.failed(permit, now_s):
                    self.ejected.set()
                    _log.warning("teacher replica ejected", endpoint=self.name, reason=error.reason, error=str(error))
