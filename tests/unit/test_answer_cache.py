"""Kept answers: for how long, how many, and in whose memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.arrays import ScoreArrays
from teacher_service.dedupe import KEPT_OBJECTS_BYTES, AnswerCache, kept_bytes, owning

A, B = b"content a", b"content b"
SMALL = KEPT_OBJECTS_BYTES + 4
"""What an answer of one position takes."""


def scores(num_scored: int = 1) -> ScoreArrays:
    return ScoreArrays(sampled_logprobs=np.full(num_scored, -1.0, np.float32))


def cache(*, max_bytes: int = 10 * SMALL, max_age_s: float = 60.0, **more: Any) -> AnswerCache:
    return AnswerCache(max_bytes=max_bytes, max_age_s=max_age_s, **{"room_bytes": lambda: 1 << 30} | more)


def test_an_answer_is_kept_for_its_seconds_and_no_longer() -> None:
    """A hit does not prolong it."""
    now_s = [1000.0]
    answers = cache(max_age_s=60.0, now_s=lambda: now_s[0])
    answers.keep("k", A, scores())
    now_s[0] += 59.9
    kept = answers.get("k")
    assert kept is not None
    assert kept.content_digest == A
    assert answers.num_bytes == SMALL
    now_s[0] += 0.1
    assert answers.get("k") is None
    assert answers.num_bytes == 0


def test_the_oldest_answers_make_way_for_new_ones() -> None:
    """Their bytes together never exceed the bound."""
    answers = cache(max_bytes=2 * SMALL)
    for key in ("a", "b", "c"):
        answers.keep(key, A, scores())
        assert answers.num_bytes <= 2 * SMALL
    assert [answers.get(key) is not None for key in ("a", "b", "c")] == [False, True, True]


def test_an_answer_above_the_bound_is_not_kept_and_costs_the_others_nothing() -> None:
    """To the byte."""
    answers = cache(max_bytes=2 * SMALL)
    answers.keep("a", A, scores())
    large = (2 * SMALL - KEPT_OBJECTS_BYTES) // 4
    answers.keep("b", A, scores(large + 1))
    assert (answers.get("a") is not None, answers.get("b")) == (True, None)
    answers.keep("b", A, scores(large))
    assert (answers.get("a"), answers.get("b") is not None) == (None, True)


@pytest.mark.parametrize("bounds", [{"max_bytes": 0}, {"max_age_s": 0.0}])
def test_a_bound_of_zero_turns_it_off(bounds: dict[str, Any]) -> None:
    """No bytes, or no seconds."""
    answers = cache(**bounds)
    answers.keep("k", A, scores())
    assert (answers.get("k"), answers.num_bytes) == (None, 0)


def test_answers_take_only_the_room_that_there_is() -> None:
    """Where it shrinks, the oldest go at the next trim."""
    room = [3 * SMALL]
    answers = cache(room_bytes=lambda: room[0])
    for key in ("a", "b", "c", "d"):
        answers.keep(key, A, scores())
    assert answers.num_bytes == 3 * SMALL
    room[0] = SMALL
    answers.trim()
    assert answers.num_bytes == SMALL
    assert answers.get("d") is not None


def test_an_answer_kept_again_counts_once() -> None:
    """The bytes of the former one are given back."""
    answers = cache()
    answers.keep("k", A, scores(1))
    answers.keep("k", B, scores(3))
    assert answers.num_bytes == kept_bytes(scores(3))


def test_what_is_kept_does_not_hold_on_to_a_larger_array() -> None:
    """An engine's array may be a window on the memory of a whole step."""
    step = np.full(1000, -1.0, np.float32)
    own = np.array([[1]], np.int32)
    kept = owning(ScoreArrays(sampled_logprobs=step[:1], topk_token_ids=own))
    assert kept.sampled_logprobs.base is None
    assert kept.sampled_logprobs.tolist() == [-1.0]
    assert kept.topk_token_ids is own
    assert kept.entropy is None
