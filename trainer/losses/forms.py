"""What is compared, and how.

Legend: S rows that are compared, K top-k entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

from torch import Tensor

from trainer.losses.events import KLTerm, kl_terms
from trainer.types import Tail, TopKDivergence

DIVERGENCES: tuple[TopKDivergence, ...] = get_args(TopKDivergence)
TAILS: tuple[Tail, ...] = get_args(Tail)


@dataclass(frozen=True, kw_only=True)
class DivergenceForm:
    """Which divergence; see `trainer.losses.topk_divergence`.

    Raises:
        ValueError: a parameter is out of its range, or the form is unknown.
    """

    divergence: TopKDivergence = "forward_kl"
    beta: float = 0.5
    skew_alpha: float = 0.1
    temperature: float = 1.0
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _ = self.terms
        if self.tail not in TAILS:
            raise ValueError(f"tail={self.tail!r} is unknown; known are {', '.join(TAILS)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be > 0")

    @property
    def terms(self) -> tuple[KLTerm, ...]:
        """The divergence as KLs."""
        return kl_terms(self.divergence, beta=self.beta, skew_alpha=self.skew_alpha)


class TopK(NamedTuple):
    """What the teacher says about each compared row."""

    token_ids: Tensor
    """`[S, K]` integers."""
    logprobs: Tensor
    """`[S, K]` nats."""
    log_tail_mass: Tensor | None = None
    """`[S]` nats; None: derived from the logprobs."""
