"""The client of the teacher service: a checked manifest, deadlines, retries, supervised replicas.

Legend: N tokens, S = N - score_start scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from protos import tracing
from protos.arrays import Float32Array
from protos.codec import WireDtype
from protos.manifest import Manifest
from trainer.errors import GKDError, TeacherClosedError, TeacherError
from trainer.teacher.attempts import Call
from trainer.teacher.compatibility import DEFAULT_PLAN, ScoringPlan, StudentInfo
from trainer.teacher.credentials import NO_CREDENTIALS, Credentials
from trainer.teacher.replica import ReplicaStatus
from trainer.teacher.request import TokenIds, build_request
from trainer.teacher.resolver import Resolve, resolve_dns
from trainer.teacher.retry import DEFAULT_RETRY, RetryPolicy, is_retryable
from trainer.teacher.session import Session
from trainer.teacher.settings import ClientSettings
from trainer.types import TeacherScores


class TeacherClient:
    """Asks one or more replicas of a teacher for logprobs.

        async with TeacherClient(endpoints=["127.0.0.1:15555"]) as teacher:
            scores = await teacher.score(token_ids, score_start=len(prompt), num_logprobs=64)

    Entering fetches the replicas' manifests and refuses teachers that differ among themselves, don't fit the student
    or can't do what the plan asks. From then on each replica is watched: one that dies, hangs, answers nonsense or is
    replaced by another teacher gets no more calls until it is well again, and its calls are made elsewhere or wait.
    Calls may run concurrently, in the event loop that entered. A client is entered once.
    """

    def __init__(
        self,
        *,
        endpoints: Sequence[str] | str,
        timeout_s: float = 60.0,
        total_timeout_s: float = 300.0,
        connect_timeout_s: float = 10.0,
        wait_ready_s: float = 30.0,
        max_inflight: int = 64,
        retry: RetryPolicy = DEFAULT_RETRY,
        student: StudentInfo | None = None,
        plan: ScoringPlan = DEFAULT_PLAN,
        expected_digest: str | None = None,
        hedge_percentile: float | None = None,
        health_period_s: float = 5.0,
        resolve_period_s: float = 30.0,
        canary_period_s: float = 300.0,
        canary_tolerance: float = 0.1,
        canary_reference: Float32Array | None = None,
        report_period_s: float = 10.0,
        resolve: Resolve = resolve_dns,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """Hold the settings; nothing is opened before the client is entered.

        Args:
            endpoints: `host:port` of each replica, or one `host:port` whose name resolves to all of them.
            timeout_s: deadline of one attempt.
            total_timeout_s: deadline of one call: the wait for a slot and for a replica that serves, all attempts, and
                the waits between them.
            connect_timeout_s: how long entering waits for replicas that don't answer.
            wait_ready_s: how long entering waits for replicas that are still loading their model.
            max_inflight: calls under way at once; further ones wait.
            retry: when to try again.
            student: what the teacher must fit; None skips the comparison of vocabularies.
            plan: the most that will be asked for, checked on entering.
            expected_digest: of a manifest that was checked before, by another client of the same run: a teacher with
                another one is refused. None: none was.
            hedge_percentile: a call slower than this share of the last ones, in (0.5, 1), is made a second time on
                another replica, and the first good answer counts. None: never.
            health_period_s: a replica that dies or hangs is noticed after about two of these.
            resolve_period_s: time between two lookups of the endpoints' name.
            canary_period_s: time between two checks of a replica's manifest and canary, a short sequence of which all
                replicas owe the same answer.
            canary_tolerance: mean absolute difference from the reference, in nats per token, above which a replica is
                taken out.
            canary_reference: `canary_reference` of another client; None: this client's first answer.
            report_period_s: time between two log lines while calls wait for a replica.
            resolve: looks up the endpoints' name.
            credentials: TLS files and a token file. The token is looked up for each call, the TLS files for each
                connection that is made, so that they may be changed meanwhile.

        Raises:
            ConfigError: a setting is out of range.
        """
        self._settings = ClientSettings(
            endpoints=endpoints,
            timeout_s=timeout_s,
            total_timeout_s=total_timeout_s,
            connect_timeout_s=connect_timeout_s,
            wait_ready_s=wait_ready_s,
            max_inflight=max_inflight,
            retry=retry,
            student=student,
            plan=plan,
            expected_digest=expected_digest,
            hedge_percentile=hedge_percentile,
            health_period_s=health_period_s,
            resolve_period_s=resolve_period_s,
            canary_period_s=canary_period_s,
            canary_tolerance=canary_tolerance,
            canary_reference=canary_reference,
            report_period_s=report_period_s,
            resolve=resolve,
            credentials=credentials,
        )
        self._session: Session | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Fetch and check the manifests, and connect until one replica is admitted.

        Raises:
            TeacherUnavailableError: no replica can be reached, or none is ready in time.
            TeacherCredentialsError: a file of the credentials can't be used, the teacher does not accept the token, or
                its certificate is not the right one.
            TeacherMismatchError: the teachers differ, are not the expected one, or don't fit the student or the plan.
            TeacherError: every replica fails otherwise.
        """
        self._check_new()
        session = await Session.open(self._settings)
        if self._closed:
            await session.close()
            raise self._closed_error()
        self._session = session
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls under way with TeacherClosedError and close the channels. Idempotent."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    @property
    def manifest(self) -> Manifest:
        """What the teacher is, checked on entering.

        Raises:
            GKDError: the client was not entered.
        """
        return self._opened.manifest

    @property
    def is_serving(self) -> bool:
        """Whether some replica would take a call now; False before entering and after closing."""
        return self._session is not None and not self._closed and self._session.pool.is_serving

    @property
    def num_inflight(self) -> int:
        """Calls under way, those that wait for a slot or a replica included; equal ones count once."""
        return 0 if self._session is None else self._session.inflight.num_calls

    @property
    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """Every replica at this moment; empty before entering and after closing."""
        return () if self._session is None or self._closed else self._session.pool.statuses()

    @property
    def canary_reference(self) -> Float32Array:
        """The sampled logprobs that every replica's canary is compared with, for another client of the same run.

        Raises:
            GKDError: the client was not entered.
        """
        reference = self._opened.canary.reference
        if reference is None:
            raise AssertionError("a client was entered without an answer to its canary")
        return reference

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
        affinity: str | None = None,
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
            affinity: calls that share it, such as those of one prompt, go to one replica where it is not clearly
                slower: their common prefix is computed once. None: any replica.

        A call equal to one under way gets its answer; nothing is sent twice.

        Raises:
            TeacherRequestError: an argument is out of range; nothing was sent.
            TeacherUnavailableError, TeacherMismatchError: no replica served in time; all are other teachers.
            TeacherDeadlineError, TeacherOverloadedError, TeacherCredentialsError: retried in vain.
            TeacherRefusedError: the teacher refused the request.
            TeacherFailedError, TeacherAnswerError: several attempts failed in the teacher, or brought wrong answers.
            TeacherClosedError: the client was closed meanwhile.
        """
        session = self._opened
        asked = build_request(
            session.manifest,
            token_ids,
            score_start=score_start,
            num_logprobs=num_logprobs,
            temperature=temperature,
            wire_dtype=wire_dtype,
            candidate_token_ids=candidate_token_ids,
            return_entropy=return_entropy,
        )
        deadline_s = asyncio.get_running_loop().time() + self._settings.total_timeout_s
        with tracing.span("teacher score") as span:
            span.set_attributes({"gkd.num_scored": asked.num_scored, "gkd.num_logprobs": num_logprobs})
            return await self._run(session, Call(asked, affinity=affinity, deadline_s=deadline_s))

    async def _run(self, session: Session, call: Call) -> TeacherScores:
        asked = call.asked
        joins = asked.key in session.joined
        try:
            return await session.joined.run(asked.key, partial(session.run, call))
        except TeacherError as error:
            if not joins or not is_retryable(error) or call.left_s <= 0:
                raise
            # The call that was joined began before this one, and so did its time.
            return await session.joined.run(asked.key, partial(session.run, call))

    @property
    def _opened(self) -> Session:
        if self._closed:
            raise self._closed_error()
        if self._session is None:
            raise GKDError("the teacher client was not entered; use `async with TeacherClient(...) as teacher`")
        return self._session

    def _check_new(self) -> None:
        if self._session is not None or self._closed:
            raise GKDError("the teacher client was entered before; make a new one")

    def _closed_error(self) -> TeacherClosedError:
        return TeacherClosedError(
            "the teacher client is closed; make a new one", endpoint=self._settings.where, reason="CLOSED"
        )
