"""On- and off-policy data: which question is used which way, and which batch comes at which step. Pure.

Everything is a function of the step, the seed and the data, so a resumed run continues without any state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainer.errors import ConfigError

_LARGEST_DENOMINATOR = 10**6
"""gkd_lambda as the fraction that was meant: .7 is 7/10, not the nearest binary float."""


def split_questions(questions: Iterable[str], *, on_policy_share: float, seed: int) -> frozenset[str]:
    """The questions that are used on-policy; the others are used off-policy only.

    Questions are ranked by a hash with the seed: the split depends on neither their order nor the batch size, and a
    larger share contains every smaller one.

    Args:
        questions: texts; repeated ones count once.
        on_policy_share: in [0, 1]. Exactly this share, rounded to whole questions.
        seed: of the split.
    """

    def rank(question: str) -> bytes:
        return hashlib.sha256(f"{seed}|{question}".encode()).digest()

    ranked = sorted(set(questions), key=rank)
    return frozenset(ranked[: round(_exact(on_policy_share) * len(ranked))])


def _exact(share: float) -> Fraction:
    return Fraction(share).limit_denominator(_LARGEST_DENOMINATOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rows of one step."""

    on_policy: bool
    """Whether the student writes the responses."""
    rows: tuple[int, ...]
    """Positions in the pool of that kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Rows of one kind, drawn batch by batch; each pass has an order of its own and leaves out the last, short batch.

    Raises:
        ConfigError: the pool holds less than one batch.
    """

    name: str
    """For errors and for the seed: `on-policy` or `off-policy`."""
    num_rows: int
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.num_rows < self.batch_size:
            raise ConfigError(
                f"the {self.name} share holds {self.num_rows} rows, fewer than one batch of {self.batch_size}; add "
                "data, or change trainer.gkd_lambda, data.train_batch_size or data.off_policy_batch_size"
            )

    @property
    def batches_per_pass(self) -> int:
        """Whole batches in one pass over the pool."""
        return self.num_rows // self.batch_size

    def batch(self, number: int) -> tuple[int, ...]:
        """Rows of the pool's batch `number`, counted from 0 over all passes."""
        one_pass, slot = divmod(number, self.batches_per_pass)
        first = slot * self.batch_size
        if not self.shuffle:
            return tuple(range(first, first + self.batch_size))
        generator = np.random.default_rng([self.seed, one_pass, *self.name.encode()])
        return tuple(generator.permutation(self.num_rows)[first : first + self.batch_size].tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSchedule:
    """Which batch comes at which step, on- and off-policy ones interleaved as evenly as whole batches allow.

    With equal batch sizes, any window of w steps holds within one batch of w times `on_policy_share` on-policy ones:
    step t is on-policy where ceil(t r) exceeds ceil((t - 1) r). With unequal sizes the shares hold in questions.
    """

    on_policy_share: float
    """gkd_lambda: share of the questions drawn that is on-policy."""
    on_policy: Pool | None
    """None for a share of 0."""
    off_policy: Pool | None
    """None for a share of 1."""

    def __post_init__(self) -> None:
        for pool, share, name in (
            (self.on_policy, self.on_policy_share, "on-policy"),
            (self.off_policy, 1 - self.on_policy_share, "off-policy"),
        ):
            if pool is None and share > 0:
                raise ConfigError(f"a share of {share} is {name}, but there is no {name} data")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that use every row of both pools once, but for rests shorter than a batch."""
        return sum(pool.batches_per_pass for pool in (self.on_policy, self.off_policy) if pool is not None)

    def is_on_policy(self, step: int) -> bool:
        """Whether the student writes the responses of a step, counted from 1. Draws no rows."""
        return self._on_policy_steps(step) > self._on_policy_steps(step - 1)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 1."""
        before = self._on_policy_steps(step - 1)
        if self.on_policy is not None and self.is_on_policy(step):
            return Batch(on_policy=True, rows=self.on_policy.batch(before))
        if self.off_policy is None:
            raise ConfigError(f"step {step} is off-policy, but there is no off-policy data")
        return Batch(on_policy=False, rows=self.off_policy.batch(step - 1 - before))

    def _on_policy_steps(self, step: int) -> int:
        """On-policy steps among the first `step`."""
        share = _exact(self.on_policy_share)
        if self.on_policy is None or share == 0:
            return 0
        if self.off_policy is None or share == 1:
            return step
        on, off = share / self.on_policy.batch_size, (1 - share) / self.off_policy.batch_size
        return -int(-step * on // (on + off))
