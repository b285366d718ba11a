"""Makes the teacher, which has learnt the task, and the student, which has only begun to.

`python -m examples.sort_digits.pretrain --output-dir DIR` writes `data/`, `teacher/` and `student_start/` there.

Legend: B rows, P prompt tokens, A answer tokens, N = P + A, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

from examples.sort_digits.encoding import EncodedRows, encode_rows
from examples.sort_digits.errors import DemoError
from examples.sort_digits.evaluate import evaluate
from examples.sort_digits.models import STUDENT_SIZE, TEACHER_SIZE, ModelSize, build_model, build_tokenizer, save_model
from examples.sort_digits.task import Splits, TaskConfig, make_splits, write_splits

TEACHER_FOLDER, STUDENT_FOLDER, DATA_FOLDER = "teacher", "student_start", "data"
OnStep = Callable[[int, float], None]
"""Told after each validation: the steps so far and the accuracy in [0, 1]."""


class PretrainingError(DemoError):
    """A model missed its accuracy within the allowed steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one model is trained, and when it is done."""

    name: str
    """What the model is called in messages."""
    size: ModelSize
    """What is trained."""
    learning_rate: float
    """Peak, after the warm-up; falls linearly to a tenth at `max_steps`."""
    target_accuracy: float
    """Stop at the first validation that reaches it, in (0, 1)."""
    max_steps: int
    """Give up after so many."""
    validate_every: int
    """Steps between validations."""
    seed_offset: int
    """Added to the run's seed, so that two models never start alike."""
    batch_size: int = 128
    """Rows per step."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises."""


TEACHER_RECIPE = Recipe(
    name="teacher",
    size=TEACHER_SIZE,
    learning_rate=3e-3,
    target_accuracy=0.985,
    max_steps=500,
    validate_every=10,
    seed_offset=0,
)
STUDENT_RECIPE = Recipe(
    name="student",
    size=STUDENT_SIZE,
    learning_rate=1e-3,
    target_accuracy=0.22,
    max_steps=200,
    validate_every=1,
    seed_offset=1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What training gave."""

    model: Qwen3ForCausalLM
    """In float32."""
    steps: int
    """Optimizer steps taken."""
    validation_accuracy: float
    """Of the float32 model, in [0, 1]."""


def train(
    recipe: Recipe, training: EncodedRows, validation: EncodedRows, *, seed: int, on_step: OnStep
) -> TrainedModel:
    """Supervised fine-tuning from random weights until validation reaches the recipe's accuracy.

    Raises:
        PretrainingError: it didn't within `max_steps`.
    """
    model = build_model(recipe.size, seed=seed + recipe.seed_offset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    order = torch.Generator().manual_seed(seed + recipe.seed_offset)
    best = 0.0
    for step in range(1, recipe.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _learning_rate_share(step, recipe)
        picked = torch.randint(len(training), (recipe.batch_size,), generator=order)
        optimizer.zero_grad()
        _answer_loss(model, training.token_ids[picked], training.prompt_tokens).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % recipe.validate_every == 0:
            accuracy = greedy_accuracy(model, validation)
            on_step(step, accuracy)
            if accuracy >= recipe.target_accuracy:
                return TrainedModel(model=model, steps=step, validation_accuracy=accuracy)
            best = max(best, accuracy)
    raise PretrainingError(
        f"the {recipe.name} answers {best:.1%} of the validation questions at best after {recipe.max_steps} steps, "
        f"{recipe.target_accuracy:.1%} are needed; try another seed"
    )


def _learning_rate_share(step: int, recipe: Recipe) -> float:
    return min(step / recipe.warmup_steps, max(0.1, 1.0 - step / recipe.max_steps))


def _answer_logits(model: Qwen3ForCausalLM, token_ids_BN: Tensor, prompt_tokens: int) -> Tensor:
    """Logits that predict the answer's tokens, [B, A, V]; the LM head runs on no other position."""
    hidden = model.model(input_ids=token_ids_BN[:, :-1], use_cache=False).last_hidden_state
    logits_BAV: Tensor = model.lm_head(hidden[:, prompt_tokens - 1 :])
    return logits_BAV


def _answer_loss(model: Qwen3ForCausalLM, token_ids_BN: Tensor, prompt_tokens: int) -> Tensor:
    logits_BAV = _answer_logits(model, token_ids_BN, prompt_tokens)
    return cross_entropy(logits_BAV.flatten(0, 1), token_ids_BN[:, prompt_tokens:].flatten())


@torch.no_grad()
def greedy_accuracy(model: Qwen3ForCausalLM, rows: EncodedRows) -> float:
    """Share of rows that greedy decoding gets right, in [0, 1], in one forward pass.

    Greedy decoding gives the answer exactly when each answer token is the likeliest after the ones before it.
    """
    predicted_BA = _answer_logits(model, rows.token_ids, rows.prompt_tokens).argmax(dim=-1)
    return float((predicted_BA == rows.answers).all(dim=1).float().mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """Where a distillation begins: files, and how good the two models are as saved."""

    teacher: Path
    """Hugging Face checkpoint in bfloat16."""
    student: Path
    """Hugging Face checkpoint in bfloat16, warm-started."""
    teacher_accuracy: float
    """Greedy, held-out questions, of the saved checkpoint, in [0, 1]."""
    student_accuracy: float
    """Likewise."""


def make_starting_point(splits: Splits, directory: Path, *, seed: int, progress: Progress) -> StartingPoint:
    """Train, save and evaluate both models.

    On one thread, for they are so small that a second one costs more than it brings, and the same weights come out
    whatever the number of cores.

    Raises:
        PretrainingError: a model missed its accuracy.
    """
    tokenizer = build_tokenizer()
    training, validation = encode_rows(splits.train, tokenizer), encode_rows(splits.validation, tokenizer)
    with one_thread():
        for recipe, name in ((TEACHER_RECIPE, TEACHER_FOLDER), (STUDENT_RECIPE, STUDENT_FOLDER)):
            trained = train(recipe, training, validation, seed=seed, on_step=_show(progress, recipe))
            save_model(trained.model, directory / name)
    return load_starting_point(directory, splits)


def load_starting_point(directory: Path, splits: Splits) -> StartingPoint:
    """Evaluate the two models that `make_starting_point` saved in `directory`."""
    teacher, student = directory / TEACHER_FOLDER, directory / STUDENT_FOLDER
    return StartingPoint(
        teacher=teacher,
        student=student,
        teacher_accuracy=evaluate(teacher, splits.held_out),
        student_accuracy=evaluate(student, splits.held_out),
    )


def _show(progress: Progress, recipe: Recipe) -> OnStep:
    task = progress.add_task(f"{recipe.name} learns", total=recipe.target_accuracy, shown="")

    def on_step(step: int, accuracy: float) -> None:
        shown = f"{accuracy:.1%} right after {step} steps"
        progress.update(task, completed=min(accuracy, recipe.target_accuracy), shown=shown)

    return on_step


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def progress_bar(console: Console) -> Progress:
    """Bars with a free text field `shown`."""
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    return Progress(*columns, console=console)


def main(
    *,
    output_dir: Annotated[Path, typer.Option(help="Folder for data/, teacher/ and student_start/.")],
    seed: Annotated[int, typer.Option(help="Of the data, the weights and the order of training.")] = 0,
) -> None:
    """Write the task's data, a teacher that knows it and a student that has begun to learn it."""
    transformers.utils.logging.disable_progress_bar()
    splits = make_splits(TaskConfig(seed=seed))
    write_splits(splits, output_dir / DATA_FOLDER)
    try:
        with progress_bar(Console()) as progress:
            start = make_starting_point(splits, output_dir, seed=seed, progress=progress)
    except PretrainingError as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from exc
    typer.echo(f"teacher {start.teacher_accuracy:.1%}  {start.teacher}")
    typer.echo(f"student {start.student_accuracy:.1%}  {start.student}")


if __name__ == "__main__":
    typer.run(main)
