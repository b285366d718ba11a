"""When a failed call is worth repeating, and after how long."""

from __future__ import annotations

import pytest

from trainer.errors import (
    ConfigError,
    TeacherDeadlineError,
    TeacherFailedError,
    TeacherOverloadedError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from trainer.teacher.retry import RetryPolicy, error_class, is_fault, is_retryable


@pytest.mark.parametrize(
    ("code", "reason", "expected", "retryable"),
    [
        ("UNAVAILABLE", "UNREACHABLE", TeacherUnavailableError, True),
        ("UNAVAILABLE", "NOT_READY", TeacherUnavailableError, True),
        ("UNAVAILABLE", "DRAINING", TeacherUnavailableError, True),
        ("UNAVAILABLE", "ENGINE_DEAD", TeacherUnavailableError, True),
        ("RESOURCE_EXHAUSTED", "OVERLOADED", TeacherOverloadedError, True),
        ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE", TeacherRefusedError, False),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", TeacherRefusedError, False),
        ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", TeacherDeadlineError, True),
        ("INVALID_ARGUMENT", "SEQUENCE_TOO_LONG", TeacherRefusedError, False),
        ("FAILED_PRECONDITION", "MISSING_CAPABILITY", TeacherRefusedError, False),
        ("UNIMPLEMENTED", "UNIMPLEMENTED", TeacherRefusedError, False),
        ("INTERNAL", "ENGINE_ERROR", TeacherFailedError, False),
        ("UNKNOWN", "UNKNOWN", TeacherFailedError, False),
        ("DATA_LOSS", "DATA_LOSS", TeacherFailedError, False),
    ],
)
def test_only_what_may_pass_later_is_retried(code: str, reason: str, expected: type, retryable: bool) -> None:
    """Each status and reason has one error class, and only unavailability, overload and lateness are retried."""
    cls = error_class(code, reason)
    assert cls is expected
    error = cls("x", endpoint="e:1", reason=reason)
    assert is_retryable(error) is retryable
    assert is_fault(error) is (expected is TeacherFailedError)


def test_backoff_doubles_up_to_its_limit() -> None:
    """Without jitter the wait doubles from the first to the longest, and stays there."""
    policy = RetryPolicy(initial_delay_s=0.5, max_delay_s=3.0, multiplier=2.0, jitter=0.5)
    assert [policy.backoff_s(n, draw=0.0) for n in (1, 2, 3, 4, 5, 100_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_jitter_shortens_the_wait_by_at_most_its_share() -> None:
    """With jitter 0.25 a draw of 1 takes a quarter off."""
    policy = RetryPolicy(initial_delay_s=1.0, max_delay_s=8.0, jitter=0.25)
    assert policy.backoff_s(2, draw=0.0) == 2.0
    assert policy.backoff_s(2, draw=1.0) == 1.5


def test_a_delay_that_the_service_names_is_never_undercut() -> None:
    """The wait is the service's delay plus a backoff that spreads the clients."""
    policy = RetryPolicy(initial_delay_s=1.0, max_delay_s=8.0, jitter=1.0)
    assert policy.delay_s(1, draw=0.999999, retry_delay_s=20.0) >= 20.0
    assert policy.delay_s(1, draw=0.0, retry_delay_s=20.0) == 21.0
    assert policy.delay_s(1, draw=0.0, retry_delay_s=None) == 1.0


@pytest.mark.parametrize(
    "setting",
    [
        {"max_attempts": 0},
        {"initial_delay_s": 0.0},
        {"initial_delay_s": 6.0},
        {"max_delay_s": float("inf")},
        {"multiplier": 0.5},
        {"jitter": 1.5},
        {"jitter": float("nan")},
    ],
)
def test_a_policy_out_of_range_is_refused(setting: dict[str, float]) -> None:
    """A setting that makes no sense fails when the policy is made, with its value."""
    with pytest.raises(ConfigError, match=str(next(iter(setting.values())))):
        RetryPolicy(**setting)  # type: ignore[arg-type]
