"""What a teacher's logprobs cost by each way to them: `make bench-teacher`, or `python -m benchmarks.teacher`.

The models are random Qwen3, 2 layers of hidden size 256 with 2 heads of 128 (Qwen3's own size) and 768 intermediate, as
peaked as a trained one; only the vocabulary differs. So small a model shows what a path costs beside the model: a
larger one hides it. They compute in float32, as a CPU without instructions for bfloat16 multiplies that several times
slower (`--dtype`). A sequence of the main table has 128 prompt and 384 response tokens, no two of them share a prompt,
and K is 64. Prompts begin with another token in every run, so that no prefix cache knows them.

Paths, all with the same vLLM settings and arithmetic, alive together, idle while another is measured:
  floor           vLLM in this process, one token generated, no logprobs: the forward pass, which all of them need
  math_bound      the floor, and the LM head, logsumexp and top-k of the response rows alone, computed in the floor's
                  engine by the fastest of several forms (`teacher_bound.py`): on this machine, no scoring is faster
  in_process      our engine's fast route, without a service
  grpc, http      our service, asked over gRPC, and over HTTP with protobuf bodies
  grpc_float16    over gRPC, with the top-k's logprobs in float16
  openai          vLLM's server, `/v1/completions` with `prompt_logprobs`
  token_endpoint  vLLM's server, `/inference/v1/generate`, which takes tokens and gives no text
  flat            our engine by vLLM's public flat prompt logprobs, in process
A repeat runs all of them in turn; shares are medians over repeats of the ratio within one. openai, token_endpoint and
flat are slow: they get the first quarter of the sequences, and are paired with the floor's and the bound's time on
these. At the largest vocabulary there are a quarter as many sequences. Whoever asks shares the processor with the
server, and ends with arrays: reading the answers is part of the time.

tokens_per_s counts prompts, everything per token counts response tokens. CPU time is that of whole processes:
`engine_cpu` of the one that computes, `server_cpu` of all others of a server. peak_rss_mb_above_idle sums each
process's own peak during the largest run, beyond what was resident after a warm-up; the asking process is part of it
only where it holds the engine's frontend (floor, in_process, flat).

Sweeps: `memory` scores 2 sequences of 2000 tokens at the largest vocabulary, before anything large has run; the
others vary one thing over our gRPC. `num_siblings` has a model of 4 layers, 384 prompt and 128 response tokens, n
sequences of each prompt submitted together; `engine_cpu_gain` is the engine's CPU time for as many sequences without
shared prompts over that. `concurrency` has at least 64 sequences, and as many as are in flight, of 16 prompt and 48
response tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.losses import BUSY_LOAD, machine
from benchmarks.teacher_meter import Batch, Sample, ScoringPath, TeacherBenchmarkError
from benchmarks.teacher_paths import MAX_LEN, MAX_NUM_SEQS, PATHS, Paths, started_paths
from examples.sort_digits.interrupts import Interrupts
from examples.sort_digits.models import ModelSize, build_model, save_model
from examples.sort_digits.processes import ProcessSupervisor, supervised
from protos.arrays import Int32Array
from teacher_service.engine.vllm import environment

SIZE = ModelSize(hidden_size=256, num_heads=2, head_dim=128, intermediate_size=768)
SIBLINGS_LAYERS = 4
"""Of the model of `num_siblings`. A cache spares layers, not the LM head: beside two layers of this size that is a
quarter of the work, in a real teacher less than a tenth."""
SHARPNESS = 8.0
"""What the logits are multiplied by, in the last norm: fresh weights predict almost uniformly."""
VOCAB_SIZES = (2_048, 32_000, 151_936)
SMALLEST, MIDDLE, LARGEST = VOCAB_SIZES
NUM_LOGPROBS = 64
CONCURRENCY = 64
SLOW_PATHS = frozenset({"openai", "token_endpoint", "flat"})
SLOW_SHARE = 4
"""They get one sequence of so many."""
LARGE_VOCAB_SHARE = 4
MIN_SEQUENCES = 2
SWEEP_REPEATS = 3
SIBLINGS_REPEATS = 5
MEMORY_REPEATS = 1
MAX_NUM_SIBLINGS = 16
TOLERANCE = 0.25
"""Nats between two paths: in bfloat16 a logit near 30 is rounded to 1/8."""
SWEEPS = ("main", "memory", "num_logprobs", "num_siblings", "concurrency")
SWEEP_VOCAB_SIZES = {
    "main": VOCAB_SIZES,
    "memory": (LARGEST,),
    "num_logprobs": (MIDDLE,),
    "num_siblings": (SMALLEST, MIDDLE),
    "concurrency": (MIDDLE,),
}
DTYPES = ("bfloat16", "float32")
MEMORY_PATHS = frozenset({"in_process", "grpc", "flat", "openai"})
WIDTH = 200
"""Columns of the output where it does not go to a terminal."""
DECIMALS = {
    "tokens_per_s": 1,
    "share_of_floor": 4,
    "share_of_math_bound": 4,
    "payload_bytes_per_token": 1,
    "server_cpu_us_per_token": 2,
    "engine_cpu_us_per_token": 2,
    "engine_cpu_gain": 3,
    "peak_rss_mb_above_idle": 1,
}
IDENTITY = ("sweep", "path", "vocab_size", "num_layers", "num_logprobs", "num_siblings", "concurrency")

Row = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What is measured, by one or more paths."""

    sweep: str
    vocab_size: int
    num_sequences: int
    num_logprobs: int = NUM_LOGPROBS
    num_siblings: int = 1
    """Sequences of each prompt."""
    num_layers: int = SIZE.num_layers
    concurrency: int = CONCURRENCY
    prompt_tokens: int = 128
    response_tokens: int = 384
    repeats: int
    paths: tuple[str, ...]

    def count(self, path: str) -> int:
        """Sequences that a path gets."""
        if self.sweep == "main" and path in SLOW_PATHS:
            return min(self.num_sequences, max(MIN_SEQUENCES, self.num_sequences // SLOW_SHARE))
        return self.num_sequences

    def batch(self, num_sequences: int, *, first_token: int) -> Batch:
        """The first sequences of the cell, whose prompts begin with a token that tells this run from all others."""
        rng = np.random.default_rng(0)
        sequences: list[Int32Array] = []
        prompt = np.empty(0, np.int32)
        for number in range(num_sequences):
            if number % self.num_siblings == 0:
                prompt = rng.integers(0, self.vocab_size, self.prompt_tokens, dtype=np.int32)
                prompt[0] = first_token % self.vocab_size
            response = rng.integers(0, self.vocab_size, self.response_tokens, dtype=np.int32)
            sequences.append(np.concatenate([prompt, response]))
        return Batch(
            token_ids=sequences,
            score_start=self.prompt_tokens,
            num_logprobs=self.num_logprobs,
            concurrency=self.concurrency,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A path's runs of a cell, and beside each those that it is compared with, of the same repeat."""

    samples: list[Sample]
    floors: list[Sample]
    """Empty where there is nothing to compare."""
    bounds: list[Sample]
    """Likewise."""


def cells(
    vocab_size: int, *, num_sequences: int, repeats: int, paths: Sequence[str], sweeps: Sequence[str]
) -> Iterator[list[Cell]]:
    """What is measured of one model, in order; the cells of a group take turns."""
    if vocab_size >= LARGEST:
        num_sequences = max(MIN_SEQUENCES, num_sequences // LARGE_VOCAB_SHARE)
    here = [sweep for sweep in sweeps if vocab_size in SWEEP_VOCAB_SIZES[sweep] or sweep == "main"]
    if "memory" in here and (chosen := tuple(path for path in paths if path in MEMORY_PATHS)):
        yield [
            Cell(
                sweep="memory",
                vocab_size=vocab_size,
                num_sequences=2,
                concurrency=2,
                prompt_tokens=200,
                response_tokens=1800,
                repeats=min(repeats, MEMORY_REPEATS),
                paths=chosen,
            )
        ]
    if "main" in here:
        yield [Cell(sweep="main", vocab_size=vocab_size, num_sequences=num_sequences, repeats=repeats, paths=(*paths,))]
    if "grpc" not in paths:
        return
    cell = Cell(
        sweep="",
        vocab_size=vocab_size,
        num_sequences=num_sequences,
        repeats=min(repeats, SWEEP_REPEATS),
        paths=("grpc",),
    )
    if "num_logprobs" in here:
        yield [dataclasses.replace(cell, sweep="num_logprobs", num_logprobs=k) for k in (0, 8, 32, 64, 128)]
    if "num_siblings" in here:
        long_prompt = dataclasses.replace(
            cell,
            sweep="num_siblings",
            num_layers=SIBLINGS_LAYERS,
            prompt_tokens=384,
            response_tokens=128,
            num_sequences=max(num_sequences, 4 * MAX_NUM_SIBLINGS),
            repeats=min(repeats, SIBLINGS_REPEATS),
        )
        yield [dataclasses.replace(long_prompt, num_siblings=n) for n in (1, 4, MAX_NUM_SIBLINGS)]
    if "concurrency" in here:
        short = dataclasses.replace(cell, sweep="concurrency", prompt_tokens=16, response_tokens=48)
        yield [
            dataclasses.replace(
                short,
                concurrency=limit,
                num_sequences=max(limit, num_sequences, MAX_NUM_SEQS),
                repeats=1 if limit > MAX_NUM_SEQS else cell.repeats,
            )
            for limit in (1, 8, 64, 512)
        ]


def models(groups: Sequence[list[Cell]]) -> list[list[list[Cell]]]:
    """The groups of cells of each model, in order."""
    by_layers: dict[int, list[list[Cell]]] = {}
    for group in groups:
        by_layers.setdefault(group[0].num_layers, []).append(group)
    return list(by_layers.values())


async def measure(
    group: Sequence[Cell], paths: Paths, numbers: Iterator[int], report: Callable[[str], None]
) -> dict[Cell, dict[str, Measured]]:
    """Run the cells of a group, all paths of all cells in turn in each repeat."""
    done: dict[Cell, dict[str, Measured]] = {cell: {} for cell in group}
    for repeat in range(max(cell.repeats for cell in group)):
        for cell in group:
            if repeat >= cell.repeats:
                continue
            for name, (sample, references) in (await _repeat(cell, paths, numbers)).items():
                measured = done[cell].setdefault(name, Measured(samples=[], floors=[], bounds=[]))
                measured.samples.append(sample)
                if references is not None:
                    measured.floors.append(references[0])
                    measured.bounds.append(references[1])
            report(f"{_in_words(cell)}, repeat {repeat + 1} of {cell.repeats}: {_times(done[cell])}")
    return done


async def _repeat(
    cell: Cell, paths: Paths, numbers: Iterator[int]
) -> dict[str, tuple[Sample, tuple[Sample, Sample] | None]]:
    """Each path once, and what it is compared with."""
    references: dict[int, tuple[Sample, Sample]] = {}
    taken: dict[str, tuple[Sample, tuple[Sample, Sample] | None]] = {}
    if cell.sweep != "memory":
        for count in {cell.num_sequences: None} | {cell.count(name): None for name in cell.paths}:
            batch = cell.batch(count, first_token=next(numbers))
            floor = await paths.scoring["floor"].run(dataclasses.replace(batch, concurrency=count))
            references[count] = floor, await paths.floor.run_bound(batch, floor)
        floor, bound = references[cell.num_sequences]
        own = {"floor": floor, "math_bound": bound}
        taken = {name: (own[name], (floor, bound)) for name in cell.paths if name in own}
    for name, path in paths.scoring.items():
        if name != "floor" and name in cell.paths:
            count = cell.count(name)
            sample = await path.run(cell.batch(count, first_token=next(numbers)))
            taken[name] = sample, references.get(count)
    return taken


def row(cell: Cell, path: str, measured: Measured, *, unshared: Measured | None = None) -> Row:
    """One row of the results; what does not apply is left out.

    Args:
        cell: what was measured.
        path: by which path.
        measured: its runs.
        unshared: runs of the same repeats on as many sequences that share no prompt, of a sweep over siblings.
    """
    samples = measured.samples
    made: Row = {
        "path": path,
        "vocab_size": cell.vocab_size,
        "num_layers": cell.num_layers,
        "num_logprobs": cell.num_logprobs,
        "num_siblings": cell.num_siblings,
        "concurrency": min(cell.concurrency, cell.count(path)),
        "sweep": cell.sweep,
    }
    numbers: dict[str, float | None] = {
        "tokens_per_s": _median([one.num_tokens / one.seconds for one in samples]),
        "share_of_floor": _paired(measured.floors, samples),
        "share_of_math_bound": _paired(measured.bounds, samples),
        "payload_bytes_per_token": _median([_per_token(one.payload_bytes, one) for one in samples]),
        "server_cpu_us_per_token": _median([_per_token(one.server_cpu_s, one, scale=1e6) for one in samples]),
        "engine_cpu_us_per_token": _median([_per_token(one.engine_cpu_s, one, scale=1e6) for one in samples]),
    }
    if unshared is not None:
        pairs = zip(unshared.samples, samples, strict=True)
        numbers["engine_cpu_gain"] = _median([one.engine_cpu_s / other.engine_cpu_s for one, other in pairs])
    if peaks := [one.peak_bytes for one in samples if one.peak_bytes is not None]:
        numbers["peak_rss_mb_above_idle"] = max(peaks) / 1e6
    return made | {key: round(value, DECIMALS[key]) for key, value in numbers.items() if value is not None}


def _median(values: Sequence[float | None]) -> float | None:
    """None where a value is absent."""
    present = [one for one in values if one is not None]
    return statistics.median(present) if present and len(present) == len(values) else None


def _paired(references: Sequence[Sample], samples: Sequence[Sample]) -> float | None:
    if not references:
        return None
    return _median([one.seconds / other.seconds for one, other in zip(references, samples, strict=True)])


def _per_token(value: float | None, sample: Sample, *, scale: float = 1.0) -> float | None:
    return None if value is None else scale * value / sample.num_scored


def rows_of(done: Mapping[Cell, Mapping[str, Measured]]) -> list[Row]:
    """The rows of a group, whose first cell shares no prompts."""
    first = next(iter(done))
    rows = []
    for cell, by_path in done.items():
        for path, measured in by_path.items():
            unshared = done[first][path] if cell.sweep == "num_siblings" else None
            rows.append(row(cell, path, measured, unshared=unshared))
    return rows


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    made = Table(title="Ways to a teacher's logprobs")
    for key in (*IDENTITY, *DECIMALS):
        is_text = key in ("sweep", "path")
        made.add_column(key.replace("_", " "), justify="left" if is_text else "right", no_wrap=is_text)
    for before, one in zip([None, *rows], rows, strict=False):
        if before is not None and any(before[key] != one[key] for key in ("sweep", "vocab_size")):
            made.add_section()
        made.add_row(*(f"{one[key]}" for key in IDENTITY), *(_number(one.get(key), key) for key in DECIMALS))
    return made


def _number(value: str | int | float | None, key: str) -> str:
    return "-" if value is None else f"{value:,.{min(3, DECIMALS[key])}f}"


async def check_agreement(cell: Cell, paths: Mapping[str, ScoringPath], numbers: Iterator[int]) -> float | None:
    """Let every path score one sequence, and return the largest difference in nats; None where one path alone scores.

    Raises:
        TeacherBenchmarkError: two paths differ by more than the arithmetic explains.
    """
    batch = cell.batch(1, first_token=next(numbers))
    answers = {}
    for name, path in paths.items():
        answer = await path.ask(batch.token_ids[0], batch.score_start, batch.num_logprobs)
        if answer.scores is not None:
            answers[name] = answer.scores
    largest = 0.0
    for (name, ours), (other, theirs) in itertools.combinations(answers.items(), 2):
        for key in ("sampled_logprobs", "topk_logprobs"):
            difference = float(np.abs(getattr(ours, key) - getattr(theirs, key)).max())
            if not difference <= TOLERANCE:
                raise TeacherBenchmarkError(
                    f"{key} of {name} and {other} differ by {difference:.3g} nats, {TOLERANCE} allowed"
                )
            largest = max(largest, difference)
    return largest if len(answers) > 1 else None


def write_checkpoint(folder: Path, vocab_size: int, num_layers: int, dtype: str) -> Path:
    """Write a model of that vocabulary and depth; returns its folder."""
    size = dataclasses.replace(SIZE, num_layers=num_layers)
    model = build_model(size, seed=0, vocab_rows=vocab_size, max_len=MAX_LEN)
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
    checkpoint = folder / f"v{vocab_size}-{num_layers}"
    save_model(model, checkpoint, dtype=getattr(torch, dtype))
    return checkpoint


async def run_model(
    groups: Sequence[Sequence[Cell]], supervisor: ProcessSupervisor, report: Callable[[str], None], *, dtype: str
) -> list[Row]:
    """Measure cells that are all of one model."""
    vocab_size, num_layers = groups[0][0].vocab_size, groups[0][0].num_layers
    names = [name for name in PATHS if any(name in cell.paths for group in groups for cell in group)]
    checkpoint = await asyncio.to_thread(write_checkpoint, supervisor.temp_dir, vocab_size, num_layers, dtype)
    rows: list[Row] = []
    numbers = itertools.count(1)
    async with started_paths(checkpoint, names, supervisor, dtype=dtype) as paths:
        missing = set(names) - {*paths.scoring, "math_bound"}
        if missing:
            report(f"left out, since this vLLM lacks them: {', '.join(sorted(missing))}")
        trial = Cell(sweep="main", vocab_size=vocab_size, num_sequences=MIN_SEQUENCES, repeats=1, paths=(*names,))
        difference = await check_agreement(trial, paths.scoring, numbers)
        report(
            f"V {vocab_size}, {num_layers} layers: "
            + (
                "one path alone is compared with nothing"
                if difference is None
                else f"paths agree within {difference:.2g} nats"
            )
        )
        await paths.check_idle()
        is_warm = False
        for group in groups:
            if not is_warm and group[0].sweep != "memory":
                await _repeat(trial, paths, numbers)
                is_warm = True
                report(f"V {vocab_size}: the bound's fastest form is {paths.floor.form_in_words(NUM_LOGPROBS)}")
            for path in paths.scoring.values():
                path.processes.set_idle()
            rows += rows_of(await measure(group, paths, numbers, report))
    return rows


def write_results(output: Path, rows: Sequence[Row]) -> None:
    """Write what there is so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")


def _in_words(cell: Cell) -> str:
    return (
        f"{cell.sweep}: V {cell.vocab_size}, K {cell.num_logprobs}, siblings {cell.num_siblings}, "
        f"concurrency {cell.concurrency}"
    )


def _times(by_path: Mapping[str, Measured]) -> str:
    latest = {name: measured.samples[-1] for name, measured in by_path.items()}
    return ", ".join(f"{name} {one.seconds:.1f} s for {one.num_tokens}" for name, one in latest.items())


def main(
    *,
    vocab_size: Annotated[list[int], typer.Option(min=128, help="Vocabulary rows; may be given several times.")] = [  # noqa: B006
        *VOCAB_SIZES
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each path of the main table.")] = 5,
    sequences: Annotated[int, typer.Option(min=2, help="Sequences of a run.")] = 16,
    path: Annotated[list[str], typer.Option(help="Paths; may be given several times.")] = [*PATHS],  # noqa: B006
    sweep: Annotated[list[str], typer.Option(help="Parts; likewise.")] = [*SWEEPS],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, of weights and arithmetic.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="The smallest vocabulary and few sequences: a trial.")] = False,
    work_dir: Annotated[Path, typer.Option(help="Logs of the servers.")] = Path("runs/bench-teacher"),
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/teacher.json"),
) -> None:
    """Measure every path and write the results."""
    for option, given, known in (("--path", path, PATHS), ("--sweep", sweep, SWEEPS), ("--dtype", [dtype], DTYPES)):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{option} {sorted(unknown)} is none of {', '.join(known)}")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # what it warns of, all paths have in common
    environment.set_defaults()
    environment.forbid_compiling()
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if quick:
        vocab_size, sequences, repeats = [SMALLEST], min(sequences, 16), min(repeats, 2)
    facts = machine("cpu", torch.get_num_threads()) | {"dtype": dtype}
    if float(facts["load"]) > BUSY_LOAD:
        console.print(f"the machine is busy (load {facts['load']}): times will be off", style="yellow", highlight=False)

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    rows: list[Row] = []
    interrupts = Interrupts()
    with interrupts.watched(), supervised(work_dir.resolve() / "logs", interrupts) as supervisor:
        # vLLM's sockets and temporary files, of this process's engines too
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = f"{supervisor.temp_dir}"
        for one in vocab_size:
            groups = list(cells(one, num_sequences=sequences, repeats=repeats, paths=path, sweeps=sweep))
            for of_one_model in models(groups):
                rows += asyncio.run(run_model(of_one_model, supervisor, report, dtype=dtype))
                write_results(output, rows)
    console.print(facts, table(rows))


if __name__ == "__main__":
    typer.run(main)
