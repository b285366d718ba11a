"""JSON bodies of the HTTP interface. Field meanings: `protos/teacher/v1/teacher.proto`.

Legend: N tokens, S = N - score_start scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos.arrays import Float32Array
from teacher_service.errors import InvalidRequestError, MalformedRequestError, TeacherServiceError, UnknownFieldError
from teacher_service.telemetry import RequestRecord
from teacher_service.types import Manifest, ScoreResult
from teacher_service.validation import ScoreRequest

_MAX_ECHO = 64

LogTail = list[float | Literal["-Infinity"]]


class ScoreBody(BaseModel):
    """One sequence to score."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # fail_fast: a million bad ids are one error, not a million
    token_ids: list[int] = Field(
        fail_fast=True, description="[N] prompt and response; 2 <= N <= max_request_tokens of the manifest."
    )
    score_start: int = Field(description="Index of the first token to score, normally the prompt's length; in [1, N).")
    num_logprobs: int = Field(0, description="K, most likely tokens to return per position; 0: the sampled one only.")
    temperature: float | None = Field(None, description="Divides the logits before the softmax; > 0. Unset: 1.")
    candidate_token_ids: list[list[int]] | None = Field(
        None, fail_fast=True, description="[S][C] token ids whose logprobs are wanted as well."
    )
    return_entropy: bool = Field(False, description="Also return the entropy per position.")
    idempotency_key: str | None = Field(
        None, description="Names this work, so that a retry is not computed twice; 1 to 128 characters."
    )


class TimingsBody(BaseModel):
    """Where the time went, in seconds."""

    queue_s: float = Field(description="Waiting for admission.")
    engine_s: float = Field(description="In the engine.")
    encode_s: float = Field(description="Turning arrays into JSON values.")


class ScoreAnswer(BaseModel):
    """The teacher's distribution at the scored positions; entry i predicted `token_ids[score_start + i]`. Nats.

    A missing thing is absent, never null.
    """

    scored_count: int = Field(description="S.")
    num_logprobs: int = Field(description="K.")
    topk_token_ids: list[list[int]] | None = Field(None, description="[S][K], most likely first. Absent: K = 0.")
    topk_logprobs: list[list[float]] | None = Field(None, description="[S][K] their logprobs. Absent: K = 0.")
    sampled_logprobs: list[float] = Field(description="[S] logprob of the token that stands in the sequence.")
    log_tail_mass: LogTail | None = Field(
        None, description='[S] log of the mass outside the top-k; the string "-Infinity" where none is. Absent: K = 0.'
    )
    entropy: list[float] | None = Field(None, description="[S] entropy. Absent: not asked for.")
    candidate_logprobs: list[list[float]] | None = Field(None, description="[S][C]. Absent: none asked for.")
    manifest_digest: str = Field(description="Digest of the manifest of the teacher that answered.")
    timings: TimingsBody


class TokenizerBody(BaseModel):
    """What the tokenizer maps."""

    digest: str
    token_count: int
    range_size: int
    range_digests: list[str] = Field(description="Lowercase hex, one per range of ids.")
    special_token_ids: dict[str, int]


class ManifestAnswer(BaseModel):
    """What this teacher is."""

    digest: str
    model_name: str
    weights_digest: str | None = None
    tokenizer: TokenizerBody | None = None
    vocab_rows: int
    dtype: str
    max_model_len: int
    max_num_logprobs: int
    max_request_tokens: int
    max_request_bytes: int
    capabilities: list[str]
    engine: str
    engine_version: str
    service_version: str
    route: str
    route_reason: str | None = None


class StatusAnswer(BaseModel):
    """Alive, or ready."""

    status: str


class Problem(BaseModel):
    """An error as RFC 9457 problem+json, with the same reason and metadata as over gRPC."""

    type: str = Field(description="`urn:teacher.v1:` and the reason.")
    title: str = Field(description="Name of the gRPC status code.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="What went wrong: value, limit and remedy.")
    reason: str = Field(description="Stable machine-readable reason.")
    metadata: dict[str, str] = Field(description="The offending value and the limit.")
    retry_delay_s: float | None = Field(None, description="Seconds after which a retry may succeed. Absent: unnamed.")


def parse_body(body: bytes) -> ScoreRequest:
    """Read a JSON body.

    Raises:
        UnknownFieldError: it has a field that the contract lacks.
        MalformedRequestError: it is no JSON, or a field is missing or of the wrong type.
    """
    try:
        parsed = ScoreBody.model_validate_json(body)
    except ValidationError as exc:
        raise _body_error(exc) from exc
    return ScoreRequest(
        token_ids=parsed.token_ids,
        score_start=parsed.score_start,
        num_logprobs=parsed.num_logprobs,
        temperature=1.0 if parsed.temperature is None else parsed.temperature,
        candidate_token_ids=parsed.candidate_token_ids,
        return_entropy=parsed.return_entropy,
        idempotency_key=parsed.idempotency_key,
    )


def _body_error(exc: ValidationError) -> InvalidRequestError:
    errors = exc.errors(include_url=False, include_input=False, include_context=False)
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    if unknown is not None:
        name = str(unknown["loc"][0])[:_MAX_ECHO]
        nearest = difflib.get_close_matches(name, ScoreBody.model_fields, n=1)
        hint = f"did you mean {nearest[0]}" if nearest else f"known are {', '.join(ScoreBody.model_fields)}"
        return UnknownFieldError(
            f"{name!r} is no field of the request; {hint}?" if nearest else f"{name!r} is no field; {hint}",
            metadata={"field": name, "value": name, "limit": ", ".join(ScoreBody.model_fields)},
        )
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"])[:_MAX_ECHO] or "body"
    return MalformedRequestError(
        f"{where}: {first['msg'][: 2 * _MAX_ECHO]}; /openapi.json describes the request",
        metadata={"field": where, "value": first["type"], "limit": "the schema at /openapi.json"},
    )


def encode_fields(result: ScoreResult) -> bytes:
    """A ScoreAnswer less the timings, as JSON; absent things are left out. Floats have the digits of a float32."""
    scores = result.scores
    arrays = {
        name: getattr(scores, name)
        for name in ("topk_token_ids", "topk_logprobs", "sampled_logprobs", "entropy", "candidate_logprobs")
    }
    fields: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
    if scores.log_tail_mass is not None:
        fields["log_tail_mass"] = _json_tail(scores.log_tail_mass)
    fields |= {
        "scored_count": scores.num_scored,
        "num_logprobs": scores.num_logprobs,
        "manifest_digest": result.manifest_digest,
    }
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def with_timings(fields: bytes, record: RequestRecord) -> bytes:
    """The answer's JSON, whole."""
    timings = {"queue_s": record.queue_s, "engine_s": record.engine_s, "encode_s": record.encode_s}
    return fields[:-1] + b',"timings":' + orjson.dumps(timings) + b"}"


def _json_tail(log_tail_S: Float32Array) -> Any:
    """JSON has no infinity; the string is how protobuf's JSON form writes it."""
    if np.isfinite(log_tail_S).all():
        return log_tail_S
    return ["-Infinity" if value == -np.inf else value for value in log_tail_S.tolist()]


def manifest_answer(manifest: Manifest) -> ManifestAnswer:
    """The manifest as JSON."""
    tokenizer = manifest.tokenizer
    return ManifestAnswer(
        digest=manifest.digest,
        model_name=manifest.model_name,
        weights_digest=manifest.weights_digest,
        tokenizer=None
        if tokenizer is None
        else TokenizerBody(
            digest=tokenizer.digest,
            token_count=tokenizer.token_count,
            range_size=tokenizer.range_size,
            range_digests=[one.hex() for one in tokenizer.range_digests],
            special_token_ids=dict(tokenizer.special_token_ids),
        ),
        vocab_rows=manifest.vocab_rows,
        dtype=manifest.dtype,
        max_model_len=manifest.max_model_len,
        max_num_logprobs=manifest.max_num_logprobs,
        max_request_tokens=manifest.max_request_tokens,
        max_request_bytes=manifest.max_request_bytes,
        capabilities=sorted(one.value for one in manifest.capabilities),
        engine=manifest.engine,
        engine_version=manifest.engine_version,
        service_version=manifest.service_version,
        route=manifest.route,
        route_reason=manifest.route_reason,
    )


def problem_of(error: TeacherServiceError) -> Problem:
    """The problem that tells of an error."""
    return Problem(
        type=f"urn:teacher.v1:{error.reason}",
        title=error.grpc_code,
        status=error.http_status,
        detail=error.message,
        reason=error.reason,
        metadata=error.metadata,
        retry_delay_s=error.retry_delay_s,
    )
