"""How fast each training mode learns the demo's task: `make bench-modes`, or `python -m benchmarks.modes`.

Every method starts from the same student and gets the same number of steps, responses per step and optimizer steps.
Its learning rate is chosen among the same few by the validation split, with a seed that is not reported; what is
reported is the held-out split. Runs that are done are kept in the work folder, so that an interrupted benchmark
goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from examples.sort_digits import settings
from examples.sort_digits.encoding import EncodedRows, encode_rows
from examples.sort_digits.errors import DemoError
from examples.sort_digits.evaluate import read_rows
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import build_tokenizer, save_model
from examples.sort_digits.pretrain import (
    DATA_FOLDER,
    STUDENT_FOLDER,
    STUDENT_RECIPE,
    TEACHER_FOLDER,
    TEACHER_RECIPE,
    greedy_accuracy,
    one_thread,
    train,
)
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor, supervised
from examples.sort_digits.readiness import wait_for_own_teacher
from examples.sort_digits.task import TaskConfig, make_splits, write_splits

NUM_RESPONSES = 64
"""Per step, of every method: prompts times responses per prompt."""
RESPONSES_PER_UPDATE = 32
EPOCHS = 2
"""Times that each response is learned from: on a CPU, to generate one costs far more."""
EVALUATE_EVERY = 2
START_GREEDY_ACCURACY = 0.4
START_SAMPLED_ACCURACY = 0.15
"""At temperature 1, at least: GRPO learns nothing from groups that are all wrong."""
SHARPENING = 4.0
"""What the start's logits are multiplied by (in its last norm): so early in training it is far less sure than right."""
LEARNING_RATES = (1e-4, 3e-4)
TUNING_SEED = 100
SEEDS = (0, 1, 2)
SHARES_OF_TEACHER = (0.8, 0.9)
RUN_TIMEOUT_S = 900.0
TEACHER_TIMEOUT_S = 240.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One line of the table."""

    mode: str
    """`grpo`, `gkd` or `gkd_grpo`."""
    select_strategy: str | None = None
    """GKD + GRPO."""
    gkd_lambda: float | None = None
    """GKD only."""

    @property
    def name(self) -> str:
        """For file names and messages."""
        parts = (self.mode, self.select_strategy, None if self.gkd_lambda is None else f"lambda{self.gkd_lambda:g}")
        return "-".join(part for part in parts if part is not None)

    @property
    def num_rollouts(self) -> int:
        """Responses per prompt."""
        return 1 if self.mode == "gkd" else 4

    def overrides(self) -> dict[str, object]:
        """The trainer's keys that make the method."""
        actor = "actor_rollout_ref.actor."
        chosen: dict[str, object] = {
            actor + "use_teacher_kl_loss": str(self.mode != "grpo").lower(),
            actor + "gkd_only_mode": str(self.mode == "gkd").lower(),
        }
        if self.select_strategy is not None:
            chosen |= {actor + "gkd_select_strategy": self.select_strategy, actor + "gkd_select_k": 1}
        if self.gkd_lambda is not None:
            chosen |= {"trainer.enable_off_policy": "true", "trainer.gkd_lambda": self.gkd_lambda}
        return chosen


METHODS = (
    Method(mode="grpo"),
    *(Method(mode="gkd", gkd_lambda=share) for share in (1.0, 0.5, 0.0)),
    *(Method(mode="gkd_grpo", select_strategy=one) for one in ("all", "random", "best", "worst")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training run."""

    method: Method
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.method.name}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The student after some steps."""

    step: int
    validation: float
    held_out: float
    teacher_tokens: float
    """Response tokens that the teacher has scored by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all runs share."""

    folder: Path
    validation: EncodedRows
    held_out: EncodedRows
    teacher_accuracy: float
    start_accuracy: float
    steps: int

    @property
    def student(self) -> Path:
        """Where every run starts."""
        return self.folder / STUDENT_FOLDER


def prepare(folder: Path, *, steps: int, console: Console) -> Setting:
    """Make data and models, unless an earlier call did, and measure where both models stand."""
    data = folder / DATA_FOLDER
    if not (folder / STUDENT_FOLDER).is_dir():
        splits = make_splits(TaskConfig())
        write_splits(splits, data)
        training, validation = (encode_rows(rows, build_tokenizer()) for rows in (splits.train, splits.validation))
        with one_thread():
            teacher = train(TEACHER_RECIPE, training, validation, seed=0, on_step=lambda _step, _accuracy: None)
            save_model(teacher.model, folder / TEACHER_FOLDER)
            save_model(_train_start(training, validation), folder / STUDENT_FOLDER)
    held_out = encode_rows(read_rows(data / "held_out.parquet"), build_tokenizer())
    validation = encode_rows(read_rows(data / "validation.parquet"), build_tokenizer())
    teacher, student = (_load(folder / name) for name in (TEACHER_FOLDER, STUDENT_FOLDER))
    setting = Setting(
        folder=folder,
        validation=validation,
        held_out=held_out,
        teacher_accuracy=greedy_accuracy(teacher, held_out),
        start_accuracy=greedy_accuracy(student, held_out),
        steps=steps,
    )
    console.print(
        f"teacher {setting.teacher_accuracy:.1%}, student {setting.start_accuracy:.1%} greedy, "
        f"{sampled_accuracy(student, held_out):.1%} sampled, of held-out questions"
    )
    return setting


def _train_start(training: EncodedRows, validation: EncodedRows) -> Qwen3ForCausalLM:
    """Supervised for a moment, then sharpened: its greedy answers stay, its sampled ones become right often enough.

    Raises:
        DemoError: they don't.
    """
    recipe = dataclasses.replace(STUDENT_RECIPE, target_accuracy=START_GREEDY_ACCURACY)
    model = train(recipe, training, validation, seed=0, on_step=lambda _step, _accuracy: None).model
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPENING)
    accuracy = sampled_accuracy(model, validation)
    if accuracy < START_SAMPLED_ACCURACY:
        raise DemoError(f"the start samples {accuracy:.1%} right answers, {START_SAMPLED_ACCURACY:.1%} are needed")
    return model


@torch.no_grad()
def sampled_accuracy(model: Qwen3ForCausalLM, rows: EncodedRows) -> float:
    """Mean probability of the right answer at temperature 1, in [0, 1]."""
    logits = model(input_ids=rows.token_ids[:, :-1]).logits[:, rows.prompt_tokens - 1 :]
    logprobs: Tensor = logits.log_softmax(-1).gather(-1, rows.answers.unsqueeze(-1)).squeeze(-1)
    return float(logprobs.sum(-1).exp().mean())


def _load(checkpoint: Path) -> Qwen3ForCausalLM:
    model: Qwen3ForCausalLM = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model


def command(job: Job, setting: Setting, *, endpoint: str, folder: Path) -> list[str]:
    """The trainer's command line."""
    data = setting.folder / DATA_FOLDER
    host, _, port = endpoint.rpartition(":")
    num_prompts = NUM_RESPONSES // job.method.num_rollouts
    overrides: Mapping[str, object] = {
        "trainer.device": "cpu",
        "data.train_files": data / "train.parquet",
        "data.train_batch_size": num_prompts,
        "data.max_prompt_length": settings.PROMPT_TOKENS,
        "data.max_response_length": settings.RESPONSE_TOKENS,
        "data.seed": job.seed,
        "trainer.data_partition_seed": job.seed,
        "actor_rollout_ref.model.path": setting.student,
        "actor_rollout_ref.actor.ppo_mini_batch_size": RESPONSES_PER_UPDATE // job.method.num_rollouts,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": RESPONSES_PER_UPDATE,
        "actor_rollout_ref.actor.ppo_epochs": EPOCHS,
        "actor_rollout_ref.actor.optim.lr": job.learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 4,
        "actor_rollout_ref.actor.optim.betas": "[0.9,0.99]",
        "actor_rollout_ref.actor.checkpoint.save_contents": "[hf_model]",
        "actor_rollout_ref.rollout.n": job.method.num_rollouts,
        "actor_rollout_ref.rollout.seed": job.seed,
        "actor_rollout_ref.rollout.max_model_len": settings.PROMPT_TOKENS + settings.RESPONSE_TOKENS,
        "actor_rollout_ref.rollout.max_num_seqs": NUM_RESPONSES,
        "actor_rollout_ref.teacher.server_ip": host,
        "actor_rollout_ref.teacher.server_port": port,
        "actor_rollout_ref.teacher.num_logprobs": 8,
        "trainer.total_training_steps": setting.steps,
        "trainer.total_epochs": 1000,
        "trainer.save_freq": EVALUATE_EVERY,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.logger": "[console,file]",
    } | job.method.overrides()
    return [sys.executable, "-m", "trainer.main_ppo", *(f"{key}={value}" for key, value in overrides.items())]


def evaluate_run(folder: Path, setting: Setting) -> list[Evaluation]:
    """Accuracy at every checkpoint, beside the teacher tokens spent until then."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = {line["step"]: line["data"].get(settings.SCORED_TOKENS, 0.0) for line in lines if line["step"] > 0}
    evaluations = []
    for step in range(EVALUATE_EVERY, setting.steps + 1, EVALUATE_EVERY):
        model = _load(folder / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface")
        evaluations.append(
            Evaluation(
                step=step,
                validation=greedy_accuracy(model, setting.validation),
                held_out=greedy_accuracy(model, setting.held_out),
                teacher_tokens=sum(value for at, value in tokens.items() if at <= step),
            )
        )
    return evaluations


def run_jobs(
    jobs: Sequence[Job],
    setting: Setting,
    *,
    endpoint: str,
    supervisor: ProcessSupervisor,
    num_parallel: int,
    console: Console,
) -> dict[Job, list[Evaluation]]:
    """Run what was not run yet, some at a time, and return what each learned.

    Raises:
        DemoError: a run failed, or took too long.
    """
    results: dict[Job, list[Evaluation]] = {}
    waiting, running = list(jobs), dict[Job, tuple[ManagedProcess, float]]()
    waited_s = 0.0
    while waiting or running:
        while waiting and len(running) < num_parallel:
            job = waiting.pop(0)
            folder = setting.folder / "runs" / job.name
            if (folder / "evaluations.json").is_file():
                stored = json.loads((folder / "evaluations.json").read_text())
                results[job] = [Evaluation(**one) for one in stored]
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            environment = {settings.METRICS_PATH_VARIABLE: f"{folder / 'metrics.jsonl'}"}
            arguments = command(job, setting, endpoint=endpoint, folder=folder)
            running[job] = (supervisor.start(job.name, arguments, grace_s=10, environment=environment), waited_s)
        supervisor.pause(0.5)
        waited_s += 0.5
        for job, (process, started_s) in list(running.items()):
            if (code := process.exit_code()) is None:
                if waited_s - started_s > RUN_TIMEOUT_S:
                    raise DemoError(f"{job.name} is not done after {RUN_TIMEOUT_S:.0f} s; {process.last_words()}")
                continue
            if code != 0:
                raise DemoError(f"{job.name} ended with exit code {code}; {process.last_words()}")
            del running[job]
            folder = setting.folder / "runs" / job.name
            results[job] = evaluate_run(folder, setting)
            text = json.dumps([dataclasses.asdict(one) for one in results[job]])
            (folder / "evaluations.json").write_text(text)
            shutil.rmtree(folder / "checkpoints")
            console.print(f"{job.name}: {results[job][-1].held_out:.1%} after {setting.steps} steps", highlight=False)
    return results


def choose_learning_rates(tuned: Mapping[Job, Sequence[Evaluation]]) -> dict[Method, float]:
    """Per method the rate whose validation accuracy, averaged over the run, is highest: fast and lasting."""

    def area(job: Job) -> float:
        return sum(one.validation for one in tuned[job])

    methods = dict.fromkeys(job.method for job in tuned)
    return {method: max((job for job in tuned if job.method == method), key=area).learning_rate for method in methods}


def row(job: Job, evaluations: Sequence[Evaluation], setting: Setting) -> dict[str, object]:
    """One row of the results; what was not reached is null."""
    steps: list[Evaluation | None] = []
    for share in SHARES_OF_TEACHER:
        goal = share * setting.teacher_accuracy
        steps.append(next((one for one in evaluations if one.held_out >= goal), None))
    at_80, at_90 = steps
    return {
        "mode": job.method.mode,
        "select_strategy": job.method.select_strategy,
        "gkd_lambda": job.method.gkd_lambda,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "steps_to_80": None if at_80 is None else at_80.step,
        "steps_to_90": None if at_90 is None else at_90.step,
        "teacher_tokens_to_80": None if at_80 is None else at_80.teacher_tokens,
        "teacher_tokens_to_90": None if at_90 is None else at_90.teacher_tokens,
        "final_accuracy": evaluations[-1].held_out,
        "teacher_accuracy": setting.teacher_accuracy,
        "start_accuracy": setting.start_accuracy,
        "steps": setting.steps,
    }


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as Markdown, one line per method, the seeds side by side."""
    lines = [
        "| mode | strategy | lambda | learning rate | steps to 80 % | to 90 % | teacher tokens to 80 % | to 90 % "
        "| final accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("mode", "select_strategy", "gkd_lambda", "learning_rate")
    for identity in dict.fromkeys(tuple(one[key] for key in keys) for one in rows):
        mine = [one for one in rows if tuple(one[key] for key in keys) == identity]
        cells = ["" if value is None else f"{value}" for value in identity]
        cells += [
            ", ".join("-" if one[key] is None else f"{one[key]:,.0f}" for one in mine)
            for key in ("steps_to_80", "steps_to_90", "teacher_tokens_to_80", "teacher_tokens_to_90")
        ]
        cells.append(", ".join(f"{one['final_accuracy']:.1%}" for one in mine))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def _teacher(setting: Setting, interrupts: Interrupts) -> Iterator[tuple[str, ProcessSupervisor]]:
    with supervised(setting.folder / "logs", interrupts) as supervisor:
        port_file = supervisor.temp_dir / "teacher.json"
        arguments = settings.teacher_command(setting.folder / TEACHER_FOLDER, port_file)
        process = supervisor.start("teacher", arguments, grace_s=20)
        yield wait_for_own_teacher(process, port_file, supervisor, timeout_s=TEACHER_TIMEOUT_S), supervisor


def main(
    *,
    work_dir: Annotated[Path, typer.Option(help="Models, logs and finished runs.")] = Path("runs/bench-modes"),
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/modes.json"),
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 30,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
) -> None:
    """Measure every mode and write the results."""
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    setting = prepare(work_dir.resolve(), steps=steps, console=console)
    interrupts = Interrupts()
    with interrupts.watched(), _teacher(setting, interrupts) as (endpoint, supervisor):
        tuning = [
            Job(method=method, seed=TUNING_SEED, learning_rate=rate) for method in METHODS for rate in LEARNING_RATES
        ]
        tuned = run_jobs(
            tuning, setting, endpoint=endpoint, supervisor=supervisor, num_parallel=parallel, console=console
        )
        rates = choose_learning_rates(tuned)
        jobs = [Job(method=method, seed=seed, learning_rate=rates[method]) for method in METHODS for seed in SEEDS]
        results = run_jobs(
            jobs, setting, endpoint=endpoint, supervisor=supervisor, num_parallel=parallel, console=console
        )
    rows = [row(job, results[job], setting) for job in jobs]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(table(rows), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
