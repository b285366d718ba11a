"""The metrics that the trainer writes while it runs: one JSON object per line, `{"step": …, "data": {…}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.sort_digits.errors import DemoError
from examples.sort_digits.settings import SCORED_TOKENS, STEP_SECONDS, TEACHER_KL


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What one training step reported."""

    step: int
    """Counts from 1."""
    teacher_kl: float
    """Divergence from the teacher, nats per token."""
    scored_tokens: int
    """Response tokens that the teacher scored."""
    seconds: float
    """How long it took."""


class MetricsLog:
    """Reads the file as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self.steps: list[StepMetrics] = []
        """Every step so far, in order."""

    def read_new(self) -> Sequence[StepMetrics]:
        """Read the whole lines that were added since the last call; none as long as there is no file.

        Raises:
            DemoError: a step lacks a metric that the demo reports.
        """
        if not self._path.is_file():
            return ()
        with self._path.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        records = [json.loads(line) for line in whole.splitlines()]
        # verl also logs validations by themselves, without training metrics.
        new = [self._step(one["step"], one["data"]) for one in records if STEP_SECONDS in one["data"]]
        self.steps.extend(new)
        return new

    def _step(self, step: int, metrics: Mapping[str, float]) -> StepMetrics:
        missing = [name for name in (TEACHER_KL, SCORED_TOKENS) if name not in metrics]
        if missing:
            raise DemoError(f"step {step} in {self._path} lacks {', '.join(missing)}; did it distil from a teacher?")
        return StepMetrics(
            step=step,
            teacher_kl=float(metrics[TEACHER_KL]),
            scored_tokens=round(metrics[SCORED_TOKENS]),
            seconds=float(metrics[STEP_SECONDS]),
        )
