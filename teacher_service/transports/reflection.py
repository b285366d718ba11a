"""Server reflection that also finds methods, which `grpcurl describe` asks for by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection


def enable_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Let a caller without any proto file list and describe these services, and reflection itself."""
    pool = _MethodAwarePool(descriptor_pool.Default())
    names = (*services, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=pool)  # type: ignore[arg-type] # all that it uses is there


class _MethodAwarePool:
    """A descriptor pool whose search by symbol knows methods: protobuf's own knows all other symbols."""

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        self._pool = pool

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 - protobuf's name
        """The file that defines a symbol.

        Raises:
            KeyError: none does.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            return self._pool.FindServiceByName(service).methods_by_name[method].containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
