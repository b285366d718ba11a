"""Plain values that travel through the trainer.

Legend: S scored positions, K top-k entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from protos.arrays import ScoreArrays

TopKDivergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
"""Divergences of a student's logits from a teacher's top-k."""
Distillation = TopKDivergence | Literal["policy_gradient"]
"""What teaches: a divergence's gradient, or the sampled tokens' advantage."""
Tail = Literal["bucket", "renormalize", "none"]
"""What becomes of the probability outside the top-k: one more event, left out by conditioning, or left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTimings:
    """Where the time of one teacher call went, in seconds."""

    total_s: float
    """From the call to the answer, retries included, seen by the client."""
    queue_s: float
    """Waiting for admission, as the service says."""
    engine_s: float
    """In the engine, as the service says."""
    waited_s: float = 0.0
    """Waiting in the client for a free slot, or for a replica that could be asked."""
    num_attempts: int = 1
    """Attempts made, a second one beside a slow first included."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherScores(ScoreArrays):
    """The teacher's distribution at S positions; row i predicts token `score_start + i`. Arrays: see `ScoreArrays`."""

    manifest_digest: str
    """Digest of the teacher that answered."""
    endpoint: str
    """`host:port` that answered."""
    timings: TeacherTimings
    """Where the time went."""
