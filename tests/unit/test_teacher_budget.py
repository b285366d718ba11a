"""How many retries a client may make."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.teacher.budget import RetryBudget


def test_a_burst_is_free_and_what_exceeds_it_waits_its_turn() -> None:
    """Three at once; the fourth and fifth wait for tokens that come by themselves, two per second."""
    budget = RetryBudget(now_s=0.0, burst=3, share=0.0, rate_per_s=2.0)
    assert [budget.withdraw(0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert budget.withdraw(2.5) == 0.0


def test_calls_pay_for_a_share_of_retries() -> None:
    """Eight calls at a quarter each pay for two retries; the bucket holds no more than the burst."""
    budget = RetryBudget(now_s=0.0, burst=2, share=0.25, rate_per_s=0.001)
    assert [budget.try_withdraw(0.0) for _ in range(3)] == [True, True, False]
    for _ in range(8):
        budget.deposit(0.0)
    assert [budget.try_withdraw(0.0) for _ in range(3)] == [True, True, False]
    for _ in range(1000):
        budget.deposit(0.0)
    assert [budget.try_withdraw(0.0) for _ in range(3)] == [True, True, False]


def test_a_retry_that_was_not_made_is_given_back() -> None:
    """A cancelled call leaves the budget as it was."""
    budget = RetryBudget(now_s=0.0, burst=1, share=0.0, rate_per_s=1.0)
    budget.withdraw(0.0)
    budget.refund()
    assert budget.try_withdraw(0.0)


def test_many_calls_in_trouble_make_few_retries() -> None:
    """A hundred calls a second of which each is tried over and over: retries stay near a fifth of the calls."""
    budget = RetryBudget(now_s=0.0, burst=10, share=0.2, rate_per_s=2.0)
    num_retries, num_calls = 0, 0
    for tick in range(6000):
        now_s = tick / 100
        budget.deposit(now_s)
        num_calls += 1
        num_retries += sum(budget.try_withdraw(now_s) for _ in range(3))
    assert num_retries <= 0.2 * num_calls + 2 * 60 + 10


@pytest.mark.parametrize("setting", [{"burst": 0.5}, {"share": -1.0}, {"rate_per_s": 0.0}])
def test_a_setting_out_of_range_is_refused(setting: dict[str, float]) -> None:
    """With its value."""
    with pytest.raises(ConfigError, match=str(next(iter(setting.values())))):
        RetryBudget(**({"now_s": 0.0, "burst": 1.0} | setting))
