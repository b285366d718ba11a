"""How many retries a client may make. Pure: the caller brings the time."""

from __future__ import annotations

from trainer.errors import ConfigError


class RetryBudget:
    """A token bucket: calls pay in, retries take out, and a retry that finds it empty waits for its token.

    It keeps the clients of a teacher in trouble from multiplying its load.
    """

    def __init__(self, *, now_s: float, burst: float, share: float = 0.2, rate_per_s: float = 2.0) -> None:
        """Start full.

        Args:
            now_s: the time.
            burst: most tokens, and so most retries at once, >= 1.
            share: tokens that a call pays in, >= 0: the retries that a client may make per call in the long run.
            rate_per_s: tokens per second that come by themselves, > 0.

        Raises:
            ConfigError: a number is out of range.
        """
        if not (burst >= 1 and share >= 0 and rate_per_s > 0):
            raise ConfigError(
                f"burst is {burst}, share {share} and rate_per_s {rate_per_s}; they must be >= 1, >= 0 and > 0"
            )
        self._burst, self._share, self._rate_per_s = burst, share, rate_per_s
        self._tokens = burst
        self._updated_s = now_s

    def deposit(self, now_s: float) -> None:
        """A call begins."""
        self._refill(now_s)
        self._tokens = min(self._tokens + self._share, self._burst)

    def withdraw(self, now_s: float) -> float:
        """Take one token for a retry, ahead of time where there is none, and return the seconds until it is there."""
        self._refill(now_s)
        self._tokens -= 1
        return max(-self._tokens, 0.0) / self._rate_per_s

    def try_withdraw(self, now_s: float) -> bool:
        """Take one token where there is one."""
        self._refill(now_s)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def refund(self) -> None:
        """Give back the token of a retry that was not made."""
        self._tokens = min(self._tokens + 1, self._burst)

    def _refill(self, now_s: float) -> None:
        self._tokens = min(self._tokens + (now_s - self._updated_s) * self._rate_per_s, self._burst)
        self._updated_s = now_s
