"""What a request carries to vLLM's worker beside its sampling parameters, and in which columns the answer comes back.

Legend: S scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.arrays import Int32Array
from teacher_service.types import ScoreJob

KEY = "teacher"
"""In `SamplingParams.extra_args`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What the worker is asked beyond K."""

    score_start: int
    """Index of the first scored token."""
    temperature: float
    """Divides the logits before the softmax."""
    entropy: bool
    """Whether the entropy is wanted."""
    candidates: Int32Array | None
    """`[S, C]`; None: none."""

    @classmethod
    def of(cls, job: ScoreJob) -> Parameters:
        """A job's."""
        return cls(
            score_start=job.score_start,
            temperature=job.temperature,
            entropy=job.return_entropy,
            candidates=job.candidate_token_ids,
        )

    def pack(self) -> dict[str, Any]:
        """As `extra_args`, which travel as msgpack."""
        packed: dict[str, Any] = {
            "score_start": self.score_start,
            "temperature": self.temperature,
            "entropy": self.entropy,
        }
        if self.candidates is not None:
            packed["num_candidates"] = int(self.candidates.shape[1])
            packed["candidates"] = np.ascontiguousarray(self.candidates, dtype="<i4").tobytes()
        return {KEY: packed}

    @classmethod
    def unpack(cls, extra_args: Mapping[str, Any] | None) -> Parameters | None:
        """None where a request carries none: it is not for this route."""
        packed = (extra_args or {}).get(KEY)
        if packed is None:
            return None
        candidates = None
        if "candidates" in packed:
            candidates = np.frombuffer(packed["candidates"], dtype="<i4").reshape(-1, packed["num_candidates"])
        return cls(
            score_start=packed["score_start"],
            temperature=packed["temperature"],
            entropy=packed["entropy"],
            candidates=candidates,
        )

    @property
    def num_candidates(self) -> int:
        """C."""
        return 0 if self.candidates is None else int(self.candidates.shape[1])

    def num_columns(self, num_logprobs: int) -> int:
        """Float columns of an answer: sampled, top-k, tail, entropy if asked, candidates."""
        return 1 + num_logprobs + 1 + int(self.entropy) + self.num_candidates
