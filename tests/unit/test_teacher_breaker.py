"""When a replica that fails is left alone, and when it is tried again."""

from __future__ import annotations

from trainer.teacher.breaker import Breaker


def fail(breaker: Breaker, now_s: float, times: int = 1) -> list[bool]:
    return [breaker.failed(breaker.begin(), now_s) for _ in range(times)]


def test_a_few_failures_in_a_row_eject() -> None:
    """The fifth does; four that one request may cause do not, nor do five with an answer among them."""
    breaker = Breaker()
    assert fail(breaker, 0.0, 4) == [False] * 4
    breaker.succeeded(breaker.begin())
    assert fail(breaker, 0.0, 5) == [False] * 4 + [True]
    assert not breaker.is_closed
    assert breaker.probe_at_s == 1.0


def test_a_probe_that_succeeds_closes_it() -> None:
    """No time closes it, only an outcome."""
    breaker = Breaker()
    fail(breaker, 0.0, 5)
    breaker.succeeded(breaker.begin())
    assert breaker.is_closed
    assert breaker.probe_at_s is None


def test_the_time_doubles_up_to_a_bound() -> None:
    """Each failed probe ejects for twice as long, a minute at most."""
    breaker, now_s, times_s = Breaker(), 0.0, []
    fail(breaker, now_s, 5)
    for _ in range(8):
        opens_at_s = breaker.probe_at_s
        assert opens_at_s is not None
        times_s.append(opens_at_s - now_s)
        now_s = opens_at_s
        assert fail(breaker, now_s) == [True]
    assert times_s == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_replica_that_relapses_is_ejected_for_longer_and_one_that_served_is_forgiven() -> None:
    """A probe that succeeds by luck does not start the doubling over."""
    breaker = Breaker()
    fail(breaker, 0.0, 5)
    fail(breaker, 1.0)
    breaker.succeeded(breaker.begin())  # at 3.0, after an ejection of 2 s
    fail(breaker, 3.5, 5)
    assert breaker.probe_at_s == 3.5 + 4
    breaker.succeeded(breaker.begin())
    fail(breaker, 100.0, 5)
    assert breaker.probe_at_s == 100.0 + 1


def test_outcomes_of_attempts_from_before_do_not_count() -> None:
    """Sixty attempts that fail together eject once, and a late answer does not end an ejection."""
    breaker = Breaker()
    permits = [breaker.begin() for _ in range(60)]
    assert [breaker.failed(permit, 0.0) for permit in permits[:-1]].count(True) == 1
    breaker.succeeded(permits[-1])
    assert not breaker.is_closed
    assert breaker.probe_at_s == 1.0
