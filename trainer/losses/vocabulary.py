"""A vocabulary that is split over ranks, as Megatron's tensor parallelism splits the LM head.

Legend: S rows, K top-k entries, W columns of logits on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.losses.rows import ExpSums, Targets


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """The columns `start ... start + W` of the whole vocabulary.

    Every rank of the group calls with the same rows and top-k, and every rank gets the whole result. Source: Shoeybi
    et al. 2019 (Megatron-LM, arXiv 1909.08053), section 3.
    """

    start: int
    """Token id of this rank's first column."""
    vocab_size: int
    """Tokens that exist; columns from there on pad the vocabulary and take no part."""
    group: dist.ProcessGroup
    """The ranks that hold the parts."""

    def width(self, num_columns: int) -> int:
        """How many of this rank's columns exist."""
        return max(0, min(num_columns, self.vocab_size - self.start))

    def targets(self, token_ids_SK: Tensor, width: int) -> Targets:
        """Where tokens lie on this rank, of whose columns `width` exist."""
        columns = token_ids_SK - self.start
        owned = (columns >= 0) & (columns < width)
        return Targets(columns.where(owned, 0), owned)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def combine(self, sums: ExpSums) -> ExpSums:
        """Sums over the whole vocabulary of each rank's sums."""
        max_S = sums.max_S.clone()
        dist.all_reduce(max_S, dist.ReduceOp.MAX, group=self.group)
        # a rank without tokens has a largest of -inf and sums of 0
        shift_S = torch.where(sums.max_S > -torch.inf, sums.max_S - max_S, 0.0)
        scale_S = shift_S.exp()
        parts = [sums.exp_S * scale_S]
        if sums.weighted_S is not None:
            parts.append(scale_S * (sums.weighted_S + sums.exp_S * shift_S))
        total = self.sum_(torch.stack(parts))
        return ExpSums(max_S, total[0], total[1] if sums.weighted_S is not None else None)
