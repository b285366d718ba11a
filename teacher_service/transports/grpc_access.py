"""Who calls over gRPC, and the refusal of who may not; TLS as gRPC takes it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from grpc_health.v1 import health
from grpc_status import rpc_status

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.access import AUTHORIZATION, Access
from teacher_service.errors import TeacherServiceError, UnauthenticatedError
from teacher_service.telemetry import Telemetry
from teacher_service.tls import ServerTls, TlsMaterial
from teacher_service.transports import messages

Context = grpc.aio.ServicerContext[Any, Any]

_OPEN_TO_ALL = f"/{health.SERVICE_NAME}/"
"""A load balancer and the trainer's supervision ask for health, and it tells nothing but that."""
_OWN_METHODS = frozenset(pb.DESCRIPTOR.services_by_name["TeacherService"].methods_by_name)
_OTHER_METHOD = "other"
"""What metrics call a method that may be of the caller's invention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who makes a call."""

    account: str
    """The id of its token; its host where none is needed."""
    client: str
    """The account, and the name that the client gives itself."""


def caller_of(context: Context, access: Access) -> Caller:
    """Who calls, by its metadata and its host.

    Raises:
        UnauthenticatedError: it needs a token, and has none that is accepted.
    """
    metadata = metadata_of(context)
    account = access.account_of(metadata.get(AUTHORIZATION), _host_of(context))
    return Caller(account=account, client=messages.client_name(metadata.get(messages.CLIENT_KEY), account))


def metadata_of(context: Context) -> dict[str, Any]:
    """The metadata that a call carries."""
    return dict(context.invocation_metadata() or ())


def _host_of(context: Context) -> str:
    # a peer is `ipv4:host:port` or `ipv6:%5Bhost%5D:port`
    return unquote(context.peer()).rpartition(":")[0].partition(":")[2].strip("[]")


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs alone
    """Refuses calls without an accepted token before anything of them is read, whatever service they are for."""

    def __init__(self, access: Access, telemetry: Telemetry) -> None:
        self._access = access
        self._telemetry = telemetry

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call that may be made; one that refuses any other."""
        method = str(handler_call_details.method)
        if method.startswith(_OPEN_TO_ALL):
            return await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            self._access.account_of(metadata.get(AUTHORIZATION), "")
        except UnauthenticatedError as exc:
            return self._refusal(exc, method.rpartition("/")[2])
        return await continuation(handler_call_details)

    def _refusal(self, error: UnauthenticatedError, method: str) -> Any:
        async def refuse(_payloads: Any, context: Context) -> None:
            async with translated(context):
                with self._telemetry.request(method if method in _OWN_METHODS else _OTHER_METHOD) as record:
                    record.client = _host_of(context)
                    raise error

        # of this kind for every method: it waits for no message before it answers
        return grpc.stream_stream_rpc_method_handler(refuse)


@asynccontextmanager
async def translated(context: Context) -> AsyncIterator[None]:
    """Turn the service's errors into gRPC's rich status."""
    try:
        yield
    except TeacherServiceError as exc:
        status = rpc_status.to_status(messages.error_to_status(exc))
        await context.abort(status.code, status.details, status.trailing_metadata)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow the files: each new connection is met with what they hold then."""
    given = tls.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        material = tls.current()
        if material is given:
            return None
        given = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        fetch,  # type: ignore[arg-type] # None stands for no change, which the stubs lack
        require_client_authentication=tls.wants_client_certificates,
    )


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    certificate = material.certificate
    return grpc.ssl_server_certificate_configuration(
        [(certificate.key_pem, certificate.chain_pem)], root_certificates=material.client_ca_pem
    )
