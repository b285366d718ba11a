"""Run a command, then fail if anything it started still runs, and end that. Linux only; needs no package.

The command's orphans become children of this process, whatever session or process group they moved to, so none of
them is missed: neither an engine's workers nor a Ray daemon.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0
"""How long a process may take to end by itself once the command has ended."""


def main(command: list[str]) -> int:
    """The command's exit status, or 1 where it succeeded but left processes behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; leftover processes can't be found")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode  # noqa: S603 # .ci/run's own
        left = wait_for_end(GRACE_S)
    except KeyboardInterrupt:
        return 130
    finally:
        end_all()
    for line in left:
        print(f"left behind by {' '.join(command)}, now ended: {line}", flush=True)  # noqa: T201 # it is a command
    return status or int(bool(left))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


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
