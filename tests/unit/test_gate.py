"""The gate notices what a stage leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


def command(script: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / ".ci" / "supervise.py"), *options, "bash", "-c", script]


def supervise(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *options), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("code", [0, 3])
def test_a_tidy_command_keeps_its_exit_code(code: int) -> None:
    """What the command says is what the gate says."""
    done = supervise(f"sleep 0.1 & wait; exit {code}")
    assert (done.returncode, done.stdout) == (code, "")


def test_a_process_left_behind_is_named_and_ended(tmp_path: Path) -> None:
    """Also one that moved to a session of its own."""
    done = supervise(f"setsid sleep 1000 & echo $! > {tmp_path}/pid")
    assert done.returncode == 1
    assert "process" in done.stdout
    assert "sleep 1000" in done.stdout
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_temporary_file_left_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of ours that was there before is none of the command's, and one of a stranger's none of ours."""
    (tmp_path / "gkd-earlier").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = supervise(f"touch {tmp_path}/gkd-left {tmp_path}/gkd-earlier {tmp_path}/strange")
    assert done.returncode == 1
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == [f"{tmp_path}/gkd-left"]


def test_a_stage_beside_others_answers_for_its_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What appears in shared memory meanwhile may be another stage's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shared = Path("/dev/shm") / f"gkd-test-gate-{os.getpid()}"  # noqa: S108
    try:
        assert supervise(f"touch {shared}", "--beside").returncode == 0
        shared.unlink()
        assert supervise(f"touch {shared}").returncode == 1
    finally:
        shared.unlink(missing_ok=True)
    assert supervise(f"touch {tmp_path}/gkd-left", "--beside").returncode == 1


def test_an_interrupted_command_has_time_to_end_in_order(tmp_path: Path) -> None:
    """The whole group gets the signal; what it does on its way out is waited for."""
    script = f"trap 'sleep 1; touch {tmp_path}/tidied; exit 1' TERM; touch {tmp_path}/started; sleep 1000 & wait"
    supervisor = subprocess.Popen(command(script), start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait(TIMEOUT_S) == 130
    assert (tmp_path / "tidied").exists()
