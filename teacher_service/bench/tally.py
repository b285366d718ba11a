"""One level of concurrency, counted while it runs, and the row of results that it comes to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from teacher_service.bench.settings import BenchSettings
from teacher_service.transports.caller import CallError, ScoreAnswer


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was measured at one concurrency. None: no sequence was answered."""

    concurrency: int
    """Sequences in flight at a time."""
    num_sequences: int
    """Sequences that were answered."""
    num_logprobs: int
    """K."""
    sequences_per_s: float
    tokens_per_s: float
    """Of prompts and responses."""
    scored_tokens_per_s: float
    """Of responses."""
    latency_p50_ms: float | None
    """Of an answered sequence, from its first attempt until the answer's bytes were here; with waits for a retry."""
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_max_ms: float | None
    mean_queue_ms: float | None
    """Waiting for the engine, as the service says."""
    mean_engine_ms: float | None
    """In the engine, as the service says."""
    payload_bytes_per_token: float | None
    """Size of the answers per scored token."""
    decode_us_per_token: float | None
    """This side's processor time to unpack and check the answers, per scored token."""
    retries: int
    """Attempts that the service refused as OVERLOADED and that were made again."""
    errors: dict[str, int]
    """Sequences that failed, by reason."""


class AnswerCost(NamedTuple):
    """What one answered sequence took."""

    latency_s: float
    queue_s: float
    engine_s: float
    decode_s: float
    payload_bytes: int


@dataclass(kw_only=True)
class Tally:
    """Counts one level while it runs."""

    concurrency: int
    """Sequences in flight at a time."""
    costs: list[AnswerCost] = field(default_factory=list)
    """Of each answered sequence."""
    retries: int = 0
    """Attempts that were made again."""
    errors: Counter[str] = field(default_factory=Counter)
    """Failed sequences by reason."""
    messages: dict[str, str] = field(default_factory=dict)
    """The first message of each reason, in order of appearance."""
    elapsed_s: float = 0.0
    """Seconds that the level took."""
    processor_s: float = 0.0
    """Seconds of processor time that this side spent on it."""

    @property
    def num_answered(self) -> int:
        """Sequences that were answered."""
        return len(self.costs)

    @property
    def num_failed(self) -> int:
        """Sequences that were not."""
        return self.errors.total()

    @property
    def processor_share(self) -> float:
        """Processor time of this side per second, in processors: it has one event loop, so near 1 is its limit."""
        return self.processor_s / self.elapsed_s if self.elapsed_s else 0.0

    def add_answer(self, answer: ScoreAnswer, *, waited_s: float) -> None:
        """Count one answered sequence, which waited that long before the attempt that was answered."""
        self.costs.append(
            AnswerCost(
                latency_s=waited_s + answer.latency_s,
                queue_s=answer.timings.queue_s,
                engine_s=answer.timings.engine_s,
                decode_s=answer.decode_s,
                payload_bytes=answer.payload_bytes,
            )
        )

    def add_error(self, error: CallError) -> None:
        """Count one failed sequence."""
        self.errors[error.reason] += 1
        self.messages.setdefault(error.reason, error.message)

    def row(self, settings: BenchSettings) -> Row:
        """What it comes to, for sequences as the settings say."""
        S = settings.response_tokens
        per_s = self.num_answered / self.elapsed_s if self.num_answered else 0.0
        p50_s, p95_s, p99_s, max_s = self._latencies_s((50, 95, 99, 100))
        return Row(
            concurrency=self.concurrency,
            num_sequences=self.num_answered,
            num_logprobs=settings.num_logprobs,
            sequences_per_s=per_s,
            tokens_per_s=per_s * (settings.prompt_tokens + S),
            scored_tokens_per_s=per_s * S,
            latency_p50_ms=_scaled(p50_s, 1e3),
            latency_p95_ms=_scaled(p95_s, 1e3),
            latency_p99_ms=_scaled(p99_s, 1e3),
            latency_max_ms=_scaled(max_s, 1e3),
            mean_queue_ms=_scaled(self._mean("queue_s"), 1e3),
            mean_engine_ms=_scaled(self._mean("engine_s"), 1e3),
            payload_bytes_per_token=_scaled(self._mean("payload_bytes"), 1 / S),
            decode_us_per_token=_scaled(self._mean("decode_s"), 1e6 / S),
            retries=self.retries,
            errors=dict(self.errors),
        )

    def _latencies_s(self, percentiles: tuple[float, ...]) -> list[float] | list[None]:
        if not self.costs:
            return [None] * len(percentiles)
        return [float(one) for one in np.percentile([cost.latency_s for cost in self.costs], percentiles)]

    def _mean(self, name: str) -> float | None:
        return float(np.mean([getattr(cost, name) for cost in self.costs])) if self.costs else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
