"""The loss benchmark: what it measures is what it says, and what it can't trust it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import losses

S, V, K = 8, 96, 4
ROW_KEYS = {"impl", "divergence", "device", "S", "V", "K", "forward_ms", "backward_ms", "extra_peak_mb"}


def _cell(impl: str) -> losses.Cell:
    return losses.Cell(impl=impl, divergence="forward_kl", device="cpu", S=S, V=V, K=K)


def _measure(cell: losses.Cell) -> losses.Measurement:
    return losses.measure(cell, repeats=1, warm_up=1)


def test_rows_have_the_documented_keys_and_implementations_agree() -> None:
    """A tiny grid runs through, all three divergences, and nothing is refused."""
    groups = list(losses.cells("cpu", [S], [V], [K], impls=["ours", "naive"]))
    assert [[cell.impl for cell in group] for group in groups] == [["ours", "naive"]] * 3
    console = Console(quiet=True)
    rows = [losses.row(cell, one) for group in groups for cell, one in losses.run_group(group, _measure, console)]
    assert [(one["divergence"], one["impl"]) for one in rows] == [
        (divergence, impl) for divergence in ("forward_kl", "reverse_kl", "jsd") for impl in ("ours", "naive")
    ]
    for one in rows:
        assert one.keys() == ROW_KEYS
        assert min(float(one[key]) for key in ("forward_ms", "backward_ms", "extra_peak_mb")) >= 0
    assert losses.table(rows).row_count == 6
    assert losses.ratio_table(rows).row_count == 3


@pytest.mark.parametrize("name", ["value", "inside", "outside"])
def test_a_disagreement_is_refused(name: str) -> None:
    """A value, or a gradient on either side of the top-k, that differs by a hundredth is no rounding."""
    naive = _measure(_cell("naive"))
    wrong = dataclasses.replace(naive, **{name: getattr(naive, name) * 1.02})
    losses.check_agreement(_cell("ours"), naive, naive)
    with pytest.raises(losses.BenchmarkError, match="and naive differ by"):
        losses.check_agreement(_cell("ours"), wrong, naive)


def test_memory_is_counted_to_the_byte() -> None:
    """A float32 log-softmax holds its result; its backward pass the gradient coming in and that going out as well."""
    logits = torch.randn(64, 1000, requires_grad=True)

    def backward() -> torch.Tensor:
        result = logits.log_softmax(-1)
        return torch.autograd.grad(result, logits, torch.ones_like(result))[0]

    _, forward_bytes = losses.traced_on_cpu(lambda: logits.log_softmax(-1))
    _, bytes_of_both = losses.traced_on_cpu(backward)
    assert (forward_bytes, bytes_of_both) == (logits.nbytes, 3 * logits.nbytes)


@pytest.mark.parametrize("num_logprobs", [16, 256])
def test_the_loss_needs_a_twentieth_of_the_logits_beside_them(num_logprobs: int) -> None:
    """Forward and backward, beyond the logits and their gradient: a block of rows and a few numbers per entry."""
    cell = losses.Cell(impl="ours", divergence="forward_kl", device="cpu", S=1024, V=48_000, K=num_logprobs)
    measured = losses.measure(cell, repeats=1, warm_up=1)
    assert measured.extra_peak_bytes < 0.05 * 1024 * 48_000 * torch.bfloat16.itemsize


def test_memory_unknown_to_the_allocator_is_refused() -> None:
    """The process's own growth shows what the trace can't see."""
    size = int(2 * losses.UNSEEN_BYTES)
    _, peak = losses.traced_on_cpu(lambda: np.ones(size, np.int8))
    _, resident = losses.resident_growth(lambda: np.ones(size, np.int8))
    if resident is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert peak == 0
    measured = dataclasses.replace(_measure(_cell("ours")), extra_peak_bytes=peak, resident_growth_bytes=resident)
    with pytest.raises(losses.BenchmarkError, match="resident memory grew"):
        losses.check_memory(_cell("ours"), measured)


def test_what_does_not_fit_is_left_out() -> None:
    """A cell larger than any machine leaves no row behind, and is not even started."""
    cell = dataclasses.replace(_cell("naive"), S=10**9)
    assert losses.run_group([cell], _measure, Console(quiet=True)) == []


def test_data_are_a_distribution_over_distinct_tokens() -> None:
    """The teacher's top-k has no token twice, descends, and holds the stated mass; two calls give the same."""
    first, second = (losses.make_problem(_cell(impl)) for impl in ("ours", "naive"))
    assert all(len(set(ids)) == K for ids in first.token_ids.tolist())
    assert int(first.token_ids.max()) < V
    assert (first.logprobs.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(first.logprobs.exp().sum(-1), torch.full((S,), losses.TEACHER_MASS))
    assert torch.equal(first.logits, second.logits)
    assert first.logits.is_leaf


def test_rows_of_another_device_stay(tmp_path: Path) -> None:
    """A run replaces the rows of its own device."""
    output = tmp_path / "results" / "loss.json"
    losses.write_results(output, "cuda", [{"device": "cuda", "S": 1}])
    losses.write_results(output, "cpu", [{"device": "cpu", "S": 1}])
    losses.write_results(output, "cpu", [{"device": "cpu", "S": 2}])
    assert json.loads(output.read_text()) == [{"device": "cuda", "S": 1}, {"device": "cpu", "S": 2}]
