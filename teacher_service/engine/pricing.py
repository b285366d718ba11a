"""Memory that a job takes, from its shape alone: engines differ in what they keep per token and per entry.

Legend: N tokens, S scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

from teacher_service.types import ScoreJob

TOKEN_BYTES = 400
"""A token id in this process and in the engine's: the message, lists of Python integers, arrays."""
ENTRY_BYTES = 64
"""An id and its logprob, eight times: as computed, sent, received, made contiguous, encoded, and on the wire."""


def num_entries(job: ScoreJob, *, rows: int | None = None) -> int:
    """Numbers of an answer, ids not counted: sampled, top-k, tail, entropy and candidates of `rows`, or of all S."""
    return (job.num_scored if rows is None else rows) * (job.num_logprobs + 3 + job.num_candidates)


def answer_bytes(job: ScoreJob) -> int:
    """Held for a job whose answer is kept in arrays of the scored positions."""
    return TOKEN_BYTES * job.num_tokens + ENTRY_BYTES * num_entries(job)
