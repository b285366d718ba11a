"""The first contact: every endpoint's manifest, within a bounded wait, and the refusal of teachers that differ."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from protos.manifest import Manifest
from trainer.errors import TeacherError, TeacherMismatchError
from trainer.teacher.channel import Endpoint
from trainer.teacher.compatibility import differing_fields
from trainer.teacher.failures import NOT_READY, gave_up
from trainer.teacher.retry import RetryPolicy, failure_of, is_retryable

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long the first contact may take."""

    connect_timeout_s: float
    """For a teacher that doesn't answer."""
    wait_ready_s: float
    """For a teacher that answers that it is still loading."""
    retry: RetryPolicy
    """Waits between attempts; their number is bounded by the times above alone."""
    sleep: Callable[[float], Awaitable[None]]
    """Waits some seconds."""


async def fetch_manifests(endpoints: Sequence[str], patience: Patience) -> dict[str, Manifest]:
    """Fetch the manifest of every endpoint, all at once.

    Raises:
        TeacherError: an endpoint can't be reached, stays not ready, or answers nonsense. The others are dropped.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(_fetch_manifest(name, patience)) for name in endpoints}
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {name: task.result() for name, task in tasks.items()}


def check_same_manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    """The one manifest that all endpoints have.

    Raises:
        TeacherMismatchError: two endpoints are different teachers; the message names the fields that differ.
    """
    (first_name, first), *others = manifests.items()
    for name, manifest in others:
        if manifest.digest != first.digest:
            fields = differing_fields(first, manifest)
            words = "; ".join(f"{field}: {one} / {other}" for field, (one, other) in fields.items())
            raise TeacherMismatchError(
                f"the teachers at {first_name} and {name} differ in {words or 'fields unknown to this client'}; "
                "list endpoints that serve one model with one configuration",
                endpoint=name,
                reason="ENDPOINTS_DIFFER",
                metadata={field: f"{one} / {other}" for field, (one, other) in fields.items()},
            )
    return first


@dataclass(slots=True)
class _Contact:
    """The attempts to reach one endpoint."""

    endpoint: Endpoint
    patience: Patience
    started_s: float = field(default_factory=monotonic)
    num_attempts: int = 0

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self.started_s

    async def attempt(self) -> Manifest:
        self.num_attempts += 1
        # The first attempt may take all the time to connect; a later one what is left of it.
        left_s = max(self.patience.connect_timeout_s - self.elapsed_s, 0.1 * self.patience.connect_timeout_s)
        return await self.endpoint.get_manifest(timeout_s=left_s)

    def delay_s(self, state: RetryCallState) -> float:
        draw = random.random()  # noqa: S311 jitter is no secret
        return self.patience.retry.delay_s(
            state.attempt_number, draw=draw, retry_delay_s=failure_of(state).retry_delay_s
        )

    def is_over(self, state: RetryCallState) -> bool:
        loading = failure_of(state).reason == NOT_READY
        limit_s = self.patience.wait_ready_s if loading else self.patience.connect_timeout_s
        return self.elapsed_s + state.upcoming_sleep > limit_s

    def report(self, state: RetryCallState) -> None:
        error = failure_of(state)
        what = "teacher is still loading" if error.reason == NOT_READY else "teacher does not answer yet"
        _log.info(what, endpoint=self.endpoint.name, elapsed_s=round(self.elapsed_s, 1), reason=error.reason)


async def _fetch_manifest(name: str, patience: Patience) -> Manifest:
    endpoint = Endpoint.for_manifest(name, connect_timeout_s=patience.connect_timeout_s)
    contact = _Contact(endpoint, patience)
    retrying = AsyncRetrying(
        retry=retry_if_exception(is_retryable),
        wait=contact.delay_s,
        stop=contact.is_over,
        before_sleep=contact.report,
        sleep=patience.sleep,
        reraise=True,
    )
    try:
        return await retrying(contact.attempt)
    except TeacherError as error:
        if not is_retryable(error):
            raise
        raise gave_up(
            error,
            num_attempts=contact.num_attempts,
            elapsed_s=contact.elapsed_s,
            time_limits="connect_timeout_s",
        ) from error
    finally:
        await endpoint.close()
