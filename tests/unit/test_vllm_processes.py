"""An engine's processes: how they ended, and that nothing of theirs stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from teacher_service.engine.vllm.processes import EngineProcesses

TIMEOUT_S = 20.0


def _hold_shared_memory(ready: Connection) -> None:
    segment = SharedMemory(create=True, size=4096)
    resource_tracker.unregister(f"/{segment.name}", "shared_memory")  # as if its tracker had been killed as well
    ready.send(segment.name)
    signal.pause()


def test_a_killed_process_is_named_and_its_shared_memory_freed() -> None:
    """What a hard end leaves in /dev/shm goes when the engine's processes are reaped."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_hold_shared_memory, args=(sender,))
    child.start()
    try:
        assert receiver.poll(TIMEOUT_S)
        segment = Path("/dev/shm") / receiver.recv()  # noqa: S108 - the kernel's name for it
        processes = EngineProcesses([child])
        assert processes.cause_of_death() is None
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(TIMEOUT_S)
        assert segment.exists()
        processes.reap(timeout_s=TIMEOUT_S)
        assert not segment.exists()
        assert "was killed by SIGKILL (often by the kernel, out of memory)" in str(processes.cause_of_death())
    finally:
        child.kill()
        child.join(TIMEOUT_S)
        receiver.close()
        sender.close()


def test_a_process_that_does_not_end_is_killed() -> None:
    """Reaping is bounded."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=signal.pause)
    child.start()
    EngineProcesses([child]).reap(timeout_s=0)
    assert not child.is_alive()
