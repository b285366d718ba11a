"""The demo leaves nothing behind, whatever ends it: no process, port, shared memory or temporary file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from multiprocessing import shared_memory
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
from rich.console import Console

from examples.sort_digits import demo
from examples.sort_digits.demo import Options
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import STUDENT_SIZE, build_model, save_model
from examples.sort_digits.processes import supervised
from examples.sort_digits.run_folder import RunFolder
from examples.sort_digits.settings import Distillation
from examples.sort_digits.task import TaskConfig, make_splits, write_splits
from tests.support.processes import kill_tree

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
MARKER = "SORT_DIGITS_TEST_RUN"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A demo in a process of its own."""

    popen: subprocess.Popen[str]
    output_dir: Path
    footprint: Path
    marker: str

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a phase of the run."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.popen.poll() is None, self.popen.communicate()[0]
            assert time.monotonic() < deadline, "the phase was not reached"
            time.sleep(0.02)

    def give_up(self) -> None:
        """End a run that a failed test left behind: in order first, since a kill would leave what the run started."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                kill_tree(self.popen.pid)
                self.popen.communicate()

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns exit code and output."""
        output, _ = self.popen.communicate(timeout=TIMEOUT_S)
        return self.popen.returncode, output

    def survivors(self) -> list[str]:
        """Processes with the run's environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self.marker:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models and a few questions: enough for everything but the accuracy."""
    directory = tmp_path_factory.mktemp("models")
    write_splits(make_splits(TaskConfig(num_train=8, num_validation=2, num_held_out=4)), directory / "data")
    for seed, name in enumerate(("teacher", "student_start")):
        save_model(build_model(STUDENT_SIZE, seed=seed), directory / name)
    return directory


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, Path | str], Run]]:
    """Starts a demo run; one that still runs when its test is over is ended."""
    runs: list[Run] = []

    def start(behaviour: str, models: Path | str) -> Run:
        marker = uuid.uuid4().hex
        footprint, output_dir = tmp_path / "footprint.json", tmp_path / "run"
        footprint.unlink(missing_ok=True)
        popen = subprocess.Popen(
            [sys.executable, "-m", "tests.support.demo_run", output_dir, models, behaviour, footprint],
            cwd=ROOT,
            env={**os.environ, MARKER: marker},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        runs.append(Run(popen=popen, output_dir=output_dir, footprint=footprint, marker=marker))
        return runs[-1]

    yield start
    for run in runs:
        run.give_up()


def assert_nothing_left(run: Run) -> None:
    assert run.survivors() == []
    if run.footprint.exists():
        left = json.loads(run.footprint.read_text())
        assert not psutil.pid_exists(left["pid"])
        assert not Path(left["segment"]).exists()
        assert not Path(left["temp_file"]).parent.exists()
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", left["port"])) != 0


def test_a_finished_run_reports_what_was_measured_and_leaves_nothing(
    start: Callable[[str, Path | str], Run], models: Path
) -> None:
    """summary.json repeats the trainer's own metrics; a second run replaces the first; both clean up."""
    for _ in range(2):
        run = start("finish", models)
        exit_code, output = run.end()
        assert exit_code == 0, output
        assert_nothing_left(run)
        assert run.footprint.exists()
        summary = json.loads((run.output_dir / "summary.json").read_text())
        seconds = summary.pop("seconds")
        assert 0 < seconds < TIMEOUT_S
        assert summary == {
            "teacher_accuracy": 0.0,
            "student_accuracy_before": 0.0,
            "student_accuracy_after": 0.0,
            "teacher_kl_first": 2.0,
            "teacher_kl_last": pytest.approx(2 / 3),
            "steps": 3,
            "scored_tokens": 30,
        }
        assert (run.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert (run.output_dir / "student" / "model.safetensors").is_file()
        assert not (run.output_dir / "stale").exists()
        (run.output_dir / "stale").write_text("of the first run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", ["pretraining", "teacher starts", "training"])
def test_an_interrupted_run_leaves_nothing(
    start: Callable[[str, Path | str], Run], models: Path, phase: str, number: signal.Signals
) -> None:
    """A signal in any phase ends the run, and a trainer that ignores SIGTERM and its orphans with it."""
    behaviour = {"pretraining": "finish", "teacher starts": "teacher-hangs", "training": "hang"}[phase]
    run = start(behaviour, "-" if phase == "pretraining" else models)
    reached = {
        "pretraining": run.output_dir / "data" / "held_out.parquet",
        "teacher starts": run.output_dir / "logs" / "teacher.log",
        "training": run.output_dir / "metrics.jsonl",
    }[phase]
    run.wait_until(reached.exists)
    run.popen.send_signal(number)
    exit_code, output = run.end()
    assert exit_code == 128 + number, output
    assert f"interrupted by {number.name}" in output
    assert_nothing_left(run)


def test_a_second_signal_does_not_cut_the_cleaning_up_short(
    start: Callable[[str, Path | str], Run], models: Path
) -> None:
    """An impatient Ctrl-C while the trainer is being stopped changes nothing."""
    run = start("hang", models)
    run.wait_until((run.output_dir / "metrics.jsonl").exists)
    run.popen.send_signal(signal.SIGINT)
    # The teacher is stopped after the trainer and before the orphans: cleaning up is half done.
    run.wait_until(lambda: "draining" in (run.output_dir / "logs" / "teacher.log").read_text())
    run.popen.send_signal(signal.SIGINT)
    exit_code, output = run.end()
    assert exit_code == 128 + signal.SIGINT, output
    assert_nothing_left(run)


@pytest.mark.parametrize(
    ("behaviour", "cause", "log"),
    [("fail", "the trainer broke", "trainer.log"), ("teacher-fails", "no such model", "teacher.log")],
)
def test_a_failed_service_is_one_error_with_its_log(
    start: Callable[[str, Path | str], Run], models: Path, behaviour: str, cause: str, log: str
) -> None:
    """A service that ends early is named with its exit code, its log and the log's last lines; the exit code is 1."""
    run = start(behaviour, models)
    exit_code, output = run.end()
    assert exit_code == 1
    assert "ended with exit code 1" in output
    assert cause in output
    assert f"{run.output_dir / 'logs' / log}" in output
    assert "Traceback" not in output
    assert_nothing_left(run)


def test_an_absent_teacher_is_one_error(models: Path, tmp_path: Path) -> None:
    """--endpoint where nothing listens: the address, what came of it, and the remedy; the exit code is 1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    options = Options(output_dir=tmp_path / "run", distillation=Distillation(steps=3), models=models, endpoint=endpoint)
    output = StringIO()
    assert demo.run(options, Console(file=output, width=200)) == 1
    assert f"error: the teacher at {endpoint} is UNAVAILABLE, it must be SERVING; start it" in output.getvalue()


def test_models_in_the_output_folder_are_not_wiped(tmp_path: Path) -> None:
    """An earlier run's own models can't be the start of a run that replaces it."""
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        (folder.path / "teacher").mkdir()
    options = Options(output_dir=folder.path, distillation=Distillation(steps=3), models=folder.path)
    output = StringIO()
    assert demo.run(options, Console(file=output, width=400)) == 1
    assert "which is emptied; name another one" in output.getvalue()
    assert (folder.path / "teacher").is_dir()


def test_a_folder_that_cannot_be_made_is_one_error(models: Path) -> None:
    """The system's own reason and the path; the exit code is 1."""
    options = Options(output_dir=Path("/proc/demo"), distillation=Distillation(steps=3), models=models)
    output = StringIO()
    assert demo.run(options, Console(file=output, width=200)) == 1
    assert "error: [Errno 2] No such file or directory: '/proc/demo'" in output.getvalue()


LEAVE_MEMORY = """
import time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(f"/{segment.name}", "shared_memory")
print(segment.name, flush=True)
time.sleep(600)
"""


def test_memory_of_the_killed_is_freed_and_that_of_others_is_not(tmp_path: Path) -> None:
    """What a descendant held is known from pauses, even if it was killed before; a stranger's segment stays."""
    own = shared_memory.SharedMemory(create=True, size=4096)
    stranger = subprocess.Popen([sys.executable, "-c", LEAVE_MEMORY], stdout=PIPE, text=True)
    assert stranger.stdout is not None
    foreign = Path("/dev/shm", stranger.stdout.readline().strip())  # noqa: S108 - where the kernel lists it
    try:
        with supervised(tmp_path / "logs", Interrupts()) as supervisor:
            child = supervisor.start("child", [sys.executable, "-c", LEAVE_MEMORY], grace_s=1.0)
            deadline = time.monotonic() + TIMEOUT_S
            while not (name := child.log_path.read_text().strip()):
                assert time.monotonic() < deadline
                supervisor.pause(0.05)
            supervisor.pause(0.05)
            child.popen.kill()
            child.popen.wait(TIMEOUT_S)
            assert Path("/dev/shm", name).exists()  # noqa: S108 - likewise
        assert not Path("/dev/shm", name).exists()  # noqa: S108 - likewise
        assert foreign.exists()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.communicate()
        foreign.unlink(missing_ok=True)
        own.close()
        own.unlink()
