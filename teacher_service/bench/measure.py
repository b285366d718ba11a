"""The measuring itself: random sequences, a fixed number of them in flight, over one channel.

Legend: N tokens, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from protos.manifest import Manifest
from teacher_service.bench.settings import BenchSettings, fit
from teacher_service.bench.tally import Row, Tally
from teacher_service.errors import OverloadedError
from teacher_service.transports.caller import CallError, ScoreCall, TeacherCaller, calling

_CLIENT_NAME = "bench"


class Watcher(Protocol):
    """Whoever shows how the measuring goes."""

    def began(self, manifest: Manifest, settings: BenchSettings, asked: BenchSettings) -> None:
        """The teacher is known, and the settings are fitted to it from those that were asked for."""

    def began_level(self, name: str, num_sequences: int) -> None:
        """The next level runs."""

    def advanced(self, tally: Tally) -> None:
        """One more sequence of the level was answered or failed."""

    def ended_level(self, tally: Tally) -> None:
        """The level is over, complete or not."""


@dataclass(kw_only=True)
class Measurement:
    """What is known so far; it grows while `measure` runs, so that an interrupt leaves what there is."""

    settings: BenchSettings
    """As fitted to the teacher, once that is known."""
    manifest: Manifest | None = None
    """What the teacher is; None until it has said so."""
    warm_up: Tally | None = None
    """Of the sequences before the first level; None: there were none yet."""
    levels: list[Tally] = field(default_factory=list)
    """Of each level that was begun."""

    def rows(self) -> list[Row]:
        """One for each level that was begun."""
        return [one.row(self.settings) for one in self.levels]

    def failure(self) -> str | None:
        """The first error's message, where no sequence was answered; None otherwise."""
        tallies = [one for one in (self.warm_up, *self.levels) if one is not None]
        if any(one.num_answered for one in tallies):
            return None
        return next((message for one in tallies for message in one.messages.values()), None)

    def document(self) -> dict[str, Any]:
        """The results as JSON holds them."""
        workload = dataclasses.asdict(self.settings)
        del workload["credentials"]  # no part of what was measured
        del workload["json"]
        return {
            "manifest": None if self.manifest is None else manifest_brief(self.manifest),
            "workload": workload,
            "rows": [dataclasses.asdict(one) for one in self.rows()],
        }


def manifest_brief(manifest: Manifest) -> dict[str, str | int | None]:
    """What tells one teacher from another, and its limits."""
    return {
        "model_name": manifest.model_name,
        "weights_digest": manifest.weights_digest,
        "engine": manifest.engine,
        "engine_version": manifest.engine_version,
        "service_version": manifest.service_version,
        "dtype": manifest.dtype,
        "vocab_rows": manifest.vocab_rows,
        "max_request_tokens": manifest.max_request_tokens,
        "max_num_logprobs": manifest.max_num_logprobs,
        "digest": manifest.digest,
    }


def random_calls(
    settings: BenchSettings, *, num_sequences: int, vocab_rows: int, level: int = 0
) -> Iterator[ScoreCall]:
    """Sequences of random token ids below V; each prompt with `siblings` responses, one after another.

    Args:
        settings: sizes of the sequences, and the seed.
        num_sequences: how many.
        vocab_rows: V.
        level: one more seed, so that no level's sequences are in a prefix cache from another's.
    """
    rng = np.random.default_rng([settings.seed, level])
    for first in range(0, num_sequences, settings.siblings):
        prompt = rng.integers(vocab_rows, size=settings.prompt_tokens, dtype=np.int32)
        for _ in range(min(settings.siblings, num_sequences - first)):
            response = rng.integers(vocab_rows, size=settings.response_tokens, dtype=np.int32)
            yield ScoreCall(
                token_ids=np.concatenate([prompt, response]),
                score_start=settings.prompt_tokens,
                num_logprobs=settings.num_logprobs,
                temperature=settings.temperature,
                wire_dtype=settings.wire_dtype,
            )


async def measure(found: Measurement, watcher: Watcher) -> None:
    """Score every level's sequences and fill `found`; a level without an answer is the last.

    Raises:
        CallError: the teacher does not say what it is.
        SettingsError: it can't do what is asked for.
    """
    asked = found.settings
    async with calling(asked.endpoint, client_name=_CLIENT_NAME, credentials=asked.credentials) as caller:
        manifest = found.manifest = await caller.get_manifest()
        settings = found.settings = fit(asked, manifest)
        watcher.began(manifest, settings, asked)
        bench = _Bench(caller, manifest, settings, watcher)
        if asked.warm_up:
            found.warm_up = Tally(concurrency=min(max(asked.concurrency), asked.warm_up))
            await bench.run("warm-up", found.warm_up, asked.warm_up, level=0)
            if not found.warm_up.num_answered:
                return
        for level, concurrency in enumerate(asked.concurrency, start=1):
            tally = Tally(concurrency=concurrency)
            found.levels.append(tally)
            await bench.run(f"concurrency {concurrency}", tally, asked.sequences, level=level)
            if not tally.num_answered:
                return


class _Bench:
    """Scores sequences of one teacher over one channel."""

    def __init__(self, caller: TeacherCaller, manifest: Manifest, settings: BenchSettings, watcher: Watcher) -> None:
        self._caller = caller
        self._manifest = manifest
        self._settings = settings
        self._watcher = watcher

    async def run(self, name: str, tally: Tally, num_sequences: int, *, level: int) -> None:
        """Score that many sequences, `tally.concurrency` at a time."""
        self._watcher.began_level(name, num_sequences)
        calls = random_calls(
            self._settings, num_sequences=num_sequences, vocab_rows=self._manifest.vocab_rows, level=level
        )
        began_s, processor_began_s = time.perf_counter(), time.process_time()
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(tally.concurrency, num_sequences)):
                    workers.create_task(self._work(calls, tally))
        finally:
            tally.elapsed_s = time.perf_counter() - began_s
            tally.processor_s = time.process_time() - processor_began_s
            self._watcher.ended_level(tally)

    async def _work(self, calls: Iterator[ScoreCall], tally: Tally) -> None:
        for call in calls:
            await self._score(call, tally)
            self._watcher.advanced(tally)

    async def _score(self, call: ScoreCall, tally: Tally) -> None:
        """Score one sequence; while the service is overloaded, again after the delay that it names."""
        timeout_s = self._settings.timeout_s
        began_s = time.perf_counter()
        while True:
            waited_s = time.perf_counter() - began_s
            try:
                answer = await self._caller.score(call, manifest=self._manifest, timeout_s=timeout_s)
            except CallError as exc:
                is_overloaded = exc.reason == OverloadedError.reason
                if not is_overloaded or exc.retry_delay_s is None or waited_s >= timeout_s:
                    tally.add_error(exc)
                    return
                tally.retries += 1
                await asyncio.sleep(exc.retry_delay_s)
            else:
                tally.add_answer(answer, waited_s=waited_s)
                return
