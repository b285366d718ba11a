"""One call's attempts: where, how often, after which waits, and which of two answers."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from time import monotonic

import structlog
from opentelemetry.trace import SpanKind
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from protos import tracing
from trainer.errors import TeacherCredentialsError, TeacherError, TeacherMismatchError
from trainer.teacher.budget import RetryBudget
from trainer.teacher.failures import gave_up
from trainer.teacher.hedging import RecentLatencies, race
from trainer.teacher.pool import Pool
from trainer.teacher.replica import Answer
from trainer.teacher.request import CheckedRequest
from trainer.teacher.retry import MAX_FAULTS, RetryPolicy, failure_of, is_fault, is_retryable

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Call:
    """One call and its attempts so far."""

    asked: CheckedRequest
    affinity: str | None
    deadline_s: float
    """Of the running loop's clock."""
    started_s: float = field(default_factory=monotonic)
    waited_s: float = 0.0
    """Spent waiting for a slot or for a replica that admits an attempt."""
    num_attempts: int = 0
    num_faults: int = 0
    """Attempts in which a teacher failed on the request or answered nonsense."""
    num_waiting: int = 0
    """Attempts that wait for a replica."""
    ended_waiting: bool = False
    """Whether it was taken back while it waited for a replica."""
    tried: set[str] = field(default_factory=set)
    """Replicas that were asked: others are asked first."""
    last_error: TeacherError | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return monotonic() - self.started_s

    @property
    def left_s(self) -> float:
        """Seconds until its deadline."""
        return self.deadline_s - asyncio.get_running_loop().time()


class Attempts:
    """Makes the attempts of a client's calls."""

    def __init__(
        self,
        pool: Pool,
        *,
        retry: RetryPolicy,
        timeout_s: float,
        budget: RetryBudget,
        hedge_percentile: float | None,
    ) -> None:
        """Hold the policies.

        Args:
            pool: the replicas.
            retry: how often, and after which waits.
            timeout_s: deadline of one attempt.
            budget: bounds the retries and second attempts of all calls together.
            hedge_percentile: a second attempt goes beside one that takes longer than this share of the last ones;
                None: never.
        """
        self._pool, self._retry, self._timeout_s, self._budget = pool, retry, timeout_s, budget
        self._latencies = None if hedge_percentile is None else RecentLatencies(hedge_percentile)

    async def run(self, call: Call) -> Answer:
        """The first good answer.

        Raises:
            TeacherError: the attempts allowed were made in vain, or another one can't help.
        """
        self._budget.deposit(monotonic())
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: _may_try_again(call, error)),
            wait=lambda state: self._delay_s(call, state),
            stop=lambda state: self._is_last(call, state),
            before_sleep=_report_retry,
            sleep=self._pause,
            reraise=True,
        )
        try:
            return await retrying(self._round, call)
        except TeacherError as error:
            if call.num_attempts < 2 and not is_retryable(error):
                raise
            raise gave_up(
                error,
                num_attempts=call.num_attempts,
                elapsed_s=call.elapsed_s,
                time_limits="timeout_s and total_timeout_s",
            ) from error

    async def _round(self, call: Call) -> Answer:
        """One attempt, and a second one beside it where that is asked for and the first is slow."""
        delay_s = None if self._latencies is None else self._latencies.delay_s()
        if delay_s is None:
            return await self._attempt(call)
        return await race(lambda: self._attempt(call), delay_s=delay_s, may_hedge=lambda: self._may_hedge(call))

    def _may_hedge(self, call: Call) -> bool:
        return (
            not call.num_waiting and self._pool.may_ask(besides=call.tried) and self._budget.try_withdraw(monotonic())
        )

    async def _attempt(self, call: Call) -> Answer:
        began_s = monotonic()
        call.num_waiting += 1
        try:
            replica = await self._pool.acquire(
                call.asked, affinity=call.affinity, avoid=call.tried, give_up_s=began_s + call.left_s
            )
        except asyncio.CancelledError:
            call.ended_waiting = True
            raise
        finally:
            call.num_waiting -= 1
            call.waited_s += monotonic() - began_s
        call.ended_waiting = False
        call.num_attempts += 1
        call.tried.add(replica.name)
        asked_s = monotonic()
        try:
            # nothing may be awaited between the choice of a replica and this
            with tracing.span("teacher attempt", kind=SpanKind.CLIENT) as span:
                span.set_attributes({"server.address": replica.name, "gkd.attempt": call.num_attempts})
                answer = await replica.ask(call.asked, timeout_s=max(min(self._timeout_s, call.left_s), 0.0))
        except TeacherError as error:
            call.last_error = error
            call.num_faults += is_fault(error)
            raise
        if self._latencies is not None:
            self._latencies.observe(monotonic() - asked_s)
        return answer

    def _delay_s(self, call: Call, state: RetryCallState) -> float:
        # The delay that one replica named does not bind another.
        elsewhere = self._pool.may_ask(besides=call.tried)
        return self._retry.delay_s(
            state.attempt_number,
            draw=random.random(),  # noqa: S311 jitter is no secret
            retry_delay_s=None if elsewhere else failure_of(state).retry_delay_s,
        )

    def _is_last(self, call: Call, state: RetryCallState) -> bool:
        limit = self._retry.max_attempts
        return (limit is not None and state.attempt_number >= limit) or state.upcoming_sleep >= call.left_s

    async def _pause(self, delay_s: float) -> None:
        """Wait before a retry, and for its share of the budget."""
        budget_s = self._budget.withdraw(monotonic())
        try:
            await asyncio.sleep(max(delay_s, budget_s))
        except asyncio.CancelledError:
            self._budget.refund()
            raise


def _may_try_again(call: Call, error: BaseException) -> bool:
    if is_fault(error):
        return call.num_faults < MAX_FAULTS
    # A replica that turned out to be another teacher is out; the call is for the others, or waits. Credentials were
    # accepted when the client entered, so somebody is changing them: the next attempt shows what the files hold then.
    return is_retryable(error) or isinstance(error, (TeacherCredentialsError, TeacherMismatchError))


def _report_retry(state: RetryCallState) -> None:
    error = failure_of(state)
    _log.info(
        "teacher call failed, trying again",
        endpoint=error.endpoint,
        reason=error.reason,
        num_attempts=state.attempt_number,
        delay_s=round(state.upcoming_sleep, 3),
    )
