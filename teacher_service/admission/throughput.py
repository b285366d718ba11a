"""How fast the engine works, of late and while it has work."""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""Busy seconds after which what was counted weighs 1/e."""


class Throughput:
    """Tokens per busy second, both decaying alike. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._counted_until_s = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None until something was finished."""
        return self._tokens / self._busy_s if self._tokens > 0 and self._busy_s > 0 else None

    def began(self, now_s: float) -> None:
        """The engine has work, after it had none."""
        self._counted_until_s = now_s

    def passed(self, num_tokens: int, now_s: float) -> None:
        """A sequence of so many tokens left the engine; 0 for one that was not finished."""
        passed_s = now_s - self._counted_until_s
        kept = math.exp(-passed_s / MEMORY_S)
        self._tokens = kept * self._tokens + num_tokens
        self._busy_s = kept * self._busy_s + passed_s
        self._counted_until_s = now_s
