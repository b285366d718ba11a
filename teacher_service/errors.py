"""Everything the service refuses or fails with: ONE table, class -> gRPC code, HTTP status, reason, retryable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TeacherServiceError(Exception):
    """A failure that a caller is told of: message (value, limit, remedy), reason, and machine-readable metadata."""

    grpc_code: ClassVar[str]
    """Name of the gRPC status code."""
    http_status: ClassVar[int]
    """HTTP status of the same failure."""
    reason: ClassVar[str]
    """Stable machine-readable reason, upper snake case."""
    retryable: ClassVar[bool]
    """Whether the same request may succeed later or elsewhere."""

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_delay_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        """The offending value and the limit, as strings."""
        self.retry_delay_s = retry_delay_s
        """Seconds after which a retry may succeed; None where the service names no delay."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.metadata, self.retry_delay_s))


def _rebuild(
    cls: type[TeacherServiceError], message: str, metadata: dict[str, str], retry_delay_s: float | None
) -> TeacherServiceError:
    return cls(message, metadata=metadata, retry_delay_s=retry_delay_s)


class InvalidRequestError(TeacherServiceError):
    """The request breaks a rule of the contract; sending it again can't help."""

    grpc_code, http_status, reason, retryable = "INVALID_ARGUMENT", 400, "INVALID_REQUEST", False


class MalformedRequestError(InvalidRequestError):
    """The body is no message or JSON of the contract."""

    reason = "MALFORMED_REQUEST"


class UnknownFieldError(InvalidRequestError):
    """The JSON body has a field that the contract lacks."""

    reason = "UNKNOWN_FIELD"


class EmptySequenceError(InvalidRequestError):
    """token_ids is empty."""

    reason = "EMPTY_SEQUENCE"


class ScoreStartOutOfRangeError(InvalidRequestError):
    """score_start is outside [1, N)."""

    reason = "SCORE_START_OUT_OF_RANGE"


class TokenIdOutOfRangeError(InvalidRequestError):
    """A token id is outside [0, V)."""

    reason = "TOKEN_ID_OUT_OF_RANGE"


class SequenceTooLongError(InvalidRequestError):
    """The sequence is longer than the teacher can score."""

    reason = "SEQUENCE_TOO_LONG"


class NumLogprobsOutOfRangeError(InvalidRequestError):
    """num_logprobs is outside [0, max_num_logprobs]."""

    reason = "NUM_LOGPROBS_OUT_OF_RANGE"


class InvalidTemperatureError(InvalidRequestError):
    """temperature is not finite or not > 0."""

    reason = "INVALID_TEMPERATURE"


class InvalidCandidatesError(InvalidRequestError):
    """candidates has the wrong shape."""

    reason = "INVALID_CANDIDATES"


class InvalidWireDtypeError(InvalidRequestError):
    """wire_dtype is no element type of the contract."""

    reason = "INVALID_WIRE_DTYPE"


class InvalidIdempotencyKeyError(InvalidRequestError):
    """idempotency_key is empty or too long."""

    reason = "INVALID_IDEMPOTENCY_KEY"


class IdempotencyKeyReusedError(InvalidRequestError):
    """idempotency_key names another request, which is under way or was answered a short while ago."""

    http_status, reason = 422, "IDEMPOTENCY_KEY_REUSED"


class InvalidTimeoutError(InvalidRequestError):
    """A timeout is no finite number of seconds > 0."""

    reason = "INVALID_TIMEOUT"


class InvalidStreamIdError(InvalidRequestError):
    """The id of a message on a stream is missing, too long, or in use by a sequence in flight."""

    reason = "INVALID_STREAM_ID"


class UnsupportedContentTypeError(InvalidRequestError):
    """The HTTP body is of a type that the service does not read."""

    http_status, reason = 415, "UNSUPPORTED_CONTENT_TYPE"


class NotFoundError(InvalidRequestError):
    """The HTTP path is none of the service's."""

    grpc_code, http_status, reason = "UNIMPLEMENTED", 404, "NOT_FOUND"


class MethodNotAllowedError(InvalidRequestError):
    """The HTTP path exists, but not with this method."""

    grpc_code, http_status, reason = "UNIMPLEMENTED", 405, "METHOD_NOT_ALLOWED"


class RequestTooLargeError(TeacherServiceError):
    """The body is over the size limit."""

    grpc_code, http_status, reason, retryable = "RESOURCE_EXHAUSTED", 413, "REQUEST_TOO_LARGE", False


class AnswerTooLargeError(RequestTooLargeError):
    """The answer would be over the size limit."""

    reason = "ANSWER_TOO_LARGE"


class OverMemoryBudgetError(TeacherServiceError):
    """The sequence takes more memory than the engine has, even alone."""

    grpc_code, http_status, reason, retryable = "RESOURCE_EXHAUSTED", 413, "OVER_MEMORY_BUDGET", False


class UnauthenticatedError(TeacherServiceError):
    """The call carries no token, or none that the service accepts. Never says which one it was."""

    grpc_code, http_status, reason, retryable = "UNAUTHENTICATED", 401, "UNAUTHENTICATED", False


class MissingCapabilityError(TeacherServiceError):
    """The engine can't do what was asked for."""

    grpc_code, http_status, reason, retryable = "FAILED_PRECONDITION", 422, "MISSING_CAPABILITY", False


class OverloadedError(TeacherServiceError):
    """The queue is full; carries a retry delay."""

    grpc_code, http_status, reason, retryable = "RESOURCE_EXHAUSTED", 429, "OVERLOADED", True


class NotReadyError(TeacherServiceError):
    """The model is still loading."""

    grpc_code, http_status, reason, retryable = "UNAVAILABLE", 503, "NOT_READY", True


class DrainingError(TeacherServiceError):
    """The service is shutting down and takes no new work."""

    grpc_code, http_status, reason, retryable = "UNAVAILABLE", 503, "DRAINING", True


class EngineDeadError(TeacherServiceError):
    """The engine is dead; the process is about to end."""

    grpc_code, http_status, reason, retryable = "UNAVAILABLE", 503, "ENGINE_DEAD", True


class DeadlineExceededError(TeacherServiceError):
    """The caller's time ran out; the work was dropped."""

    grpc_code, http_status, reason, retryable = "DEADLINE_EXCEEDED", 504, "DEADLINE_EXCEEDED", True


class ClientGoneError(TeacherServiceError):
    """The caller hung up; the work was dropped. Nobody reads it but the log and the metrics."""

    grpc_code, http_status, reason, retryable = "CANCELLED", 499, "CANCELLED", False


class EngineError(TeacherServiceError):
    """The engine failed on this request, or answered what the contract does not allow."""

    grpc_code, http_status, reason, retryable = "INTERNAL", 500, "ENGINE_ERROR", False


class InternalError(TeacherServiceError):
    """A defect of the service. The message carries the request's id; the cause stands in the log alone."""

    grpc_code, http_status, reason, retryable = "INTERNAL", 500, "INTERNAL", False


class SettingsError(TeacherServiceError):
    """A flag or environment variable is unknown or out of range. Never reaches a caller: the process ends with it."""

    grpc_code, http_status, reason, retryable = "INTERNAL", 500, "SETTINGS", False


class AddressError(TeacherServiceError):
    """A port can't be opened. Never reaches a caller: the process ends with it."""

    grpc_code, http_status, reason, retryable = "INTERNAL", 500, "ADDRESS", False


class EngineStartError(TeacherServiceError):
    """The model can't be loaded. Never reaches a caller: the process ends with it."""

    grpc_code, http_status, reason, retryable = "INTERNAL", 500, "ENGINE_START", False


def all_error_classes() -> tuple[type[TeacherServiceError], ...]:
    """Every class of the table, parents before children."""
    found: list[type[TeacherServiceError]] = []
    pending = list(TeacherServiceError.__subclasses__())
    while pending:
        cls = pending.pop(0)
        found.append(cls)
        pending.extend(cls.__subclasses__())
    return tuple(found)
