"""The processes behind one engine: why they ended, and that they leave nothing behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

KILL_TIMEOUT_S = 5.0
"""Seconds that the kernel may take to end a killed process."""

_KILLERS = {
    signal.SIGKILL: " (often by the kernel, out of memory)",
    signal.SIGILL: " (an instruction that this processor or kernel does not allow)",
}
"""What usually sends a signal to an engine's process."""
_SHARED_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - the kernel's name for it, not a temporary file


def children() -> frozenset[BaseProcess]:
    """Processes that this process has started by multiprocessing and that still run."""
    return frozenset(multiprocessing.active_children())


class EngineProcesses:
    """The processes that an engine has started, with their descendants and shared memory as of now."""

    def __init__(self, roots: Iterable[BaseProcess]) -> None:
        """Take stock.

        Args:
            roots: direct children of this process.
        """
        self._roots = tuple(roots)
        self._descendants: list[psutil.Process] = []
        self._segments: set[str] = set()
        for root in self._roots:
            if root.pid is None or not psutil.pid_exists(root.pid):
                continue
            process = psutil.Process(root.pid)
            descendants = process.children(recursive=True)
            self._descendants += descendants
            for member in (process, *descendants):
                self._segments |= _shared_memory_of(member)

    def cause_of_death(self) -> str | None:
        """How the first root that ended did so, in words; None while all of them run."""
        for root in self._roots:
            if root.exitcode is not None:
                return f"process {root.name} (pid {root.pid}) {_exit_in_words(root.exitcode)}"
        return None

    def reap(self, *, timeout_s: float) -> None:
        """Wait for every process to be gone, kill what is not after `timeout_s`, and free shared memory left behind."""
        # Roots are waited for by multiprocessing alone: who else collects their exit code hides it from it.
        for root in self._roots:
            root.join(timeout=timeout_s)
            if root.is_alive():
                root.kill()
                root.join(timeout=KILL_TIMEOUT_S)
        _, alive = psutil.wait_procs(self._descendants, timeout=timeout_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
        for name in self._segments:
            _free_shared_memory(name)


def _exit_in_words(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with code {exitcode}"
    number = signal.Signals(-exitcode)
    return f"was killed by {number.name}{_KILLERS.get(number, '')}"


def _shared_memory_of(process: psutil.Process) -> set[str]:
    try:
        paths = {Path(mapped.path) for mapped in process.memory_maps()}
    except psutil.Error:
        return set()
    return {path.name for path in paths if path.parent == _SHARED_MEMORY_FOLDER and _is_left_behind(path.name)}


def _is_left_behind(name: str) -> bool:
    """Whether it is Python's (multiprocessing.shared_memory), or what vLLM's ranks on a CPU exchange tensors in."""
    return name.startswith("psm_") or "-cpushm" in name


def _free_shared_memory(name: str) -> None:
    try:
        segment = SharedMemory(name=name)
    except FileNotFoundError:
        return
    segment.close()
    segment.unlink()
