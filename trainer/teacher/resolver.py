"""The replicas' addresses: a list as it is given, or a DNS name that is looked up again and again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from trainer.errors import ConfigError, TeacherUnavailableError

UNRESOLVED = "UNRESOLVED"
"""Reason of a failure in which a name had no address."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""A DNS name with its port, `host:port`, to the `address:port` of every replica behind it."""

_TIMEOUT_S = 5.0
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """A name that resolves to the replicas."""

    name: str
    """`host:port`."""
    resolve: Resolve
    """Looks it up."""
    period_s: float
    """Time between two lookups."""


async def resolve_dns(name: str) -> list[str]:
    """Look up every address of `host:port`, off the event loop.

    IPv4 addresses alone where there are any: one server that listens on both families, as behind `localhost`, would
    be two replicas otherwise.

    Raises:
        TeacherUnavailableError: the name has no address, or the lookup took longer than 5 s.
    """
    host, port = split_endpoint(name)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # a TimeoutError is an OSError; a label beyond 63 characters no name
        cause = f"no answer within {_TIMEOUT_S:g} s" if isinstance(exc, TimeoutError) else str(exc)
        raise TeacherUnavailableError(
            f"the name {host!r} of the teacher at {name} does not resolve ({cause})", endpoint=name, reason=UNRESOLVED
        ) from exc
    by_family = {family: [str(one[4][0]) for one in found if one[0] == family] for family in _FAMILIES}
    addresses = by_family[socket.AF_INET] or [f"[{address}]" for address in by_family[socket.AF_INET6]]
    return sorted({f"{address}:{port}" for address in addresses})


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port`; brackets around an IPv6 address are taken off.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = endpoint.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"the endpoint {endpoint!r} is no `host:port` with a port in [1, 65535]")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_endpoints(endpoints: Sequence[str] | str) -> None:
    """Refuse what is neither one `host:port` nor a list of different ones.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(endpoints, str):
        split_endpoint(endpoints)
        return
    if not endpoints:
        raise ConfigError(
            f"endpoints is {endpoints!r}, must be one `host:port` that resolves to every replica, or a list of at "
            "least one"
        )
    for endpoint in endpoints:
        split_endpoint(endpoint)
    if len(set(endpoints)) != len(endpoints):
        raise ConfigError(f"endpoints holds one twice: {list(endpoints)}; name each once")
