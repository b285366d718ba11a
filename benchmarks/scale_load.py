"""Replicas of the scaling benchmark, a closed loop of calls to them, and what happens to one in mid-run."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil
from numpy.typing import NDArray

from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor
from examples.sort_digits.readiness import wait_for_own_teacher
from teacher_service.engine.fake import expected_logprobs
from trainer.errors import TeacherError
from trainer.teacher import TeacherClient
from trainer.types import TeacherScores

VOCAB_ROWS = 32
"""Of the fake engine."""
PROMPT_TOKENS = 16
RESPONSE_TOKENS = 48
NUM_LOGPROBS = 16
CALLS_PER_SLOT = 2
"""In flight: while one is answered, the next waits in the service."""
DIP_SHARE = 0.75
DIP_WINDOW_S = 1.0
DIP_STEP_S = 0.1
WARM_UP_S = 2.0
READY_TIMEOUT_S = 120.0
GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs have in common."""

    latency_s: float
    """Time that a sequence takes in the engine."""
    slots: int
    """Sequences in a replica's engine at a time."""
    seconds: float
    """Of each measured part of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A service under way."""

    process: ManagedProcess
    endpoint: str


@dataclass(kw_only=True, slots=True)
class Timeline:
    """The answers of a run in order, and what was lost."""

    answers: list[tuple[float, str]] = field(default_factory=list)
    """When, on `time.monotonic`'s clock, and by which endpoint."""
    lost: Counter[str] = field(default_factory=Counter)
    """Calls without a right answer, by reason."""
    num_retries: int = 0
    """Attempts beyond the first of the answered calls."""
    is_ending: bool = False
    """Whether no new calls are made."""

    def per_s(self, start_s: float, end_s: float) -> float:
        """Answers per second within a part of the run."""
        return sum(start_s <= at_s < end_s for at_s, _ in self.answers) / (end_s - start_s)

    def fairness(self, endpoints: Sequence[str], start_s: float, end_s: float) -> float:
        """Fewest answers of an endpoint over most; 0 where one gave none."""
        by_endpoint = Counter(endpoint for at_s, endpoint in self.answers if start_s <= at_s < end_s)
        counts = [by_endpoint[endpoint] for endpoint in endpoints]
        return min(counts) / max(max(counts), 1)

    def dip_s(self, start_s: float, end_s: float, *, per_s: float) -> float:
        """Seconds of a part of the run in which the throughput of the second before was under DIP_SHARE of `per_s`."""
        steps = np.arange(start_s, end_s, DIP_STEP_S) + DIP_STEP_S
        low = [self.per_s(at_s - DIP_WINDOW_S, at_s) < DIP_SHARE * per_s for at_s in steps]
        return sum(low) * DIP_STEP_S

    def first_after(self, start_s: float, endpoint: str) -> float | None:
        """When an endpoint first answered after a moment; None: it did not."""
        return next((at_s for at_s, name in self.answers if at_s > start_s and name == endpoint), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run with the moments that part it, on `time.monotonic`'s clock."""

    event: str
    endpoints: tuple[str, ...]
    """The replicas; the last one meets the event."""
    timeline: Timeline
    start_s: float
    """When measuring began, after the warm-up."""
    event_s: float
    """When the event came; with none, the end."""
    resume_s: float
    """When a paused replica went on; else the end."""
    end_s: float
    cpu_share: float
    """Of this machine, while measuring."""


class Load:
    """A closed loop of calls, no two of them alike."""

    def __init__(self, client: TeacherClient, *, retry_after_s: float) -> None:
        self._client = client
        self._retry_after_s = retry_after_s
        # Equal sequences would be answered once for all.
        self._numbers = itertools.count(time.monotonic_ns())
        positions = range(PROMPT_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS)
        self._expected_SV = expected_logprobs(positions, vocab_rows=VOCAB_ROWS).astype(np.float32)
        self.timeline = Timeline()
        """What came of the calls so far."""

    @asynccontextmanager
    async def running(self, num_inflight: int) -> AsyncIterator[Timeline]:
        """Keep so many calls under way; at the end those under way are waited for."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num_inflight):
                group.create_task(self._keep_calling())
            try:
                yield self.timeline
            finally:
                self.timeline.is_ending = True

    async def _keep_calling(self) -> None:
        timeline = self.timeline
        while not timeline.is_ending:
            token_ids = self._next_sequence()
            try:
                scores = await self._client.score(token_ids, score_start=PROMPT_TOKENS, num_logprobs=NUM_LOGPROBS)
            except TeacherError as error:
                timeline.lost[error.reason] += 1
                await asyncio.sleep(self._retry_after_s)  # a client that refuses at once must not spin
                continue
            if self._is_right(token_ids, scores):
                timeline.answers.append((time.monotonic(), scores.endpoint))
                timeline.num_retries += scores.timings.num_attempts - 1
            else:
                timeline.lost["WRONG"] += 1

    def _next_sequence(self) -> NDArray[np.int64]:
        rng = np.random.default_rng(next(self._numbers))
        return rng.integers(0, VOCAB_ROWS, PROMPT_TOKENS + RESPONSE_TOKENS)

    def _is_right(self, token_ids: NDArray[np.int64], scores: TeacherScores) -> bool:
        positions = np.arange(RESPONSE_TOKENS)
        ids_SK = scores.topk_token_ids
        return (
            ids_SK is not None
            and np.allclose(scores.sampled_logprobs, self._expected_SV[positions, token_ids[PROMPT_TOKENS:]])
            and np.allclose(scores.topk_logprobs, self._expected_SV[positions[:, None], ids_SK])  # type: ignore[arg-type] # given with the ids
        )


async def run(replicas: Sequence[Replica], event: str, settings: Settings) -> Run:
    """One run; with an event, the last replica meets it."""
    endpoints = tuple(one.endpoint for one in replicas)
    num_inflight = CALLS_PER_SLOT * settings.slots * len(replicas)
    victim = replicas[-1].process.popen
    async with TeacherClient(endpoints=endpoints, max_inflight=num_inflight) as client:
        load = Load(client, retry_after_s=settings.latency_s)
        async with load.running(num_inflight) as timeline:
            await asyncio.sleep(WARM_UP_S)
            psutil.cpu_percent()
            start_s = time.monotonic()
            await asyncio.sleep(settings.seconds)
            event_s = end_s = resume_s = time.monotonic()
            if event != "none":
                victim.send_signal(signal.SIGKILL if event == "killed" else signal.SIGSTOP)
                await asyncio.sleep(2 * settings.seconds)
                end_s = resume_s = time.monotonic()
            if event == "paused":
                victim.send_signal(signal.SIGCONT)
                await asyncio.sleep(2 * settings.seconds)
                end_s = time.monotonic()
            cpu_share = psutil.cpu_percent() / 100
    return Run(
        event=event,
        endpoints=endpoints,
        timeline=timeline,
        start_s=start_s,
        event_s=event_s,
        resume_s=resume_s,
        end_s=end_s,
        cpu_share=cpu_share,
    )


def start_replicas(count: int, settings: Settings, supervisor: ProcessSupervisor) -> list[Replica]:
    """Services that serve."""
    started = []
    for number in range(count):
        port_file = supervisor.temp_dir / f"replica-{number}.json"
        command = [
            sys.executable, "-m", "teacher_service", "serve",
            "--engine", "fake",
            "--fake-latency-s", f"{settings.latency_s}",
            "--max-inflight-requests", f"{settings.slots}",
            "--grpc-port", "0",
            "--http-port", "0",
            "--port-file", f"{port_file}",
            "--log-level", "warning",
        ]  # fmt: skip
        started.append((supervisor.start(f"replica-{number}", command, grace_s=GRACE_S), port_file))
    return [
        Replica(
            process=process,
            endpoint=wait_for_own_teacher(process, port_file, supervisor, timeout_s=READY_TIMEOUT_S),
        )
        for process, port_file in started
    ]
