"""What further replicas of a teacher give, and what a lost one costs: `make bench-scale`, `python -m benchmarks.scale`.

Every replica is the real service in a process of its own, with the fake engine: a sequence takes it a fixed time, and
its admission lets a fixed number in at a time. So a replica's capacity is `slots / latency` sequences per second, as
long as the machine keeps up (`cpu_share` says whether it is busy), and what is measured is the client: whether it keeps
all replicas busy, and how it takes the loss of one. It runs with its defaults and makes twice as many calls at a time
as there are slots. No two sequences are alike, and every answer is compared with the analytic one.

event:
  none     all replicas serve. `efficiency` is the throughput over that of as many single replicas, `fairness` the
           least share of the answers that a replica gave over the largest
  killed   one gets SIGKILL in mid-run
  paused   one gets SIGSTOP in mid-run, and SIGCONT later
With an event, `sequences_per_s` is the throughput from the event on (until SIGCONT), its dip included; `kept` is that
over the throughput before, and `efficiency` and `fairness` are of the replicas that are left.
  dip_s         seconds in which the throughput of the second before was under 3/4 of what the replicas left give
  resumed       throughput after SIGCONT over that before the event
  back_after_s  seconds from SIGCONT to the replica's first answer
  lost          calls that ended with an error or a wrong answer
  retries       attempts beyond the first, of all calls
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import structlog
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.losses import BUSY_LOAD, machine
from benchmarks.scale_load import Replica, Run, Settings, Timeline, run, start_replicas
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.processes import supervised

NUM_FOR_EVENTS = 4
WIDTH = 150
"""Columns of the output where it does not go to a terminal."""
DECIMALS = {
    "sequences_per_s": 1,
    "efficiency": 3,
    "fairness": 3,
    "kept": 3,
    "dip_s": 1,
    "resumed": 3,
    "back_after_s": 1,
    "lost": 0,
    "retries": 0,
    "cpu_share": 2,
}

Row = dict[str, str | int | float]


def row(done: Run, *, single_per_s: float) -> Row:
    """One row of the results; what does not apply is left out.

    Args:
        done: what was run.
        single_per_s: throughput of a single replica.
    """
    timeline, num_replicas = done.timeline, len(done.endpoints)
    before_per_s = timeline.per_s(done.start_s, done.event_s)
    numbers: dict[str, float | None] = {
        "sequences_per_s": before_per_s,
        "efficiency": before_per_s / (num_replicas * single_per_s),
        "fairness": timeline.fairness(done.endpoints, done.start_s, done.event_s),
    }
    if done.event != "none":
        num_left = num_replicas - 1
        after_per_s = timeline.per_s(done.event_s, done.resume_s)
        left_per_s = before_per_s * num_left / num_replicas
        numbers = {
            "sequences_per_s": after_per_s,
            "efficiency": after_per_s / (num_left * single_per_s),
            "fairness": timeline.fairness(done.endpoints[:-1], done.event_s, done.resume_s),
            "kept": after_per_s / before_per_s,
            "dip_s": timeline.dip_s(done.event_s, done.resume_s, per_s=left_per_s),
        }
    if done.event == "paused":
        back_s = timeline.first_after(done.resume_s, done.endpoints[-1])
        numbers["resumed"] = timeline.per_s(done.resume_s, done.end_s) / before_per_s
        numbers["back_after_s"] = None if back_s is None else back_s - done.resume_s
    numbers["lost"] = timeline.lost.total()
    numbers["retries"] = timeline.num_retries
    numbers["cpu_share"] = done.cpu_share
    made: Row = {"replicas": num_replicas, "event": done.event}
    return made | {
        key: round(value, DECIMALS[key]) if DECIMALS[key] else int(value)
        for key, value in numbers.items()
        if value is not None
    }


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    made = Table(title="Replicas of a teacher")
    for key in ("replicas", "event", *DECIMALS):
        made.add_column(key.replace("_", " "), justify="left" if key == "event" else "right")
    for one in rows:
        made.add_row(*(f"{one.get(key, '-')}" for key in ("replicas", "event", *DECIMALS)))
    return made


def plans(counts: Sequence[int]) -> list[tuple[int, str]]:
    """What is run: each count of replicas, one first, then the events; last the one that a replica does not survive."""
    without_event = [(count, "none") for count in sorted({1, *counts})]
    return [*without_event, (NUM_FOR_EVENTS, "paused"), (NUM_FOR_EVENTS, "killed")]


async def measure(
    planned: Sequence[tuple[int, str]], replicas: Sequence[Replica], settings: Settings, report: Callable[[str], None]
) -> list[Row]:
    """The row of each run; the first one is that of a single replica."""
    rows: list[Row] = []
    single_per_s = None
    for count, event in planned:
        done = await run(replicas[:count], event, settings)
        if single_per_s is None:
            single_per_s = done.timeline.per_s(done.start_s, done.event_s)
        rows.append(row(done, single_per_s=single_per_s))
        report(f"{count} replicas, {event}: {rows[-1]['sequences_per_s']} sequences/s{_losses(done.timeline)}")
    return rows


def _losses(timeline: Timeline) -> str:
    return "".join(f", {number} lost: {reason}" for reason, number in timeline.lost.items())


def main(
    *,
    replicas: Annotated[list[int], typer.Option(min=1, help="Replicas; may be given several times.")] = [1, 2, 4, 8],  # noqa: B006
    latency_s: Annotated[float, typer.Option(min=0.001, help="Seconds that a sequence takes a replica.")] = 0.2,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that a replica takes at a time.")] = 8,
    seconds: Annotated[float, typer.Option(min=1, help="Of each measured part; events take more.")] = 8.0,
    work_dir: Annotated[Path, typer.Option(help="Logs of the replicas.")] = Path("runs/bench-scale"),
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/scale.json"),
) -> None:
    """Measure every count of replicas and every event, and write the results."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    # what becomes of the calls is told in the rows
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    facts = machine("cpu", torch.get_num_threads())
    if float(facts["load"]) > BUSY_LOAD:
        console.print(f"the machine is busy (load {facts['load']}): times will be off", style="yellow", highlight=False)

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    settings = Settings(latency_s=latency_s, slots=slots, seconds=seconds)
    interrupts = Interrupts()
    with interrupts.watched(), supervised(work_dir.resolve() / "logs", interrupts) as supervisor:
        planned = plans(replicas)
        started = start_replicas(max(count for count, _ in planned), settings, supervisor)
        rows = asyncio.run(measure(planned, started, settings, report))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(facts, table(rows))


if __name__ == "__main__":
    typer.run(main)
