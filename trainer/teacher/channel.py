"""One endpoint: its channel, sized by what its manifest allows, and its calls with the trainer's errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self, TypeVar

from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import tracing
from protos.codec import CodecError, manifest_from_pb
from protos.manifest import Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1.teacher_pb2_grpc import TeacherServiceStub
from trainer.errors import (
    TeacherAnswerError,
    TeacherCredentialsError,
    TeacherDeadlineError,
    TeacherError,
    TeacherUnavailableError,
)
from trainer.teacher.credentials import Identity
from trainer.teacher.failures import translated_errors

_KEEPALIVE_PERIOD_S = 30.0
_KEEPALIVE_TIMEOUT_S = 10.0
_FIRST_RECONNECT_DELAY_S = 0.1
_MAX_RECONNECT_DELAY_S = 2.0
_MANIFEST_BYTES = 1 << 20
"""Most that a manifest may have: 8 bytes per 1,024 tokens, and a few hundred for the rest."""
_OTHER_FIELDS_BYTES = 4096
_INT32_MAX = 2**31 - 1
_WATCH_S = 3600.0
"""Deadline of one health stream, which is then opened again."""
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

T = TypeVar("T")


class Endpoint:
    """A channel to one teacher. Made and closed in one event loop."""

    def __init__(
        self,
        name: str,
        *,
        connect_timeout_s: float,
        max_receive_bytes: int,
        max_send_bytes: int,
        identity: Identity | None = None,
    ) -> None:
        self.name = name
        """`host:port`."""
        self._identity = Identity() if identity is None else identity
        self._channel = self._identity.open_channel(
            name,
            [
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", max_send_bytes),
                ("grpc.keepalive_time_ms", round(_KEEPALIVE_PERIOD_S * 1000)),
                ("grpc.keepalive_timeout_ms", round(_KEEPALIVE_TIMEOUT_S * 1000)),
                # Without it, gRPC stops pinging during a call that takes minutes, and a dead peer goes unnoticed.
                ("grpc.http2.max_pings_without_data", 0),
                # A channel that waits up to two minutes before it connects again outlives every retry.
                ("grpc.initial_reconnect_backoff_ms", round(_FIRST_RECONNECT_DELAY_S * 1000)),
                ("grpc.max_reconnect_backoff_ms", round(_MAX_RECONNECT_DELAY_S * 1000)),
                # Despite its name, gRPC gives up a single connection attempt after this long.
                ("grpc.min_reconnect_backoff_ms", max(round(connect_timeout_s * 1000), 100)),
                # A new client starts afresh, not with the back-off of an older one in this process.
                ("grpc.use_local_subchannel_pool", 1),
                # A teacher stands on the private network; a proxy meant for the internet would lose the call.
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._stub = TeacherServiceStub(self._channel)  # type: ignore[no-untyped-call] # generated
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @classmethod
    def for_manifest(cls, name: str, *, connect_timeout_s: float, identity: Identity | None = None) -> Endpoint:
        """A channel that takes a manifest and nothing larger."""
        return cls(
            name,
            connect_timeout_s=connect_timeout_s,
            max_receive_bytes=_MANIFEST_BYTES,
            max_send_bytes=_OTHER_FIELDS_BYTES,
            identity=identity,
        )

    @classmethod
    def for_scoring(
        cls, name: str, manifest: Manifest, *, connect_timeout_s: float, identity: Identity | None = None
    ) -> Endpoint:
        """A channel that takes the largest answer this teacher can owe."""
        return cls(
            name,
            connect_timeout_s=connect_timeout_s,
            # a manifest is asked for again over the same channel
            max_receive_bytes=max(max_answer_bytes(manifest), _MANIFEST_BYTES),
            max_send_bytes=min(manifest.max_request_bytes, _INT32_MAX),
            identity=identity,
        )

    async def get_manifest(self, *, timeout_s: float) -> Manifest:
        """What the teacher is.

        Raises:
            TeacherError: the call failed.
            TeacherAnswerError: what came is no valid manifest.
        """
        with self._translated(timeout_s):
            answer: pb.GetManifestResponse | None = await self._stub.GetManifest(
                pb.GetManifestRequest(), timeout=timeout_s, metadata=self._identity.metadata()
            )
        try:
            return manifest_from_pb(_parsed(answer, self.name).manifest)
        except CodecError as exc:
            raise TeacherAnswerError(
                f"the manifest of the teacher at {self.name} is invalid: {exc}; is it a teacher service?",
                endpoint=self.name,
                reason="INVALID_MANIFEST",
            ) from exc

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> pb.ScoreResponse:
        """The answer to one request, not yet checked.

        Raises:
            TeacherError: the call failed.
            TeacherAnswerError: the answer's bytes are no message.
        """
        with self._translated(timeout_s):
            answer: pb.ScoreResponse | None = await self._stub.Score(
                request, timeout=timeout_s, metadata=(*self._identity.metadata(), *tracing.metadata())
            )
        return _parsed(answer, self.name)

    async def is_serving(self, *, timeout_s: float) -> bool:
        """Whether the teacher says that it serves; a teacher without a health service does, since it answers.

        Raises:
            TeacherDeadlineError: it does not answer.
            TeacherUnavailableError: it can't be reached.
            TeacherCredentialsError: it is not the one that it should be.
        """
        try:
            with self._translated(timeout_s):
                answer: health_pb2.HealthCheckResponse | None = await self._health.Check(
                    health_pb2.HealthCheckRequest(), timeout=timeout_s
                )
            return bool(_parsed(answer, self.name).status != _NOT_SERVING)
        except (TeacherCredentialsError, TeacherDeadlineError, TeacherUnavailableError):
            raise
        except TeacherError:
            return True

    async def wait_until_not_serving(self) -> None:
        """Follow the teacher's health until it says that it does not serve.

        Raises:
            TeacherError: the stream ended. TeacherRefusedError: the teacher has no health service.
        """
        stream = self._health.Watch(health_pb2.HealthCheckRequest(), timeout=_WATCH_S)
        try:
            with self._translated(_WATCH_S):
                async for answer in stream:
                    if _parsed(answer, self.name).status == _NOT_SERVING:
                        return
        finally:
            stream.cancel()
        raise TeacherUnavailableError(
            f"the teacher at {self.name} ended its health stream", endpoint=self.name, reason="STREAM_ENDED"
        )

    async def close(self) -> None:
        """Close the channel; a call still under way is cancelled."""
        await self._channel.close(grace=None)

    def _translated(self, timeout_s: float) -> AbstractContextManager[None]:
        return translated_errors(self.name, timeout_s=timeout_s, handshake_hint=self._identity.handshake_hint)


def _parsed(answer: T | None, endpoint: str) -> T:
    """The message of an answer; gRPC gives None for bytes that it can't parse, with no error.

    Raises:
        TeacherAnswerError: there is none.
    """
    if answer is None:
        raise TeacherAnswerError(
            f"the answer of the teacher at {endpoint} is no message of the contract: its bytes were damaged on the "
            "way, or no teacher service listens there",
            endpoint=endpoint,
            reason="INVALID_ANSWER",
        )
    return answer


def max_answer_bytes(manifest: Manifest) -> int:
    """Largest ScoreResponse that a teacher with this manifest can send, in bytes.

    Per position: K ids and K logprobs, the sampled logprob, tail mass and entropy, 4 bytes each at most. Candidates
    answer with as many bytes as they were asked with, which the request's limit bounds.
    """
    per_position = 4 * (2 * manifest.max_num_logprobs + 3)
    needed = manifest.max_request_tokens * per_position + manifest.max_request_bytes + _OTHER_FIELDS_BYTES
    return min(needed, _INT32_MAX)
