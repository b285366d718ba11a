"""One run of one way to a teacher's logprobs: what was asked, and what it took of time, processor and memory.

Legend: N tokens of a sequence, K top-k entries.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protos.arrays import Int32Array, ScoreArrays

SAMPLING_S = 0.005
"""Between looks at resident memory, where the kernel does not let us reset its own peak."""


class TeacherBenchmarkError(RuntimeError):
    """A measurement can't be taken, or can't be trusted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Sequences that are submitted together."""

    token_ids: Sequence[Int32Array]
    """`[N]` each."""
    score_start: int
    """Tokens of each prompt."""
    num_logprobs: int
    """K."""
    concurrency: int
    """Sequences in flight at a time, at most."""

    @property
    def num_tokens(self) -> int:
        """Prompts included."""
        return sum(len(one) for one in self.token_ids)

    @property
    def num_scored(self) -> int:
        """Response tokens."""
        return self.num_tokens - len(self.token_ids) * self.score_start


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a caller gets for one sequence."""

    scores: ScoreArrays | None
    """None of the floor, which scores nothing."""
    payload_bytes: int | None = None
    """Body of the answer; None where nothing travels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run of one path on one batch."""

    seconds: float
    num_tokens: int
    num_scored: int
    engine_cpu_s: float
    server_cpu_s: float | None = None
    payload_bytes: int | None = None
    peak_bytes: int | None = None
    """Resident memory beyond that of the idle processes."""


class Processes:
    """The processes behind a path: what they have used so far, and hold."""

    def __init__(self, engine: int, serving: Sequence[int], *, are_served: bool) -> None:
        """Take stock.

        Args:
            engine: pid of the process that computes.
            serving: pids of the others.
            are_served: whether those only serve; else they are this process, which asks as well.
        """
        self.engine = engine
        self.serving = tuple(serving)
        self.are_served = are_served
        self.idle_bytes = 0

    def engine_cpu_s(self) -> float:
        """CPU time of the engine."""
        return cpu_s(self.engine)

    def serving_cpu_s(self) -> float:
        """CPU time of the others."""
        return sum(cpu_s(pid) for pid in self.serving)

    def set_idle(self) -> None:
        """From now on, memory is counted beyond what is resident now."""
        self.idle_bytes = sum(_resident_bytes(pid)["VmRSS"] for pid in (self.engine, *self.serving))

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Within it peaks are watched; the function then tells the bytes beyond idle.

        The kernel's own peak of each process, and so at most more than that of the sum; where it does not let us reset
        it, the largest sum seen.
        """
        pids = (self.engine, *self.serving)
        try:
            for pid in pids:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:
            with _sampled_peak(pids) as seen:
                yield lambda: seen[0] - self.idle_bytes
            return
        yield lambda: sum(_resident_bytes(pid)["VmHWM"] for pid in pids) - self.idle_bytes


def cpu_s(pid: int) -> float:
    """CPU time of a process, ended threads included, to the nanosecond (/proc counts in hundredths of a second)."""
    return time.clock_gettime(~pid << 3 | 2)  # the clock's id, see clock_getcpuclockid(3)


def _resident_bytes(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: 1024 * int(size) for name, size in re.findall(r"(VmHWM|VmRSS):\s*(\d+) kB", status)}


@contextmanager
def _sampled_peak(pids: Sequence[int]) -> Iterator[list[int]]:
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLING_S):
            with contextlib.suppress(OSError, KeyError):
                seen[0] = max(seen[0], sum(_resident_bytes(pid)["VmRSS"] for pid in pids))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringPath:
    """One way, ready to be asked."""

    name: str
    processes: Processes
    ask: Callable[[Int32Array, int, int], Awaitable[Answer]]
    """With `[N]` token ids, the prompt's length and K."""

    async def run(self, batch: Batch) -> Sample:
        """Ask for a batch, as many at a time as it says, and account for it."""
        slots = asyncio.Semaphore(batch.concurrency)

        async def one(token_ids: Int32Array) -> int | None:
            async with slots:
                return (await self.ask(token_ids, batch.score_start, batch.num_logprobs)).payload_bytes

        processes = self.processes
        with processes.peak() as peak_bytes:
            engine_s, serving_s = processes.engine_cpu_s(), processes.serving_cpu_s()
            started = time.perf_counter()
            payloads = await asyncio.gather(*(one(token_ids) for token_ids in batch.token_ids))
            seconds = time.perf_counter() - started
            return Sample(
                seconds=seconds,
                num_tokens=batch.num_tokens,
                num_scored=batch.num_scored,
                engine_cpu_s=processes.engine_cpu_s() - engine_s,
                server_cpu_s=processes.serving_cpu_s() - serving_s if processes.are_served else None,
                payload_bytes=sum(size or 0 for size in payloads) if processes.are_served else None,
                peak_bytes=peak_bytes(),
            )
