"""Repeated requests: one that is under way is joined, one that was answered a short while ago is answered again.

A request is known again by its idempotency key, and its content must be the same. Whose it is does not matter: equal
content has equal answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.errors import IdempotencyKeyReusedError, OverloadedError
from teacher_service.offload import off_loop
from teacher_service.telemetry import AnswerSource, Progress, RequestRecord
from teacher_service.types import ScoreJob

MAX_WAITERS = 16
"""Requests that may wait for one computation: retries of a caller that gave up waiting, and not a flood."""
KEPT_OBJECTS_BYTES = 2048
"""What keeping an answer takes beside its numbers: key, digest, array headers, places in tables."""
_RETRY_DELAY_S = 1.0
_MAX_ECHO = 32

Compute = Callable[[Progress], Awaitable[ScoreArrays]]
"""Scores one sequence, and says how far it is."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptAnswer:
    """An answer that was given."""

    content_digest: bytes
    """Of the request that it answers."""
    scores: ScoreArrays
    """The answer."""
    num_bytes: int
    """Memory that it takes."""
    expires_s: float
    """When it is dropped, by the cache's clock."""


class AnswerCache:
    """Answers by key, the oldest dropped first: after some seconds, or where their bytes are needed."""

    def __init__(
        self,
        *,
        max_bytes: int,
        max_age_s: float,
        room_bytes: Callable[[], int],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty cache.

        Args:
            max_bytes: of all answers together; 0: none is kept.
            max_age_s: seconds that an answer is kept; 0: none is kept.
            room_bytes: memory that there is for them right now.
            now_s: a clock.
        """
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._room_bytes = room_bytes
        self._now_s = now_s
        # in order of arrival, which is also that of expiry
        self._kept: dict[str, KeptAnswer] = {}
        self.num_bytes = 0
        """Memory that all answers take."""

    def get(self, key: str) -> KeptAnswer | None:
        """The answer under a key; None: there is none, or none any more."""
        self.trim()
        return self._kept.get(key)

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much could be kept, be it instead of all else."""
        return self._max_age_s > 0 and num_bytes <= self._limit_bytes

    def keep(self, key: str, content_digest: bytes, scores: ScoreArrays) -> None:
        """Keep an answer whose arrays own their memory; one for which there is no room is let go."""
        num_bytes = kept_bytes(scores)
        if not self.has_room(num_bytes):
            return
        self._drop(key)
        self._kept[key] = KeptAnswer(
            content_digest=content_digest,
            scores=scores,
            num_bytes=num_bytes,
            expires_s=self._now_s() + self._max_age_s,
        )
        self.num_bytes += num_bytes
        self.trim()

    def trim(self) -> None:
        """Drop what is too old, and the oldest where there is less room than they take."""
        now_s, limit_bytes = self._now_s(), self._limit_bytes
        while self._kept:
            key = next(iter(self._kept))
            if self.num_bytes <= limit_bytes and now_s < self._kept[key].expires_s:
                return
            self._drop(key)

    @property
    def _limit_bytes(self) -> int:
        return min(self._max_bytes, self._room_bytes())

    def _drop(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes


@dataclass(slots=True, eq=False)
class _Computation:
    """One that is under way."""

    content_digest: bytes
    progress: Progress = field(default_factory=Progress)
    num_waiters: int = 0
    task: asyncio.Task[ScoreArrays] = field(init=False)


class Deduplicator:
    """Computes once what is asked for several times under one key. Belongs to one event loop."""

    def __init__(self, cache: AnswerCache) -> None:
        self._cache = cache
        self._under_way: dict[str, _Computation] = {}

    @property
    def num_joined(self) -> int:
        """Requests that wait for a computation beside the one that it would be made for."""
        return sum(one.num_waiters - 1 for one in self._under_way.values())

    async def answer(self, key: str, content_digest: bytes, compute: Compute, record: RequestRecord) -> ScoreArrays:
        """An equal request's answer, kept or under way; where there is none, it is computed.

        Cancelling a call leaves the computation to the others who wait for it; the last one takes it along. A failure
        is told to all of them, and not remembered.

        Args:
            key: names the request.
            content_digest: of what it asks for, see `content_digest`.
            compute: computes it; cancelled once nobody waits any more.
            record: told where the answer came from and how long it took.

        Raises:
            IdempotencyKeyReusedError: the key names a request of other content.
            OverloadedError: too many wait for this answer.
            TeacherServiceError: what `compute` raised.
        """
        kept = self._cache.get(key)
        if kept is not None:
            _check_content(key, content_digest, kept.content_digest)
            record.source = AnswerSource.CACHE
            return kept.scores
        computation = self._under_way.get(key)
        if computation is None:
            computation = self._start(key, content_digest, compute)
        else:
            _check_content(key, content_digest, computation.content_digest)
            _check_waiters(key, computation.num_waiters)
            record.source = AnswerSource.JOINED
        return await self._wait(key, computation, record)

    def _start(self, key: str, content_digest: bytes, compute: Compute) -> _Computation:
        computation = self._under_way[key] = _Computation(content_digest)
        computation.task = asyncio.create_task(self._run(key, computation, compute))
        # a failure that comes as the last waiter leaves has nobody to be told to
        computation.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return computation

    async def _run(self, key: str, computation: _Computation, compute: Compute) -> ScoreArrays:
        try:
            scores = await compute(computation.progress)
            if self._cache.has_room(kept_bytes(scores)):
                scores = await off_loop(scores.size, lambda: owning(scores))
                # without a waiter it was given up, and the key may stand for another computation
                if computation.num_waiters:
                    self._cache.keep(key, computation.content_digest, scores)
            return scores
        finally:
            self._forget(key, computation)

    async def _wait(self, key: str, computation: _Computation, record: RequestRecord) -> ScoreArrays:
        began_s = time.perf_counter()
        task = computation.task
        computation.num_waiters += 1
        try:
            # unlike awaiting the task itself, this does not cancel it with the one who waits
            await asyncio.wait({task})
        finally:
            computation.num_waiters -= 1
            computation.progress.tell(record, since_s=began_s)
            if not computation.num_waiters and not task.done():
                self._forget(key, computation)
                task.cancel()
                # its place in the engine is free when this returns
                await asyncio.wait({task})
        return task.result()

    def _forget(self, key: str, computation: _Computation) -> None:
        # once its last waiter has left, the key may stand for a new one
        if self._under_way.get(key) is computation:
            del self._under_way[key]


def content_digest(job: ScoreJob) -> bytes:
    """SHA-256 over everything that an answer depends on."""
    digest = hashlib.sha256(
        f"{job.num_tokens} {job.score_start} {job.num_logprobs} {job.temperature!r} {job.num_candidates} "
        f"{job.return_entropy}\n".encode()
    )
    digest.update(np.ascontiguousarray(job.token_ids).data)
    if job.candidate_token_ids is not None:
        digest.update(np.ascontiguousarray(job.candidate_token_ids).data)
    return digest.digest()


def kept_bytes(scores: ScoreArrays) -> int:
    """Memory that keeping an answer takes, once its arrays own theirs."""
    return KEPT_OBJECTS_BYTES + sum(array.nbytes for array in _arrays(scores).values())


def owning(scores: ScoreArrays) -> ScoreArrays:
    """The same numbers; an array that is a window on a larger one is copied, so as not to hold on to that."""
    return ScoreArrays(
        **{name: array if array.flags.owndata else array.copy() for name, array in _arrays(scores).items()}
    )


def _arrays(scores: ScoreArrays) -> dict[str, np.ndarray]:
    values = {one.name: getattr(scores, one.name) for one in fields(scores)}
    return {name: array for name, array in values.items() if array is not None}


def _check_content(key: str, given: bytes, known: bytes) -> None:
    if given != known:
        raise IdempotencyKeyReusedError(
            f"idempotency_key {key[:_MAX_ECHO]!r} names a request of other content, which is under way or was answered "
            "a short while ago; take a new key for each request, and the same one only to repeat it unchanged",
            metadata={"field": "idempotency_key", "value": key[:_MAX_ECHO], "limit": "one content per key"},
        )


def _check_waiters(key: str, num_waiters: int) -> None:
    if num_waiters >= MAX_WAITERS:
        raise OverloadedError(
            f"{num_waiters} requests wait for the answer under idempotency_key {key[:_MAX_ECHO]!r}, limit "
            f"{MAX_WAITERS}; retry in {_RETRY_DELAY_S:g} s",
            metadata={"field": "idempotency_key", "value": f"{num_waiters}", "limit": f"{MAX_WAITERS}"},
            retry_delay_s=_RETRY_DELAY_S,
        )
