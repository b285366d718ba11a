"""vLLM's flat prompt logprobs as arrays, on hand-written entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from teacher_service.engine.vllm.flat_logprobs import score_arrays
from teacher_service.errors import EngineError
from teacher_service.types import ScoreJob


@dataclass
class Flat:
    """What vLLM hands over, as far as it is read."""

    start_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


# Tokens 5 7 9 over a vocabulary of 10, K = 2: position 0 has no entries, then (the token, its two likeliest).
FLAT = Flat(
    start_indices=[0, 0, 3],
    token_ids=[7, 7, 2, 9, 4, 1],
    logprobs=[-0.5, -0.5, -1.5, -3.0, -0.25, -2.0],
)


def job(*, token_ids: tuple[int, ...] = (5, 7, 9), score_start: int = 1, num_logprobs: int = 2) -> ScoreJob:
    return ScoreJob(
        request_id="r",
        token_ids=np.asarray(token_ids, dtype=np.int32),
        score_start=score_start,
        num_logprobs=num_logprobs,
    )


def test_rows_belong_to_the_tokens_they_predict() -> None:
    """Row i holds the sampled logprob and the top-k of token score_start + i, in vLLM's order."""
    scores = score_arrays(FLAT, job(), vocab_rows=10)
    np.testing.assert_array_equal(scores.sampled_logprobs, np.float32([-0.5, -3.0]))
    np.testing.assert_array_equal(scores.topk_token_ids, np.int32([[7, 2], [4, 1]]))
    np.testing.assert_array_equal(scores.topk_logprobs, np.float32([[-0.5, -1.5], [-0.25, -2.0]]))


def test_positions_before_score_start_are_left_out() -> None:
    """With score_start at the last token only its row comes back."""
    scores = score_arrays(FLAT, job(score_start=2), vocab_rows=10)
    np.testing.assert_array_equal(scores.sampled_logprobs, np.float32([-3.0]))
    np.testing.assert_array_equal(scores.topk_token_ids, np.int32([[4, 1]]))


def test_tail_mass_is_what_the_topk_leaves() -> None:
    """log(1 - sum of the top-k's probabilities)."""
    scores = score_arrays(FLAT, job(), vocab_rows=10)
    expected = np.log([1 - np.exp(-0.5) - np.exp(-1.5), 1 - np.exp(-0.25) - np.exp(-2.0)])
    np.testing.assert_allclose(scores.log_tail_mass, expected, rtol=1e-6)


def test_tail_mass_is_minus_infinity_where_nothing_is_left() -> None:
    """A top-k whose mass rounds to one, or that holds the whole vocabulary, leaves nothing."""
    full = Flat(start_indices=[0, 0], token_ids=[1, 1, 0], logprobs=[0.0, 0.0, -30.0])
    assert score_arrays(full, job(token_ids=(0, 1)), vocab_rows=10).log_tail_mass == [-np.inf]
    halves = Flat(start_indices=[0, 0], token_ids=[1, 1, 0], logprobs=[-0.7, -0.7, -0.7])
    assert score_arrays(halves, job(token_ids=(0, 1)), vocab_rows=2).log_tail_mass == [-np.inf]


def test_without_topk_only_the_sampled_logprobs_exist() -> None:
    """K = 0 leaves the other arrays absent, not empty."""
    scores = score_arrays(Flat([0, 0, 1], [7, 9], [-0.5, -3.0]), job(num_logprobs=0), vocab_rows=10)
    np.testing.assert_array_equal(scores.sampled_logprobs, np.float32([-0.5, -3.0]))
    assert (scores.topk_token_ids, scores.topk_logprobs, scores.log_tail_mass) == (None, None, None)


def test_rounding_above_zero_is_put_back_to_zero() -> None:
    """A logprob a few ulp above 0 is a probability of 1."""
    flat = Flat([0, 0], [1, 1, 0], [1e-7, 1e-7, -20.0])
    scores = score_arrays(flat, job(token_ids=(0, 1)), vocab_rows=10)
    assert scores.sampled_logprobs == [0.0]


@pytest.mark.parametrize(
    ("flat", "named"),
    [
        (Flat([0, 0], [7, 7, 2], [-0.5, -0.5, -1.5]), "2 positions of 3"),
        (Flat([0, 0, 2], [7, 7, 9, 4], [-0.5, -0.5, -3.0, -0.25]), "4 entries for 2 positions of 3"),
        (Flat([0, 0, 3], [9, 7, 2, 7, 4, 1], [-0.5, -0.5, -1.5, -3.0, -0.25, -2.0]), "not aligned"),
    ],
)
def test_another_layout_is_refused(flat: Flat, named: str) -> None:
    """Entries that don't fit the sequence fail loudly instead of being read at the wrong place."""
    with pytest.raises(EngineError, match=named):
        score_arrays(flat, job(), vocab_rows=10)
