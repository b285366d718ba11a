"""gRPC statuses to the trainer's errors, and the words for a call that was given up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped] # googleapis ships no stubs
from grpc_status import rpc_status

from trainer.errors import (
    TeacherCredentialsError,
    TeacherDeadlineError,
    TeacherError,
    TeacherOverloadedError,
    TeacherUnavailableError,
)
from trainer.teacher.resolver import UNRESOLVED
from trainer.teacher.retry import error_class

UNREACHABLE = "UNREACHABLE"
"""Reason of a failure in which no teacher spoke: refused, reset, unresolved."""
NOT_READY = "NOT_READY"
"""The service's reason while it loads its model."""
NOT_SERVING = "NOT_SERVING"
"""Reason for a teacher that is there, but whose health says that it does not serve."""
TLS_FAILED = "TLS_FAILED"
"""Reason of a failure in which the teacher could not prove who it is."""
WENT_DOWN = "WENT_DOWN"
"""Reason of an attempt that the client ended because its teacher went out of rotation."""

_CONNECTING = "failed to connect"
"""In gRPC's words for a connection that never stood."""
_START_ONE = (
    "start one with `python -m teacher_service serve --model PATH --grpc-port 15555` or set "
    "actor_rollout_ref.teacher.server_ip/server_port"
)


@contextmanager
def translated_errors(endpoint: str, *, timeout_s: float, handshake_hint: str) -> Iterator[None]:
    """Raise the trainer's error for a call to `endpoint` that failed.

    Args:
        endpoint: `host:port`.
        timeout_s: what the call was given.
        handshake_hint: what may be wrong where the connection was closed before it stood.

    Raises:
        TeacherError: the class that the status stands for.
    """
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise _error_of(exc, endpoint, timeout_s, handshake_hint) from exc


def gave_up(error: TeacherError, *, num_attempts: int, elapsed_s: float, time_limits: str) -> TeacherError:
    """The error of a call that was retried in vain: what failed last, how often it was tried, what to do.

    Args:
        error: the last failure.
        num_attempts: attempts made.
        elapsed_s: seconds they and the waits between them took.
        time_limits: names of the settings to raise for a teacher that is merely slow.
    """
    attempts = f"{num_attempts} attempt{'' if num_attempts == 1 else 's'}"
    return type(error)(
        f"{error.message} after {attempts} in {elapsed_s:.1f} s; {_remedy(error, time_limits)}",
        endpoint=error.endpoint,
        reason=error.reason,
        metadata=error.metadata,
        retry_delay_s=error.retry_delay_s,
    )


def not_serving(endpoint: str) -> TeacherUnavailableError:
    """The error for a teacher whose health says that it does not serve."""
    return TeacherUnavailableError(
        f"the teacher at {endpoint} says NOT_SERVING: it is loading or draining, or its engine is dead",
        endpoint=endpoint,
        reason=NOT_SERVING,
    )


def went_down(endpoint: str, cause: str) -> TeacherUnavailableError:
    """The error of an attempt whose teacher went out of rotation.

    Args:
        endpoint: `host:port` of the teacher.
        cause: why it did.
    """
    return TeacherUnavailableError(
        f"the teacher at {endpoint} was given up during the call: {cause}", endpoint=endpoint, reason=WENT_DOWN
    )


def _remedy(error: TeacherError, time_limits: str) -> str:
    if error.reason == UNREACHABLE:
        return _START_ONE
    if error.reason == UNRESOLVED:
        return "check the name, or list the teachers' addresses"
    if error.reason == NOT_READY:
        return "raise wait_ready_s if the model needs longer to load"
    if isinstance(error, TeacherCredentialsError):
        return "files are read again when they change: nothing has to be restarted"
    if isinstance(error, TeacherDeadlineError):
        return f"check that a teacher service listens there, or raise {time_limits}"
    if isinstance(error, TeacherOverloadedError):
        return f"lower max_inflight, raise {time_limits}, or add a teacher"
    return "see the teacher's log"


def _error_of(exc: grpc.aio.AioRpcError, endpoint: str, timeout_s: float, handshake_hint: str) -> TeacherError:
    code, details = exc.code().name, exc.details() or ""
    reason, metadata, retry_delay_s = _details_of(exc)
    message = f"the teacher at {endpoint} says: {details}"
    if reason is None:
        if code == "UNAVAILABLE" and (tls_fault := _tls_fault_in(details)) is not None:
            return TeacherCredentialsError(
                f"no TLS with the teacher at {endpoint}: {tls_fault}", endpoint=endpoint, reason=TLS_FAILED
            )
        reason = UNREACHABLE if code == "UNAVAILABLE" else code
        if code == "UNAVAILABLE":
            message = f"no teacher answers at {endpoint} ({_cause_in(details, handshake_hint)})"
        elif code == "DEADLINE_EXCEEDED":
            message = f"the teacher at {endpoint} did not answer within {timeout_s:.1f} s"
        else:
            message = f"the call to the teacher at {endpoint} ended with {code}: {details}"
    return error_class(code, reason)(
        message, endpoint=endpoint, reason=reason, metadata=metadata, retry_delay_s=retry_delay_s
    )


def _details_of(exc: grpc.aio.AioRpcError) -> tuple[str | None, dict[str, str], float | None]:
    """Reason, metadata and retry delay of google.rpc's details; a status without valid ones has none."""
    try:
        # the call's interface is all that from_call reads, and AioRpcError has it
        status = rpc_status.from_call(exc)  # type: ignore[arg-type]
    except (ValueError, DecodeError):
        return None, {}, None
    reason, metadata, retry_delay_s = None, {}, None
    for detail in status.details if status is not None else ():
        error_info, retry_info = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(error_info):
            reason, metadata = error_info.reason or None, dict(error_info.metadata)
        elif detail.Unpack(retry_info):
            retry_delay_s = max(retry_info.retry_delay.ToTimedelta().total_seconds(), 0.0)
    return reason, metadata, retry_delay_s


def _cause_in(details: str, handshake_hint: str) -> str:
    """The cause within gRPC's chain of wrapped messages, e.g. `connection refused`."""
    if _CONNECTING in details and re.search(r"socket closed|connection reset", details, re.IGNORECASE):
        return f"it closed the connection before it stood; {handshake_hint}"
    refused = re.search(r"(connection refused|connection reset|no route to host|timed? ?out)", details, re.IGNORECASE)
    return refused.group(1).lower() if refused else details or "no cause given"


def _tls_fault_in(details: str) -> str | None:
    """What is wrong with the teacher's side of TLS, and the remedy; None where that is not what failed."""
    if (refused := re.search(r"CERTIFICATE_VERIFY_FAILED: ([^:]*)", details)) is not None:
        cause = refused.group(1).strip()
        if "expired" in cause:
            return f"its certificate is past its time ({cause}); renew the service's --tls-cert"
        return (
            f"the CA in actor_rollout_ref.teacher.tls.ca did not sign its certificate ({cause}); name the CA that did"
        )
    if "Hostname Verification Check failed" in details:
        return (
            "its certificate is for another name; name the teacher as the certificate does, or set "
            "actor_rollout_ref.teacher.tls.server_name to a name in it"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return (
            "it answers in plain text; serve with --tls-cert and --tls-key, or leave out actor_rollout_ref.teacher.tls"
        )
    return None
