"""The two functions that read and write whole rows of logits, as Triton kernels for CUDA.

They do what `rows.outside_sums` and `rows.write_outside` do, each reading the logits once. A program of the first
sums a row in blocks, with a running maximum. It hides the top-k by writing -inf over their logits and puts them back
when it is done, since no cheap test tells whether a token is among K others; nothing may read the logits meanwhile,
which the CUDA stream's order sees to.

Legend: S rows that are compared, K top-k entries, W vocabulary rows held here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.losses.rows import ExpSums, Rows, Targets

BLOCK = 16384
"""Tokens that a program reads at once."""
NUM_WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _outside_sums(  # type: ignore[no-untyped-def]
    logits, stride, rows, ids, owned, max_out, exp_out, weighted_out, width, k, scale,
    HAS_ROWS: tl.constexpr, HAS_OWNED: tl.constexpr, WEIGHTED: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + s) if HAS_ROWS else s
    start = logits + row * stride
    entries = tl.arange(0, K_BLOCK)
    hidden = entries < k
    if HAS_OWNED:
        hidden = hidden & (tl.load(owned + s * k + entries, mask=hidden, other=0) != 0)
    columns = tl.load(ids + s * k + entries, mask=hidden, other=0).to(tl.int64)
    kept = tl.load(start + columns, mask=hidden, other=0.0)
    tl.debug_barrier()
    tl.store(start + columns, tl.full((K_BLOCK,), float("-inf"), tl.float32).to(kept.dtype), mask=hidden)
    tl.debug_barrier()
    largest = float("-inf")
    total = 0.0
    weighted = 0.0
    for offset in range(0, width, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32) * scale
        new = tl.maximum(largest, tl.max(z, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - shift))
        e = tl.exp(z - shift)
        if WEIGHTED:
            moved = tl.where(largest == float("-inf"), 0.0, largest - shift)
            weighted = shrink * (weighted + total * moved)
            weighted += tl.sum(tl.where(e > 0, e * (z - shift), 0.0), 0)
        total = total * shrink + tl.sum(e, 0)
        largest = new
    tl.debug_barrier()
    tl.store(start + columns, kept, mask=hidden)
    tl.store(max_out + s, largest)
    tl.store(exp_out + s, total)
    if WEIGHTED:
        tl.store(weighted_out + s, weighted)


@triton.jit  # type: ignore[untyped-decorator]
def _write_outside(  # type: ignore[no-untyped-def]
    out, out_stride, logits, stride, rows, coefficient, reference, width, scale,
    HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + s) if HAS_ROWS else s
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    z = tl.load(logits + row * stride + column, mask=there, other=float("-inf")).to(tl.float32) * scale
    gradient = tl.exp(z - tl.load(reference + s)) * tl.load(coefficient + s)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=there)


def usable(logits: Tensor) -> bool:
    """Whether the kernels can take these logits: on CUDA, in rows without gaps, not float64."""
    return logits.is_cuda and logits.stride(-1) == 1 and logits.dtype != torch.float64


def outside_sums(rows: Rows, targets: Targets, temperature: float, *, weighted: bool) -> ExpSums:
    """See `rows.outside_sums`."""
    logits, k = rows.logits_TW, int(targets.ids_SK.shape[1])
    max_S = torch.full((rows.num_rows,), -torch.inf, dtype=torch.float32, device=logits.device)
    exp_S = torch.zeros_like(max_S)
    weighted_S = torch.zeros_like(max_S) if weighted else None
    if rows.num_rows and rows.width:
        _outside_sums[(rows.num_rows,)](
            logits, logits.stride(0), _or(rows.rows_S, max_S), targets.ids_SK.contiguous(),
            max_S if targets.owned_SK is None else targets.owned_SK.to(torch.uint8).contiguous(),
            max_S, exp_S, _or(weighted_S, max_S), rows.width, k, 1 / temperature,
            HAS_ROWS=rows.rows_S is not None, HAS_OWNED=targets.owned_SK is not None, WEIGHTED=weighted,
            K_BLOCK=triton.next_power_of_2(max(1, k)), BLOCK=_block(rows.width), num_warps=NUM_WARPS,
        )  # fmt: skip
    return ExpSums(max_S, exp_S, weighted_S)


def write_outside(out_TW: Tensor, rows: Rows, coefficient_S: Tensor, reference_S: Tensor, temperature: float) -> None:
    """See `rows.write_outside`."""
    logits = rows.logits_TW
    if not rows.num_rows or not rows.width:
        return
    block = _block(rows.width)
    _write_outside[(rows.num_rows, triton.cdiv(rows.width, block))](
        out_TW, out_TW.stride(0), logits, logits.stride(0), _or(rows.rows_S, coefficient_S), coefficient_S.contiguous(),
        reference_S.contiguous(), rows.width, 1 / temperature,
        HAS_ROWS=rows.rows_S is not None, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


def _block(width: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(width)))


def _or(tensor: Tensor | None, stand_in: Tensor) -> Any:
    """A kernel takes a pointer, also where it does not look."""
    return stand_in if tensor is None else tensor
