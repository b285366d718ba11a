"""The first contact: who answers, within a bounded wait, and the refusal of teachers that differ."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from protos.manifest import Manifest
from trainer.errors import TeacherError, TeacherMismatchError, TeacherUnavailableError
from trainer.teacher.channel import Endpoint
from trainer.teacher.compatibility import differing_fields, words_of
from trainer.teacher.credentials import Identity
from trainer.teacher.failures import NOT_READY, gave_up
from trainer.teacher.resolver import UNRESOLVED, Naming
from trainer.teacher.retry import RetryPolicy, failure_of, is_retryable

_log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long the first contact may take."""

    connect_timeout_s: float
    """For a teacher that doesn't answer."""
    wait_ready_s: float
    """For a teacher that answers that it is still loading."""
    retry: RetryPolicy
    """Waits between attempts; their number is bounded by the times above alone."""
    identity: Identity
    """What the client shows."""


async def first_addresses(naming: Naming, patience: Patience) -> list[str]:
    """The addresses of a name, as soon as it has any.

    Raises:
        TeacherUnavailableError: it does not resolve within connect_timeout_s.
    """

    async def look_up(_timeout_s: float) -> list[str]:
        addresses = list(await naming.resolve(naming.name))
        if not addresses:
            raise TeacherUnavailableError(
                f"the name of the teacher at {naming.name} has no address", endpoint=naming.name, reason=UNRESOLVED
            )
        return addresses

    return await _Contact(naming.name, look_up, patience).run()


async def fetch_manifests(endpoints: Sequence[str], patience: Patience) -> dict[str, Manifest]:
    """Fetch manifests of all endpoints at once, those of at least one.

    Endpoints are waited for until one has answered and each of the others was heard of or asked in vain. Those that
    did not answer are logged and left out.

    Raises:
        TeacherError: not one can be reached, is ready in time, or makes sense; the first endpoint's failure.
    """
    contacts = {name: _Contact(name, _manifest_fetcher(name, patience), patience) for name in endpoints}
    tasks = {name: asyncio.create_task(contact.run()) for name, contact in contacts.items()}
    try:
        pending, found = set(tasks.values()), False
        while pending and not found:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            found = any(task.exception() is None for task in done)
        if not found:
            tasks[endpoints[0]].result()
        for contact in contacts.values():
            await contact.heard.wait()
        manifests = {name: task.result() for name, task in tasks.items() if task.done() and task.exception() is None}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    for name in endpoints:
        if name not in manifests:
            _log.warning("teacher replica does not answer; it is tried in the background", endpoint=name)
    return manifests


def check_same_manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    """The one manifest that all endpoints have.

    Raises:
        TeacherMismatchError: two endpoints are different teachers; the message names the fields that differ.
    """
    (first_name, first), *others = manifests.items()
    for name, manifest in others:
        if manifest.digest != first.digest:
            fields = differing_fields(first, manifest)
            words = words_of(fields)
            raise TeacherMismatchError(
                f"the teachers at {first_name} and {name} differ in {words or 'fields unknown to this client'}; "
                "list endpoints that serve one model with one configuration",
                endpoint=name,
                reason="ENDPOINTS_DIFFER",
                metadata={field: f"{one} / {other}" for field, (one, other) in fields.items()},
            )
    return first


class _Contact(Generic[T]):
    """The attempts to hear of one endpoint."""

    def __init__(self, name: str, attempt: Callable[[float], Awaitable[T]], patience: Patience) -> None:
        """Do nothing yet.

        Args:
            name: `host:port`.
            attempt: makes one attempt within the seconds that it is given.
            patience: how long to go on.
        """
        self._name, self._attempt_within, self._patience = name, attempt, patience
        self._started_s = monotonic()
        self._num_attempts = 0
        self.heard = asyncio.Event()
        """Set once the first attempt has ended, in whatever way."""

    async def run(self) -> T:
        """Try again and again.

        Raises:
            TeacherError: the patience is over, or another attempt can't help.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_retryable),
            wait=self._delay_s,
            stop=self._is_over,
            before_sleep=self._report,
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt)
        except TeacherError as error:
            if not is_retryable(error):
                raise
            raise gave_up(
                error,
                num_attempts=self._num_attempts,
                elapsed_s=self._elapsed_s,
                time_limits="connect_timeout_s",
            ) from error

    @property
    def _elapsed_s(self) -> float:
        return monotonic() - self._started_s

    async def _attempt(self) -> T:
        self._num_attempts += 1
        # The first attempt may take all the time to connect; a later one what is left of it.
        connect_timeout_s = self._patience.connect_timeout_s
        try:
            return await self._attempt_within(max(connect_timeout_s - self._elapsed_s, 0.1 * connect_timeout_s))
        finally:
            self.heard.set()

    def _delay_s(self, state: RetryCallState) -> float:
        draw = random.random()  # noqa: S311 jitter is no secret
        return self._patience.retry.delay_s(
            state.attempt_number, draw=draw, retry_delay_s=failure_of(state).retry_delay_s
        )

    def _is_over(self, state: RetryCallState) -> bool:
        loading = failure_of(state).reason == NOT_READY
        limit_s = self._patience.wait_ready_s if loading else self._patience.connect_timeout_s
        return self._elapsed_s + state.upcoming_sleep > limit_s

    def _report(self, state: RetryCallState) -> None:
        error = failure_of(state)
        what = "teacher is still loading" if error.reason == NOT_READY else "teacher does not answer yet"
        _log.info(what, endpoint=self._name, elapsed_s=round(self._elapsed_s, 1), reason=error.reason)


def _manifest_fetcher(name: str, patience: Patience) -> Callable[[float], Awaitable[Manifest]]:
    async def fetch(timeout_s: float) -> Manifest:
        async with Endpoint.for_manifest(
            name, connect_timeout_s=patience.connect_timeout_s, identity=patience.identity
        ) as endpoint:
            return await endpoint.get_manifest(timeout_s=timeout_s)

    return fetch
