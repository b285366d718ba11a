"""What a person sees: which teacher it is, a bar while it runs, a table at the end. Colours on a terminal alone."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from protos.manifest import Manifest
from teacher_service.bench.measure import Measurement
from teacher_service.bench.settings import BenchSettings
from teacher_service.bench.tally import Row, Tally

_ABSENT = "-"
_DIGEST_LENGTH = 12
_BUSY_SHARE = 0.8
# a file has no width, and a terminal had better wrap a table than lose its last columns
_UNBOUNDED = 10_000


class Screen:
    """The watcher of a run: says on `out` what is measured, shows on `err` how far it is.

    A context manager: leaving it takes the bar away.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = Console(file=out, width=_UNBOUNDED, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(file=err, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[troubles]}"),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._err.is_terminal,
        )
        self._task = self._progress.add_task("", start=False, visible=False, troubles="")
        self._name = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def began(self, manifest: Manifest, settings: BenchSettings, asked: BenchSettings) -> None:
        """See `Watcher.began`."""
        for line in introduction(manifest, settings, asked):
            self._out.print(line)

    def began_level(self, name: str, num_sequences: int) -> None:
        """See `Watcher.began_level`."""
        self._name = name
        self._progress.reset(self._task, description=name, total=num_sequences, visible=True, troubles="")

    def advanced(self, tally: Tally) -> None:
        """See `Watcher.advanced`."""
        self._progress.update(self._task, advance=1, troubles=_troubles(tally))

    def ended_level(self, tally: Tally) -> None:
        """See `Watcher.ended_level`. Without a bar, a line keeps a long run from looking dead."""
        if not self._err.is_terminal:
            troubles = _troubles(tally)
            self._err.print(
                f"{self._name}: {tally.num_answered} answered in {tally.elapsed_s:.1f} s"
                f"{', ' if troubles else ''}{troubles}"
            )

    def show(self, found: Measurement) -> None:
        """The table, and beneath it what went wrong or casts doubt on the numbers."""
        self._out.print()
        self._out.print(table_of(found.rows()))
        for line in remarks(found.levels):
            self._out.print(line)

    def say(self, line: str) -> None:
        """One line on `err`."""
        self._err.print(line)


def introduction(manifest: Manifest, settings: BenchSettings, asked: BenchSettings) -> list[str]:
    """Which teacher it is, what is measured, and where that differs from what was asked for."""
    lines = [
        f"teacher at {settings.endpoint}: {manifest.model_name}, {manifest.dtype}, by {manifest.engine} "
        f"{manifest.engine_version}; {manifest.vocab_rows} vocabulary rows, at most {manifest.max_request_tokens} "
        f"tokens and {manifest.max_num_logprobs} logprobs; manifest {manifest.digest[:_DIGEST_LENGTH]}",
        f"measuring {settings.sequences} random sequences at each concurrency: {settings.prompt_tokens} tokens of "
        f"prompt and {settings.response_tokens} of response, {settings.siblings} "
        f"response{'' if settings.siblings == 1 else 's'} per prompt, {settings.num_logprobs} logprobs as "
        f"{settings.wire_dtype}, temperature {settings.temperature:g}, seed {settings.seed}",
    ]
    if settings != asked:
        lines.append(
            f"note: asked were {asked.prompt_tokens} and {asked.response_tokens} tokens, this teacher takes "
            f"{manifest.max_request_tokens} in all"
        )
    if max(settings.concurrency) > settings.sequences:
        lines.append(
            f"note: {settings.sequences} sequences can't fill a concurrency of {max(settings.concurrency)}; "
            f"pass --sequences {4 * max(settings.concurrency)} or more"
        )
    return lines


def remarks(levels: list[Tally]) -> list[str]:
    """What a reader of the table should know: each kind of error, and where this side may have been the limit."""
    lines = [
        f"concurrency {tally.concurrency}: {tally.errors[reason]} x {reason}: {message}"
        for tally in levels
        for reason, message in tally.messages.items()
    ]
    busy = [f"{tally.concurrency}" for tally in levels if tally.processor_share > _BUSY_SHARE]
    if busy:
        lines.append(
            f"note: at concurrency {', '.join(busy)} this side used its processor for more than {_BUSY_SHARE:.0%} of "
            "the time and may be the limit; run several at once, and away from the teacher's machine"
        )
    return lines


def table_of(rows: list[Row]) -> Table:
    """A column for each concurrency, so that three of them fit any terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("concurrency", no_wrap=True)
    for row in rows:
        table.add_column(f"{row.concurrency}", justify="right", no_wrap=True)

    def add(label: str, values: list[float | None], digits: int) -> None:
        table.add_row(label, *[_ABSENT if value is None else f"{value:,.{digits}f}" for value in values])

    add("sequences answered", [row.num_sequences for row in rows], 0)
    add("sequences / s", [row.sequences_per_s for row in rows], 2)
    add("tokens / s, prompt and response", [row.tokens_per_s for row in rows], 0)
    add("scored tokens / s", [row.scored_tokens_per_s for row in rows], 0)
    add("latency p50, ms", [row.latency_p50_ms for row in rows], 1)
    add("latency p95, ms", [row.latency_p95_ms for row in rows], 1)
    add("latency p99, ms", [row.latency_p99_ms for row in rows], 1)
    add("latency max, ms", [row.latency_max_ms for row in rows], 1)
    add("  in the service's queue, mean ms", [row.mean_queue_ms for row in rows], 1)
    add("  in its engine, mean ms", [row.mean_engine_ms for row in rows], 1)
    add("answer, bytes / scored token", [row.payload_bytes_per_token for row in rows], 1)
    add("decoding here, us / scored token", [row.decode_us_per_token for row in rows], 2)
    add("retries after OVERLOADED", [row.retries for row in rows], 0)
    add("sequences failed", [sum(row.errors.values()) for row in rows], 0)
    return table


def _troubles(tally: Tally) -> str:
    counts = {"failed": tally.num_failed, "retries": tally.retries}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
