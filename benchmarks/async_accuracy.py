"""What asynchronous training costs in accuracy: `make bench-async-accuracy`, or `python -m benchmarks.async_accuracy`.

The demo's distillation from the same starting point, in each of verl's modes and with several seeds; seeds order the
questions and draw the responses. Reported is the share of held-out questions that the student answers exactly right.

As many responses and updates as the demo has, but each batch is one mini-batch: verl's separate_async learns from every
mini-batch by itself, all its epochs in a row, where sync takes turns among those of a batch. With one for each batch
both do the same, and what differs is how old the responses are.
Rows: `schedule`, `seed`, `accuracy_before`, `accuracy_after`, `teacher_kl_last`, `seconds`.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from examples.sort_digits import settings
from examples.sort_digits.demo import Options, run_demo
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.pretrain import DATA_FOLDER, make_starting_point, progress_bar
from examples.sort_digits.settings import Distillation
from examples.sort_digits.task import TaskConfig, make_splits, write_splits

SCHEDULES = ("sync", "separate_async")
SEEDS = (0, 1, 2)

STEPS = 64
BATCH_SIZE = 32
WARM_UP_STEPS = 10

Row = dict[str, str | float | int]


def run(schedule: str, seed: int, *, models: Path, output: Path, console: Console, interrupts: Interrupts) -> Row:
    """One distillation."""

    def command(*args: Any, **kwargs: Any) -> list[str]:
        return [*settings.trainer_command(*args, **kwargs), f"trainer.v1.trainer_mode={schedule}"]

    distillation = Distillation(
        seed=seed, steps=STEPS, batch_size=BATCH_SIZE, mini_batch_size=BATCH_SIZE, warmup_steps=WARM_UP_STEPS
    )
    options = Options(output_dir=output, distillation=distillation, models=models, trainer_command=command)
    summary = run_demo(options, console=console, interrupts=interrupts)
    return {
        "schedule": schedule,
        "seed": seed,
        "accuracy_before": summary.student_accuracy_before,
        "accuracy_after": summary.student_accuracy_after,
        "teacher_kl_last": summary.teacher_kl_last,
        "seconds": summary.seconds,
    }


def table(rows: Sequence[Row]) -> Table:
    """Mean, lowest and highest accuracy of each schedule."""
    made = Table("schedule", "seeds", "mean", "lowest", "highest", title="Held-out questions right after distillation")
    for schedule in dict.fromkeys(one["schedule"] for one in rows):
        found = [float(one["accuracy_after"]) for one in rows if one["schedule"] == schedule]
        made.add_row(
            f"{schedule}", f"{len(found)}", f"{statistics.mean(found):.1%}", f"{min(found):.1%}", f"{max(found):.1%}"
        )
    return made


def main(
    *,
    schedule: Annotated[list[str], typer.Option(help="May be given several times.")] = [*SCHEDULES],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Likewise.")] = [*SEEDS],  # noqa: B006
    work_dir: Annotated[Path, typer.Option(help="Models and runs.")] = Path("runs/bench-async-accuracy"),
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/async_accuracy.json"),
) -> None:
    """Train with every schedule and seed, and write the results; runs that are done are kept."""
    console, interrupts = Console(), Interrupts()
    models = work_dir / "models"
    rows: list[Row] = []
    with interrupts.watched():
        if not (models / DATA_FOLDER).is_dir():
            _make_models(models, console)
        for one_seed in seed:
            for one in schedule:
                done = work_dir / f"{one}-{one_seed}.json"
                if not done.is_file():
                    row = run(
                        one, one_seed, models=models, output=work_dir / "run", console=console, interrupts=interrupts
                    )
                    done.write_text(json.dumps(row) + "\n")
                rows.append(json.loads(done.read_text()))
                console.print(rows[-1], highlight=False, soft_wrap=True)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(rows, indent=1) + "\n")
    shutil.rmtree(work_dir / "run", ignore_errors=True)
    console.print(table(rows))


def _make_models(folder: Path, console: Console) -> None:
    splits = make_splits(TaskConfig())
    with progress_bar(console) as progress:
        make_starting_point(splits, folder, seed=0, progress=progress)
    write_splits(splits, folder / DATA_FOLDER)  # last, so that what an interrupt left is not taken for whole


if __name__ == "__main__":
    typer.run(main)
