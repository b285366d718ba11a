"""What a client has between entering and closing: the checked teacher, its replicas, and the calls under way."""

from __future__ import annotations

from contextlib import AsyncExitStack
from time import monotonic
from typing import Self

import structlog

from protos.arrays import ScoreArrays
from protos.manifest import Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from trainer.errors import TeacherClosedError, TeacherDeadlineError, TeacherError, TeacherOverloadedError
from trainer.teacher.attempts import Attempts, Call
from trainer.teacher.budget import RetryBudget
from trainer.teacher.canary import Canary
from trainer.teacher.compatibility import check_compatibility, manifest_changed
from trainer.teacher.connect import Patience, check_same_manifest, fetch_manifests, first_addresses
from trainer.teacher.credentials import Identity
from trainer.teacher.failures import gave_up
from trainer.teacher.inflight import Inflight
from trainer.teacher.joining import JoinedCalls
from trainer.teacher.pool import Pool
from trainer.teacher.replica import Answer
from trainer.teacher.request import CheckedRequest, read_answer
from trainer.teacher.settings import ClientSettings
from trainer.teacher.supervision import Checks
from trainer.types import TeacherScores, TeacherTimings

_log = structlog.get_logger(__name__)

_LEAST_BURST = 10
"""Retries that may be made at once, however few calls a client has; otherwise as many as it has calls."""


class Session:
    """An entered client's teacher. Made by `open`, in the event loop that the calls run in."""

    def __init__(self, settings: ClientSettings, manifest: Manifest, canary: Canary, pool: Pool) -> None:
        self.manifest, self.canary, self.pool = manifest, canary, pool
        self.inflight = Inflight(settings.max_inflight)
        self.joined: JoinedCalls[TeacherScores] = JoinedCalls()
        self._settings = settings
        self._attempts = Attempts(
            pool,
            retry=settings.retry,
            timeout_s=settings.timeout_s,
            budget=RetryBudget(now_s=monotonic(), burst=max(settings.max_inflight, _LEAST_BURST)),
            hedge_percentile=settings.hedge_percentile,
        )
        self._is_closing = False

    @classmethod
    async def open(cls, settings: ClientSettings) -> Self:
        """Fetch and check the manifests, and connect until one replica is admitted.

        Raises:
            TeacherError: see `TeacherClient.__aenter__`.
        """
        identity = settings.identity()
        patience = Patience(
            connect_timeout_s=settings.connect_timeout_s,
            wait_ready_s=settings.wait_ready_s,
            retry=settings.retry,
            identity=identity,
        )
        naming = settings.naming
        names = list(settings.endpoints) if naming is None else await first_addresses(naming, patience)
        manifest = check_same_manifest(await fetch_manifests(names, patience))
        _check_manifest(manifest, settings)
        canary = Canary(manifest, tolerance=settings.canary_tolerance, reference=settings.canary_reference)
        async with AsyncExitStack() as stack:
            checks = _checks(settings, manifest, canary, identity)
            pool = Pool(names, checks, naming=naming, report_period_s=settings.report_period_s)
            stack.push_async_callback(pool.close)
            await pool.wait_serving(settings.connect_timeout_s + settings.timeout_s)
            stack.pop_all()
        _log.info("teacher connected", endpoints=names, model=manifest.model_name, engine=manifest.engine)
        return cls(settings, manifest, canary, pool)

    async def close(self) -> None:
        """End the calls under way with TeacherClosedError, and all supervision."""
        self._is_closing = True
        await self.inflight.end_all()
        await self.joined.wait_ended()
        await self.pool.close()

    async def run(self, call: Call) -> TeacherScores:
        """Make a call, within its deadline.

        Raises:
            TeacherError: see `TeacherClient.score`.
        """
        if self._is_closing:
            raise self._ended_early(call)
        try:
            async with self.inflight.slot(call.deadline_s):
                call.waited_s = call.elapsed_s
                answer = await self._attempts.run(call)
        except TimeoutError as exc:
            raise self._ended_early(call) from exc
        return _scores_of(answer, call)

    def _ended_early(self, call: Call) -> TeacherError:
        """The error of a call whose slot was taken away: by close, or by its deadline."""
        last = call.last_error
        endpoint = self._settings.where if last is None else last.endpoint
        if self._is_closing:
            return TeacherClosedError(
                f"the teacher client was closed {call.elapsed_s:.1f} s into a call; wait for calls before closing",
                endpoint=endpoint,
                reason="CLOSED",
            )
        if call.ended_waiting:
            error = last if isinstance(last, TeacherOverloadedError) else self.pool.nobody_serves()
            return gave_up(
                error, num_attempts=call.num_attempts, elapsed_s=call.elapsed_s, time_limits="total_timeout_s"
            )
        waited = "" if call.num_attempts else f", all spent waiting for one of {self._settings.max_inflight} slots"
        failure = "" if last is None else f"; the last failure: {last.message}"
        return TeacherDeadlineError(
            f"no answer from the teacher at {endpoint} within total_timeout_s = {self._settings.total_timeout_s:g} s "
            f"({call.num_attempts} attempts{waited}){failure}; raise total_timeout_s, or add a teacher",
            endpoint=endpoint,
            reason="DEADLINE_EXCEEDED",
        )


def _check_manifest(manifest: Manifest, settings: ClientSettings) -> None:
    if settings.expected_digest not in (None, manifest.digest):
        raise manifest_changed(settings.where, digest=manifest.digest, checked=settings.expected_digest)
    check_compatibility(
        manifest,
        settings.student,
        endpoint=settings.where,
        num_logprobs=settings.plan.num_logprobs,
        temperature=settings.plan.temperature,
        max_tokens=settings.plan.max_tokens,
    )


def _checks(settings: ClientSettings, manifest: Manifest, canary: Canary, identity: Identity) -> Checks:
    student_vocab_rows = None if settings.student is None else settings.student.vocab_rows

    def read(answer: pb.ScoreResponse, asked: CheckedRequest, endpoint: str) -> ScoreArrays:
        return read_answer(answer, asked, manifest=manifest, endpoint=endpoint, student_vocab_rows=student_vocab_rows)

    return Checks(
        manifest=manifest,
        canary=canary,
        identity=identity,
        read=read,
        connect_timeout_s=settings.connect_timeout_s,
        timeout_s=settings.timeout_s,
        health_period_s=settings.health_period_s,
        canary_period_s=settings.canary_period_s,
    )


def _scores_of(answer: Answer, call: Call) -> TeacherScores:
    scores, timings = answer.scores, answer.message.timings
    return TeacherScores(
        sampled_logprobs=scores.sampled_logprobs,
        topk_token_ids=scores.topk_token_ids,
        topk_logprobs=scores.topk_logprobs,
        log_tail_mass=scores.log_tail_mass,
        entropy=scores.entropy,
        candidate_logprobs=scores.candidate_logprobs,
        manifest_digest=answer.message.manifest_digest,
        endpoint=answer.endpoint,
        timings=TeacherTimings(
            total_s=call.elapsed_s,
            queue_s=timings.queue_s,
            engine_s=timings.engine_s,
            waited_s=call.waited_s,
            num_attempts=call.num_attempts,
        ),
    )
