"""Turns what a caller asked for into a job that an engine may rely on, or says which rule it breaks.

Legend: N tokens, S = N - score_start scored positions, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_service.errors import (
    EmptySequenceError,
    InvalidCandidatesError,
    InvalidIdempotencyKeyError,
    InvalidTemperatureError,
    MissingCapabilityError,
    NumLogprobsOutOfRangeError,
    ScoreStartOutOfRangeError,
    SequenceTooLongError,
    TokenIdOutOfRangeError,
)
from teacher_service.types import Capability, Manifest, ScoreJob

MAX_IDEMPOTENCY_KEY_LENGTH = 128
MIN_TEMPERATURE, MAX_TEMPERATURE = float(np.float32(1e-4)), 1e4
"""Beyond, float32 logits overflow, or all are equal."""

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreRequest:
    """What a caller asked for, parsed but not checked against the teacher."""

    token_ids: Sequence[int]
    """N ids of any size."""
    score_start: int
    """Index of the first token to score."""
    num_logprobs: int = 0
    """K."""
    temperature: float = 1.0
    """Divides the logits."""
    candidate_token_ids: Sequence[Sequence[int]] | NDArray[np.int32] | None = None
    """[S, C] ids to score as well."""
    return_entropy: bool = False
    """Whether the entropy is wanted."""
    idempotency_key: str | None = None
    """Names the work, so that repeating it costs nothing. None: it is not known again."""


def validate(request: ScoreRequest, manifest: Manifest, *, request_id: str) -> ScoreJob:
    """Check a request against what the teacher is.

    Raises:
        InvalidRequestError: a field breaks a rule; the subclass says which.
        MissingCapabilityError: the engine lacks what was asked for.
    """
    _check_length(len(request.token_ids), manifest)
    num_scored = _check_score_start(request.score_start, len(request.token_ids))
    _check_num_logprobs(request.num_logprobs, manifest)
    token_ids = _as_ids(request.token_ids, manifest.vocab_rows)
    _check_temperature(request.temperature, manifest)
    _check_idempotency_key(request.idempotency_key)
    if request.return_entropy:
        _require(Capability.ENTROPY, "return_entropy", manifest)
    return ScoreJob(
        request_id=request_id,
        token_ids=token_ids.astype(np.int32),
        score_start=request.score_start,
        num_logprobs=request.num_logprobs,
        temperature=request.temperature,
        candidate_token_ids=_candidates(request, manifest, num_scored),
        return_entropy=request.return_entropy,
    )


def _check_length(num_tokens: int, manifest: Manifest) -> None:
    limit = manifest.max_request_tokens
    if num_tokens == 0:
        raise EmptySequenceError(
            f"token_ids holds 0 tokens; send between 2 and {limit}",
            metadata={"field": "token_ids", "value": "0", "limit": f"2..{limit}"},
        )
    if num_tokens > limit:
        raise SequenceTooLongError(
            f"token_ids holds {num_tokens} tokens, limit {limit}; truncate it, or serve the model with larger limits "
            f"(its own is {manifest.max_model_len})",
            metadata={"field": "token_ids", "value": f"{num_tokens}", "limit": f"{limit}"},
        )


def _check_score_start(score_start: int, num_tokens: int) -> int:
    if 1 <= score_start < num_tokens:
        return num_tokens - score_start
    raise ScoreStartOutOfRangeError(
        f"score_start is {_brief(score_start)}, outside [1, {num_tokens}) for a sequence of {num_tokens} tokens; it is "
        "the index of the first token to score, normally the prompt's length, and the first token has no prefix",
        metadata={"field": "score_start", "value": _brief(score_start), "limit": f"[1, {num_tokens})"},
    )


def _check_num_logprobs(num_logprobs: int, manifest: Manifest) -> None:
    limit = manifest.max_num_logprobs
    if not 0 <= num_logprobs <= limit:
        raise NumLogprobsOutOfRangeError(
            f"num_logprobs is {_brief(num_logprobs)}, outside [0, {limit}]; ask for fewer, or serve with a larger "
            "--max-num-logprobs",
            metadata={"field": "num_logprobs", "value": _brief(num_logprobs), "limit": f"[0, {limit}]"},
        )


def _check_temperature(temperature: float, manifest: Manifest) -> None:
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise InvalidTemperatureError(
            f"temperature is {temperature}, outside [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]; it divides the logits "
            "(unset: 1)",
            metadata={
                "field": "temperature",
                "value": f"{temperature}",
                "limit": f"[{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]",
            },
        )
    if temperature != 1.0:
        _require(Capability.TEMPERATURE, f"temperature {temperature:g}", manifest)


def _check_idempotency_key(key: str | None) -> None:
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_LENGTH:
        raise InvalidIdempotencyKeyError(
            f"idempotency_key has {len(key)} characters, outside [1, {MAX_IDEMPOTENCY_KEY_LENGTH}]; shorten it, or "
            "leave it unset",
            metadata={
                "field": "idempotency_key",
                "value": f"{len(key)}",
                "limit": f"[1, {MAX_IDEMPOTENCY_KEY_LENGTH}]",
            },
        )


def _candidates(request: ScoreRequest, manifest: Manifest, num_scored: int) -> NDArray[np.int32] | None:
    rows = request.candidate_token_ids
    if rows is None:
        return None
    _require(Capability.CANDIDATES, "candidates", manifest)
    widths = [rows.shape[1]] if isinstance(rows, np.ndarray) else sorted({len(row) for row in rows})
    if len(rows) != num_scored or len(widths) != 1 or 0 in widths:
        shape = f"{len(rows)} rows of {widths[:3]} ids"
        raise InvalidCandidatesError(
            f"candidates has {shape}; it needs one row for each of the {num_scored} scored positions, all of one "
            "length >= 1",
            metadata={"field": "candidates", "value": shape, "limit": f"[{num_scored}, C]"},
        )
    try:
        if isinstance(rows, np.ndarray):
            flat = _in_range(rows.reshape(-1).astype(np.int64), manifest.vocab_rows)
        else:
            flat = _as_ids([one for row in rows for one in row], manifest.vocab_rows)
    except TokenIdOutOfRangeError as exc:
        raise InvalidCandidatesError(f"candidates: {exc.message}", metadata=exc.metadata) from exc
    return flat.astype(np.int32).reshape(num_scored, -1)


def _as_ids(token_ids: Sequence[int], vocab_rows: int) -> Int64Array:
    """Ids [...] as an array, each in [0, V)."""
    try:
        ids = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
    except OverflowError:
        index, value = next((i, one) for i, one in enumerate(token_ids) if not 0 <= one < vocab_rows)
        raise _id_error(index, value, vocab_rows) from None
    return _in_range(ids, vocab_rows)


def _in_range(ids: Int64Array, vocab_rows: int) -> Int64Array:
    outside = (ids < 0) | (ids >= vocab_rows)
    if outside.any():
        index = int(outside.argmax())
        raise _id_error(index, int(ids[index]), vocab_rows)
    return ids


def _id_error(index: int, value: int, vocab_rows: int) -> TokenIdOutOfRangeError:
    return TokenIdOutOfRangeError(
        f"token id at index {index} is {_brief(value)}, outside [0, {vocab_rows}); is the tokenizer the teacher's?",
        metadata={
            "field": "token_ids",
            "index": f"{index}",
            "value": _brief(value),
            "limit": f"[0, {vocab_rows})",
        },
    )


def _require(capability: Capability, what: str, manifest: Manifest) -> None:
    if capability not in manifest.capabilities:
        offered = ", ".join(sorted(manifest.capabilities)) or "none"
        raise MissingCapabilityError(
            f"{what} needs the capability {capability.value}, which engine {manifest.engine} lacks (it offers: "
            f"{offered}); leave it out, or ask a teacher on another engine",
            metadata={"field": what.split()[0], "value": capability.value, "limit": offered},
        )


def _brief(value: int) -> str:
    """A number short enough for a header: JSON allows thousands of digits."""
    return f"{value}" if abs(value) < 10**20 else f"{'-' if value < 0 else ''}a number above 10^20"
