"""Distils a small student from a small teacher on this machine: `python -m examples.sort_digits.demo`.

A teacher learns to sort digits, is served by the teacher service, and a student that has barely begun learns from it.
Everything that the run starts is gone when it ends, whatever ends it.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from examples.sort_digits import settings
from examples.sort_digits.errors import DemoError
from examples.sort_digits.evaluate import evaluate, read_rows
from examples.sort_digits.interrupts import Interrupted, Interrupts
from examples.sort_digits.metrics_log import MetricsLog, StepMetrics
from examples.sort_digits.plot import plot_run
from examples.sort_digits.pretrain import (
    DATA_FOLDER,
    StartingPoint,
    load_starting_point,
    make_starting_point,
    progress_bar,
)
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor, supervised
from examples.sort_digits.readiness import check_running, require_serving, wait_for_own_teacher
from examples.sort_digits.run_folder import RunFolder
from examples.sort_digits.settings import Distillation
from examples.sort_digits.summary import Summary
from examples.sort_digits.task import SPLIT_NAMES, Splits, TaskConfig, make_splits, write_splits

POLL_S = 0.5
TEACHER_READY_TIMEOUT_S = 180.0
TEACHER_GRACE_S = 20.0
"""For the teacher to finish what is in flight and to stop vLLM; then they are killed."""
_DEFAULTS = Distillation()
STEP_TIMEOUT_S = 600.0
"""Longest silence of the trainer before it is taken for hung: start-up is the longest, about a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user chose."""

    output_dir: Path
    """Folder of the run."""
    distillation: Distillation
    """How the student is trained."""
    models: Path | None = None
    """Folder with data and models that `pretrain` wrote. None: make them."""
    endpoint: str | None = None
    """`host:port` of a teacher that already serves. None: start one."""
    keep_checkpoints: bool = False
    """Leave the trainer's own checkpoint folder in place."""
    teacher_command: Callable[[Path, Path], list[str]] = settings.teacher_command
    """How the teacher is started."""
    trainer_command: Callable[..., list[str]] = settings.trainer_command
    """How the trainer is started."""
    trainer_grace_s: float = 10.0
    """For the trainer and Ray to leave in order after SIGTERM; then they are killed."""


def run_demo(options: Options, *, console: Console, interrupts: Interrupts) -> Summary:
    """Make data and models, serve the teacher, distil the student, measure, and write the results.

    Raises:
        DemoError: a part failed; the message names its log.
        OSError: a file can't be read or written.
        Interrupted: a signal asked the run to end.
    """
    started_s = time.monotonic()
    folder = RunFolder(options.output_dir)
    if options.models is not None and options.models.resolve().is_relative_to(folder.path):
        raise DemoError(
            f"--models {options.models} lies in --output-dir {folder.path}, which is emptied; name another one"
        )
    with folder.claimed():
        data_dir = (options.models or folder.path) / DATA_FOLDER
        with progress_bar(console) as progress:
            start = _prepare(options, folder, progress)
            with supervised(folder.logs, interrupts) as supervisor:
                steps = _distil(options, folder, start, data_dir, supervisor, progress)
        student = settings.trained_student(folder.checkpoints, options.distillation)
        _take_student(student, folder.student, keep=options.keep_checkpoints)
        if not options.keep_checkpoints:
            shutil.rmtree(folder.checkpoints)
        summary = Summary(
            teacher_accuracy=start.teacher_accuracy,
            student_accuracy_before=start.student_accuracy,
            student_accuracy_after=evaluate(folder.student, read_rows(data_dir / "held_out.parquet")),
            teacher_kl_first=steps[0].teacher_kl,
            teacher_kl_last=steps[-1].teacher_kl,
            steps=len(steps),
            seconds=round(time.monotonic() - started_s, 1),
            scored_tokens=sum(one.scored_tokens for one in steps),
        )
        summary.write(folder.summary)
        plot_run(steps, summary, folder.curves)
    return summary


def _prepare(options: Options, folder: RunFolder, progress: Progress) -> StartingPoint:
    seed = options.distillation.seed
    if options.models is not None:
        data_dir = options.models / DATA_FOLDER
        parts = {name: read_rows(data_dir / f"{name}.parquet") for name in SPLIT_NAMES}
        return load_starting_point(options.models, Splits(**parts))
    splits = make_splits(TaskConfig(seed=seed))
    write_splits(splits, folder.path / DATA_FOLDER)
    return make_starting_point(splits, folder.path, seed=seed, progress=progress)


def _distil(
    options: Options,
    folder: RunFolder,
    start: StartingPoint,
    data_dir: Path,
    supervisor: ProcessSupervisor,
    progress: Progress,
) -> list[StepMetrics]:
    """Run teacher and trainer to the end of training; returns what each step reported."""
    endpoint, teacher = _teacher(options, start, supervisor, progress)
    command = options.trainer_command(
        options.distillation,
        student=start.student,
        train_file=(data_dir / "train.parquet").resolve(),
        validation_file=(data_dir / "validation.parquet").resolve(),
        endpoint=endpoint,
        checkpoints=folder.checkpoints,
        hydra_dir=folder.hydra,
    )
    environment = {settings.METRICS_PATH_VARIABLE: f"{folder.metrics}"}
    trainer = supervisor.start("trainer", command, grace_s=options.trainer_grace_s, environment=environment)
    log = MetricsLog(folder.metrics)
    return _follow(trainer, teacher, log, supervisor, progress, num_steps=options.distillation.steps)


def _teacher(
    options: Options, start: StartingPoint, supervisor: ProcessSupervisor, progress: Progress
) -> tuple[str, ManagedProcess | None]:
    """The address of a teacher that is SERVING, and its process if it is ours."""
    if options.endpoint is not None:
        require_serving(options.endpoint)
        return options.endpoint, None
    task = progress.add_task("teacher starts", total=None, shown="")
    port_file = supervisor.temp_dir / "teacher.json"
    command = options.teacher_command(start.teacher, port_file)
    process = supervisor.start("teacher", command, grace_s=TEACHER_GRACE_S)
    endpoint = wait_for_own_teacher(process, port_file, supervisor, timeout_s=TEACHER_READY_TIMEOUT_S)
    progress.update(task, total=1, completed=1, shown=f"serving at {endpoint}")
    return endpoint, process


def _follow(
    trainer: ManagedProcess,
    teacher: ManagedProcess | None,
    log: MetricsLog,
    supervisor: ProcessSupervisor,
    progress: Progress,
    *,
    num_steps: int,
) -> list[StepMetrics]:
    """Show the steps as they come, until the trainer ends.

    Raises:
        DemoError: the trainer failed, ended early or hung, or the teacher ended.
    """
    task = progress.add_task("distillation", total=num_steps, shown="trainer starts")
    heard_s = time.monotonic()
    while (exit_code := trainer.exit_code()) is None:
        if teacher is not None:
            check_running(teacher)
        if new := log.read_new():
            heard_s = time.monotonic()
            _show_steps(progress, task, new, num_steps=num_steps)
        elif time.monotonic() - heard_s > STEP_TIMEOUT_S:
            raise DemoError(f"no step for {STEP_TIMEOUT_S:.0f} s; {trainer.last_words()}")
        supervisor.pause(POLL_S)
    last = log.read_new()
    if exit_code != 0:
        check_running(trainer)
    if len(log.steps) != num_steps:
        raise DemoError(f"the trainer reported {len(log.steps)} of {num_steps} steps; {trainer.last_words()}")
    _show_steps(progress, task, last, num_steps=num_steps)
    return log.steps


def _show_steps(progress: Progress, task: TaskID, steps: Sequence[StepMetrics], *, num_steps: int) -> None:
    for step in steps:
        shown = f"divergence {step.teacher_kl:.3f} nats/token, {step.seconds:.1f} s/step"
        progress.update(task, completed=step.step, shown=shown)
        if not progress.console.is_terminal:  # a log, in which a bar appears only once it is full
            progress.console.print(f"step {step.step} of {num_steps}: {shown}", highlight=False)


def _take_student(checkpoint: Path, student: Path, *, keep: bool) -> None:
    """Put the trained student where the run keeps it.

    Raises:
        DemoError: the trainer left no weights.
    """
    if not any(checkpoint.glob("*.safetensors")):
        raise DemoError(f"the trainer left no student in {checkpoint}")
    if keep:
        shutil.copytree(checkpoint, student)
    else:
        shutil.move(checkpoint, student)


def main(
    *,
    output_dir: Annotated[
        Path, typer.Option(help="Folder of the run; new, empty, or of an earlier run, which is replaced.")
    ] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = _DEFAULTS.steps,
    seed: Annotated[int, typer.Option(min=0, help="Of data, models and training.")] = _DEFAULTS.seed,
    models: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder that examples.sort_digits.pretrain wrote; default: make all."
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running teacher that serves MODELS/teacher; default: start one.")
    ] = None,
    metrics_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the trainer offers its metrics to Prometheus.")
    ] = None,
    keep_checkpoints: Annotated[bool, typer.Option(help="Keep the trainer's own checkpoints.")] = False,
) -> None:
    """Make a teacher that sorts digits, serve it, and distil a small student from it."""
    if endpoint is not None and models is None:
        raise typer.BadParameter("--endpoint needs --models, the folder whose teacher it serves")
    options = Options(
        output_dir=output_dir,
        distillation=Distillation(steps=steps, seed=seed, metrics_address=metrics_address),
        models=models.resolve() if models else None,
        endpoint=endpoint,
        keep_checkpoints=keep_checkpoints,
    )
    raise typer.Exit(run(options, Console()))


def run(options: Options, console: Console) -> int:
    """Run and report; returns the exit code."""
    transformers.utils.logging.disable_progress_bar()
    interrupts = Interrupts()
    try:
        with interrupts.watched():
            summary = run_demo(options, console=console, interrupts=interrupts)
    except Interrupted as exc:
        console.print(f"[red]interrupted[/red] by {signal.Signals(exc.signal_number).name}; everything was stopped")
        return 128 + exc.signal_number
    except (DemoError, OSError) as exc:
        console.print(f"[red]error:[/red] {escape(str(exc))}", soft_wrap=True)
        return 1
    console.print(summary.as_table())
    console.print(f"student, summary.json and curves.png are in {escape(str(options.output_dir))}")
    return 0


if __name__ == "__main__":
    typer.run(main)
