"""Run a command, then fail if it left a process or a temporary file behind. Linux only; needs no package.

Usage: supervise.py [--beside] COMMAND...; with --beside, other stages run meanwhile, and what lies in /dev/shm may be
theirs.

What still runs is ended. The command's orphans become children of this process, whatever session or process group
they moved to, so none of them is missed: neither an engine's workers nor a Ray daemon.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0
"""How long a process may take to end by itself once the command has ended."""
INTERRUPT_GRACE_S = 60.0
"""How long everything may take to end in order after a signal, which .ci/run sends to the whole process group."""
TEMPORARY = (Path(tempfile.gettempdir()), Path("/dev/shm"))  # noqa: S108 # the kernel's name for it
"""Where this project and what it is built on keep temporary files, sockets and shared memory."""
PREFIXES = ("gkd-", "teacher-", "pytest-", "torchinductor_", "ray", "verl", "vllm", "psm_", "plasma")
"""How the names of theirs begin: others on the machine make files there too."""


def main(command: list[str]) -> int:
    """The command's exit status, or 1 where it succeeded but left processes behind."""
    folders = TEMPORARY
    if command[0] == "--beside":
        command, folders = command[1:], TEMPORARY[:1]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; leftover processes can't be found")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    earlier = temporary_files(folders)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 # .ci/run's own
        status = process.wait()
        left = [f"process {line}" for line in wait_for_end(GRACE_S)]
    except KeyboardInterrupt:
        status = 130
        left = [f"process {line}" for line in wait_for_end(INTERRUPT_GRACE_S)]
    finally:
        end_all()
    left += [f"file {path}" for path in sorted(temporary_files(folders) - earlier)]
    for line in left:
        print(f"left behind by {' '.join(command)}: {line}", flush=True)  # noqa: T201 # it is a command
    return status or int(bool(left))


def _interrupt(number: int, frame: object) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut the ending short
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def temporary_files(folders: tuple[Path, ...]) -> set[Path]:
    """What lies in the folders for temporary files under a name of ours or of a library's."""
    return {path for folder in folders for path in folder.iterdir() if path.name.startswith(PREFIXES)}


def wait_for_end(timeout_s: float) -> list[str]:
    """Wait for all descendants to end; a line for each that did not."""
    deadline = time.monotonic() + timeout_s
    while (pids := descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{pid} {command_line(pid)}" for pid in pids]


def end_all() -> None:
    """Kill every descendant; those they start meanwhile fall to this process too."""
    while pids := descendants():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        time.sleep(0.05)


def descendants() -> list[int]:
    """Ids of the live processes below this one, once the dead among its own children are reaped."""
    reap()
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the command's name stands in parentheses and may hold anything, spaces and parentheses too
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    return [pid for pid in parents if _is_below(pid, os.getpid(), parents)]


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def reap() -> None:
    """Collect the exit status of every dead child."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return  # no child is left


def command_line(pid: int) -> str:
    """What a process runs; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()[:160]
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
