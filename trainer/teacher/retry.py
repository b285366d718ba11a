"""When a failed teacher call is worth repeating, and after how long. Pure: no channel, no clock, no sleep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tenacity import RetryCallState

from trainer.errors import (
    ConfigError,
    TeacherAnswerError,
    TeacherCredentialsError,
    TeacherDeadlineError,
    TeacherError,
    TeacherFailedError,
    TeacherOverloadedError,
    TeacherRefusedError,
    TeacherUnavailableError,
)

MAX_FAULTS = 3
"""Attempts of one call that may fail inside a teacher or bring an invalid answer: the sequence itself may be why."""

_RETRYABLE = (TeacherUnavailableError, TeacherOverloadedError, TeacherDeadlineError)
_CLASS_BY_CODE: dict[str, type[TeacherError]] = {
    "UNAVAILABLE": TeacherUnavailableError,
    "DEADLINE_EXCEEDED": TeacherDeadlineError,
    "RESOURCE_EXHAUSTED": TeacherRefusedError,
    "INVALID_ARGUMENT": TeacherRefusedError,
    "OUT_OF_RANGE": TeacherRefusedError,
    "FAILED_PRECONDITION": TeacherRefusedError,
    "UNIMPLEMENTED": TeacherRefusedError,
    "NOT_FOUND": TeacherRefusedError,
    "UNAUTHENTICATED": TeacherCredentialsError,
    "PERMISSION_DENIED": TeacherRefusedError,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter."""

    max_attempts: int | None = None
    """Calls made for one answer, the first included, >= 1; None: as many as the call's time allows."""
    initial_delay_s: float = 0.1
    """Longest wait before the second attempt, > 0."""
    max_delay_s: float = 5.0
    """Longest wait that the backoff itself asks for, >= initial_delay_s. A service may ask for more."""
    multiplier: float = 2.0
    """Growth of the wait from attempt to attempt, >= 1."""
    jitter: float = 0.5
    """Share of each wait that is drawn at random, in [0, 1], so that clients don't come back together."""

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ConfigError(f"max_attempts is {self.max_attempts}, must be >= 1; 1 means no retry")
        if not (0 < self.initial_delay_s <= self.max_delay_s < math.inf):
            raise ConfigError(
                f"initial_delay_s is {self.initial_delay_s} and max_delay_s {self.max_delay_s}; "
                "they must be finite with 0 < initial_delay_s <= max_delay_s"
            )
        if not (1 <= self.multiplier < math.inf and 0 <= self.jitter <= 1):
            raise ConfigError(
                f"multiplier is {self.multiplier} and jitter {self.jitter}; multiplier must be >= 1, jitter in [0, 1]"
            )

    def backoff_s(self, num_attempts: int, *, draw: float) -> float:
        """Seconds to wait after `num_attempts` failed attempts.

        Args:
            num_attempts: attempts made so far, >= 1.
            draw: a random number in [0, 1).
        """
        # A float power overflows long before a run with thousands of attempts ends.
        exponent = min(num_attempts - 1, 64)
        longest = min(self.max_delay_s, self.initial_delay_s * self.multiplier**exponent)
        return longest * (1 - self.jitter * draw)

    def delay_s(self, num_attempts: int, *, draw: float, retry_delay_s: float | None) -> float:
        """Seconds to wait for a service that named `retry_delay_s`: never less than it, and spread by the backoff."""
        return (retry_delay_s or 0.0) + self.backoff_s(num_attempts, draw=draw)


DEFAULT_RETRY = RetryPolicy()


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed later or elsewhere, as often as it takes."""
    return isinstance(error, _RETRYABLE)


def is_fault(error: BaseException) -> bool:
    """Whether the teacher failed on the request, so that few more attempts are worth their while."""
    return isinstance(error, (TeacherFailedError, TeacherAnswerError))


def error_class(code: str, reason: str) -> type[TeacherError]:
    """The error that a gRPC status stands for.

    Args:
        code: name of the status code.
        reason: the service's reason; RESOURCE_EXHAUSTED is worth a retry for OVERLOADED only, since a message
            that is too large stays so.
    """
    if code == "RESOURCE_EXHAUSTED" and reason == "OVERLOADED":
        return TeacherOverloadedError
    return _CLASS_BY_CODE.get(code, TeacherFailedError)


def failure_of(state: RetryCallState) -> TeacherError:
    """The error that made tenacity ask for a wait: always the trainer's own, since only those are retried."""
    error = None if state.outcome is None else state.outcome.exception()
    if not isinstance(error, TeacherError):
        raise TypeError(f"a retry without a teacher error: {error!r}")
    return error
