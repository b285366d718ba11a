"""What a teacher's top-k leaves of a divergence: `make bench-truncation`, or `python -m benchmarks.truncation`.

The demo's teacher scores what the demo's student says to held-out questions, and each divergence of their
distributions is taken on the top K of the vocabulary and on all of it. Two errors of the first, over all tokens: of the
mean value, and of the gradient by the logits (the norm of the difference over the norm of the full one).

Legend: B questions, P prompt tokens, A answer tokens, V vocabulary rows, S tokens of all answers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.sort_digits.encoding import encode_rows
from examples.sort_digits.models import build_tokenizer
from examples.sort_digits.pretrain import STUDENT_FOLDER, TEACHER_FOLDER, make_starting_point, progress_bar
from examples.sort_digits.task import TaskConfig, make_splits
from trainer.losses import TAILS, topk_divergence
from trainer.types import Tail, TopKDivergence

SEED = 0
DIVERGENCES: tuple[TopKDivergence, ...] = ("forward_kl", "reverse_kl", "jsd")
KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Row(NamedTuple):
    """One form at one K."""

    divergence: str
    tail: str
    k: int
    teacher_tail_mass: float
    """Mean teacher probability outside the top-k."""
    value: float
    """Nats per token."""
    full_value: float
    """The same over the whole vocabulary."""
    gradient_error: float
    """|g_K - g_V| / |g_V|."""


class Distributions(NamedTuple):
    """What both models say at each token of the student's answers."""

    student_logits: Tensor
    """`[S, V]`."""
    teacher_logprobs: Tensor
    """`[S, V]` nats."""


@torch.no_grad()
def answer(folder: Path, *, num_questions: int) -> Distributions:
    """Let the student answer by sampling, and both models look at the answers."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in (STUDENT_FOLDER, TEACHER_FOLDER)
    )
    questions = encode_rows(make_splits(TaskConfig(seed=SEED)).held_out[:num_questions], build_tokenizer())
    torch.manual_seed(SEED)
    token_ids = student.generate(
        questions.prompts, do_sample=True, top_k=0, max_new_tokens=questions.answers.shape[1], use_cache=True
    )
    ends = (token_ids[:, questions.prompt_tokens :] == student.config.eos_token_id).long()
    learned = ends.cumsum(-1) - ends == 0  # up to the first end of turn, and it
    rows = slice(questions.prompt_tokens - 1, -1)
    logits = student(input_ids=token_ids).logits[:, rows][learned]
    return Distributions(logits, torch.log_softmax(teacher(input_ids=token_ids).logits[:, rows][learned], -1))


def measure(distributions: Distributions) -> list[Row]:
    """Every divergence and tail at every K, in float64."""
    student, teacher = (one.double() for one in distributions)
    vocab_rows = student.shape[1]
    rows = []
    for divergence in DIVERGENCES:
        full_value, full_gradient = _divergence(student, teacher, vocab_rows, divergence, "bucket")
        for tail, k in itertools.product(TAILS, KS):
            value, gradient = _divergence(student, teacher, k, divergence, tail)
            mass = float(teacher.topk(k, -1).values.exp().sum(-1).mean())
            error = float((gradient - full_gradient).norm() / full_gradient.norm())
            rows.append(Row(divergence, tail, k, 1 - mass, value, full_value, error))
    return rows


def _divergence(
    student: Tensor, teacher: Tensor, k: int, divergence: TopKDivergence, tail: Tail
) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    logprobs, ids = teacher.topk(k, -1)
    value = topk_divergence(leaf, ids, logprobs, divergence=divergence, tail=tail).mean()
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient


def table(rows: Sequence[Row]) -> Table:
    """Errors by K."""
    shown = Table("divergence", "tail", *(f"K={k}" for k in KS), title="value / full value, gradient error")
    for (divergence, tail), group in itertools.groupby(rows, key=lambda one: (one.divergence, one.tail)):
        shown.add_row(
            divergence, tail, *(f"{one.value / one.full_value:.3f} {one.gradient_error:.3f}" for one in group)
        )
    return shown


def draw(rows: Sequence[Row], path: Path) -> None:
    """Both errors against K, a column of panels to each divergence."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no global state
    panels = figure.subplots(2, len(DIVERGENCES), sharex=True)
    for column, divergence in enumerate(DIVERGENCES):
        _panel(panels[0][column], rows, divergence, lambda one: one.value / one.full_value)
        _panel(panels[1][column], rows, divergence, lambda one: max(one.gradient_error, 1e-4))
        panels[0][column].set(title=divergence)
        panels[0][column].axhline(1, color="0.6", linewidth=0.8)
        panels[1][column].set(xlabel="K", yscale="log")
    panels[0][0].set(ylabel="value / full value")
    panels[1][0].set(ylabel="error of the gradient")
    panels[0][0].legend()
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, rows: Sequence[Row], divergence: str, height: Callable[[Row], float]) -> None:
    for tail in TAILS:
        group = [one for one in rows if (one.divergence, one.tail) == (divergence, tail)]
        axes.plot([one.k for one in group], [height(one) for one in group], marker="o", markersize=3, label=tail)
    axes.set(xscale="log", xticks=[1, 2, 4, 8, 16, 32], xticklabels=["1", "2", "4", "8", "16", "32"])
    axes.grid(alpha=0.3)


def main(
    *,
    folder: Annotated[Path, typer.Option(help="The demo's models; made there if absent.")] = Path("runs/truncation"),
    num_questions: Annotated[int, typer.Option(min=1, help="That the student answers.")] = 400,
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/truncation.json"),
    figure: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/truncation.png"),
) -> None:
    """Measure what truncation costs, and draw it."""
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    if not (folder / STUDENT_FOLDER).is_dir():
        with progress_bar(console) as progress:
            make_starting_point(make_splits(TaskConfig(seed=SEED)), folder, seed=SEED, progress=progress)
    rows = measure(answer(folder, num_questions=num_questions))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([one._asdict() for one in rows], indent=1) + "\n")
    draw(rows, figure)
    console.print(table(rows))


if __name__ == "__main__":
    typer.run(main)
