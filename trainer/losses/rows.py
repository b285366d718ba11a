"""What a row of logits must be read for, and how its gradient is written: in blocks of rows, with one float32 buffer.

This is the torch form, for any device; `kernels.py` holds `outside_sums` and `write_outside` for CUDA.

Legend: T packed rows, S rows that are compared, K top-k entries, W vocabulary rows held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 1 << 19}
"""Elements of a block's buffer: what stays in a core's cache."""
BLOCK_ELEMENTS_ELSEWHERE = 1 << 22
"""Enough work for one launch on a GPU, at 16 MiB."""


class Rows(NamedTuple):
    """The rows that are compared, without a copy."""

    logits_TW: Tensor
    rows_S: Tensor | None
    """`[S]` indices into T; None: all of them, in order."""
    width: int
    """Leading columns that exist; the rest pads the vocabulary."""

    @property
    def num_rows(self) -> int:
        """S."""
        return int((self.logits_TW if self.rows_S is None else self.rows_S).shape[0])

    def block(self, block: slice) -> Tensor:
        """Rows of a block, `[R, width]`, in the logits' own type."""
        if self.rows_S is None:
            return self.logits_TW[block, : self.width]
        return self.logits_TW.index_select(0, self.rows_S[block])[:, : self.width]


class Targets(NamedTuple):
    """Where the top-k tokens lie in this rank's part of the vocabulary."""

    ids_SK: Tensor
    """Integers in [0, width): columns. Any column where not owned."""
    owned_SK: Tensor | None
    """Booleans; None: every token is held here."""

    def columns(self, block: slice, elsewhere: int) -> Tensor:
        """Columns of a block, with `elsewhere` for tokens that another rank holds."""
        ids = self.ids_SK[block].long()
        return ids if self.owned_SK is None else ids.where(self.owned_SK[block], elsewhere)


class ExpSums(NamedTuple):
    """Sums over some tokens of each row, of z = logits / temperature; float32 (float64 for float64 logits)."""

    max_S: Tensor
    """Largest z; -inf where there is no token."""
    exp_S: Tensor
    """sum exp(z - max)."""
    weighted_S: Tensor | None
    """sum exp(z - max) (z - max), where asked for."""

    @property
    def log_sum(self) -> Tensor:
        """logsumexp of z; -inf where there is no token."""
        return self.max_S + self.exp_S.log()

    @property
    def weighted_mean(self) -> Tensor:
        """Mean of z - max under the softmax of z; 0 where there is no token.

        Raises:
            ValueError: it was not asked for.
        """
        if self.weighted_S is None:
            raise ValueError("these sums were made without weights")
        return self.weighted_S / self.exp_S.clamp_min(1.0)  # the largest alone adds 1


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all else."""
    return torch.promote_types(logits.dtype, torch.float32)


def outside_sums(rows: Rows, targets: Targets, temperature: float, *, weighted: bool) -> ExpSums:
    """Read each row once and sum over what is not in its top-k."""
    dtype, device = arithmetic_dtype(rows.logits_TW), rows.logits_TW.device
    max_S = torch.full((rows.num_rows,), -torch.inf, dtype=dtype, device=device)
    exp_S, weighted_S = torch.zeros_like(max_S), torch.zeros_like(max_S) if weighted else None
    for block, z in _blocks(rows, dtype):
        if temperature != 1:
            z.mul_(1 / temperature)
        z.scatter_(-1, targets.columns(block, rows.width), -torch.inf)
        z = z[:, : rows.width]
        torch.amax(z, -1, out=max_S[block])
        z.sub_(finite(max_S[block]).unsqueeze(-1))
        if weighted_S is None:
            torch.sum(z.exp_(), -1, out=exp_S[block])
            continue
        exp = z.exp()
        torch.sum(exp, -1, out=exp_S[block])
        # -inf stands for probability 0, and 0 * -inf must be 0
        torch.sum(exp.mul_(z.clamp_min_(torch.finfo(dtype).min)), -1, out=weighted_S[block])
    return ExpSums(max_S, exp_S, weighted_S)


def gather(rows: Rows, targets: Targets) -> Tensor:
    """Logits `[S, K]` of the targets; 0 where another rank holds the token."""
    ids_SK = targets.ids_SK.long()
    row_S1 = (torch.arange(rows.num_rows, device=ids_SK.device) if rows.rows_S is None else rows.rows_S).unsqueeze(-1)
    logits_SK = rows.logits_TW[row_S1, ids_SK].to(arithmetic_dtype(rows.logits_TW))
    return logits_SK if targets.owned_SK is None else logits_SK.where(targets.owned_SK, 0.0)


def write_outside(out_TW: Tensor, rows: Rows, coefficient_S: Tensor, reference_S: Tensor, temperature: float) -> None:
    """Write `coefficient exp(z - reference)` over each row in `out_TW`, which may be the logits themselves."""
    for block, z in _blocks(rows, arithmetic_dtype(rows.logits_TW)):
        z = z[:, : rows.width]
        if temperature != 1:
            z.mul_(1 / temperature)
        z.sub_(reference_S[block].unsqueeze(-1)).exp_().mul_(coefficient_S[block].unsqueeze(-1))
        if rows.rows_S is None:
            out_TW[block, : rows.width].copy_(z)
        else:
            out_TW[:, : rows.width].index_copy_(0, rows.rows_S[block], z.to(out_TW.dtype))


def write_targets(out_TW: Tensor, rows: Rows, targets: Targets, values_SK: Tensor) -> None:
    """Write the targets' entries into `out_TW`; not by scatter, which on a CPU copies half-precision tensors whole."""
    ids_SK, values_SK = targets.ids_SK.long(), values_SK.to(out_TW.dtype)
    row_SK = (torch.arange(rows.num_rows, device=ids_SK.device) if rows.rows_S is None else rows.rows_S).unsqueeze(-1)
    owned = slice(None) if targets.owned_SK is None else targets.owned_SK
    out_TW[row_SK.expand_as(ids_SK)[owned], ids_SK[owned]] = values_SK[owned]


def clear_others(out_TW: Tensor, rows: Rows) -> None:
    """Set to 0 what no compared row covers."""
    out_TW[:, rows.width :] = 0
    if rows.rows_S is not None:
        other_T = torch.ones(out_TW.shape[0], dtype=torch.bool, device=out_TW.device)
        other_T[rows.rows_S] = False
        out_TW.index_fill_(0, other_T.nonzero().squeeze(-1), 0)


def _blocks(rows: Rows, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Each block's slice of S and its logits in a buffer `[R, width + 1]`; the last column is for tokens elsewhere."""
    if not rows.width or not rows.num_rows:
        return
    elements = BLOCK_ELEMENTS.get(rows.logits_TW.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    size = max(1, min(rows.num_rows, elements // rows.width))
    buffer = torch.empty((size, rows.width + 1), dtype=dtype, device=rows.logits_TW.device)
    for start in range(0, rows.num_rows, size):
        block = slice(start, min(start + size, rows.num_rows))
        z = buffer[: block.stop - block.start]
        z[:, : rows.width].copy_(rows.block(block))
        yield block, z


def finite(max_S: Tensor) -> Tensor:
    """0 for -inf: where no token is possible there is nothing to shift by."""
    return max_S.where(max_S > -torch.inf, 0.0)
