"""A steady stream of calls to a teacher, no two of them alike, each answer compared with what it has to be."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teacher_service.engine.fake import expected_logprobs
from tests.support.waiting import until
from trainer.teacher import TeacherClient
from trainer.types import TeacherScores

V = 32
"""Rows of the analytic teacher's vocabulary, and of the scripted one's."""
K = 16
NUM_INFLIGHT = 8
"""Calls under way at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """What one call asks."""

    token_ids: NDArray[np.int64]
    score_start: int

    @classmethod
    def make(cls, number: int) -> Sequence:
        """One that differs from all others, also in shape from the next ones: an answer to another would show."""
        rng = np.random.default_rng(number)
        return cls(token_ids=rng.integers(0, V, 60 + number % 50), score_start=5 + number % 7)

    @property
    def response(self) -> NDArray[np.int64]:
        """[S] the scored tokens."""
        return self.token_ids[self.score_start :]


Predict = Callable[[Sequence], NDArray[np.float64]]
"""The distributions that a teacher has to answer with, [S, V]."""


def analytic(sequence: Sequence) -> NDArray[np.float64]:
    """What the fake engine predicts."""
    return expected_logprobs(range(sequence.score_start, len(sequence.token_ids)), vocab_rows=V)


def uniform(sequence: Sequence) -> NDArray[np.float64]:
    """What the scripted teacher predicts."""
    return np.full((len(sequence.response), V), -np.log(V))


@dataclass
class SteadyCalls:
    """Calls under way. Made by `steady_calls`."""

    answered: Counter[str] = field(default_factory=Counter)
    """Right answers by endpoint."""
    is_ending: bool = False
    """Whether no new calls are made."""

    async def more(self, count: int, *, endpoint: str | None = None) -> None:
        """Return once that many further calls were answered, by that endpoint where it is given."""

        def num_answered() -> int:
            return self.answered.total() if endpoint is None else self.answered[endpoint]

        wanted = num_answered() + count
        await until(lambda: num_answered() >= wanted)

    async def keep_calling(self, client: TeacherClient, numbers: itertools.count[int], predict: Predict) -> None:
        """One call after the other; a call that fails or is answered wrong raises."""
        while not self.is_ending:
            sequence = Sequence.make(next(numbers))
            scores = await client.score(sequence.token_ids, score_start=sequence.score_start, num_logprobs=K)
            check_scores(scores, sequence, predict(sequence))
            self.answered[scores.endpoint] += 1


@asynccontextmanager
async def steady_calls(client: TeacherClient, *, predict: Predict = analytic) -> AsyncIterator[SteadyCalls]:
    """Keep NUM_INFLIGHT calls under way; at the end those under way are waited for. A call that is lost raises.

    Raises:
        ExceptionGroup: calls failed, or were answered wrong.
    """
    calls, numbers = SteadyCalls(), itertools.count()
    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_INFLIGHT):
            group.create_task(calls.keep_calling(client, numbers, predict))
        yield calls
        calls.is_ending = True


def check_scores(scores: TeacherScores, sequence: Sequence, expected_SV: NDArray[np.float64]) -> None:
    """Every array, position by position."""
    assert scores.topk_token_ids is not None
    sampled = np.take_along_axis(expected_SV, sequence.response[:, None], axis=1)[:, 0]
    topk = -np.sort(-expected_SV, axis=1)[:, :K]
    np.testing.assert_allclose(scores.sampled_logprobs, sampled, rtol=1e-5)
    np.testing.assert_allclose(scores.topk_logprobs, topk, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected_SV, scores.topk_token_ids, axis=1), topk, rtol=1e-5)
    np.testing.assert_allclose(scores.log_tail_mass, np.log1p(-np.exp(topk).sum(axis=1)), rtol=1e-3)
