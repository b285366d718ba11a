"""The two shell scripts that run in the pods."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "deploy" / "base" / "scripts"
TIMEOUT_S = 30.0

STUB = """#!{python}
import os, signal, sys, time
path = os.environ["NOTES"]
def note(line):
    with open(path, "a") as file:
        file.write(line + "\\n")
def stop(number, frame):
    time.sleep(0.3)  # a step that ends
    note("saved")
    sys.exit(int(os.environ.get("STOPPED", "0")))
signal.signal(signal.SIGTERM, stop)
for one in sys.argv[1:]:
    note(one)
note("running")
if "TRAIN_S" in os.environ:
    time.sleep(float(os.environ["TRAIN_S"]))
sys.exit(int(os.environ.get("ENDED", "0")))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a `python` that writes down how it was called, and one with overrides."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    (tmp_path / "overrides").mkdir()
    return tmp_path


@contextmanager
def started(script: str, *arguments: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["/bin/sh", str(SCRIPTS / script), *arguments],
        env=_environment(folder) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _environment(folder: Path) -> Mapping[str, str]:
    return {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "NOTES": f"{folder}/notes",
        "OVERRIDES": f"{folder}/overrides",
        "WAIT_PERIOD_S": "0.1",
    }


def _notes(folder: Path) -> list[str]:
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


def _wait_for(folder: Path, note: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while note not in _notes(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_overrides_arrive_as_they_are_written(folder: Path) -> None:
    """One argument a line, whatever is in it; comments and empty lines left out, files in the order of their names."""
    (folder / "overrides" / "20-b.txt").write_text("b=$HOME `x` '*'")  # no newline at its end
    (folder / "overrides" / "10-a.txt").write_text('# why\na="x y"\n\nroutes={math: [a:1], "*": b:2}\n')
    with started("run-trainer.sh", folder=folder) as process:
        assert process.wait(TIMEOUT_S) == 0
    expected = ["-m", "trainer.main_ppo", 'a="x y"', 'routes={math: [a:1], "*": b:2}', "b=$HOME `x` '*'", "running"]
    assert _notes(folder) == expected


def test_no_overrides_are_an_error(folder: Path) -> None:
    """A volume that was not mounted is no empty list."""
    with started("run-trainer.sh", folder=folder) as process:
        assert process.wait(TIMEOUT_S) not in {0, 143}
    assert _notes(folder) == []


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_trainers(folder: Path, code: int) -> None:
    """As long as nobody told it to stop."""
    (folder / "overrides" / "10-a.txt").write_text("a=1\n")
    with started("run-trainer.sh", folder=folder, ENDED=str(code)) as process:
        assert process.wait(TIMEOUT_S) == code


@pytest.mark.parametrize(("code", "expected"), [(0, 143), (7, 7)])
def test_a_run_that_was_told_to_stop_is_not_done(folder: Path, code: int, expected: int) -> None:
    """It has its time to save; Kubernetes sees a failure, and runs it again."""
    (folder / "overrides" / "10-a.txt").write_text("a=1\n")
    with started("run-trainer.sh", folder=folder, TRAIN_S="60", STOPPED=str(code)) as process:
        _wait_for(folder, "running")
        process.terminate()
        assert process.wait(TIMEOUT_S) == expected
    assert _notes(folder)[-1] == "saved"


def test_waiting_ends_once_everything_is_there(folder: Path) -> None:
    """A file and a port; what is missing is named."""
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with started("wait-for.sh", f"{folder}/config.json", endpoint, folder=folder) as process:
            time.sleep(0.3)
            assert process.poll() is None
            (folder / "config.json").touch()
            assert process.wait(TIMEOUT_S) == 0
            assert process.stdout is not None
            lines = process.stdout.read().splitlines()
    assert lines[0] == f"waiting for {folder}/config.json"
    assert lines[-2:] == [f"{folder}/config.json is there", f"{endpoint} is there"]


def test_waiting_for_a_port_says_why(folder: Path) -> None:
    """Nothing listens there, so it goes on waiting, and ends when it is told to."""
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    with started("wait-for.sh", "127.0.0.1:1", folder=folder) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        began_s = time.monotonic()
        process.terminate()
        assert process.wait(TIMEOUT_S) == 143
        assert time.monotonic() - began_s < 5
    assert any("refused" in line for line in lines)
    assert "waiting for 127.0.0.1:1\n" in lines
