"""What a top-k distillation loss costs in time and memory: `make bench-loss`, or `python -m benchmarks.losses`.

Every measurement has a process of its own, so that nothing is left over from the one before; the implementations of one
cell follow each other, on the same data. The data are bfloat16 logits, a leaf that wants its gradient, and a teacher's
top-k that holds about 0.9 of the probability.

Time: the median of the repeats, after a warm-up. A CPU that other processes use as well slows many small operations on
several threads down far more than a few large ones: such a machine compares fairly with `--threads 1` alone.

Memory: the most bytes alive at any moment of one forward and backward pass, beyond what was alive before it (the
logits) and beyond the size of their gradient, which no loss can do without. On a CPU these are the bytes that torch's
allocator handed out and took back, all of them in order, as the profiler records them. Memory that came from elsewhere
would be missing there, so the kernel's account of another pass (peak resident memory) is the cross-check: it may not
grow by more than the allocator says, or the cell is left out. On CUDA they are the caching allocator's peak.

Each implementation that computes what the plain form computes is compared with it, in value and gradient, on the data
that were measured; nothing is written where they disagree.

Legend: S positions, V vocabulary rows, K top-k entries. ms are milliseconds, MB are 10^6 bytes.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainer.losses import topk_divergence
from trainer.types import TopKDivergence

SEED = 0
TEACHER_MASS = 0.9
"""Probability that the teacher's top-k holds."""
ZIPF_EXPONENT = 1.5
DISAGREEMENT = 0.5
"""Standard deviation of the student's logits around the teacher's, inside the top-k."""
NOISE_ROWS = 128
"""Rows of logits that are drawn; they repeat, and their top-k does not."""
SAMPLED_ROWS = 16
"""Rows, evenly spaced, whose gradients are compared."""
BETA = 0.5
VALUE_TOLERANCE = 1e-4
"""Nats at any position: the plain form takes the tail as one minus a sum."""
GRADIENT_TOLERANCE = 1e-2
"""Norm of the difference over the norm, inside and outside the top-k each: a rounding to bfloat16 has 2e-3."""
UNSEEN_BYTES = 64e6
UNSEEN_SHARE = 0.05
"""Resident memory may grow by so much more than the allocator handed out: code, stacks, whole pages."""
SPARE_BYTES = 1.5e9
"""To be left free, beside what a measurement is expected to take."""
BUSY_LOAD = 0.5
"""Load average from which on times are doubtful."""

KEYS = ("impl", "divergence", "device", "S", "V", "K", "forward_ms", "backward_ms", "extra_peak_mb")
TEXT_KEYS = ("impl", "divergence", "device")
WIDTH = 110
"""Columns of the output where it does not go to a terminal."""
NOTES = (
    "verl: its default configuration, without use_chunked_topk. It has no tail event, a smaller computation, works on "
    "bfloat16 log-probabilities, and also computes the overlap of both sides' top-k, which it logs.",
    "liger: its JSD over the whole vocabulary, on the teacher's log-probabilities made dense, which are not counted.",
)

Floats = np.ndarray[Any, np.dtype[np.float32]]
Row = dict[str, str | int | float]
T = TypeVar("T")


class BenchmarkError(RuntimeError):
    """A measurement can't be taken, or can't be trusted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One measurement."""

    impl: str
    divergence: TopKDivergence
    device: str
    S: int
    V: int
    K: int

    def __str__(self) -> str:
        return f"{self.impl} {self.divergence} on {self.device}, S {self.S}, V {self.V}, K {self.K}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The data."""

    logits: Tensor
    """`[S, V]` bfloat16, a leaf."""
    token_ids: Tensor
    """`[S, K]` int64."""
    logprobs: Tensor
    """`[S, K]` float32 nats, descending."""


class Outcome(NamedTuple):
    """What a loss gives."""

    value: Tensor
    """`[S]` nats, or a mean over them."""
    others: object = None
    """What its caller is handed besides, and so stays alive until the backward pass is over."""


Loss = Callable[[], Outcome]


class Pass(NamedTuple):
    """One forward and backward pass."""

    forward_s: float
    backward_s: float
    outcome: Outcome
    gradient: Tensor
    """`[S, V]` of the logits, of the sum over positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """A loss under measurement."""

    prepare: Callable[[Problem, TopKDivergence], Loss]
    """Makes the call that is measured; what it does before that is free."""
    devices: tuple[str, ...]
    bytes_per_logit: int
    """What it is expected to take at most beyond logits and gradient, to leave out what does not fit."""
    divergences: tuple[TopKDivergence, ...] = ("forward_kl", "reverse_kl", "jsd")
    same_as_naive: bool = True
    """Whether it computes the same."""
    module: str | None = None
    """A library that it needs and that need not be there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a process sends back."""

    forward_s: float
    backward_s: float
    extra_peak_bytes: int
    resident_growth_bytes: int | None
    """None where the kernel does not tell."""
    value: Floats
    inside: Floats
    """The sampled rows' gradient of the top-k."""
    outside: Floats
    """Of all else."""


def make_problem(cell: Cell) -> Problem:
    """The data of a cell, the same for every implementation."""
    generator = torch.Generator(cell.device).manual_seed(SEED)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=cell.device)

    ranks = torch.arange(1, cell.K + 1, device=cell.device)
    scores = normal(cell.S, cell.K) - ZIPF_EXPONENT * ranks.log()
    logprobs = scores.log_softmax(-1).sort(-1, descending=True).values + math.log(TEACHER_MASS)
    # one token out of each of K equal parts of the vocabulary: distinct
    part = cell.V // cell.K
    within = torch.randint(part, (cell.S, cell.K), generator=generator, device=cell.device)
    token_ids = within + part * normal(cell.S, cell.K).argsort(-1)
    noise = normal(min(cell.S, NOISE_ROWS), cell.V).bfloat16()
    logits = noise.repeat(math.ceil(cell.S / len(noise)), 1)[: cell.S].contiguous()
    # of V standard normals the sum of exponentials is about V sqrt(e)
    log_total = math.log(cell.V) + 0.5 - math.log(1 - TEACHER_MASS)
    topk = logprobs + log_total + DISAGREEMENT * normal(cell.S, cell.K)
    logits.scatter_(-1, token_ids, topk.bfloat16())
    return Problem(logits=logits.requires_grad_(), token_ids=token_ids, logprobs=logprobs)


def naive_divergence(logits: Tensor, token_ids: Tensor, logprobs: Tensor, divergence: TopKDivergence) -> Tensor:
    """The plain form: log-softmax of everything, gather, one minus the sum; autograd does the rest. `[S]` nats."""

    def with_tail(topk: Tensor) -> Tensor:
        mass = topk.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(topk.dtype).eps)
        return torch.cat([topk, torch.log1p(-mass)], -1)

    log_q = with_tail(logits.float().log_softmax(-1).gather(-1, token_ids))
    log_p = with_tail(logprobs)
    if divergence == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
        from_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
        return BETA * from_teacher + (1 - BETA) * (log_q.exp() * (log_q - log_m)).sum(-1)
    raise BenchmarkError(f"the plain form of {divergence} is not written down here")


def _ours(problem: Problem, divergence: TopKDivergence) -> Loss:
    return lambda: Outcome(
        topk_divergence(problem.logits, problem.token_ids, problem.logprobs, divergence=divergence, beta=BETA)
    )


def _naive(problem: Problem, divergence: TopKDivergence) -> Loss:
    return lambda: Outcome(naive_divergence(problem.logits, problem.token_ids, problem.logprobs, divergence))


def _verl(problem: Problem, _divergence: TopKDivergence) -> Loss:
    """As verl's FSDP engine calls it: packed logits, nested teacher."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # it warns of a name that its own nested tensors use
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    K = problem.token_ids.shape[1]
    loss = DistillationLossConfig(loss_mode="forward_kl_topk", topk=K, use_policy_gradient=False)
    config = DistillationConfig(distillation_loss=loss)
    offsets = torch.tensor([0, problem.logits.shape[0]], device=problem.logits.device)
    logprobs, token_ids = (
        torch.nested.nested_tensor_from_jagged(values, offsets) for values in (problem.logprobs, problem.token_ids)
    )

    def call() -> Outcome:
        outputs = compute_forward_kl_topk(
            student_logits=problem.logits.unsqueeze(0),
            teacher_topk_log_probs=logprobs,
            teacher_topk_ids=token_ids,
            config=config,
            data_format="thd",
        )
        return Outcome(outputs["distillation_losses"].squeeze(0), outputs)

    return call


def _liger(problem: Problem, divergence: TopKDivergence) -> Loss:
    """The rest of the teacher's probability is spread evenly over the rest of the vocabulary."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[divergence]
    jsd = importlib.import_module("liger_kernel.transformers.jsd").LigerJSD(beta=beta)
    S, V = problem.logits.shape
    rest = torch.log1p(-problem.logprobs.exp().sum(-1, keepdim=True)) - math.log(V - problem.logprobs.shape[1])
    teacher = rest.expand(S, V).scatter(-1, problem.token_ids, problem.logprobs)
    return lambda: Outcome(jsd(problem.logits.float().log_softmax(-1), teacher))


IMPLEMENTATIONS = {
    "ours": Implementation(prepare=_ours, devices=("cpu",), bytes_per_logit=0),
    # on CUDA the same function takes its kernels
    "triton": Implementation(prepare=_ours, devices=("cuda",), bytes_per_logit=0),
    "naive": Implementation(prepare=_naive, devices=("cpu", "cuda"), bytes_per_logit=12),
    "verl": Implementation(
        prepare=_verl,
        devices=("cpu", "cuda"),
        bytes_per_logit=8,
        divergences=("forward_kl",),
        same_as_naive=False,
        module="verl",
    ),
    "liger": Implementation(
        prepare=_liger,
        devices=("cuda",),
        bytes_per_logit=24,
        same_as_naive=False,
        module="liger_kernel",
    ),
}
OURS = ("ours", "triton")


def measure(cell: Cell, *, repeats: int, warm_up: int, seconds: float = 0.0) -> Measurement:
    """Take a measurement in this process.

    Args:
        cell: what.
        repeats: timed passes, at least.
        warm_up: passes before them, at least 1; the memory of the first is traced.
        seconds: time that the timed passes take together, at least.
    """
    problem = make_problem(cell)
    loss = IMPLEMENTATIONS[cell.impl].prepare(problem, cell.divergence)

    def run() -> Pass:
        return run_pass(loss, problem.logits)

    done, peak = (traced_on_cuda if cell.device == "cuda" else traced_on_cpu)(run)
    extra_peak_bytes = peak - done.gradient.nbytes
    rows = torch.arange(0, cell.S, max(1, cell.S // SAMPLED_ROWS), device=cell.device)
    value, gradient = done.outcome.value.detach(), done.gradient[rows].float()
    token_ids = problem.token_ids[rows]
    del done
    for _ in range(warm_up - 1):
        run()
    first, resident = resident_growth(lambda: run()[:2])
    times = [first]
    while len(times) < repeats or sum(map(sum, times)) < seconds:
        times.append(run()[:2])
    return Measurement(
        forward_s=statistics.median(forward_s for forward_s, _ in times),
        backward_s=statistics.median(backward_s for _, backward_s in times),
        extra_peak_bytes=extra_peak_bytes,
        resident_growth_bytes=resident if cell.device == "cpu" else None,
        value=value.float().cpu().numpy(),
        inside=gradient.gather(-1, token_ids).cpu().numpy(),
        outside=gradient.scatter(-1, token_ids, 0.0).cpu().numpy(),
    )


def run_pass(loss: Loss, logits: Tensor) -> Pass:
    """Forward and backward, once."""

    def now() -> float:
        if logits.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    outcome = loss()
    between = now()
    (gradient,) = torch.autograd.grad(outcome.value, logits, torch.ones_like(outcome.value))
    return Pass(between - started, now() - between, outcome, gradient)


def traced_on_cpu(run: Callable[[], T]) -> tuple[T, int]:
    """What a function returns, and the most bytes that torch's allocator had handed out beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: int(event.start_ns())))
    return result, max(itertools.accumulate(changes, initial=0))


def traced_on_cuda(run: Callable[[], T]) -> tuple[T, int]:
    """The same for CUDA."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def resident_growth(run: Callable[[], T]) -> tuple[T, int | None]:
    """What a function returns, and by how much resident memory exceeded that before; None where it can't be told."""
    before = _resident_bytes(reset_peak=True)
    result = run()
    after = _resident_bytes()
    return result, None if before is None or after is None else after["VmHWM"] - before["VmRSS"]


def _resident_bytes(*, reset_peak: bool = False) -> dict[str, int] | None:
    """Resident memory now and at its peak; None where the kernel is another or does not let us reset the peak."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return {name: 1024 * int(size) for name, size in re.findall(r"(VmHWM|VmRSS):\s*(\d+) kB", status)}


def check_memory(cell: Cell, measured: Measurement) -> None:
    """Hold the allocator's account against the kernel's.

    Raises:
        BenchmarkError: the process took memory that the allocator knows nothing of.
    """
    if measured.resident_growth_bytes is None:
        return
    handed_out = measured.extra_peak_bytes + 2 * cell.S * cell.V
    if measured.resident_growth_bytes > handed_out * (1 + UNSEEN_SHARE) + UNSEEN_BYTES:
        raise BenchmarkError(
            f"{cell}: resident memory grew by {measured.resident_growth_bytes / 1e6:,.0f} MB, of which the allocator "
            f"knows {handed_out / 1e6:,.0f} MB"
        )


def check_agreement(cell: Cell, measured: Measurement, naive: Measurement) -> tuple[float, float]:
    """Largest difference of a value in nats, and relative difference of the gradient, inside or outside the top-k.

    Raises:
        BenchmarkError: one of them is not tolerable.
    """

    def relative(one: Floats, other: Floats) -> float:
        return float(np.linalg.norm(one - other) / np.linalg.norm(other).clip(np.finfo(np.float32).tiny))

    value = float(np.abs(measured.value - naive.value).max())
    gradient = max(relative(measured.inside, naive.inside), relative(measured.outside, naive.outside))
    if not (value <= VALUE_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise BenchmarkError(
            f"{cell} and naive differ by {value:.1e} nats ({VALUE_TOLERANCE:g} allowed) and by {gradient:.1e} of the "
            f"gradient ({GRADIENT_TOLERANCE:g} allowed)"
        )
    return value, gradient


def row(cell: Cell, measured: Measurement) -> Row:
    """One row of the results."""
    return {
        "impl": cell.impl,
        "divergence": cell.divergence,
        "device": cell.device,
        "S": cell.S,
        "V": cell.V,
        "K": cell.K,
        "forward_ms": round(measured.forward_s * 1e3, 3),
        "backward_ms": round(measured.backward_s * 1e3, 3),
        "extra_peak_mb": round(measured.extra_peak_bytes / 1e6, 3),
    }


def check_possible(cell: Cell) -> None:
    """Look for what a cell needs, before it is measured.

    Raises:
        BenchmarkError: a library or memory is missing.
    """
    implementation = IMPLEMENTATIONS[cell.impl]
    if implementation.module is not None and importlib.util.find_spec(implementation.module) is None:
        raise BenchmarkError(f"{cell}: {implementation.module} is not installed")
    free = torch.cuda.mem_get_info()[0] if cell.device == "cuda" else psutil.virtual_memory().available
    # logits and gradient; then a few numbers per entry, and verl's comparison of every entry with every other
    needed = cell.S * (cell.V * (4 + implementation.bytes_per_logit) + cell.K * (200 + 2 * cell.K)) + SPARE_BYTES
    if needed > free:
        raise BenchmarkError(f"{cell}: it may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _measure_in_child(cell: Cell, threads: int, options: Mapping[str, Any]) -> Measurement:
    torch.set_num_threads(threads)
    return measure(cell, **options)


def measure_apart(cell: Cell, *, threads: int, **options: Any) -> Measurement:
    """Take a measurement in a new process; the options are those of `measure`.

    Raises:
        BenchmarkError: the process was killed, as for its memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_in_child, cell, threads, options).result()
        except BrokenProcessPool as exc:
            raise BenchmarkError(f"{cell}: its process was killed; did the machine run out of memory?") from exc


def cells(
    device: str, S: Sequence[int], V: Sequence[int], K: Sequence[int], *, impls: Sequence[str]
) -> Iterator[list[Cell]]:
    """The grid, the cells to be compared together: forward KL everywhere, the others at the largest S and middle K."""
    others = {(max(S), one, sorted(K)[len(K) // 2]) for one in V}
    divergences: tuple[TopKDivergence, ...] = ("forward_kl", "reverse_kl", "jsd")
    for shape in itertools.product(S, V, K):
        for divergence in divergences if shape in others else divergences[:1]:
            chosen = [
                Cell(impl=name, divergence=divergence, device=device, S=shape[0], V=shape[1], K=shape[2])
                for name, implementation in IMPLEMENTATIONS.items()
                if name in impls and device in implementation.devices and divergence in implementation.divergences
            ]
            if chosen:
                yield chosen


def run_group(
    group: Sequence[Cell], take: Callable[[Cell], Measurement], console: Console
) -> list[tuple[Cell, Measurement]]:
    """Measure the cells to be compared, one after the other, and compare; what can't be measured is left out.

    Raises:
        BenchmarkError: an implementation does not compute what the plain form computes.
    """
    taken: list[tuple[Cell, Measurement]] = []
    for cell in group:
        try:
            check_possible(cell)
            measured = take(cell)
            check_memory(cell, measured)
        except BenchmarkError as exc:
            console.print(f"left out: {exc}", style="yellow", highlight=False, soft_wrap=True)
            continue
        taken.append((cell, measured))
        resident = measured.resident_growth_bytes
        console.print(
            f"{cell}: {measured.forward_s * 1e3:,.0f} + {measured.backward_s * 1e3:,.0f} ms, "
            f"{measured.extra_peak_bytes / 1e6:,.1f} MB"
            + ("" if resident is None else f" (resident, with the gradient: {resident / 1e6:,.1f} MB)"),
            highlight=False,
            soft_wrap=True,
        )
    naive = next((measured for cell, measured in taken if cell.impl == "naive"), None)
    for cell, measured in taken:
        if cell.impl == "naive" or not IMPLEMENTATIONS[cell.impl].same_as_naive:
            continue
        if naive is None:
            console.print(f"  {cell.impl} is compared with nothing: naive was not measured", style="yellow")
            continue
        value, gradient = check_agreement(cell, measured, naive)
        console.print(f"  {cell.impl} and naive differ by {value:.1e} nats, {gradient:.1e} of the gradient")
    return taken


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    made = Table(title="Top-k losses", caption="\n".join(NOTES), caption_justify="left")
    for key in KEYS:
        made.add_column(key.replace("_", " "), justify="left" if key in TEXT_KEYS else "right")
    for one in rows:
        made.add_row(*(f"{one[key]:,.1f}" if isinstance(one[key], float) else f"{one[key]}" for key in KEYS))
    return made


def ratio_table(rows: Sequence[Row]) -> Table:
    """Memory and time of ours over each other implementation's, cell by cell."""
    keys = [key for key in KEYS[1:] if key in TEXT_KEYS or key in ("S", "V", "K")]
    groups: dict[tuple[str | int | float, ...], dict[str, Row]] = {}
    for one in rows:
        groups.setdefault(tuple(one[key] for key in keys), {})[str(one["impl"])] = one
    others = [name for name in IMPLEMENTATIONS if name not in OURS and any(name in group for group in groups.values())]
    made = Table(title="Ours over others")
    for key in [*keys, *(f"{what} / {name}" for name in others for what in ("memory", "time"))]:
        made.add_column(key, justify="left" if key in TEXT_KEYS else "right")
    for where, group in groups.items():
        ours = next((group[name] for name in OURS if name in group), None)
        if ours is not None:
            ratios = [cell for name in others for cell in _ratios(ours, group.get(name))]
            made.add_row(*map(str, where), *ratios)
    return made


def _ratios(ours: Row, other: Row | None) -> tuple[str, str]:
    """Of extra memory and of total time, as text."""
    if other is None:
        return "-", "-"
    (our_ms, our_mb), (other_ms, other_mb) = (
        (float(one["forward_ms"]) + float(one["backward_ms"]), float(one["extra_peak_mb"])) for one in (ours, other)
    )
    return f"{our_mb / other_mb:.3g}" if other_mb else "-", f"{our_ms / other_ms:.2f}"


def machine(device: str, threads: int) -> dict[str, str | int | float]:
    """What the numbers depend on, at the start."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    facts: dict[str, str | int | float] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": psutil.cpu_count() or 0,
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def write_results(output: Path, device: str, rows: Sequence[Row]) -> None:
    """Write this device's rows; those that another device left in the file stay."""
    stored = json.loads(output.read_text()) if output.is_file() else []
    output.parent.mkdir(parents=True, exist_ok=True)
    results = [one for one in stored if one["device"] != device] + list(rows)
    output.write_text(json.dumps(results, indent=1) + "\n")


def main(
    *,
    S: Annotated[list[int], typer.Option("--S", min=1, help="Positions; may be given several times.")] = [1024, 4096],  # noqa: B006
    V: Annotated[list[int], typer.Option("--V", min=2, help="Vocabulary rows; likewise.")] = [32_000, 151_936],  # noqa: B006
    K: Annotated[list[int], typer.Option("--K", min=1, help="Top-k entries; likewise.")] = [16, 64, 256],  # noqa: B006
    impl: Annotated[list[str], typer.Option(help="Implementations; likewise.")] = list(IMPLEMENTATIONS),  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes, at least.")] = 3,
    warm_up: Annotated[int, typer.Option(min=1, help="Passes before them.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Time of the timed passes together, at least.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = torch.get_num_threads(),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One small shape, whatever --S, --V and --K say.")] = False,
    output: Annotated[Path, typer.Option(help="The results.")] = Path("benchmarks/results/loss.json"),
) -> None:
    """Measure every loss and write the results."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, in the children
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if quick:
        S, V, K = [512], [32_000], [64]

    def take(cell: Cell) -> Measurement:
        return measure_apart(cell, threads=threads, repeats=repeats, warm_up=warm_up, seconds=seconds)

    facts, rows = machine(device, threads), list[Row]()
    if float(facts["load"]) > BUSY_LOAD:
        console.print(f"the machine is busy (load {facts['load']}): times will be off", style="yellow", highlight=False)
    for group in cells(device, S, V, K, impls=impl):
        rows += [row(cell, measured) for cell, measured in run_group(group, take, console)]
    write_results(output, device, rows)
    console.print(facts, table(rows), ratio_table(rows))


if __name__ == "__main__":
    typer.run(main)
