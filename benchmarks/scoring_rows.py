"""What scoring rows of logits costs beside reading them once: `python -m benchmarks.scoring_rows`.

Four forms on the same logits, a normal distribution's: `read` takes each row's maximum, so reads the logits once and
writes next to nothing; `fused` is the fast route's Triton kernel, which needs a GPU; `torch` is the fast route's form
in torch; `softmax` is what one would write first, a float32 log_softmax of everything, a top-k and a gather. All but
`read` give the top-k and the given token's logprob, `fused` and `torch` the tail's mass as well. They are compared
before they are timed.

Time: the median over the repeats of the mean of so many calls in a row that a repeat takes long enough; the launches of
a call then hide behind the call before. Memory: the most bytes alive beyond the logits.

Legend: R rows, V vocabulary rows, K top-k entries. ms are milliseconds, MB are 10^6 bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.losses import BUSY_LOAD, WIDTH, BenchmarkError, machine, traced_on_cpu, traced_on_cuda
from teacher_service.engine.vllm.fast import forms, kernel
from teacher_service.engine.vllm.fast.kernel import logprobs_of
from teacher_service.engine.vllm.fast.scorer import ScoreRows

SEED = 0
SPREAD = 3.0
TOLERANCE = 1e-3
"""Nats by which two forms may differ."""
REPEAT_S = 0.05
"""A repeat takes at least that long."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_GPU = "the Triton kernel runs on a GPU; give --device cuda"
Row = dict[str, str | int | float | bool]


class Answer(NamedTuple):
    """What the forms have in common."""

    topk: Tensor
    """`[R, K]` logprobs."""
    given: Tensor
    """`[R, 1]` logprobs of the given tokens."""
    entropy: Tensor | None
    """`[R]`."""


Call = Callable[[], Any]


def make_logits(num_rows: int, vocab_rows: int, *, dtype: torch.dtype, device: str) -> Tensor:
    """`[R, V]`, drawn in their own type: a float32 copy of all of them might not fit."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randn(num_rows, vocab_rows, generator=generator, dtype=dtype, device=device).mul_(SPREAD)


def make_calls(logits: Tensor, k: int, *, entropy: bool, console: Console) -> dict[str, Call]:
    """The forms by name, those that can run."""
    ids = torch.randint(logits.shape[1], (logits.shape[0], 1), device=logits.device)
    calls: dict[str, Call] = {"read": lambda: logits.amax(-1)}
    fused, reason = _fused(logits, k)
    if fused is None:
        console.print(f"left out: fused: {reason}", style="yellow", highlight=False, soft_wrap=True)
    else:
        calls["fused"] = lambda: by_kernel(fused, logits, ids, k, entropy=entropy)
    calls["torch"] = lambda: by_kernel(kernel.score_rows, logits, ids, k, entropy=entropy)
    calls["softmax"] = lambda: by_softmax(logits, ids, k, entropy=entropy)
    return calls


def by_kernel(form: ScoreRows, logits: Tensor, ids: Tensor, k: int, *, entropy: bool) -> Answer:
    """As the fast route scores a step's rows."""
    scored = form(logits, k, None, entropy=entropy)
    return Answer(scored.topk, logprobs_of(logits, ids, scored.log_total, None), scored.entropy)


def by_softmax(logits: Tensor, ids: Tensor, k: int, *, entropy: bool) -> Answer:
    """Plainly."""
    logprobs = logits.float().log_softmax(-1)
    topk = logprobs.topk(k, -1).values
    return Answer(topk, logprobs.gather(-1, ids), -(logprobs.exp() * logprobs).sum(-1) if entropy else None)


def check_agreement(calls: dict[str, Call]) -> None:
    """Compare the forms that score with `softmax`.

    Raises:
        BenchmarkError: one differs.
    """
    expected: Answer = calls["softmax"]()
    for name in ("fused", "torch"):
        if name not in calls:
            continue
        found: Answer = calls[name]()
        for field, one, other in zip(Answer._fields, found, expected, strict=True):
            if one is None or other is None or not one.numel():
                continue
            error = float((one - other).abs().max())
            if not error <= TOLERANCE:
                raise BenchmarkError(f"{name} differs from softmax by {error:.3g} nats in {field}, over {TOLERANCE}")


def measure(call: Call, *, device: str, repeats: int) -> tuple[float, int]:
    """Median seconds of a call, and bytes that it takes beyond what was there before."""
    _, peak_bytes = (traced_on_cuda if device == "cuda" else traced_on_cpu)(call)
    once = _seconds(call, 1, device)
    num_calls = max(1, math.ceil(REPEAT_S / once))
    return statistics.median(_seconds(call, num_calls, device) for _ in range(repeats)), peak_bytes


def measure_all(logits: Tensor, k: int, *, entropy: bool, device: str, repeats: int, console: Console) -> list[Row]:
    """One row of the results per form; its time over that of `read` is `reads`."""
    calls = make_calls(logits, k, entropy=entropy, console=console)
    check_agreement(calls)
    measured = {name: measure(call, device=device, repeats=repeats) for name, call in calls.items()}
    num_rows, vocab_rows = logits.shape
    return [
        {
            "form": name,
            "device": device,
            "dtype": str(logits.dtype).removeprefix("torch."),
            "rows": num_rows,
            "V": vocab_rows,
            "K": k,
            "entropy": entropy,
            "ms": round(seconds * 1e3, 4),
            "reads": round(seconds / measured["read"][0], 3),
            "gb_per_s": round(logits.nbytes / seconds / 1e9, 1),
            "extra_peak_mb": round(peak_bytes / 1e6, 3),
        }
        for name, (seconds, peak_bytes) in measured.items()
    ]


def table(rows: list[Row]) -> Table:
    """All rows."""
    made = Table(title="Scoring rows of logits", caption="reads: time over that of reading the logits once")
    for key in rows[0]:
        made.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], float) else "left")
    for one in rows:
        made.add_row(*(f"{value:,}" if isinstance(value, float) else f"{value}" for value in one.values()))
    return made


def _fused(logits: Tensor, k: int) -> tuple[ScoreRows | None, str | None]:
    """Triton's form, or why it can't be measured."""
    if not logits.is_cuda:
        return None, NO_GPU
    form, reason = forms.choose("cuda", widths={logits.shape[1]}, dtype=logits.dtype, num_logprobs=k)
    return (form, None) if reason is None else (None, reason)


def _seconds(call: Call, num_calls: int, device: str) -> float:
    """Per call."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    for _ in range(num_calls):
        call()
    return (now() - started) / num_calls


def main(
    *,
    rows: Annotated[int, typer.Option(min=1, help="Rows; 883 of 151,936 bfloat16 logits are a GPU's call.")] = 883,
    V: Annotated[int, typer.Option("--V", min=2, help="Vocabulary rows.")] = 151_936,
    K: Annotated[list[int], typer.Option("--K", min=0, help="Top-k entries; may be given several times.")] = [64],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of the logits: bfloat16, float16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON alone.")] = False,
) -> None:
    """Measure each form with and without the entropy."""
    if dtype not in DTYPES or device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--dtype {dtype}, --device {device}: give one of {', '.join(DTYPES)} and cpu or cuda")
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = WIDTH
    facts = machine(device, torch.get_num_threads())
    if float(facts["load"]) > BUSY_LOAD:
        console.print(f"the machine is busy (load {facts['load']}): times will be off", style="yellow", highlight=False)
    logits = make_logits(rows, V, dtype=DTYPES[dtype], device=device)
    with torch.inference_mode():
        results = [
            row
            for k, entropy in itertools.product(K, (False, True))
            for row in measure_all(logits, k, entropy=entropy, device=device, repeats=repeats, console=console)
        ]
    if as_json:
        typer.echo(json.dumps({"machine": facts, "results": results}, indent=1))
    else:
        console.print(facts, table(results))


if __name__ == "__main__":
    typer.run(main)
