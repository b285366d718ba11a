"""Endpoints: lists, names, and what a name resolves to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from trainer.errors import ConfigError, TeacherUnavailableError
from trainer.teacher.resolver import check_endpoints, resolve_dns, split_endpoint

V4, V6 = socket.AF_INET, socket.AF_INET6


def names(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, str]) -> None:
    """Let every name resolve to these."""

    async def getaddrinfo(*_arguments: Any, **_settings: Any) -> list[tuple[Any, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", (address, 7)) for family, address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_every_address_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, with the port that was given."""
    names(monkeypatch, (V4, "10.0.0.2"), (V4, "10.0.0.1"), (V4, "10.0.0.2"))
    assert await resolve_dns("teachers:7") == ["10.0.0.1:7", "10.0.0.2:7"]


async def test_where_both_families_are_there_ipv4_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One server behind `localhost` is one replica."""
    names(monkeypatch, (V6, "::1"), (V4, "127.0.0.1"))
    assert await resolve_dns("localhost:7") == ["127.0.0.1:7"]


async def test_ipv6_addresses_alone_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In brackets, as gRPC wants them."""
    names(monkeypatch, (V6, "fd00::2"), (V6, "fd00::1"))
    assert await resolve_dns("teachers:7") == ["[fd00::1]:7", "[fd00::2]:7"]


async def test_an_address_stands_for_itself() -> None:
    """Looked up for real."""
    assert await resolve_dns("127.0.0.1:7") == ["127.0.0.1:7"]


async def test_a_name_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the name and the cause."""

    async def getaddrinfo(*_arguments: Any, **_settings: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(TeacherUnavailableError, match=r"'nowhere' .* not resolve \(.*not known\)") as caught:
        await resolve_dns("nowhere:7")
    assert caught.value.reason == "UNRESOLVED"


async def test_a_lookup_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that is silent does not hold the client."""

    async def getaddrinfo(*_arguments: Any, **_settings: Any) -> list[Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("trainer.teacher.resolver._TIMEOUT_S", 0.01)
    with pytest.raises(TeacherUnavailableError, match=r"no answer within 0\.01 s"):
        await resolve_dns("slow:7")


def test_an_endpoint_is_split() -> None:
    """Brackets go."""
    assert split_endpoint("[::1]:80") == ("::1", 80)
    assert split_endpoint("a.b:80") == ("a.b", 80)


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        ([], "at least one"),
        ("", "'' is no `host:port`"),
        ("host", "'host' is no `host:port`"),
        (["host:0"], "port in"),
        (["host:70000"], "port in"),
        (["a:1", "a:1"], "one twice"),
    ],
)
def test_what_is_no_endpoint_is_refused(endpoints: list[str] | str, words: str) -> None:
    """With the value."""
    with pytest.raises(ConfigError, match=words):
        check_endpoints(endpoints)
