"""Listening sockets with errors that say what to do."""

from __future__ import annotations

import socket

from teacher_service.errors import AddressError


def open_socket(host: str, port: int, *, flag: str) -> socket.socket:
    """A listening socket that shares its port with nobody.

    Raises:
        AddressError: the address or port can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as exc:
        raise AddressError(
            f"can't listen on {host}:{port}: {exc.strerror}; stop what holds it, or pass another --host or {flag} (0 "
            "takes a free port)",
            metadata={"field": flag, "value": f"{host}:{port}"},
        ) from exc
