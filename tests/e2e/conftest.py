"""Models, data, and processes that end with the module that started them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import STUDENT_SIZE, TEACHER_SIZE, build_model, save_model
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor, supervised
from examples.sort_digits.readiness import wait_for_own_teacher
from examples.sort_digits.settings import teacher_command
from examples.sort_digits.task import TaskConfig, make_splits, write_splits
from tests.support.trainer import TrainerRun

TRAINER_TIMEOUT_S = 900.0
READY_TIMEOUT_S = 240.0
NUM_STEPS = 4


@dataclass
class Workspace:
    """A folder laid out as `examples.sort_digits.pretrain` does, and where processes are started."""

    folder: Path
    supervisor: ProcessSupervisor

    @property
    def train_file(self) -> Path:
        """Questions and answers."""
        return self.folder / "data" / "train.parquet"

    def start_teacher(
        self, name: str, *more: str, model: str = "teacher", engine: str = "vllm"
    ) -> tuple[ManagedProcess, str, str]:
        """A ready teacher: its process, gRPC address and HTTP address."""
        port_file = self.folder / f"{name}.json"
        command = [*teacher_command(self.folder / model, port_file), *more]
        command[command.index("--engine") + 1] = engine
        if engine != "vllm":
            cache = command.index("--kv-cache-bytes")
            del command[cache : cache + 2]
        process = self.supervisor.start(name, command, grace_s=60)
        endpoint = wait_for_own_teacher(process, port_file, self.supervisor, timeout_s=READY_TIMEOUT_S)
        return process, endpoint, json.loads(port_file.read_text())["http"]

    def run(self, name: str, endpoint: str, *, num_steps: int = NUM_STEPS) -> TrainerRun:
        """A trainer run of its own folder."""
        folder = self.folder / name
        folder.mkdir()
        return TrainerRun(
            train_file=self.train_file,
            student=self.folder / "student_start",
            endpoint=endpoint,
            folder=folder,
            num_steps=num_steps,
        )

    def start(
        self, name: str, command: list[str], environment: Mapping[str, str], *, cwd: Path | None = None
    ) -> ManagedProcess:
        """A trainer's process."""
        if cwd is not None:
            environment = {**environment, "PYTHONPATH": f"{cwd}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        return self.supervisor.start(name, command, grace_s=10, environment=environment)

    def wait(self, *processes: ManagedProcess, timeout_s: float = TRAINER_TIMEOUT_S) -> list[int]:
        """The exit codes, once all have ended."""
        deadline = time.monotonic() + timeout_s
        for process in processes:
            while process.exit_code() is None:
                assert time.monotonic() < deadline, f"still running after {timeout_s} s; {process.last_words()}"
                self.supervisor.pause(0.2)
        return [process.popen.wait() for process in processes]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Random models of the demo's sizes; whatever is started ends with the module."""
    folder = tmp_path_factory.mktemp("gkd")
    write_splits(make_splits(TaskConfig(num_train=64, num_validation=8, num_held_out=1)), folder / "data")
    save_model(build_model(TEACHER_SIZE, seed=0), folder / "teacher")
    save_model(build_model(STUDENT_SIZE, seed=1), folder / "student_start")
    with supervised(folder / "logs", Interrupts()) as supervisor:
        yield Workspace(folder, supervisor)
