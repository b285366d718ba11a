"""Which endpoint gets the next attempt."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from trainer.teacher.balancer import Balancer


def pick(balancer: Balancer, now_s: float) -> str:
    with balancer.attempt(now_s) as endpoint:
        return endpoint


def test_the_least_loaded_endpoint_is_picked() -> None:
    """Attempts under way spread evenly."""
    balancer = Balancer(["a:1", "b:1", "c:1"], cool_down_s=5.0)
    with ExitStack() as stack:
        picked = [stack.enter_context(balancer.attempt(0.0)) for _ in range(6)]
    assert sorted(picked) == ["a:1", "a:1", "b:1", "b:1", "c:1", "c:1"]


def test_a_busy_endpoint_is_passed_over() -> None:
    """While one attempt is under way on a, the next ones go to b."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    with balancer.attempt(0.0) as busy:
        assert busy == "a:1"
        assert [pick(balancer, 0.0) for _ in range(3)] == ["b:1", "b:1", "b:1"]


def test_idle_endpoints_take_turns() -> None:
    """One call after the other does not always land on the first endpoint."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    assert [pick(balancer, 0.0) for _ in range(4)] == ["a:1", "b:1", "a:1", "b:1"]


def test_an_endpoint_that_failed_is_avoided_for_the_cool_down() -> None:
    """An endpoint that fails fast, and so is always idle, does not draw the traffic."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    balancer.report_failure("a:1", 100.0)
    with balancer.attempt(104.9) as busy:
        assert busy == "b:1"
        assert pick(balancer, 104.9) == "b:1"
        assert pick(balancer, 105.0) == "a:1"


def test_success_ends_the_cool_down() -> None:
    """An endpoint that answers again is used again at once."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    balancer.report_failure("a:1", 100.0)
    balancer.report_success("a:1")
    assert pick(balancer, 100.0) == "a:1"


def test_a_longer_delay_that_the_endpoint_named_counts() -> None:
    """An overloaded endpoint is left alone for as long as it asked, and not for less than the cool-down."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    balancer.report_failure("a:1", 0.0, retry_delay_s=9.0)
    balancer.report_failure("b:1", 0.0, retry_delay_s=1.0)
    assert not balancer.has_available(4.9)
    assert balancer.has_available(5.0)
    assert [pick(balancer, 8.9), pick(balancer, 8.9)] == ["b:1", "b:1"]


def test_where_all_failed_the_first_to_recover_is_picked() -> None:
    """With no endpoint left an attempt still goes somewhere."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    balancer.report_failure("a:1", 2.0)
    balancer.report_failure("b:1", 1.0)
    assert pick(balancer, 3.0) == "b:1"


def test_an_attempt_that_raises_is_uncounted() -> None:
    """A failed attempt leaves no load behind."""
    balancer = Balancer(["a:1", "b:1"], cool_down_s=5.0)
    with pytest.raises(RuntimeError, match="x"), balancer.attempt(0.0):
        raise RuntimeError("x")
    with balancer.attempt(0.0), balancer.attempt(0.0) as second:
        assert second == "a:1"
