"""Repeated requests: what is computed once, and who takes a computation along."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protos.arrays import ScoreArrays
from teacher_service.dedupe import MAX_WAITERS, AnswerCache, Deduplicator, content_digest
from teacher_service.errors import EngineError, IdempotencyKeyReusedError, OverloadedError, TeacherServiceError
from teacher_service.telemetry import AnswerSource, Progress, RequestRecord
from tests.support.engines import job

A, B = b"content a", b"content b"


class Computing:
    """A computation that a test lets go on."""

    def __init__(self, error: TeacherServiceError | None = None) -> None:
        self.gate = asyncio.Event()
        self.error = error
        self.num_started = 0
        self.num_cancelled = 0

    async def __call__(self, progress: Progress) -> ScoreArrays:
        """Wait for the gate, then answer or fail."""
        self.num_started += 1
        progress.admitted_s = 0.0
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return scores()


def scores() -> ScoreArrays:
    return ScoreArrays(sampled_logprobs=np.full(1, -1.0, np.float32))


def cache(now_s: Callable[[], float] = time.monotonic) -> AnswerCache:
    return AnswerCache(max_bytes=1 << 20, max_age_s=60.0, room_bytes=lambda: 1 << 30, now_s=now_s)


def ask(
    deduplicator: Deduplicator, computing: Computing, key: str = "k", digest: bytes = A
) -> tuple[asyncio.Task[ScoreArrays], RequestRecord]:
    record = RequestRecord(method="test")
    return asyncio.create_task(deduplicator.answer(key, digest, computing, record)), record


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_equal_requests_are_computed_once() -> None:
    """While the first is under way and after, each is told where its answer came from."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    work = [ask(deduplicator, computing) for _ in range(3)]
    await settle()
    assert deduplicator.num_joined == 2
    computing.gate.set()
    answers = [await task for task, _ in work]
    later, record = ask(deduplicator, computing)
    answers.append(await later)
    assert computing.num_started == 1
    assert all(one is answers[0] for one in answers)
    sources = [one.source for _, one in work] + [record.source]
    assert sources == [AnswerSource.COMPUTED, AnswerSource.JOINED, AnswerSource.JOINED, AnswerSource.CACHE]
    assert (record.queue_s, record.engine_s) == (0.0, 0.0)
    assert deduplicator.num_joined == 0


async def test_requests_of_other_keys_are_computed_each() -> None:
    """Equal content alone does not make two requests one."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    computing.gate.set()
    for key in ("a", "b"):
        await ask(deduplicator, computing, key)[0]
    assert computing.num_started == 2


@pytest.mark.parametrize("leaving", [0, 1])
async def test_who_leaves_does_not_take_the_computation_along(leaving: int) -> None:
    """Neither the one who began it nor the one who joined."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    tasks = [ask(deduplicator, computing)[0] for _ in range(2)]
    await settle()
    tasks[leaving].cancel()
    await settle()
    assert tasks[leaving].cancelled()
    computing.gate.set()
    assert (await tasks[1 - leaving]).num_scored == 1
    assert (computing.num_started, computing.num_cancelled) == (1, 0)


async def test_the_last_to_leave_takes_the_computation_along() -> None:
    """It has ended when the last one's call ends, and the key is free, also for other content."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    tasks = [ask(deduplicator, computing)[0] for _ in range(2)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert computing.num_cancelled == 1
    other = Computing()
    other.gate.set()
    await ask(deduplicator, other, digest=B)[0]
    assert other.num_started == 1


async def test_a_request_cancelled_as_it_comes_leaves_nothing() -> None:
    """Its computation has hardly begun."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    task, _ = ask(deduplicator, computing)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert computing.num_started == computing.num_cancelled
    computing.gate.set()
    await ask(deduplicator, computing, digest=B)[0]


async def test_a_computation_that_ends_although_given_up_is_not_kept() -> None:
    """Its key may stand for something else by then."""

    async def stubborn(_: Progress) -> ScoreArrays:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return scores()
        raise AssertionError("unreachable")

    answers = cache()
    task = asyncio.create_task(Deduplicator(answers).answer("k", A, stubborn, RequestRecord(method="test")))
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert answers.num_bytes == 0


@pytest.mark.parametrize("seed", range(5))
async def test_any_coming_and_going_leaves_nothing(seed: int) -> None:
    """Requests of few keys come, leave and are answered in any order; none is computed beside an equal one."""
    rng = np.random.default_rng(seed)
    deduplicator, running = Deduplicator(cache()), Counter[str]()

    async def compute(key: str) -> ScoreArrays:
        running[key] += 1
        assert running[key] == 1
        try:
            for _ in range(rng.integers(8)):
                await asyncio.sleep(0)
        finally:
            running[key] -= 1
        if rng.random() < 0.3:
            raise EngineError("broken")
        return scores()

    tasks = []
    for number in range(300):
        key = f"{number // 30} {rng.integers(3)}"
        record = RequestRecord(method="test")
        tasks.append(asyncio.create_task(deduplicator.answer(key, A, lambda _, key=key: compute(key), record)))
        if rng.random() < 0.5:
            tasks[-1 - rng.integers(min(5, len(tasks)))].cancel()
        else:
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = Counter(type(one) for one in outcomes)
    assert set(kinds) == {ScoreArrays, EngineError, asyncio.CancelledError}
    assert running.total() == 0
    assert deduplicator.num_joined == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failure_is_told_to_all_who_wait_and_not_remembered() -> None:
    """The next request computes again."""
    deduplicator, computing = Deduplicator(cache()), Computing(EngineError("broken"))
    tasks = [ask(deduplicator, computing)[0] for _ in range(2)]
    await settle()
    computing.gate.set()
    for task in tasks:
        with pytest.raises(EngineError, match="broken"):
            await task
    computing.error = None
    await ask(deduplicator, computing)[0]
    assert computing.num_started == 2


async def test_a_failure_as_the_last_one_leaves_is_nobodys() -> None:
    """asyncio would complain about an error that nobody asked for."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    deduplicator, computing = Deduplicator(cache()), Computing(EngineError("broken"))
    task, _ = ask(deduplicator, computing)
    await settle()
    computing.gate.set()
    await asyncio.sleep(0)  # it has failed, and whoever waits does not know yet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    del task
    gc.collect()
    assert complaints == []


async def test_a_key_of_other_content_is_refused_as_long_as_it_is_remembered() -> None:
    """Under way and kept; once it is forgotten it may stand for the other."""
    now_s = [1000.0]
    deduplicator, computing = Deduplicator(cache(now_s=lambda: now_s[0])), Computing()
    first, _ = ask(deduplicator, computing)
    await settle()
    with pytest.raises(IdempotencyKeyReusedError, match="idempotency_key 'k' names a request of other content"):
        await ask(deduplicator, computing, digest=B)[0]
    computing.gate.set()
    await first
    with pytest.raises(IdempotencyKeyReusedError) as caught:
        await ask(deduplicator, computing, digest=B)[0]
    assert caught.value.metadata == {"field": "idempotency_key", "value": "k", "limit": "one content per key"}
    now_s[0] += 60.0
    await ask(deduplicator, computing, digest=B)[0]
    assert computing.num_started == 2


async def test_too_many_waiters_are_refused_with_a_delay() -> None:
    """Who waits already is answered."""
    deduplicator, computing = Deduplicator(cache()), Computing()
    tasks = [ask(deduplicator, computing)[0] for _ in range(MAX_WAITERS)]
    await settle()
    refused, record = ask(deduplicator, computing)
    with pytest.raises(OverloadedError, match=f"{MAX_WAITERS} requests wait for the answer.*retry in 1 s") as caught:
        await refused
    assert caught.value.retry_delay_s == 1.0
    assert record.source is AnswerSource.COMPUTED
    computing.gate.set()
    assert len(await asyncio.gather(*tasks)) == MAX_WAITERS
    assert computing.num_started == 1


# Content and times ---------------------------------------------------------------------------------------------------

IDS = np.array([1, 2, 3], np.int32)
CHANGES: dict[str, dict[str, Any]] = {
    "token_ids": {"token_ids": np.array([1, 2, 4], np.int32)},
    "length": {"token_ids": np.array([1, 2, 3, 0], np.int32)},
    "score_start": {"score_start": 2},
    "num_logprobs": {"num_logprobs": 9},
    "temperature": {"temperature": 1.0000001},
    "candidates": {"candidates": np.array([[1, 2], [3, 4]], np.int32)},
    "return_entropy": {"return_entropy": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_tells_contents_apart(name: str) -> None:
    """By every field on which an answer depends."""
    assert content_digest(job(**{"token_ids": IDS} | CHANGES[name])) != content_digest(job(IDS))


def test_the_digest_tells_the_shape_of_candidates() -> None:
    """The same ids, two per position or one of twice as many positions."""
    wide = job(np.arange(3, dtype=np.int32), candidates=np.array([[1, 2], [3, 4]], np.int32))
    other = job(np.arange(3, dtype=np.int32), candidates=np.array([[1, 3], [2, 4]], np.int32))
    assert content_digest(wide) != content_digest(other)
    same = job(np.arange(3, dtype=np.int32), candidates=np.array([[1, 3], [2, 4]], np.int32).T)
    assert content_digest(wide) == content_digest(same)


def test_the_digest_does_not_tell_requests_of_one_content_apart() -> None:
    """The request's id is no part of it."""
    assert content_digest(job(IDS, request_id="a")) == content_digest(job(IDS.copy(), request_id="b"))


@pytest.mark.parametrize(
    ("since_s", "queue_s", "engine_s"),
    [(10.0, 2.0, 5.0), (11.5, 0.5, 5.0), (14.0, 0.0, 3.0), (18.0, 0.0, 0.0)],
)
def test_whoever_joins_counts_from_then_on(since_s: float, queue_s: float, engine_s: float) -> None:
    """A computation that began at 10, was admitted at 12 and left the engine at 17."""
    record = RequestRecord(method="test")
    Progress(admitted_s=12.0, finished_s=17.0).tell(record, since_s=since_s)
    assert (record.queue_s, record.engine_s) == (queue_s, engine_s)


def test_who_was_never_admitted_was_in_the_queue_alone() -> None:
    """Also where it left early."""
    record = RequestRecord(method="test")
    Progress().tell(record, since_s=0.0)
    assert record.queue_s > 0
    assert record.engine_s == 0
