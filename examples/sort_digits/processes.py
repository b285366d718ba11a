"""Child processes that end with the run, whatever happens to it: descendants, shared memory and temporary files too.

Ray and vLLM start processes in sessions of their own, which outlive whoever started them. On Linux this process
adopts such orphans (a "subreaper", see prctl(2)), so every descendant stays in its tree until it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from examples.sort_digits.interrupts import Interrupts

PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its name is fixed by the kernel's users
MAX_TEMP_ROOT_BYTES = 13
"""Longest folder for temporary files. A socket's path may have 107 bytes: the run's own folder below this one takes 13
of them, the trainer's for Ray 17, and what Ray puts there 64."""
MAX_LOOKS = 4
"""How often a new segment's owner is looked for: it may be listed before it is mapped, or belong to somebody else."""
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 16 * 2**10
ORPHAN_GRACE_S = 3.0
"""Time for what a stopped process leaves behind to end by itself, e.g. Python's resource tracker unlinking memory."""
KILL_WAIT_S = 10.0
"""Bound on the wait for killed processes; the kernel needs milliseconds."""


@contextmanager
def supervised(log_dir: Path, interrupts: Interrupts) -> Iterator[ProcessSupervisor]:
    """A supervisor; when it is left, everything it started is gone, also after an error or a signal. Linux only.

    While it is open, every new child of this process must come from it: others are taken for orphans and ended.

    Raises:
        OSError: a folder can't be made, or this is not Linux.
    """
    bystanders = frozenset(child.pid for child in psutil.Process().children())
    log_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gkd-", dir=_short_temp_root(), ignore_cleanup_errors=True) as temp_dir:
        supervisor = ProcessSupervisor(log_dir=log_dir, temp_dir=Path(temp_dir), bystanders=bystanders)
        try:
            _adopt_orphans(True)
            yield supervisor
        finally:
            with interrupts.shielded():
                supervisor.stop_all()
                _adopt_orphans(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ManagedProcess:
    """A child with its log."""

    name: str
    """What messages call it."""
    popen: subprocess.Popen[bytes]
    """The process, leader of a session of its own: a Ctrl-C at the terminal reaches it only through us."""
    log_path: Path
    """Its stdout and stderr."""
    grace_s: float
    """How long it may take to end after SIGTERM."""

    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self.popen.poll()

    def last_words(self) -> str:
        """Where its log is, and its last lines."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([f"its log {self.log_path} ends with:", *lines[-LOG_TAIL_LINES:]])


class ProcessSupervisor:
    """Starts children, and ends them with all their descendants. Made by `supervised`."""

    def __init__(self, *, log_dir: Path, temp_dir: Path, bystanders: frozenset[int]) -> None:
        self.temp_dir = temp_dir
        """Folder for the children's temporary files, removed at the end; short enough for Ray's sockets."""
        self._log_dir = log_dir
        self._bystanders = bystanders
        self._started: list[ManagedProcess] = []
        self._segments: set[Path] = set()
        self._num_looks = Counter(dict.fromkeys(SHARED_MEMORY.iterdir(), MAX_LOOKS))

    def start(
        self, name: str, command: Sequence[str], *, grace_s: float, environment: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        """Start a child whose output goes to `NAME.log` in the log folder and whose temporary files go to `temp_dir`.

        Raises:
            OSError: the log can't be written, or the command can't be run.
        """
        log_path = self._log_dir / f"{name}.log"
        temp = f"{self.temp_dir}"
        with log_path.open("wb") as log:
            popen = subprocess.Popen(  # noqa: S603 - the caller's own command
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": temp, "RAY_TMPDIR": temp, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        process = ManagedProcess(name=name, popen=popen, log_path=log_path, grace_s=grace_s)
        self._started.append(process)
        return process

    def stop(self, process: ManagedProcess) -> int:
        """End one child: SIGTERM, then SIGKILL after its grace. Returns its exit code.

        Its descendants end at the latest when the supervisor is left.
        """
        if process.popen.poll() is None:
            process.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.popen.wait(process.grace_s)
            process.popen.kill()
        return process.popen.wait()

    def pause(self, seconds: float) -> None:
        """Sleep, then look what shared memory the descendants hold. Whoever waits for them waits like this.

        A process that is killed by others, as Ray kills its workers, leaves its memory behind without a trace of whose
        it was: only while it lives can that be seen.
        """
        time.sleep(seconds)
        new = [path for path in SHARED_MEMORY.iterdir() if self._num_looks[path] < MAX_LOOKS]
        if new:
            self._num_looks.update(new)
            self._segments |= _mapped_shared_memory(self._descendants())

    def stop_all(self) -> None:
        """End all children, the last started first, then every descendant, and free the shared memory they held."""
        self._segments |= _mapped_shared_memory(self._descendants())
        for process in reversed(self._started):
            self.stop(process)
        self._started.clear()
        _wait_gone(self._descendants, ORPHAN_GRACE_S)
        self._segments |= _mapped_shared_memory(self._descendants())
        self._kill_descendants()
        for segment in self._segments:
            segment.unlink(missing_ok=True)

    def _descendants(self) -> list[psutil.Process]:
        """Everything below this process that was not there at the start, adopted orphans included."""
        children = [child for child in psutil.Process().children() if child.pid not in self._bystanders]
        found = {child.pid: child for child in children}
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {one.pid: one for one in child.children(recursive=True)}
        return list(found.values())

    def _kill_descendants(self) -> None:
        """Kill until none is left: a process may start another one between being listed and being killed."""
        deadline = time.monotonic() + KILL_WAIT_S
        while (alive := self._descendants()) and time.monotonic() < deadline:
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            # Waiting also reaps those that are our children by now.
            psutil.wait_procs(alive, timeout=1.0)


def _wait_gone(list_processes: Callable[[], list[psutil.Process]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (alive := list_processes()) and (left_s := deadline - time.monotonic()) > 0:
        psutil.wait_procs(alive, timeout=min(0.2, left_s))


def _mapped_shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Named shared memory that the processes have mapped."""
    found: set[Path] = set()
    for process in processes:
        # Not psutil's memory_maps: it also measures each mapping, which takes a hundred times as long.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            fields = [line.split(maxsplit=5) for line in lines if f" {SHARED_MEMORY}/" in line]
            found |= {Path(one[5]) for one in fields}
    # An unlinked segment is listed as "NAME (deleted)".
    return {path for path in found if path.exists()}


def _adopt_orphans(adopt: bool) -> None:
    """Make this process the new parent of orphaned descendants, or stop being it."""
    if not sys.platform.startswith("linux"):
        raise OSError(f"supervising Ray and vLLM needs Linux; this is {sys.platform}")
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(number)}")


def _short_temp_root() -> Path:
    """The system's folder for temporary files, or /tmp where its path is too long for Ray's sockets."""
    root = Path(tempfile.gettempdir())
    return root if len(os.fsencode(root)) <= MAX_TEMP_ROOT_BYTES else Path("/tmp")  # noqa: S108 - mkdtemp below it
