"""Which responses are selected."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import SelectionError
from trainer.selection import select_by_reward, select_random

DOCUMENTED = {0: 0.3, 1: 0.8, 2: 0.5, 3: 0.2}
"""The documented example: n=4, k=2."""


def test_best_and_worst_of_the_documented_example() -> None:
    """resp_1 and resp_2 have the highest rewards, resp_0 and resp_3 the lowest."""
    assert select_by_reward(DOCUMENTED, k=2, best=True) == {1, 2}
    assert select_by_reward(DOCUMENTED, k=2, best=False) == {0, 3}


def test_ties_go_to_the_lower_number() -> None:
    """Equal rewards are told apart the same way every time, also where every reward is equal."""
    assert select_by_reward({3: 1.0, 1: 1.0, 2: 1.0, 0: 0.0}, k=2, best=True) == {1, 2}
    assert select_by_reward(dict.fromkeys((3, 2, 1, 0), 0.5), k=1, best=False) == {0}


def test_failed_responses_leave_the_rest() -> None:
    """A response without a reward is not selected; fewer than k are all selected."""
    assert select_by_reward({0: 0.1, 3: 0.9}, k=3, best=True) == {0, 3}
    assert select_by_reward({}, k=1, best=True) == frozenset()


def test_nan_has_no_rank() -> None:
    """A reward that can't be compared is an error, with the response's number."""
    with pytest.raises(SelectionError, match="reward of response 1 is NaN"):
        select_by_reward({0: 0.0, 1: float("nan")}, k=1, best=True)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k: int) -> None:
    """Nothing to select is a mistake."""
    with pytest.raises(SelectionError, match=f"k is {k}"):
        select_random(num_responses=4, k=k, seed=0, group="g")
    with pytest.raises(SelectionError, match=f"k is {k}"):
        select_by_reward(DOCUMENTED, k=k, best=True)


@given(st.dictionaries(st.integers(0, 15), st.floats(allow_nan=False), max_size=16), st.integers(1, 16), st.booleans())
def test_no_response_left_out_beats_a_selected_one(rewards: dict[int, float], k: int, best: bool) -> None:
    """The definition of top-k, whatever the rewards."""
    selected = select_by_reward(rewards, k=k, best=best)
    assert len(selected) == min(k, len(rewards))
    for inside, outside in itertools.product(selected, rewards.keys() - selected):
        assert rewards[inside] >= rewards[outside] if best else rewards[inside] <= rewards[outside]


def test_random_is_seeded_and_differs_between_groups() -> None:
    """The same seed and group give the same draw; other groups and seeds give others."""
    draws = {
        (seed, group): select_random(num_responses=8, k=2, seed=seed, group=f"{group}")
        for seed in (1, 2)
        for group in range(50)
    }
    assert draws[1, 0] == select_random(num_responses=8, k=2, seed=1, group="0")
    assert all(len(one) == 2 for one in draws.values())
    assert len({draws[1, group] for group in range(50)}) > 15
    assert sum(draws[1, group] == draws[2, group] for group in range(50)) < 10


def test_random_is_unbiased() -> None:
    """Each of n responses is drawn in k of n groups, within four standard deviations."""
    num_groups, n, k = 4000, 4, 2
    counts = Counter(
        one for group in range(num_groups) for one in select_random(num_responses=n, k=k, seed=7, group=f"step|{group}")
    )
    expected, deviation = num_groups * k / n, (num_groups * (k / n) * (1 - k / n)) ** 0.5
    assert all(abs(counts[one] - expected) < 4 * deviation for one in range(n))
