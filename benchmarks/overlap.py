"""How much of a teacher's time a training step still sees: `make bench-overlap`, or `python -m benchmarks.overlap`.

Real verl on a CPU: GKD only, a tiny student whose responses have long-tailed lengths, a teacher that takes a fixed time
for each sequence beside its own computing, injected in the service. Schedules:
  serial          verl's sync mode, the teacher called for the whole batch at once, when the last response is complete
  sync            verl's sync mode, each response sent to the teacher when it is complete
  colocate_async  verl's mode of this name: the next batch is generated while a step waits
  separate_async  verl's mode of this name: generation and the teacher go on during the update
injected_latency_ratio is that time over generation_s, the time to generate a batch in `sync` with nothing injected.

A row's values are means over its steps, the first ones left out (the asynchronous modes take short responses first, so
their steps differ by turns, and a median would hide the longer ones):
  step_s               seconds per step, weights and all
  generation_s         seconds to generate one batch, measured once
  request_latency_s    mean seconds from a request to its answer
  teacher_latency_s    seconds for a whole batch sent at once, measured in `serial` at this ratio
  exposed_teacher_s    `timing/teacher_knowledge`: what the step waited for the teacher, all responses being there
  staleness            model versions that the responses of a step lag behind, on average
  speedup              step_s of `serial` at this ratio over step_s
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.losses import BUSY_LOAD, machine
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import ModelSize, build_model, save_model
from examples.sort_digits.processes import ProcessSupervisor, supervised
from examples.sort_digits.readiness import wait_for_own_teacher
from examples.sort_digits.task import TaskConfig, make_splits, write_splits

SCHEDULES = ("serial", "sync", "colocate_async", "separate_async")
RATIOS = (0.0, 0.5, 1.0, 2.0)
SIZE = ModelSize(hidden_size=128, num_heads=4, intermediate_size=256)
LONGEST_RESPONSE = 384
PROMPT_TOKENS = 24
BATCH_SIZE = 16
EPOCHS = 4
"""Times that each response is learned from: on a CPU this makes an update about as long as generating a batch."""
WARM_UP_STEPS = 4
WARM_UP_BATCHES = 3
"""verl's `num_warmup_batches`: batches that are generated ahead of the one that a step takes."""
TIMEOUT_S = 900.0
READY_TIMEOUT_S = 120.0
WIDTH = 160
DECIMALS = 3

Row = dict[str, str | float | int]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where the models and data lie, and who starts processes."""

    folder: Path
    supervisor: ProcessSupervisor
    num_steps: int

    def prepare(self) -> None:
        """Write random models, questions, and the agent loop's configuration."""
        write_splits(make_splits(TaskConfig(num_train=1024, num_validation=8, num_held_out=1)), self.folder / "data")
        for seed, name in enumerate(("teacher", "student")):
            save_model(build_model(SIZE, seed=seed), self.folder / name)
        (self.folder / "loops.yaml").write_text(
            "- name: long_tailed\n  _target_: benchmarks.overlap_rollout.LongTailedAgentLoop\n"
        )

    def run(self, schedule: str, latency_s: float) -> list[dict[str, Any]]:
        """The metrics of each step of one training run, the first steps left out."""
        name = f"{schedule}-{latency_s:.2f}"
        port_file, metrics = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        teacher = self.supervisor.start(
            f"teacher-{name}",
            [
                sys.executable, "-m", "benchmarks.overlap_teacher", f"{self.folder / 'teacher'}", f"{port_file}",
                f"{latency_s}", f"{PROMPT_TOKENS + LONGEST_RESPONSE}",
            ],
            grace_s=20,
        )  # fmt: skip
        endpoint = wait_for_own_teacher(teacher, port_file, self.supervisor, timeout_s=READY_TIMEOUT_S)
        overrides = self._overrides(schedule, endpoint)
        trainer = self.supervisor.start(
            f"trainer-{name}",
            [sys.executable, "-m", "trainer.main_ppo", *(f"{key}={value}" for key, value in overrides.items())],
            grace_s=10,
            environment={"VERL_FILE_LOGGER_PATH": f"{metrics}"},
        )
        waited_s = 0.0
        while trainer.exit_code() is None:
            if waited_s > TIMEOUT_S:
                raise RuntimeError(f"{name} still runs after {TIMEOUT_S:.0f} s; {trainer.last_words()}")
            self.supervisor.pause(0.5)
            waited_s += 0.5
        if trainer.exit_code() != 0:
            raise RuntimeError(f"{name} failed; {trainer.last_words()}")
        self.supervisor.stop(teacher)
        steps = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
        return steps[WARM_UP_STEPS:]

    def _overrides(self, schedule: str, endpoint: str) -> Mapping[str, object]:
        mode = "sync" if schedule == "serial" else schedule
        agent = "actor_rollout_ref.rollout.agent"
        overrides: dict[str, object] = {
            "trainer.device": "cpu",
            "trainer.v1.trainer_mode": mode,
            "data.train_files": self.folder / "data" / "train.parquet",
            "data.train_batch_size": BATCH_SIZE,
            "data.max_prompt_length": PROMPT_TOKENS,
            "data.max_response_length": LONGEST_RESPONSE,
            "data.seed": 0,
            "actor_rollout_ref.model.path": self.folder / "student",
            "actor_rollout_ref.actor.use_teacher_kl_loss": "true",
            "actor_rollout_ref.actor.gkd_only_mode": "true",
            "actor_rollout_ref.actor.ppo_mini_batch_size": BATCH_SIZE,
            "actor_rollout_ref.actor.ppo_epochs": EPOCHS,
            "actor_rollout_ref.rollout.n": 1,
            "actor_rollout_ref.rollout.max_model_len": PROMPT_TOKENS + LONGEST_RESPONSE,
            "actor_rollout_ref.rollout.max_num_seqs": 4 * BATCH_SIZE,
            f"{agent}.agent_loop_config_path": self.folder / "loops.yaml",
            f"{agent}.default_agent_loop": "long_tailed",
            "actor_rollout_ref.teacher.endpoints": f"[{endpoint}]",
            "actor_rollout_ref.teacher.num_logprobs": 8,
            "trainer.total_training_steps": WARM_UP_STEPS + self.num_steps,
            "trainer.total_epochs": 100,
            "trainer.save_freq": -1,
            "trainer.default_local_dir": self.folder / "checkpoints",
            "trainer.resume_mode": "disable",
            "trainer.logger": "[console,file]",
        }
        if schedule == "serial":
            overrides[f"++{agent}.agent_loop_manager_class"] = "benchmarks.overlap_rollout.SerialManager"
        if mode != "sync":
            overrides[f"trainer.v1.{mode}.num_warmup_batches"] = WARM_UP_BATCHES
        return overrides


def row(schedule: str, ratio: float, steps: Sequence[Mapping[str, float]], *, generation_s: float) -> Row:
    """One row, without what compares it with others."""

    def mean(name: str) -> float:
        return round(statistics.mean(step[name] for step in steps), DECIMALS)

    return {
        "schedule": schedule,
        "injected_latency_ratio": ratio,
        "step_s": mean("timing_s/step"),
        "generation_s": round(generation_s, DECIMALS),
        "request_latency_s": mean("timing/teacher_latency/mean"),
        "exposed_teacher_s": mean("timing/teacher_knowledge"),
        "update_s": mean("timing_s/update_actor"),
        "staleness": mean("training/off_policy/trajectory_staleness/mean"),
        "num_steps": len(steps),
    }


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows, each beside `serial` at its ratio where that was measured."""
    serial = {one["injected_latency_ratio"]: one for one in rows if one["schedule"] == "serial"}
    compared = []
    for one in rows:
        reference = serial.get(one["injected_latency_ratio"])
        extra: Row = {}
        if reference is not None:
            extra = {
                "teacher_latency_s": reference["exposed_teacher_s"],
                "speedup": round(float(reference["step_s"]) / float(one["step_s"]), DECIMALS),
            }
        compared.append({**one, **extra})
    return compared


def generation_s(steps: Sequence[Mapping[str, float]]) -> float:
    """Seconds to generate a batch: what a synchronous step waits for responses, less what it waits for the teacher."""
    return statistics.median(step["timing_s/gen"] - step["timing/teacher_knowledge"] for step in steps)


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    made = Table(title="What a step sees of the teacher's time")
    columns = list(dict.fromkeys(key for one in rows for key in one))
    for key in columns:
        made.add_column(key.replace("_", " "), justify="left" if key == "schedule" else "right")
    for one in rows:
        made.add_row(*(f"{one.get(key, '-')}" for key in columns))
    return made


def main(
    *,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each run.")] = 8,
    schedule: Annotated[list[str], typer.Option(help="May be given several times.")] = [*SCHEDULES],  # noqa: B006
    ratio: Annotated[list[float], typer.Option(min=0, help="Likewise.")] = [*RATIOS],  # noqa: B006
    work_dir: Annotated[Path, typer.Option(help="Models, data and logs.")] = Path("runs/bench-overlap"),
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/overlap.json"),
) -> None:
    """Measure every schedule at every ratio, and write the results."""
    if unknown := set(schedule) - set(SCHEDULES):
        raise typer.BadParameter(f"--schedule {sorted(unknown)} is none of {', '.join(SCHEDULES)}")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    facts = machine("cpu", torch.get_num_threads())
    if float(facts["load"]) > BUSY_LOAD:
        console.print(f"the machine is busy (load {facts['load']}): times will be off", style="yellow", highlight=False)
    folder = work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    interrupts = Interrupts()
    with interrupts.watched(), supervised(folder / "logs", interrupts) as supervisor:
        bench = Bench(folder=folder, supervisor=supervisor, num_steps=steps)
        bench.prepare()
        calibration = bench.run("sync", 0.0)
        generated_s = generation_s(calibration)
        console.print(f"a batch is generated in {generated_s:.2f} s", highlight=False)
        rows: list[Row] = []
        for one_ratio in ratio:
            for one in schedule:
                is_calibration = one == "sync" and one_ratio == 0
                measured = calibration if is_calibration else bench.run(one, one_ratio * generated_s)
                rows.append(row(one, one_ratio, measured, generation_s=generated_s))
                console.print(rows[-1], highlight=False, soft_wrap=True)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(compare(rows), indent=1) + "\n")
    console.print(facts, table(compare(rows)))


if __name__ == "__main__":
    typer.run(main)
