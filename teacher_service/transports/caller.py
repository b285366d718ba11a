"""The other end of the wire, for the commands that try a running service: one endpoint, every call with a deadline.

Legend: N tokens, S = N - score_start scored positions, K top-k entries.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped] # googleapis ships no stubs
from grpc_health.v1 import health, health_pb2
from grpc_status import rpc_status

from protos.arrays import Int32Array, ScoreArrays
from protos.codec import CodecError, WireDtype, manifest_from_pb, scores_from_pb, wire_dtype_from_pb, wire_dtype_to_pb
from protos.manifest import Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.errors import SettingsError
from teacher_service.offload import off_loop
from teacher_service.transports.caller_credentials import CallerCredentials, tls_fault_in
from teacher_service.transports.messages import CLIENT_KEY, ERROR_DOMAIN
from teacher_service.types import Timings

CONNECT_TIMEOUT_S = 10.0
"""Seconds for the first answer of an endpoint that may not exist."""
UNREACHABLE = "UNREACHABLE"
"""Reason of a failure in which no teacher spoke: refused, reset, unresolved."""
TLS_FAILED = "TLS_FAILED"
"""Reason of a failure in which the teacher could not prove who it is."""
INVALID_ANSWER = "INVALID_ANSWER"
"""Reason of an answer that breaks the contract."""
MANIFEST_CHANGED = "MANIFEST_CHANGED"
"""Reason of an answer by another teacher than the one whose manifest was read."""

_SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_CAUSES = {
    "connection refused": "connection refused",
    "connection reset": "connection reset",
    "socket closed": "connection closed",
    "no route to host": "no route to host",
    "network is unreachable": "network is unreachable",
    "address lookup failed": "unknown host name",
    "dns resolution failed": "unknown host name",
    "http1.x": "it speaks HTTP, not gRPC",
}
"""What stands in gRPC's words, in lower case -> what it means."""
_MAX_PORT = 65535
_FIRST_RECONNECT_DELAY_MS = 100
_MAX_RECONNECT_DELAY_MS = 2000
_CHANNEL_OPTIONS = (
    # whoever names the endpoint trusts it, and an answer's size follows from what was asked for
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", _FIRST_RECONNECT_DELAY_MS),
    ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_DELAY_MS),
    # a new caller starts afresh, not with the back-off of an older one in this process
    ("grpc.use_local_subchannel_pool", 1),
    # a teacher stands on the private network; a proxy meant for the internet would lose the call
    ("grpc.enable_http_proxy", 0),
)


class CallError(Exception):
    """A call that failed: message (what happened, and what to do), machine-readable reason, retry delay."""

    def __init__(self, message: str, *, reason: str, retry_delay_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        """The service's reason; or `UNREACHABLE`, `INVALID_ANSWER`, `MANIFEST_CHANGED`, or a gRPC status code."""
        self.retry_delay_s = retry_delay_s
        """Seconds after which a retry may succeed; None where the service names no delay."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.reason, self.retry_delay_s))


def _rebuild(message: str, reason: str, retry_delay_s: float | None) -> CallError:
    return CallError(message, reason=reason, retry_delay_s=retry_delay_s)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreCall:
    """One sequence to ask for."""

    token_ids: Int32Array
    """[N]: prompt and response."""
    score_start: int
    """Index of the first token to score, in [1, N)."""
    num_logprobs: int
    """K."""
    temperature: float = 1.0
    """Divides the logits before the full softmax."""
    wire_dtype: WireDtype = WireDtype.FLOAT32
    """Element type of the answer's top-k logprobs."""

    @property
    def num_scored(self) -> int:
        """S."""
        return int(self.token_ids.shape[0]) - self.score_start


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreAnswer:
    """One answer, checked against what was asked for, and what it cost."""

    scores: ScoreArrays
    timings: Timings
    """Where the time went in the service, as it says."""
    latency_s: float
    """Seconds from the call until its answer's bytes were here."""
    decode_s: float
    """Seconds of processor time that this side took to unpack and check the answer."""
    payload_bytes: int
    """Size of the answer's message."""


class TeacherCaller:
    """Calls to one endpoint over one channel. `calling` makes and closes it."""

    def __init__(
        self,
        endpoint: str,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        handshake_hint: str = "",
    ) -> None:
        self.endpoint = endpoint
        """`host:port`."""
        self._channel = channel
        self._handshake_hint = handshake_hint
        self._metadata = metadata

    async def get_manifest(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Manifest:
        """What the teacher is.

        Raises:
            CallError: no teacher answers, it is loading or draining, or its manifest breaks the contract.
        """
        payload = await self._call("GetManifest", pb.GetManifestRequest(), timeout_s)
        with self._contract_kept("manifest"):
            return manifest_from_pb(pb.GetManifestResponse.FromString(payload).manifest)

    async def check_health(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> str:
        """The state of the teacher's health service, e.g. `SERVING`.

        Raises:
            CallError: no teacher answers.
        """
        payload = await self._call("Check", health_pb2.HealthCheckRequest(), timeout_s, service=health.SERVICE_NAME)
        with self._contract_kept("health"):
            state = health_pb2.HealthCheckResponse.FromString(payload).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(state))

    async def score(self, call: ScoreCall, *, manifest: Manifest, timeout_s: float) -> ScoreAnswer:
        """Score one sequence.

        Args:
            call: what to ask for.
            manifest: of the teacher that should answer.
            timeout_s: seconds the call may take.

        Raises:
            CallError: the call failed, or its answer is another teacher's or breaks the contract.
        """
        request = _request_of(call)
        began_s = time.perf_counter()
        payload = await self._call("Score", request, timeout_s)
        latency_s = time.perf_counter() - began_s
        with self._contract_kept("answer"):
            answer, scores, decode_s = await off_loop(
                len(payload) // WireDtype.FLOAT32.itemsize, lambda: _timed_decode(payload, call, manifest.vocab_rows)
            )
        if answer.manifest_digest != manifest.digest:
            raise CallError(
                f"the teacher at {self.endpoint} was replaced in the meantime: its manifest's digest is "
                f"{answer.manifest_digest!r}, at first it was {manifest.digest!r}; start again",
                reason=MANIFEST_CHANGED,
            )
        return ScoreAnswer(
            scores=scores,
            timings=Timings(queue_s=answer.timings.queue_s, engine_s=answer.timings.engine_s),
            latency_s=latency_s,
            decode_s=decode_s,
            payload_bytes=len(payload),
        )

    async def _call(self, method: str, request: Message, timeout_s: float, service: str = _SERVICE) -> bytes:
        # as bytes, not by the stub: the size and the cost of unpacking are of interest
        call = self._channel.unary_unary(f"/{service}/{method}", request_serializer=None, response_deserializer=None)
        try:
            payload: bytes = await call(request.SerializeToString(), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as exc:
            is_connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
            raise _error_of(
                exc, self.endpoint, timeout_s, is_connected=is_connected, handshake_hint=self._handshake_hint
            ) from exc
        return payload

    @contextmanager
    def _contract_kept(self, what: str) -> Iterator[None]:
        try:
            yield
        except (CodecError, DecodeError) as exc:
            raise CallError(
                f"the {what} of the teacher at {self.endpoint} breaks the contract: {exc}; check that both sides are "
                "of the same release, and report it if they are",
                reason=INVALID_ANSWER,
            ) from exc


@asynccontextmanager
async def calling(
    endpoint: str, *, client_name: str, credentials: CallerCredentials | None = None
) -> AsyncIterator[TeacherCaller]:
    """A caller of `host:port`; at the end its channel is closed and calls under way are cancelled.

    Nothing is sent yet, so an endpoint that does not answer shows in the first call.

    Args:
        endpoint: `host:port`.
        client_name: by which the service tells this caller from others on the same host, for their fair shares.
        credentials: what the caller shows; None: nothing, in plain text.

    Raises:
        SettingsError: the endpoint is malformed, or a file of the credentials can't be used.
    """
    check_endpoint(endpoint)
    shown = CallerCredentials() if credentials is None else credentials
    metadata = ((CLIENT_KEY, client_name), *shown.metadata())
    channel = shown.open_channel(endpoint, _CHANNEL_OPTIONS)
    try:
        yield TeacherCaller(endpoint, channel, metadata=metadata, handshake_hint=shown.handshake_hint)
    finally:
        await channel.close(grace=None)


def check_endpoint(endpoint: str) -> None:
    """Hold an endpoint to the form `host:port`; an IPv6 address stands in brackets.

    Raises:
        SettingsError: it has another form.
    """
    matched = _ENDPOINT.fullmatch(endpoint)
    if matched is None or not 1 <= int(matched[2]) <= _MAX_PORT:
        raise SettingsError(
            f"--endpoint is {endpoint!r}; it must be HOST:PORT with the gRPC port in [1, {_MAX_PORT}], "
            "such as 127.0.0.1:15555 or [::1]:15555",
            metadata={"field": "--endpoint", "value": endpoint, "limit": "HOST:PORT"},
        )


def _request_of(call: ScoreCall) -> pb.ScoreRequest:
    message = pb.ScoreRequest(
        token_ids=call.token_ids.tolist(),
        score_start=call.score_start,
        num_logprobs=call.num_logprobs,
        wire_dtype=wire_dtype_to_pb(call.wire_dtype),
    )
    if call.temperature != 1.0:
        message.temperature = call.temperature
    return message


def _timed_decode(payload: bytes, call: ScoreCall, vocab_rows: int) -> tuple[pb.ScoreResponse, ScoreArrays, float]:
    # of this thread's own time: other calls compete for the processor
    began_s = time.thread_time()
    answer = pb.ScoreResponse.FromString(payload)
    scores = scores_from_pb(answer, num_scored=call.num_scored, num_logprobs=call.num_logprobs, vocab_rows=vocab_rows)
    wire_dtype = wire_dtype_from_pb(answer.wire_dtype)
    if wire_dtype is not call.wire_dtype:
        raise CodecError(f"wire_dtype is {wire_dtype}, asked was {call.wire_dtype}")
    return answer, scores, time.thread_time() - began_s


def _error_of(
    exc: grpc.aio.AioRpcError, endpoint: str, timeout_s: float, *, is_connected: bool, handshake_hint: str
) -> CallError:
    reason, retry_delay_s = _details_of(exc)
    code, details = exc.code().name, exc.details() or "no cause given"
    if reason is not None:
        message = f"the teacher at {endpoint} says: {details}"
        return CallError(message, reason=reason, retry_delay_s=retry_delay_s)
    if code == "DEADLINE_EXCEEDED" and is_connected:
        message = f"the teacher at {endpoint} did not answer within {timeout_s:g} s; raise --timeout-s, or see its log"
        return CallError(message, reason=code)
    if (tls_fault := tls_fault_in(details)) is not None:
        return CallError(f"no TLS with the teacher at {endpoint}: {tls_fault}", reason=TLS_FAILED)
    if code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}:
        cause = (
            f"no connection within {timeout_s:g} s"
            if code == "DEADLINE_EXCEEDED"
            else _cause_in(details, handshake_hint)
        )
        return CallError(
            f"no teacher answers at {endpoint} ({cause}); start one with `python -m teacher_service serve --model "
            "PATH`, or name the gRPC port of one that runs",
            reason=UNREACHABLE,
        )
    message = f"the call to {endpoint} ended with {code}: {details}; is it the gRPC port of a teacher service?"
    return CallError(message, reason=code)


def _details_of(exc: grpc.aio.AioRpcError) -> tuple[str | None, float | None]:
    """The contract's reason and the retry delay; a status without valid details has none."""
    reason: str | None = None
    retry_delay_s: float | None = None
    try:
        # the call's interface is all that from_call reads, and AioRpcError has it
        status = rpc_status.from_call(exc)  # type: ignore[arg-type]
        for detail in status.details if status is not None else ():
            error_info, retry_info = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(error_info) and error_info.domain == ERROR_DOMAIN:
                reason = error_info.reason or None
            elif detail.Unpack(retry_info):
                retry_delay_s = max(retry_info.retry_delay.ToTimedelta().total_seconds(), 0.0)
    except (ValueError, DecodeError):
        return None, None
    return reason, retry_delay_s


def _cause_in(details: str, handshake_hint: str) -> str:
    """The cause within gRPC's chain of wrapped messages; the whole where none is known."""
    if "failed to connect" in details and re.search("socket closed|connection reset", details, re.IGNORECASE):
        return f"it closed the connection before it stood; {handshake_hint}"
    return next((words for sign, words in _CAUSES.items() if sign in details.lower()), details)
