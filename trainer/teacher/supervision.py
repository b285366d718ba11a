"""The life of one replica, as long as the client lives: connect, check, admit, watch, and from the start again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from protos.manifest import Manifest
from trainer.errors import (
    TeacherAnswerError,
    TeacherDeadlineError,
    TeacherError,
    TeacherMismatchError,
    TeacherOverloadedError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from trainer.teacher.canary import Canary
from trainer.teacher.channel import Endpoint
from trainer.teacher.compatibility import check_unchanged
from trainer.teacher.credentials import Identity
from trainer.teacher.failures import NOT_SERVING, not_serving
from trainer.teacher.replica import Read, Replica, ReplicaState
from trainer.teacher.retry import RetryPolicy

_log = structlog.get_logger(__name__)

_RECONNECT = RetryPolicy(initial_delay_s=0.1, max_delay_s=5.0)
_MAX_MISSES = 2
"""Health checks without an answer, one after the other, that take a replica out of rotation: one alone may be a
teacher whose processor is busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What a replica must be, and how often that is looked at."""

    manifest: Manifest
    """The one that was checked on entering."""
    canary: Canary
    """The sequence with a known answer."""
    identity: Identity
    """What the client shows."""
    read: Read
    """Checks answers."""
    connect_timeout_s: float
    """Deadline of the manifest and of the first health check."""
    timeout_s: float
    """Deadline of the canary: it may have to wait in a busy teacher's queue."""
    health_period_s: float
    """A replica that is dead or silent is out of rotation after about two of these."""
    canary_period_s: float
    """Time between two looks at manifest and canary, and between two looks at a replica in quarantine."""


class Supervisor:
    """Keeps one replica's state true. `run` never returns; cancelling it closes the channel."""

    def __init__(self, replica: Replica, checks: Checks, *, has_elsewhere: Callable[[], bool]) -> None:
        """Do nothing yet.

        Args:
            replica: whose life it is.
            checks: what it must pass.
            has_elsewhere: whether another replica serves, so that attempts can be made there.
        """
        self._replica, self._checks = replica, checks
        self._name = replica.name
        self._has_elsewhere = has_elsewhere
        self._reported: tuple[str, str] | None = None

    async def run(self) -> None:
        """Connect, check, admit and watch, again and again."""
        num_failures = 0
        while True:
            started_s = monotonic()
            try:
                await self._one_connection()
                continue  # a quarantine whose time is over: look again
            except TeacherError as error:
                # a mismatch has been reported, and waits until its own time is over
                self._replica.withdraw(error, ReplicaState.CONNECTING)
                num_failures = 1 if monotonic() - started_s > _RECONNECT.max_delay_s else num_failures + 1
                delay_s = _RECONNECT.delay_s(
                    num_failures,
                    draw=random.random(),  # noqa: S311 jitter is no secret
                    retry_delay_s=error.retry_delay_s,
                )
                level = _log.warning if num_failures == 1 else _log.debug
                level("teacher replica is not serving", endpoint=self._name, reason=error.reason, error=str(error))
            await asyncio.sleep(delay_s)

    async def _one_connection(self) -> None:
        """From the first word to the last; returns when a quarantine is over, raises what ended it otherwise."""
        checks = self._checks
        async with Endpoint.for_manifest(
            self._name, connect_timeout_s=checks.connect_timeout_s, identity=checks.identity
        ) as endpoint:
            try:
                if not await endpoint.is_serving(timeout_s=checks.connect_timeout_s):
                    raise not_serving(self._name)
                await self._check_manifest(endpoint)
            except TeacherMismatchError as error:
                await self._quarantine(endpoint, error)
                return
        async with Endpoint.for_scoring(
            self._name, checks.manifest, connect_timeout_s=checks.connect_timeout_s, identity=checks.identity
        ) as endpoint:
            try:
                await self._check_canary(endpoint)
                await self._serve(endpoint)
            except TeacherMismatchError as error:
                await self._quarantine(endpoint, error)

    async def _check_manifest(self, endpoint: Endpoint) -> None:
        manifest = await endpoint.get_manifest(timeout_s=self._checks.connect_timeout_s)
        check_unchanged(self._name, manifest=manifest, checked=self._checks.manifest)

    async def _check_canary(self, endpoint: Endpoint) -> None:
        canary = self._checks.canary
        answer = await endpoint.score(canary.request.message, timeout_s=self._checks.timeout_s)
        canary.check(self._checks.read(answer, canary.request, self._name).sampled_logprobs, self._name)

    async def _serve(self, endpoint: Endpoint) -> None:
        """Admit the replica, and watch it until something is wrong with it."""
        self._replica.admit(endpoint)
        self._reported = None
        _log.info("teacher replica serves", endpoint=self._name)
        try:
            await _first_failure(
                self._stay_alive(endpoint),
                self._follow_health(endpoint),
                self._check_again(endpoint),
                self._probe_when_ejected(endpoint),
            )
        except TeacherError as error:
            is_other = isinstance(error, TeacherMismatchError)
            self._replica.withdraw(error, ReplicaState.QUARANTINED if is_other else ReplicaState.CONNECTING)
            if error.reason == NOT_SERVING and not self._has_elsewhere():
                await self._let_finish(endpoint)
            raise
        finally:
            self._replica.end_attempts()
            # the channel closes next, which would cancel an attempt with no word of why
            await self._replica.idle.wait()

    async def _stay_alive(self, endpoint: Endpoint) -> None:
        """Ask for its health again and again; raises once it misses too often, or does not serve."""
        period_s = self._checks.health_period_s
        num_misses = 0
        while True:
            if not num_misses:
                await self._pause(period_s / 2)
            if self._replica.impostor is not None:
                raise await self._named_mismatch(endpoint, self._replica.impostor)
            try:
                is_serving = await endpoint.is_serving(timeout_s=0.75 * period_s)
            except TeacherDeadlineError:
                num_misses += 1
                if num_misses >= _MAX_MISSES:
                    raise
                continue
            num_misses = 0
            if not is_serving:
                raise not_serving(self._name)

    async def _pause(self, delay_s: float) -> None:
        """Wait, or until an attempt on the replica gives reason to look at once."""
        suspected = self._replica.suspected
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await suspected.wait()
        suspected.clear()

    async def _named_mismatch(self, endpoint: Endpoint, impostor: TeacherMismatchError) -> TeacherError:
        """The mismatch in an answer, with the fields that differ; another error where the manifest is the right one."""
        self._replica.impostor = None
        try:
            await self._check_manifest(endpoint)
        except TeacherMismatchError as named:
            return named
        except TeacherError:
            return impostor
        return TeacherAnswerError(
            f"an answer of the teacher at {self._name} names another manifest than the teacher itself does: it was "
            "damaged on the way, or the teacher was replaced and is back",
            endpoint=self._name,
            reason="DAMAGED_ANSWER",
        )

    async def _follow_health(self, endpoint: Endpoint) -> None:
        """Raise as soon as the teacher says NOT_SERVING; return where it has no health service."""
        while True:
            try:
                await endpoint.wait_until_not_serving()
                raise not_serving(self._name)
            except TeacherRefusedError:
                return
            except TeacherError as error:
                if error.reason == NOT_SERVING:
                    raise
                self._replica.suspected.set()
            await asyncio.sleep(self._checks.health_period_s)

    async def _check_again(self, endpoint: Endpoint) -> None:
        """Look at manifest and canary from time to time."""
        while True:
            await asyncio.sleep(self._checks.canary_period_s)
            try:
                await self._check_manifest(endpoint)
                await self._check_canary(endpoint)
            except (TeacherDeadlineError, TeacherOverloadedError, TeacherUnavailableError):
                self._replica.suspected.set()  # busy or gone, which the health check tells apart

    async def _probe_when_ejected(self, endpoint: Endpoint) -> None:
        """Find out whether an ejected replica is well again with the canary, at no caller's cost."""
        while True:
            await self._replica.ejected.wait()
            await self._replica.probe(lambda: self._check_canary(endpoint))

    async def _let_finish(self, endpoint: Endpoint) -> None:
        """Leave attempts to a teacher that drains while no other could take them, for as long as it lives."""
        replica = self._replica
        while not replica.idle.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._checks.health_period_s):
                    await replica.idle.wait()
            try:
                if replica.idle.is_set() or await endpoint.is_serving(timeout_s=self._checks.health_period_s):
                    return
            except TeacherError:
                return
            if self._has_elsewhere():
                return

    async def _quarantine(self, endpoint: Endpoint, error: TeacherMismatchError) -> None:
        """Keep the replica out until the period is over, or the connection is lost: both are worth another look."""
        self._replica.withdraw(error, ReplicaState.QUARANTINED)
        found = (error.reason, error.metadata.get("digest", ""))
        if found != self._reported:
            self._reported = found
            _log.error("teacher replica quarantined", endpoint=self._name, reason=error.reason, error=str(error))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._checks.canary_period_s):
                await self._stay_alive(endpoint)


async def _first_failure(*watches: Coroutine[Any, Any, None]) -> None:
    """Run all at once until one fails, and raise its failure.

    Not a TaskGroup: one that is cancelled while a task of its own fails raises the failure, and its owner lives on.
    """
    tasks = [asyncio.create_task(watch) for watch in watches]
    try:
        for done in asyncio.as_completed(tasks):
            await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
