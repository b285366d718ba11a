"""Messages of the contract to and from the core's plain values, and errors as gRPC tells them."""

from __future__ import annotations

import time
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped] # ships no stubs
from numpy.typing import NDArray

from protos.codec import CodecError, WireDtype, manifest_to_pb, scores_to_pb, wire_dtype_from_pb
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.errors import (
    InvalidCandidatesError,
    InvalidWireDtypeError,
    MalformedRequestError,
    RequestTooLargeError,
    TeacherServiceError,
)
from teacher_service.offload import off_loop
from teacher_service.telemetry import RequestRecord
from teacher_service.types import Manifest, ScoreResult
from teacher_service.validation import ScoreRequest

ERROR_DOMAIN = "teacher.v1"
CLIENT_KEY = "x-client-id"
"""Metadata or header by which a client names itself, for its fair share of the engine."""
MAX_CLIENT_NAME_LENGTH = 64

MessageT = TypeVar("MessageT", bound=Message)


def client_name(given: str | bytes | None, account: str) -> str:
    """How admission and the log call a client; its account where it gives no name."""
    name = given.decode(errors="replace") if isinstance(given, bytes) else given
    return f"{account}/{name[:MAX_CLIENT_NAME_LENGTH]}" if name else account


def check_body_size(num_bytes: int, limit: int) -> None:
    """Hold a body to the limit.

    Raises:
        RequestTooLargeError: it is larger.
    """
    if num_bytes > limit:
        raise RequestTooLargeError(
            f"the body has {num_bytes} bytes or more, limit {limit}; send a shorter sequence, or serve with a larger "
            "--max-request-bytes",
            metadata={"field": "body", "value": f"{num_bytes}", "limit": f"{limit}"},
        )


def parse(kind: type[MessageT], payload: bytes) -> MessageT:
    """Read a message of the contract.

    Raises:
        MalformedRequestError: the bytes are none of that kind.
    """
    try:
        return kind.FromString(payload)
    except DecodeError as exc:
        name = kind.DESCRIPTOR.full_name
        raise MalformedRequestError(
            f"the body of {len(payload)} bytes is no {name}; send that message, serialized; server "
            "reflection shows the service's teacher.proto",
            metadata={"field": "body", "value": f"{len(payload)} bytes", "limit": name},
        ) from exc


def request_from_pb(message: pb.ScoreRequest) -> ScoreRequest:
    """The core's form of a request.

    Raises:
        InvalidCandidatesError: the candidates' bytes don't fill whole rows.
    """
    return ScoreRequest(
        token_ids=message.token_ids,
        score_start=message.score_start,
        num_logprobs=message.num_logprobs,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        candidate_token_ids=_candidates(message.candidates) if message.HasField("candidates") else None,
        return_entropy=message.return_entropy,
        idempotency_key=message.idempotency_key if message.HasField("idempotency_key") else None,
    )


def wire_dtype_of(message: pb.ScoreRequest) -> WireDtype:
    """The element type that the answer should have.

    Raises:
        InvalidWireDtypeError: the number stands for none.
    """
    try:
        return wire_dtype_from_pb(message.wire_dtype)
    except CodecError as exc:
        raise InvalidWireDtypeError(
            f"{exc}; leave it unset for float32",
            metadata={"field": "wire_dtype", "value": f"{message.wire_dtype}", "limit": "0..3"},
        ) from exc


def _candidates(message: pb.Candidates) -> NDArray[np.int32]:
    row_bytes = 4 * message.count
    if message.count < 1 or not message.token_ids or len(message.token_ids) % row_bytes:
        raise InvalidCandidatesError(
            f"candidates has count {message.count} and {len(message.token_ids)} bytes; count must be >= 1 and the "
            "bytes whole rows of count little-endian int32",
            metadata={"field": "candidates", "value": f"{message.count}", "limit": ">= 1"},
        )
    return np.frombuffer(message.token_ids, dtype="<i4").reshape(-1, message.count).astype(np.int32, copy=False)


async def result_to_pb(result: ScoreResult, wire_dtype: WireDtype, record: RequestRecord) -> pb.ScoreResponse:
    """The answer's message, timings included; the record learns how long encoding took."""
    began_s = time.perf_counter()
    scores = result.scores
    message = await off_loop(
        scores.size, lambda: scores_to_pb(scores, wire_dtype=wire_dtype, manifest_digest=result.manifest_digest)
    )
    record.encode_s = time.perf_counter() - began_s
    message.timings.queue_s = result.timings.queue_s
    message.timings.engine_s = result.timings.engine_s
    message.timings.encode_s = record.encode_s
    return message


def manifest_response(manifest: Manifest) -> pb.GetManifestResponse:
    """The manifest's message."""
    return pb.GetManifestResponse(manifest=manifest_to_pb(manifest))


def error_to_status(error: TeacherServiceError) -> status_pb2.Status:
    """The rich status of an error: ErrorInfo always, RetryInfo where there is a delay."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    )
    if error.retry_delay_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
        status.details.add().Pack(retry)
    return status


def error_to_pb(error: TeacherServiceError) -> pb.ScoreError:
    """The error of one sequence on a stream."""
    return pb.ScoreError(
        code=code_pb2.Code.Value(error.grpc_code),
        message=error.message,
        reason=error.reason,
        metadata=error.metadata,
        retry_delay_s=error.retry_delay_s,
    )
