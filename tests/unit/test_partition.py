"""The split of the questions and the order of the batches."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.partition import BatchSchedule, Pool, split_questions

QUESTIONS = [f"question {number}" for number in range(1000)]


def _pool(name: str, num_rows: int, batch_size: int = 8, *, seed: int = 1, shuffle: bool = True) -> Pool:
    return Pool(name=name, num_rows=num_rows, batch_size=batch_size, seed=seed, shuffle=shuffle)


def _schedule(share: float, *, on: int = 80, off: int = 80, on_batch: int = 8, off_batch: int = 8) -> BatchSchedule:
    return BatchSchedule(
        on_policy_share=share,
        on_policy=_pool("on-policy", on, on_batch) if share > 0 else None,
        off_policy=_pool("off-policy", off, off_batch) if share < 1 else None,
    )


@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.7, 1.0])
def test_the_split_has_exactly_its_share(share: float) -> None:
    """Of 1,000 questions, 1,000 times the share are on-policy, .29 included, which no binary float is."""
    assert len(split_questions(QUESTIONS, on_policy_share=share, seed=12345)) == round(1000 * share)


def test_the_split_depends_on_the_seed_alone() -> None:
    """Neither the order of the rows nor repeated ones change it; another seed does."""
    shuffled = random.Random(0).sample(QUESTIONS, len(QUESTIONS))  # noqa: S311  # no secret
    split = split_questions(QUESTIONS, on_policy_share=0.5, seed=12345)
    assert split == split_questions([*shuffled, *shuffled[:100]], on_policy_share=0.5, seed=12345)
    other = split_questions(QUESTIONS, on_policy_share=0.5, seed=1)
    assert 200 < len(split & other) < 300  # 250 of 500 by chance


def test_a_larger_share_contains_the_smaller() -> None:
    """Raising lambda takes no question away from the on-policy side."""
    smaller, larger = (split_questions(QUESTIONS, on_policy_share=one, seed=3) for one in (0.3, 0.7))
    assert smaller < larger


def test_seven_tenths_by_hand() -> None:
    """The first ten steps of lambda .7, and ten more of the same pattern."""
    kinds = [_schedule(0.7).batch(step).on_policy for step in range(1, 21)]
    assert kinds == 2 * [True, True, True, False, True, True, False, True, True, False]


@pytest.mark.parametrize(("share", "kind"), [(1.0, True), (0.0, False)])
def test_pure_shares_know_one_kind(share: float, kind: bool) -> None:
    """Lambda 1 generates every response, lambda 0 none."""
    assert {_schedule(share).batch(step).on_policy for step in range(1, 50)} == {kind}


@given(st.fractions(0, 1, max_denominator=100), st.integers(1, 300), st.integers(1, 100))
def test_shares_hold_over_any_window(share: Fraction, first: int, width: int) -> None:
    """In any window of steps the on-policy ones are within one batch of their share: never two blocks."""
    schedule = _schedule(float(share))
    count = sum(schedule.batch(step).on_policy for step in range(first, first + width))
    assert abs(count - share * width) < 1


@given(st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=20), st.integers(1, 16), st.integers(1, 16))
def test_unequal_batches_keep_the_share_of_questions(share: Fraction, on_batch: int, off_batch: int) -> None:
    """With batches of different sizes, the share of questions drawn is right to within a batch of each."""
    schedule = _schedule(float(share), on_batch=on_batch, off_batch=off_batch)
    batches = [schedule.batch(step) for step in range(1, 201)]
    on = sum(len(one.rows) for one in batches if one.on_policy)
    total = sum(len(one.rows) for one in batches)
    assert abs(on - share * total) <= on_batch + off_batch


def test_a_pass_draws_each_row_once() -> None:
    """Ten batches of eight are the pool's 80 rows, in an order of each pass's own."""
    pool = _pool("on-policy", 80)
    passes = [[row for number in range(10) for row in pool.batch(10 * one + number)] for one in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(80))
    assert passes[0] != passes[1]
    assert passes[0] != [row for number in range(10) for row in _pool("off-policy", 80).batch(number)]


def test_without_shuffling_rows_come_in_order() -> None:
    """`data.shuffle=false` means it."""
    pool = _pool("on-policy", 20, shuffle=False)
    assert pool.batch(0) == tuple(range(8))
    assert pool.batch(1) == tuple(range(8, 16))
    assert pool.batch(2) == pool.batch(0)  # four rows are a rest


def test_an_epoch_is_one_pass_over_both() -> None:
    """70 and 30 rows in batches of 8: eight on-policy and three off-policy batches."""
    assert _schedule(0.7, on=70, off=30).steps_per_epoch == 11


def test_too_small_a_share_is_refused_with_its_size() -> None:
    """A pool that can't fill a batch is named, with the keys to change."""
    with pytest.raises(ConfigError, match=r"off-policy share holds 3 rows, fewer than one batch of 8.*gkd_lambda"):
        _pool("off-policy", 3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_without_data_is_refused(share: float) -> None:
    """A schedule never finds out in mid-run that it has nothing to draw."""
    with pytest.raises(ConfigError, match="there is no"):
        BatchSchedule(on_policy_share=share, on_policy=None, off_policy=None)
