"""Real verl, real Ray, real vLLM on both sides of the real contract."""

from __future__ import annotations

import json
import math
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import STUDENT_SIZE, TEACHER_SIZE, build_model, save_model
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor, supervised
from examples.sort_digits.readiness import wait_for_own_teacher
from examples.sort_digits.settings import teacher_command
from examples.sort_digits.task import TaskConfig, make_splits, write_splits
from tests.support.trainer import BATCH_SIZE, TrainerRun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NUM_STEPS = 4
TRAINER_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 240.0


@dataclass
class Workspace:
    """Models, data, and where processes are started."""

    folder: Path
    train_file: Path
    supervisor: ProcessSupervisor

    def start_teacher(self, name: str, *more: str) -> tuple[ManagedProcess, str, str]:
        """A ready teacher: its process, gRPC address and HTTP address."""
        port_file = self.folder / f"{name}.json"
        command = [*teacher_command(self.folder / "teacher", port_file), *more]
        process = self.supervisor.start(name, command, grace_s=20)
        endpoint = wait_for_own_teacher(process, port_file, self.supervisor, timeout_s=READY_TIMEOUT_S)
        return process, endpoint, json.loads(port_file.read_text())["http"]

    def run(self, name: str, endpoint: str) -> TrainerRun:
        """A trainer run of its own folder."""
        folder = self.folder / name
        folder.mkdir()
        return TrainerRun(
            train_file=self.train_file,
            student=self.folder / "student",
            endpoint=endpoint,
            folder=folder,
            num_steps=NUM_STEPS,
        )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Random models of the demo's sizes; whatever is started ends with the module."""
    folder = tmp_path_factory.mktemp("gkd")
    files = write_splits(make_splits(TaskConfig(num_train=64, num_validation=1, num_held_out=1)), folder)
    save_model(build_model(TEACHER_SIZE, seed=0), folder / "teacher")
    save_model(build_model(STUDENT_SIZE, seed=1), folder / "student")
    with supervised(folder / "logs", Interrupts()) as supervisor:
        yield Workspace(folder, files["train"], supervisor)


def _wait(process: ManagedProcess, supervisor: ProcessSupervisor, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while (code := process.exit_code()) is None:
        assert time.monotonic() < deadline, f"still running after {timeout_s} s; {process.last_words()}"
        supervisor.pause(0.2)
    return code


def test_distillation_on_the_real_stack(workspace: Workspace) -> None:
    """Each step's metrics are right, the rollout follows the weights, the student changes, the teacher agrees."""
    teacher, endpoint, http = workspace.start_teacher("teacher")
    run = workspace.run("distil", endpoint)
    trainer = workspace.supervisor.start("trainer", run.command(), grace_s=10, environment=run.environment())
    assert _wait(trainer, workspace.supervisor, TRAINER_TIMEOUT_S) == 0, trainer.last_words()

    steps = run.steps()
    assert len(steps) == NUM_STEPS
    for step in steps:
        # the rollout's weights are the trainer's: below .99 they are stale
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.99
        # every response token was scored, once, and nothing else
        assert step["gkd/scored_tokens"] == pytest.approx(step["response_length/mean"] * BATCH_SIZE)
        assert step["actor/teacher_kl_coef"] == 1.0
        assert step["actor/loss"] == pytest.approx(step["actor/teacher_kl_loss"], rel=1e-5)
        assert step["data/is_on_policy"] == 1.0
        assert 0 <= step["timing/teacher_knowledge"] <= step["timing_s/gen"] + step["timing_s/step"]
        assert 0 < step["gkd/teacher_tail_mass"] < 1
        assert math.isfinite(step["actor/grad_norm"])
        # distillation alone has no reward, no advantage and no policy-gradient loss
        assert not [name for name in step if name.startswith("critic/") or "pg_loss" in name]
    assert steps[-1]["actor/teacher_kl_loss"] < steps[0]["actor/teacher_kl_loss"]

    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    served = sum(float(line.split()[-1]) for line in lines if line.startswith("teacher_tokens_scored_total"))
    assert served == sum(step["gkd/scored_tokens"] for step in steps)

    before = AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(
        run.folder / "checkpoints" / f"global_step_{NUM_STEPS}" / "actor" / "huggingface", dtype=torch.float32
    )
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(moved) > 1e-3

    assert workspace.supervisor.stop(teacher) == 0  # a drained teacher ends well


def test_teacher_that_dies_ends_the_run_with_its_reason(workspace: Workspace) -> None:
    """Killed in mid-run, and not back within max_wait_s: the trainer says so and ends; nothing hangs."""
    teacher, endpoint, _ = workspace.start_teacher("mortal")
    run = workspace.run("bereaved", endpoint)
    changes = {
        "actor_rollout_ref.teacher.max_wait_s": 5,
        "trainer.total_training_steps": 10_000,
        "trainer.save_freq": -1,
    }
    trainer = workspace.supervisor.start("orphan", run.command(changes), grace_s=10, environment=run.environment())
    deadline = time.monotonic() + TRAINER_TIMEOUT_S
    while not run.steps():
        assert trainer.exit_code() is None, trainer.last_words()
        assert time.monotonic() < deadline, trainer.last_words()
        workspace.supervisor.pause(0.1)
    service = psutil.Process(teacher.popen.pid)
    for one in [*service.children(recursive=True), service]:
        if "resource_tracker" not in " ".join(one.cmdline()):  # it frees what the others leave behind
            one.send_signal(signal.SIGKILL)
    assert _wait(trainer, workspace.supervisor, 120) == 1
    assert "responses could not be scored by the teacher: " in trainer.last_words()
