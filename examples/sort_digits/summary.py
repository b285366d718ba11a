"""The numbers of a run, as measured in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What `summary.json` holds."""

    teacher_accuracy: float
    """Share of held-out questions that the teacher answers exactly right, greedily, in [0, 1]."""
    student_accuracy_before: float
    """Likewise of the student, before distillation."""
    student_accuracy_after: float
    """Likewise of the student, after it."""
    teacher_kl_first: float
    """Divergence from the teacher at the first step, nats per token."""
    teacher_kl_last: float
    """Likewise at the last step."""
    steps: int
    """Training steps: rounds of generation, scoring and update."""
    seconds: float
    """Of the whole run: making the models, start-up, training, evaluation, stopping."""
    scored_tokens: int
    """Response tokens that the teacher scored."""

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def as_table(self) -> Table:
        """What the terminal shows."""
        table = Table("", "before", "after", title="Distilled")
        table.add_row(
            "student, held-out questions right",
            f"{self.student_accuracy_before:.1%}",
            f"{self.student_accuracy_after:.1%}",
        )
        table.add_row("teacher, likewise", f"{self.teacher_accuracy:.1%}", f"{self.teacher_accuracy:.1%}")
        table.add_row(
            "divergence, nats per token (first step, last step)",
            f"{self.teacher_kl_first:.3f}",
            f"{self.teacher_kl_last:.3f}",
        )
        table.add_row("tokens scored by the teacher", "", f"{self.scored_tokens}")
        table.add_row("steps", "", f"{self.steps}")
        table.add_row("seconds", "", f"{self.seconds:.0f}")
        return table
