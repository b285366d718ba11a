"""The task: sort the digits of a number. "52413=" is answered with "12345".

`python -m examples.sort_digits.task --output-dir DIR` writes the splits as parquet files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

SPLIT_NAMES = ("train", "validation", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What the generator makes. The same values give the same rows."""

    num_digits: int = 5
    """Digits of a question, >= 1."""
    num_train: int = 20_000
    """Questions to train on: the teacher with their answers, the student without."""
    num_validation: int = 500
    """Questions that decide when training stops."""
    num_held_out: int = 1_000
    """Questions that nothing but the final evaluation sees."""
    seed: int = 0
    """Which questions are drawn, and which split each falls into."""

    def __post_init__(self) -> None:
        if self.num_digits < 1:
            raise ValueError(f"num_digits is {self.num_digits}, must be at least 1")
        sizes = {name: getattr(self, f"num_{name}") for name in SPLIT_NAMES}
        for name, size in sizes.items():
            if size < 0:
                raise ValueError(f"num_{name} is {size}, must be at least 0")
        total, available = sum(sizes.values()), 10**self.num_digits
        if total > available:
            raise ValueError(
                f"{total} distinct questions were asked for, but only {available} have {self.num_digits} digits; "
                "ask for fewer rows or more digits"
            )


DEFAULTS = TaskConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question with its only right answer."""

    question: str
    """Digits and an equals sign: "52413="."""
    answer: str
    """The digits in ascending order: "12345"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The three parts; no question is in two of them, or twice in one."""

    train: tuple[Row, ...]
    """Questions to train on."""
    validation: tuple[Row, ...]
    """Questions that decide when training stops."""
    held_out: tuple[Row, ...]
    """Questions for the final evaluation."""


def make_splits(config: TaskConfig) -> Splits:
    """Draw distinct questions and deal them out."""
    total = config.num_train + config.num_validation + config.num_held_out
    numbers = random.Random(config.seed).sample(range(10**config.num_digits), total)  # noqa: S311 - no secret
    rows = tuple(_row(number, config.num_digits) for number in numbers)
    first_held_out = config.num_train + config.num_validation
    return Splits(
        train=rows[: config.num_train],
        validation=rows[config.num_train : first_held_out],
        held_out=rows[first_held_out:],
    )


def _row(number: int, num_digits: int) -> Row:
    digits = f"{number:0{num_digits}d}"
    return Row(question=f"{digits}=", answer="".join(sorted(digits)))


def write_parquet(rows: tuple[Row, ...], path: Path) -> None:
    """Write the columns `question` and `answer`, both strings, over whatever `path` held."""
    columns = {"question": [row.question for row in rows], "answer": [row.answer for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns, dtype="str").to_parquet(path, index=False)


def write_splits(splits: Splits, directory: Path) -> dict[str, Path]:
    """Write `train.parquet`, `validation.parquet` and `held_out.parquet`; returns the path of each split."""
    paths = {name: directory / f"{name}.parquet" for name in SPLIT_NAMES}
    for name, path in paths.items():
        write_parquet(getattr(splits, name), path)
    return paths


def main(
    *,
    output_dir: Annotated[Path, typer.Option(help="Folder for the parquet files.")],
    num_digits: Annotated[int, typer.Option(help="Digits of a question.")] = DEFAULTS.num_digits,
    num_train: Annotated[int, typer.Option(help="Rows to train on.")] = DEFAULTS.num_train,
    num_validation: Annotated[int, typer.Option(help="Rows for validation.")] = DEFAULTS.num_validation,
    num_held_out: Annotated[int, typer.Option(help="Rows for the final evaluation.")] = DEFAULTS.num_held_out,
    seed: Annotated[int, typer.Option(help="Which questions are drawn.")] = DEFAULTS.seed,
) -> None:
    """Write the splits of the digit-sorting task as parquet with the columns `question` and `answer`."""
    try:
        config = TaskConfig(
            num_digits=num_digits,
            num_train=num_train,
            num_validation=num_validation,
            num_held_out=num_held_out,
            seed=seed,
        )
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    for path in write_splits(make_splits(config), output_dir).values():
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
