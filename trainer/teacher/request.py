"""Arguments to a checked request, and a checked answer out of the service's: both ends of one call.

Legend: N tokens, S = N - score_start scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.arrays import Int32Array, ScoreArrays
from protos.codec import (
    CodecError,
    WireDtype,
    encode_token_ids,
    scores_from_pb,
    wire_dtype_from_pb,
    wire_dtype_to_pb,
)
from protos.manifest import Capability, Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from trainer.errors import TeacherAnswerError, TeacherRequestError
from trainer.teacher.compatibility import manifest_changed

TokenIds = Sequence[int] | NDArray[np.integer]

_WIRE_CAPABILITY = {
    WireDtype.FLOAT16: Capability.WIRE_FLOAT16,
    WireDtype.BFLOAT16: Capability.WIRE_BFLOAT16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRequest:
    """A request that the teacher's manifest allows, and what its answer must look like."""

    message: pb.ScoreRequest
    num_scored: int
    """S."""
    num_candidates: int
    """C."""
    key: str
    """Names the content, SHA-256 hex: equal for equal questions to one teacher, in every process and run."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.message.token_ids)


def build_request(
    manifest: Manifest,
    token_ids: TokenIds,
    *,
    score_start: int,
    num_logprobs: int,
    temperature: float,
    wire_dtype: WireDtype,
    candidate_token_ids: NDArray[np.integer] | None,
    return_entropy: bool,
) -> CheckedRequest:
    """Check a call's arguments against the manifest and pack them.

    Args:
        manifest: what the teacher allows.
        token_ids: [N] prompt and response.
        score_start: index of the first token to score.
        num_logprobs: K.
        temperature: divides the logits before the softmax.
        wire_dtype: element type of the answer's logprobs.
        candidate_token_ids: [S, C] ids to score as well; None for none.
        return_entropy: whether the entropy is wanted.

    Raises:
        TeacherRequestError: an argument is out of range; nothing was sent.
    """
    ids = _checked_token_ids("token_ids", np.asarray(token_ids), manifest.vocab_rows, ndim=1)
    _check_numbers(manifest, ids, score_start, num_logprobs, temperature)
    _check_capabilities(manifest, temperature, wire_dtype, candidate_token_ids, return_entropy)
    message = pb.ScoreRequest(
        token_ids=ids.tolist(),
        score_start=score_start,
        num_logprobs=num_logprobs,
        wire_dtype=wire_dtype_to_pb(wire_dtype),
        return_entropy=return_entropy,
    )
    if temperature != 1.0:
        message.temperature = temperature
    num_scored, num_candidates = len(ids) - score_start, 0
    if candidate_token_ids is not None:
        candidates = _checked_candidates(np.asarray(candidate_token_ids), num_scored, manifest.vocab_rows)
        num_candidates = candidates.shape[1]
        message.candidates.count = num_candidates
        message.candidates.token_ids = encode_token_ids(candidates)
    key = _content_key(manifest, message)
    if Capability.IDEMPOTENCY in manifest.capabilities:
        message.idempotency_key = key
    if message.ByteSize() > manifest.max_request_bytes:
        raise TeacherRequestError(
            f"the request has {message.ByteSize()} bytes, the teacher's limit is {manifest.max_request_bytes}; "
            "send fewer tokens or candidates, or raise the teacher's limit"
        )
    return CheckedRequest(message=message, num_scored=num_scored, num_candidates=num_candidates, key=key)


def _content_key(manifest: Manifest, message: pb.ScoreRequest) -> str:
    content = hashlib.sha256(manifest.digest.encode())
    content.update(b"\0" + message.SerializeToString(deterministic=True))
    return content.hexdigest()


def read_answer(
    answer: pb.ScoreResponse,
    request: CheckedRequest,
    *,
    manifest: Manifest,
    endpoint: str,
    student_vocab_rows: int | None,
) -> ScoreArrays:
    """Check an answer against what was asked for, and unpack it.

    Raises:
        TeacherMismatchError: another teacher answered than the one that was checked at the start.
        TeacherAnswerError: the answer contradicts the contract or the request.
    """
    if answer.manifest_digest != manifest.digest:
        raise manifest_changed(endpoint, digest=answer.manifest_digest, checked=manifest.digest)
    try:
        return _unpack(answer, request, manifest.vocab_rows, student_vocab_rows)
    except CodecError as exc:
        raise TeacherAnswerError(
            f"the answer of the teacher at {endpoint} is invalid: {exc}; report it to whoever runs the teacher",
            endpoint=endpoint,
            reason="INVALID_ANSWER",
        ) from exc


def _unpack(
    answer: pb.ScoreResponse, request: CheckedRequest, vocab_rows: int, student_vocab_rows: int | None
) -> ScoreArrays:
    asked = request.message
    scores = scores_from_pb(
        answer,
        num_scored=request.num_scored,
        num_logprobs=asked.num_logprobs,
        vocab_rows=vocab_rows,
        num_candidates=request.num_candidates,
    )
    if answer.wire_dtype != asked.wire_dtype:
        names = [wire_dtype_from_pb(value) for value in (answer.wire_dtype, asked.wire_dtype)]
        raise CodecError(f"wire_dtype is {names[0]}, asked was {names[1]}")
    if (scores.entropy is not None) != asked.return_entropy:
        raise CodecError(f"entropy is {'absent' if asked.return_entropy else 'present'}, against what was asked")
    _check_student_rows(scores, student_vocab_rows)
    return scores


def _check_student_rows(scores: ScoreArrays, student_vocab_rows: int | None) -> None:
    # A teacher's padding rows can reach its top-k; indexing the student's logits with them would fail far from here.
    if student_vocab_rows is None or scores.topk_token_ids is None:
        return
    highest_id = int(scores.topk_token_ids.max())
    if highest_id >= student_vocab_rows:
        raise CodecError(
            f"its top-k hold the token id {highest_id}, the student's LM head has {student_vocab_rows} rows"
        )


def _checked_token_ids(name: str, values: NDArray[np.generic], vocab_rows: int, *, ndim: int) -> Int32Array:
    if values.ndim != ndim or values.size == 0:
        raise TeacherRequestError(f"{name} has shape {list(values.shape)}; it must be {ndim}-dimensional and not empty")
    if not np.issubdtype(values.dtype, np.integer):
        raise TeacherRequestError(f"{name} has dtype {values.dtype}; it must be of integers")
    ids: NDArray[np.integer] = values.astype(np.int64)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_rows:
        raise TeacherRequestError(
            f"{name} spans {lowest} to {highest}, the teacher takes ids in [0, {vocab_rows}); "
            "tokenize with the teacher's token map"
        )
    return ids.astype(np.int32)


def _check_numbers(
    manifest: Manifest, token_ids: Int32Array, score_start: int, num_logprobs: int, temperature: float
) -> None:
    num_tokens = len(token_ids)
    if num_tokens > manifest.max_request_tokens:
        raise TeacherRequestError(
            f"token_ids holds {num_tokens} tokens, the teacher scores at most {manifest.max_request_tokens}; "
            "shorten prompt or response, or raise the teacher's limit"
        )
    if not 1 <= score_start < num_tokens:
        raise TeacherRequestError(
            f"score_start is {score_start}, must be in [1, {num_tokens}) for {num_tokens} tokens; "
            "normally it is the prompt's length"
        )
    if not 0 <= num_logprobs <= manifest.max_num_logprobs:
        raise TeacherRequestError(
            f"num_logprobs is {num_logprobs}, must be in [0, {manifest.max_num_logprobs}]; "
            "ask for fewer, or start the teacher with a higher limit"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise TeacherRequestError(f"temperature is {temperature}, must be finite and > 0; 1 is the model's own")


def _check_capabilities(
    manifest: Manifest,
    temperature: float,
    wire_dtype: WireDtype,
    candidate_token_ids: NDArray[np.integer] | None,
    return_entropy: bool,
) -> None:
    needed = {
        Capability.TEMPERATURE: temperature != 1.0,
        Capability.CANDIDATES: candidate_token_ids is not None,
        Capability.ENTROPY: return_entropy,
    }
    if wire_dtype is not WireDtype.FLOAT32:
        needed[_WIRE_CAPABILITY[wire_dtype]] = True
    missing = [
        capability for capability, wanted in needed.items() if wanted and capability not in manifest.capabilities
    ]
    if missing:
        raise TeacherRequestError(
            f"the call needs {', '.join(missing)}, the teacher's engine {manifest.engine} offers "
            f"{', '.join(sorted(manifest.capabilities)) or 'none'}; leave it out, or use an engine that has it"
        )


def _checked_candidates(values: NDArray[np.generic], num_scored: int, vocab_rows: int) -> Int32Array:
    candidates = _checked_token_ids("candidate_token_ids", values, vocab_rows, ndim=2)
    if candidates.shape[0] != num_scored:
        raise TeacherRequestError(
            f"candidate_token_ids has {candidates.shape[0]} rows, must have one per scored position: {num_scored}"
        )
    return candidates
