"""The client of the teacher service: a checked manifest, deadlines, retries, several endpoints.

Legend: N tokens, S = N - score_start scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

import asyncio
import math
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np
import structlog
from numpy.typing import NDArray
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from protos.codec import WireDtype
from protos.manifest import Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from trainer.errors import (
    ConfigError,
    GKDError,
    TeacherAnswerError,
    TeacherClosedError,
    TeacherDeadlineError,
    TeacherError,
    TeacherFailedError,
)
from trainer.teacher.balancer import Balancer
from trainer.teacher.channel import Endpoint
from trainer.teacher.compatibility import (
    DEFAULT_PLAN,
    ScoringPlan,
    StudentInfo,
    check_compatibility,
    manifest_changed,
)
from trainer.teacher.connect import Patience, check_same_manifest, fetch_manifests
from trainer.teacher.failures import gave_up
from trainer.teacher.inflight import Inflight
from trainer.teacher.request import CheckedRequest, TokenIds, build_request, read_answer
from trainer.teacher.retry import DEFAULT_RETRY, RetryPolicy, failure_of, is_retryable
from trainer.types import TeacherScores, TeacherTimings

_log = structlog.get_logger(__name__)


class TeacherClient:
    """Asks one or more replicas of a teacher for logprobs.

        async with TeacherClient(endpoints=["127.0.0.1:15555"]) as teacher:
            scores = await teacher.score(token_ids, score_start=len(prompt), num_logprobs=64)

    Entering fetches every endpoint's manifest and refuses teachers that differ among themselves, don't fit the
    student or can't do what the plan asks. Calls may run concurrently, in the event loop that entered. A client is
    entered once.
    """

    def __init__(
        self,
        *,
        endpoints: Sequence[str],
        timeout_s: float = 60.0,
        total_timeout_s: float = 300.0,
        connect_timeout_s: float = 10.0,
        wait_ready_s: float = 30.0,
        max_inflight: int = 64,
        cool_down_s: float = 2.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        student: StudentInfo | None = None,
        plan: ScoringPlan = DEFAULT_PLAN,
        expected_digest: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Hold the settings; nothing is opened before the client is entered.

        Args:
            endpoints: `host:port` of each replica.
            timeout_s: deadline of one attempt.
            total_timeout_s: deadline of one call: the wait for a slot, all attempts, and the waits between them.
            connect_timeout_s: how long entering waits for an endpoint that doesn't answer.
            wait_ready_s: how long entering waits for an endpoint that is still loading its model.
            max_inflight: calls under way at once; further ones wait.
            cool_down_s: how long an endpoint that failed is avoided while there is another.
            retry: when to try again.
            student: what the teacher must fit; None skips the comparison of vocabularies.
            plan: the most that will be asked for, checked on entering.
            expected_digest: of a manifest that was checked before, by another client of the same run: a teacher with
                another one is refused. None: none was.
            sleep: waits between attempts; a test passes one that doesn't.

        Raises:
            ConfigError: a setting is out of range.
        """
        _check_endpoints(endpoints)
        _check_times(timeout_s=timeout_s, total_timeout_s=total_timeout_s, connect_timeout_s=connect_timeout_s)
        if not (wait_ready_s >= 0 and cool_down_s >= 0):
            raise ConfigError(f"wait_ready_s is {wait_ready_s} and cool_down_s {cool_down_s}; they must be >= 0")
        if max_inflight < 1:
            raise ConfigError(f"max_inflight is {max_inflight}, must be >= 1")
        self._timeout_s = timeout_s
        self._total_timeout_s = total_timeout_s
        self._max_inflight = max_inflight
        self._retry = retry
        self._student = student
        self._plan = plan
        self._expected_digest = expected_digest
        self._patience = Patience(
            connect_timeout_s=connect_timeout_s, wait_ready_s=wait_ready_s, retry=retry, sleep=sleep
        )
        self._balancer = Balancer(endpoints, cool_down_s=cool_down_s)
        self._endpoint_names = tuple(endpoints)
        self._where = ", ".join(endpoints)
        self._session: _Session | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Fetch and check the manifests, and open the channels.

        Raises:
            TeacherUnavailableError: an endpoint can't be reached, or is not ready in time.
            TeacherMismatchError: the teachers differ, are not the expected one, or don't fit the student or the plan.
            TeacherError: an endpoint fails otherwise.
        """
        if self._session is not None or self._closed:
            raise GKDError("the teacher client was entered before; make a new one")
        manifest = check_same_manifest(await fetch_manifests(self._endpoint_names, self._patience))
        if self._expected_digest not in (None, manifest.digest):
            raise manifest_changed(self._where, digest=manifest.digest, checked=self._expected_digest)
        check_compatibility(
            manifest,
            self._student,
            endpoint=self._where,
            num_logprobs=self._plan.num_logprobs,
            temperature=self._plan.temperature,
            max_tokens=self._plan.max_tokens,
        )
        connect_timeout_s = self._patience.connect_timeout_s
        self._session = _Session(
            manifest=manifest,
            endpoints={
                name: Endpoint.for_scoring(name, manifest, connect_timeout_s=connect_timeout_s)
                for name in self._endpoint_names
            },
            inflight=Inflight(self._max_inflight),
        )
        _log.info(
            "teacher connected", endpoints=self._endpoint_names, model=manifest.model_name, engine=manifest.engine
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls under way with TeacherClosedError and close the channels. Idempotent."""
        self._closed = True
        if self._session is not None:
            session = self._session
            await session.inflight.end_all()
            await asyncio.gather(*(endpoint.close() for endpoint in session.endpoints.values()))

    @property
    def manifest(self) -> Manifest:
        """What the teacher is, checked on entering.

        Raises:
            GKDError: the client was not entered.
        """
        return self._opened.manifest

    async def score(
        self,
        token_ids: TokenIds,
        *,
        score_start: int,
        num_logprobs: int,
        temperature: float = 1.0,
        wire_dtype: WireDtype = WireDtype.FLOAT32,
        candidate_token_ids: NDArray[np.integer] | None = None,
        return_entropy: bool = False,
    ) -> TeacherScores:
        """The teacher's distribution at S positions; row i predicts `token_ids[score_start + i]`, nothing is shifted.

        Args:
            token_ids: [N] prompt and response.
            score_start: index of the first token to score, normally the prompt's length; in [1, N).
            num_logprobs: K, most likely tokens per position; 0 for the sampled token's logprob only.
            temperature: divides the logits before the full softmax; other than 1 needs the capability.
            wire_dtype: element type of the top-k and candidate logprobs on the wire.
            candidate_token_ids: [S, C] ids whose logprobs are wanted too; None for none.
            return_entropy: whether the entropy per position is wanted.

        Raises:
            TeacherRequestError: an argument is out of range; nothing was sent.
            TeacherDeadlineError, TeacherUnavailableError, TeacherOverloadedError: retried in vain.
            TeacherRefusedError, TeacherFailedError: the teacher refused the request or failed on it.
            TeacherAnswerError, TeacherMismatchError: the answer is wrong, or another teacher's.
            TeacherClosedError: the client was closed meanwhile.
        """
        session = self._opened
        request = build_request(
            session.manifest,
            token_ids,
            score_start=score_start,
            num_logprobs=num_logprobs,
            temperature=temperature,
            wire_dtype=wire_dtype,
            candidate_token_ids=candidate_token_ids,
            return_entropy=return_entropy,
            idempotency_key=uuid.uuid4().hex,
        )
        call = _Call(request, deadline_s=asyncio.get_running_loop().time() + self._total_timeout_s)
        try:
            async with session.inflight.slot(call.deadline_s):
                return await self._score_with_retries(call)
        except TimeoutError as exc:
            raise self._ended_early(call) from exc

    @property
    def _opened(self) -> _Session:
        if self._closed:
            raise TeacherClosedError(
                "the teacher client is closed; make a new one",
                endpoint=self._where,
                reason="CLOSED",
            )
        if self._session is None:
            raise GKDError("the teacher client was not entered; use `async with TeacherClient(...) as teacher`")
        return self._session

    async def _score_with_retries(self, call: _Call) -> TeacherScores:
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_retryable),
            wait=self._delay_s,
            stop=lambda state: self._is_last(call, state),
            before_sleep=_report_retry,
            sleep=self._patience.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, call)
        except TeacherError as error:
            if not is_retryable(error):
                raise
            raise gave_up(
                error,
                num_attempts=call.num_attempts,
                elapsed_s=call.elapsed_s,
                time_limits="timeout_s and total_timeout_s",
            ) from error

    async def _attempt(self, call: _Call) -> TeacherScores:
        session = self._opened
        timeout_s = min(self._timeout_s, call.deadline_s - asyncio.get_running_loop().time())
        call.num_attempts += 1
        with self._balancer.attempt(monotonic()) as name:
            try:
                answer = await session.endpoints[name].score(call.request.message, timeout_s=timeout_s)
                scores = self._read(answer, call, name)
            except TeacherError as error:
                call.last_error = error
                if is_retryable(error) or isinstance(error, (TeacherFailedError, TeacherAnswerError)):
                    self._balancer.report_failure(name, monotonic(), retry_delay_s=error.retry_delay_s)
                raise
        self._balancer.report_success(name)
        return scores

    def _read(self, answer: pb.ScoreResponse, call: _Call, endpoint: str) -> TeacherScores:
        scores = read_answer(
            answer,
            call.request,
            manifest=self._opened.manifest,
            endpoint=endpoint,
            student_vocab_rows=None if self._student is None else self._student.vocab_rows,
        )
        return TeacherScores(
            sampled_logprobs=scores.sampled_logprobs,
            topk_token_ids=scores.topk_token_ids,
            topk_logprobs=scores.topk_logprobs,
            log_tail_mass=scores.log_tail_mass,
            entropy=scores.entropy,
            candidate_logprobs=scores.candidate_logprobs,
            manifest_digest=answer.manifest_digest,
            endpoint=endpoint,
            timings=TeacherTimings(
                total_s=call.elapsed_s, queue_s=answer.timings.queue_s, engine_s=answer.timings.engine_s
            ),
        )

    def _delay_s(self, state: RetryCallState) -> float:
        # The delay that one endpoint named does not bind another.
        elsewhere = self._balancer.has_available(monotonic())
        return self._retry.delay_s(
            state.attempt_number,
            draw=random.random(),  # noqa: S311 jitter is no secret
            retry_delay_s=None if elsewhere else failure_of(state).retry_delay_s,
        )

    def _is_last(self, call: _Call, state: RetryCallState) -> bool:
        now_s = asyncio.get_running_loop().time()
        return state.attempt_number >= self._retry.max_attempts or now_s + state.upcoming_sleep >= call.deadline_s

    def _ended_early(self, call: _Call) -> TeacherError:
        """The error of a call whose slot was taken away: by close, or by its deadline."""
        last = call.last_error
        endpoint = self._where if last is None else last.endpoint
        if self._closed:
            return TeacherClosedError(
                f"the teacher client was closed {call.elapsed_s:.1f} s into a call; wait for calls before closing",
                endpoint=endpoint,
                reason="CLOSED",
            )
        waited = "" if call.num_attempts else f", all spent waiting for one of {self._max_inflight} slots"
        failure = "" if last is None else f"; the last failure: {last.message}"
        return TeacherDeadlineError(
            f"no answer from the teacher at {endpoint} within total_timeout_s = {self._total_timeout_s:g} s "
            f"({call.num_attempts} attempts{waited}){failure}; raise total_timeout_s, or add a teacher",
            endpoint=endpoint,
            reason="DEADLINE_EXCEEDED",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """What exists between entering and closing."""

    manifest: Manifest
    endpoints: dict[str, Endpoint]
    inflight: Inflight


@dataclass(slots=True)
class _Call:
    """One call and its attempts so far."""

    request: CheckedRequest
    deadline_s: float
    """Of the running loop's clock."""
    started_s: float = field(default_factory=monotonic)
    num_attempts: int = 0
    last_error: TeacherError | None = None

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self.started_s


def _report_retry(state: RetryCallState) -> None:
    error = failure_of(state)
    _log.warning(
        "teacher call failed, trying again",
        endpoint=error.endpoint,
        reason=error.reason,
        num_attempts=state.attempt_number,
        delay_s=round(state.upcoming_sleep, 3),
    )


def _check_endpoints(endpoints: Sequence[str]) -> None:
    if isinstance(endpoints, str) or not endpoints:
        raise ConfigError(f"endpoints is {endpoints!r}, must be a list of at least one `host:port`")
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f"the endpoint {endpoint!r} is no `host:port` with a port in [1, 65535]")
    if len(set(endpoints)) != len(endpoints):
        raise ConfigError(f"endpoints holds one twice: {list(endpoints)}; name each once")


def _check_times(**times_s: float) -> None:
    for name, value in times_s.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value}, must be finite and > 0 seconds")
