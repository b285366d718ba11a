"""Arrays to message bytes and back. The sender checks what its engine answers, the receiver what it reads."""

from __future__ import annotations

import enum
import zlib

import numpy as np
from numpy.typing import NDArray

from protos.arrays import Float32Array, Int32Array, ScoreArrays, ScoreArraysError, check_score_arrays
from protos.manifest import RANGE_DIGEST_BYTES, Capability, Manifest, TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb

_FLOAT16_MIN = float(np.finfo(np.float16).min)


class WireDtype(enum.StrEnum):
    """Element type of logprob arrays on the wire."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is WireDtype.FLOAT32 else 2


_WIRE_DTYPE_TO_PB = {
    WireDtype.FLOAT32: pb.WIRE_DTYPE_FLOAT32,
    WireDtype.FLOAT16: pb.WIRE_DTYPE_FLOAT16,
    WireDtype.BFLOAT16: pb.WIRE_DTYPE_BFLOAT16,
}
_PAYLOADS = ("topk_token_ids", "topk_logprobs", "sampled_logprobs", "log_tail_mass", "entropy", "candidate_logprobs")
"""Fields of an answer that hold packed bytes, by number."""
_MASS_SLACK = {WireDtype.FLOAT32: 0.01, WireDtype.FLOAT16: 0.02, WireDtype.BFLOAT16: 0.05}
"""What rounding logprobs near -12, those of a flat distribution over 10^5 tokens, may add to a mass of 1."""
_CAPABILITY_TO_PB = {
    Capability.TEMPERATURE: pb.CAPABILITY_TEMPERATURE,
    Capability.CANDIDATES: pb.CAPABILITY_CANDIDATES,
    Capability.ENTROPY: pb.CAPABILITY_ENTROPY,
    Capability.EXACT_TAIL_MASS: pb.CAPABILITY_EXACT_TAIL_MASS,
    Capability.WIRE_FLOAT16: pb.CAPABILITY_WIRE_FLOAT16,
    Capability.WIRE_BFLOAT16: pb.CAPABILITY_WIRE_BFLOAT16,
    Capability.IDEMPOTENCY: pb.CAPABILITY_IDEMPOTENCY,
}


class CodecError(ValueError):
    """Bytes or arrays that the contract does not allow."""


def wire_dtype_to_pb(wire_dtype: WireDtype) -> pb.WireDtype:
    """The enum value that stands for an element type."""
    return _WIRE_DTYPE_TO_PB[wire_dtype]


def wire_dtype_from_pb(value: int) -> WireDtype:
    """The element type that an enum value stands for; UNSPECIFIED means float32.

    Raises:
        CodecError: the number is no known element type.
    """
    if value == pb.WIRE_DTYPE_UNSPECIFIED:
        return WireDtype.FLOAT32
    for wire_dtype, number in _WIRE_DTYPE_TO_PB.items():
        if number == value:
            return wire_dtype
    raise CodecError(f"wire_dtype is {value}; known are {sorted(_WIRE_DTYPE_TO_PB.values())}")


def encode_logprobs(values: Float32Array, wire_dtype: WireDtype) -> bytes:
    """Pack float32 values [...] as little-endian `wire_dtype`, row-major.

    Values below float16's range saturate there: -65504 nats is as impossible as any.
    """
    if wire_dtype is WireDtype.FLOAT32:
        return np.ascontiguousarray(values, dtype="<f4").tobytes()
    if wire_dtype is WireDtype.FLOAT16:
        return np.maximum(values, _FLOAT16_MIN).astype("<f2").tobytes()
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    # round to nearest even: the half of the dropped bits, plus the kept part's last bit
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded.tobytes()


def decode_logprobs(name: str, payload: bytes, shape: tuple[int, ...], wire_dtype: WireDtype) -> Float32Array:
    """Unpack little-endian `wire_dtype` bytes into a float32 array of the given shape.

    Raises:
        CodecError: the payload's length does not match the shape.
    """
    _check_length(name, payload, shape, wire_dtype.itemsize)
    if wire_dtype is WireDtype.FLOAT32:
        return np.frombuffer(payload, dtype="<f4").reshape(shape).astype(np.float32, copy=False)
    if wire_dtype is WireDtype.FLOAT16:
        return np.frombuffer(payload, dtype="<f2").reshape(shape).astype(np.float32)
    bits = np.frombuffer(payload, dtype="<u2").astype("<u4") << 16
    return bits.view("<f4").reshape(shape).astype(np.float32, copy=False)


def encode_token_ids(token_ids: NDArray[np.integer]) -> bytes:
    """Pack token ids [...] as little-endian int32, row-major."""
    return np.ascontiguousarray(token_ids, dtype="<i4").tobytes()


def decode_token_ids(name: str, payload: bytes, shape: tuple[int, ...]) -> Int32Array:
    """Unpack little-endian int32 bytes into an array of the given shape.

    Raises:
        CodecError: the payload's length does not match the shape.
    """
    _check_length(name, payload, shape, 4)
    return np.frombuffer(payload, dtype="<i4").reshape(shape).astype(np.int32, copy=False)


def _check_length(name: str, payload: bytes, shape: tuple[int, ...], itemsize: int) -> None:
    expected = int(np.prod(shape, dtype=np.int64)) * itemsize
    if len(payload) != expected:
        raise CodecError(f"{name} holds {len(payload)} bytes; shape {list(shape)} needs {expected}")


def scores_to_pb(scores: ScoreArrays, *, wire_dtype: WireDtype, manifest_digest: str) -> pb.ScoreResponse:
    """Pack one scored sequence, which `check_score_arrays` accepts. The caller adds the timings."""
    message = pb.ScoreResponse(
        scored_count=scores.num_scored,
        num_logprobs=scores.num_logprobs,
        wire_dtype=wire_dtype_to_pb(wire_dtype),
        sampled_logprobs=encode_logprobs(scores.sampled_logprobs, WireDtype.FLOAT32),
        manifest_digest=manifest_digest,
    )
    if scores.topk_token_ids is not None and scores.topk_logprobs is not None and scores.log_tail_mass is not None:
        message.topk_token_ids = encode_token_ids(scores.topk_token_ids)
        message.topk_logprobs = encode_logprobs(scores.topk_logprobs, wire_dtype)
        message.log_tail_mass = encode_logprobs(scores.log_tail_mass, WireDtype.FLOAT32)
    if scores.entropy is not None:
        message.entropy = encode_logprobs(scores.entropy, WireDtype.FLOAT32)
    if scores.candidate_logprobs is not None:
        message.candidate_logprobs = encode_logprobs(scores.candidate_logprobs, wire_dtype)
    message.payload_crc32 = _payload_crc32(message)
    return message


def scores_from_pb(
    message: pb.ScoreResponse, *, num_scored: int, num_logprobs: int, vocab_rows: int | None, num_candidates: int = 0
) -> ScoreArrays:
    """Unpack and check one answer against what was asked for.

    Args:
        message: the answer.
        num_scored: S that was asked for.
        num_logprobs: K that was asked for.
        vocab_rows: V of the teacher's manifest; None where it is not known.
        num_candidates: C that was asked for; 0 where none were.

    Raises:
        CodecError: the answer is not what was asked for, was damaged on the way, or contradicts the contract.
    """
    S, K, C = num_scored, num_logprobs, num_candidates
    if message.scored_count != S or message.num_logprobs != K:
        raise CodecError(
            f"the answer has {message.scored_count} positions and {message.num_logprobs} logprobs; asked: {S}, {K}"
        )
    _check_payload_crc32(message)
    wire_dtype = wire_dtype_from_pb(message.wire_dtype)
    f32 = WireDtype.FLOAT32

    def logprobs(name: str, shape: tuple[int, ...], dtype: WireDtype) -> Float32Array | None:
        return decode_logprobs(name, getattr(message, name), shape, dtype) if message.HasField(name) else None

    scores = ScoreArrays(
        sampled_logprobs=decode_logprobs("sampled_logprobs", message.sampled_logprobs, (S,), f32),
        topk_token_ids=(
            decode_token_ids("topk_token_ids", message.topk_token_ids, (S, K))
            if message.HasField("topk_token_ids")
            else None
        ),
        topk_logprobs=logprobs("topk_logprobs", (S, K), wire_dtype),
        log_tail_mass=logprobs("log_tail_mass", (S,), f32),
        entropy=logprobs("entropy", (S,), f32),
        candidate_logprobs=logprobs("candidate_logprobs", (S, C), wire_dtype),
    )
    if (scores.candidate_logprobs is not None) != (C > 0):
        raise CodecError(
            f"candidate_logprobs is {'present' if C == 0 else 'absent'} though {C} candidates were asked for"
        )
    try:
        check_score_arrays(
            scores, num_scored=S, num_logprobs=K, vocab_rows=vocab_rows, mass_slack=_MASS_SLACK[wire_dtype]
        )
    except ScoreArraysError as exc:
        raise CodecError(str(exc)) from exc
    return scores


def _payload_crc32(message: pb.ScoreResponse) -> int:
    """CRC-32 over an answer's packed bytes; a field that is unset has none."""
    checksum = 0
    for name in _PAYLOADS:
        checksum = zlib.crc32(getattr(message, name), checksum)
    return checksum


def _check_payload_crc32(message: pb.ScoreResponse) -> None:
    if not message.HasField("payload_crc32"):
        return
    found = _payload_crc32(message)
    if found != message.payload_crc32:
        raise CodecError(
            f"the answer's bytes have the CRC-32 {found:#010x}, payload_crc32 is {message.payload_crc32:#010x}: they "
            "were damaged between the teacher and here; ask again, and look for the fault on the network if it stays"
        )


def manifest_to_pb(manifest: Manifest) -> pb.Manifest:
    """The message of a manifest."""
    message = pb.Manifest(
        digest=manifest.digest,
        model_name=manifest.model_name,
        vocab_rows=manifest.vocab_rows,
        dtype=manifest.dtype,
        max_model_len=manifest.max_model_len,
        max_num_logprobs=manifest.max_num_logprobs,
        max_request_tokens=manifest.max_request_tokens,
        max_request_bytes=manifest.max_request_bytes,
        capabilities=sorted(_CAPABILITY_TO_PB[one] for one in manifest.capabilities),
        engine=manifest.engine,
        engine_version=manifest.engine_version,
        service_version=manifest.service_version,
        route=manifest.route,
        route_reason=manifest.route_reason,
    )
    if manifest.weights_digest is not None:
        message.weights_digest = manifest.weights_digest
    if manifest.tokenizer is not None:
        tokenizer = manifest.tokenizer
        message.tokenizer.digest = tokenizer.digest
        message.tokenizer.token_count = tokenizer.token_count
        message.tokenizer.range_size = tokenizer.range_size
        message.tokenizer.range_digests = b"".join(tokenizer.range_digests)
        message.tokenizer.special_token_ids.update(tokenizer.special_token_ids)
    return message


def manifest_from_pb(message: pb.Manifest) -> Manifest:
    """The manifest of a message.

    Capabilities that this side does not know are left out, so an older client talks to a newer teacher. The
    digest is then the sender's own, as its answers repeat it.

    Raises:
        CodecError: a field has no valid value.
    """
    if message.vocab_rows < 1 or message.max_request_tokens < 2 or not message.digest:
        raise CodecError(
            f"the manifest has vocab_rows {message.vocab_rows}, max_request_tokens {message.max_request_tokens} and "
            f"digest {message.digest!r}; they must be >= 1, >= 2 and set"
        )
    known = {number: capability for capability, number in _CAPABILITY_TO_PB.items()}
    return Manifest(
        model_name=message.model_name,
        weights_digest=message.weights_digest if message.HasField("weights_digest") else None,
        tokenizer=_tokenizer_from_pb(message.tokenizer) if message.HasField("tokenizer") else None,
        vocab_rows=message.vocab_rows,
        dtype=message.dtype,
        max_model_len=message.max_model_len,
        max_num_logprobs=message.max_num_logprobs,
        max_request_tokens=message.max_request_tokens,
        max_request_bytes=message.max_request_bytes,
        capabilities=frozenset(known[one] for one in message.capabilities if one in known),
        engine=message.engine,
        engine_version=message.engine_version,
        service_version=message.service_version,
        route=message.route or "only",
        route_reason=message.route_reason if message.HasField("route_reason") else None,
        received_digest=message.digest,
    )


def _tokenizer_from_pb(message: pb.TokenizerManifest) -> TokenizerManifest:
    payload, width = message.range_digests, RANGE_DIGEST_BYTES
    if len(payload) % width:
        raise CodecError(f"range_digests holds {len(payload)} bytes, not a multiple of {width}")
    return TokenizerManifest(
        digest=message.digest,
        token_count=message.token_count,
        range_size=message.range_size,
        range_digests=tuple(payload[i : i + width] for i in range(0, len(payload), width)),
        special_token_ids=dict(message.special_token_ids),
    )
