"""A run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.sort_digits.metrics_log import StepMetrics
from examples.sort_digits.summary import Summary


def plot_run(steps: Sequence[StepMetrics], summary: Summary, path: Path) -> None:
    """Draw the divergence at every step, and the accuracies where they were measured, into a PNG file."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    # Without pyplot: no global state, and no window system is looked for.
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_divergence(left, steps)
    _draw_accuracy(right, summary)
    figure.savefig(path, dpi=120)


def _draw_divergence(axes: Axes, steps: Sequence[StepMetrics]) -> None:
    axes.plot([one.step for one in steps], [one.teacher_kl for one in steps])
    axes.set(
        title="Divergence from the teacher",
        xlabel="training step",
        ylabel="forward KL (nats per token)",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)


def _draw_accuracy(axes: Axes, summary: Summary) -> None:
    measured = [100 * summary.student_accuracy_before, 100 * summary.student_accuracy_after]
    # Dotted: measured at its ends only.
    axes.plot([0, summary.steps], measured, marker="o", linestyle=":", label="student")
    axes.axhline(100 * summary.teacher_accuracy, color="black", linestyle="--", label="teacher")
    axes.set(
        title="Held-out questions, greedy",
        xlabel="training step",
        ylabel="answered exactly right (%)",
        ylim=(0, 105),
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
