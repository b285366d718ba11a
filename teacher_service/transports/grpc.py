"""gRPC over the scoring core: TeacherService, health, reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.access import Access
from teacher_service.errors import AddressError
from teacher_service.scoring import Scorer
from teacher_service.telemetry import Telemetry
from teacher_service.tls import ServerTls
from teacher_service.transports import messages
from teacher_service.transports.grpc_access import (
    Context,
    TokenInterceptor,
    caller_of,
    metadata_of,
    server_credentials,
    translated,
)
from teacher_service.transports.grpc_stream import ScoreStreamSession
from teacher_service.transports.reflection import enable_reflection
from teacher_service.transports.sockets import open_socket

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_REFLECTED = (SERVICE, health.SERVICE_NAME)
_HEALTH_NAMES = ("", SERVICE)
# Above our own limit, so that a body that is merely too large gets our error; beyond, gRPC refuses unread.
_HARD_LIMIT_FACTOR = 2
_HARD_LIMIT_SLACK_BYTES = 2**20
_MIN_PING_INTERVAL_MS = 10_000


class GrpcTransport:
    """A gRPC server over one scorer."""

    def __init__(
        self,
        scorer: Scorer,
        telemetry: Telemetry,
        *,
        max_stream_inflight: int,
        access: Access,
        tls: ServerTls | None,
        reflection: bool,
    ) -> None:
        """Listen to nothing yet.

        Args:
            scorer: the core.
            telemetry: told of every request.
            max_stream_inflight: sequences in flight on one stream.
            access: who may call.
            tls: the certificate to show; None: plain text.
            reflection: whether the server describes itself.
        """
        self._scorer = scorer
        self._access = access
        self._tls = tls
        self._telemetry = telemetry
        self._max_stream_inflight = max_stream_inflight
        self._closing = asyncio.Event()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # the stubs lack it
        self._server = grpc.aio.server(
            options=_options(scorer.limits.max_request_bytes), interceptors=[TokenInterceptor(access, telemetry)]
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflection:
            enable_reflection(_REFLECTED, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port.

        Raises:
            AddressError: the port can't be opened.
        """
        await self.set_serving(serving=False)
        # gRPC says no more than "failed to bind", and on stderr by itself: ask the system first
        open_socket(host, port, flag="--grpc-port").close()
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, server_credentials(self._tls))
        except RuntimeError as exc:
            raise AddressError(f"can't listen on {host}:{port}: {exc}; pass another --host or --grpc-port") from exc
        await self._server.start()
        return bound

    async def set_serving(self, *, serving: bool) -> None:
        """Tell the health service's callers and watchers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in _HEALTH_NAMES:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """End open streams, wait for answers being written, and close the port."""
        self._closing.set()
        await self._server.stop(grace_s)

    def _handlers(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        # no deserializer: garbage is ours to refuse, as a bad argument and not as an internal error
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetManifest": grpc.unary_unary_rpc_method_handler(self._get_manifest),
                "Score": grpc.unary_unary_rpc_method_handler(self._score),
                "ScoreStream": grpc.stream_stream_rpc_method_handler(self._score_stream),
            },
        )

    async def _get_manifest(self, payload: bytes, context: Context) -> bytes:
        async with translated(context):
            with self._telemetry.request("GetManifest", metadata_of(context)):
                messages.parse(pb.GetManifestRequest, payload)
                return messages.manifest_response(self._scorer.manifest()).SerializeToString()

    async def _score(self, payload: bytes, context: Context) -> bytes:
        async with translated(context):
            with self._telemetry.request("Score", metadata_of(context)) as record:
                caller = caller_of(context, self._access)
                record.client, record.account = caller.client, caller.account
                record.received_bytes = len(payload)
                messages.check_body_size(len(payload), self._scorer.limits.max_request_bytes)
                message = messages.parse(pb.ScoreRequest, payload)
                wire_dtype = messages.wire_dtype_of(message)
                result = await self._scorer.score(
                    messages.request_from_pb(message), timeout_s=context.time_remaining(), record=record
                )
                answer = (await messages.result_to_pb(result, wire_dtype, record)).SerializeToString()
                record.sent_bytes = len(answer)
                return answer

    async def _score_stream(self, payloads: AsyncIterator[bytes], context: Context) -> None:
        async with translated(context):
            session = ScoreStreamSession(
                self._scorer,
                self._telemetry,
                context,
                caller=caller_of(context, self._access),
                max_inflight=self._max_stream_inflight,
                closing=self._closing,
            )
            await session.run(payloads)


def _options(max_request_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", _HARD_LIMIT_FACTOR * max_request_bytes + _HARD_LIMIT_SLACK_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
    ]
