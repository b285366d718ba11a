"""How a client proves who it is, and knows the teacher: TLS files and a token file, followed while it runs."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from protos.credential_files import (
    Certificate,
    CredentialFileError,
    FollowedFiles,
    read_ca,
    read_certificate,
    read_tokens,
)
from trainer.errors import ConfigError

_log = structlog.get_logger(__name__)

SYSTEM_CA = "system"
"""For `TlsFiles.ca`: the public authorities that gRPC brings along."""

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """TLS to the teacher."""

    ca: str
    """PEM file of the CA that signed the teacher's certificate, or `system`."""
    cert: str | None = None
    """PEM file of the client's own certificate; None: it shows none."""
    key: str | None = None
    """PEM file of its private key."""
    server_name: str | None = None
    """Name that the teacher's certificate must have; None: the endpoint's own."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.cert else ("key", "cert")
            raise ConfigError(f"tls.{given} is given without tls.{missing}; set both, or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a client proves itself with. Holds paths alone, so it may be printed and sent."""

    tls: TlsFiles | None = None
    """None: plain text."""
    token_file: str | None = None
    """File whose first line is the token; None: the client sends none."""


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True, kw_only=True, slots=True)
class _TlsContent:
    ca_pem: bytes | None
    certificate: Certificate | None


class Identity:
    """The files' content now: a new channel and a new call take what they hold then. Used in one event loop."""

    def __init__(self, credentials: Credentials = NO_CREDENTIALS, *, known_as: str | None = None) -> None:
        """Read the files.

        Args:
            credentials: what there is.
            known_as: host name that was resolved to the endpoints' addresses, which certificates don't name.

        Raises:
            CredentialFileError: a file can't be used.
        """
        self._tls = credentials.tls
        self.sends_token = credentials.token_file is not None
        self._server_name = None if self._tls is None else self._tls.server_name or _as_name(known_as)
        self._content = None if self._tls is None else _follow_tls(self._tls)
        self._token = None if credentials.token_file is None else _follow_token(Path(credentials.token_file))

    @property
    def is_private(self) -> bool:
        """Whether others on the way can't read along."""
        return self._tls is not None

    @property
    def handshake_hint(self) -> str:
        """What to look at where a teacher closes new connections without a word."""
        if self._tls is None:
            return "if it serves with TLS, set actor_rollout_ref.teacher.tls.ca"
        if self._tls.cert is None:
            return "if it wants client certificates, set actor_rollout_ref.teacher.tls.cert and tls.key"
        return (
            f"it may refuse the client certificate {self._tls.cert}: the service's --tls-client-ca must have signed it"
        )

    def open_channel(self, endpoint: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """A channel to `host:port`, with the certificates of this moment."""
        if self._content is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        content = self._content.current()
        own = content.certificate
        credentials = grpc.ssl_channel_credentials(
            content.ca_pem, None if own is None else own.key_pem, None if own is None else own.chain_pem
        )
        names = () if self._server_name is None else (("grpc.ssl_target_name_override", self._server_name),)
        return grpc.aio.secure_channel(endpoint, credentials, options=(*options, *names))

    def metadata(self) -> Metadata:
        """What a call carries: the token of this moment."""
        return () if self._token is None else (("authorization", f"Bearer {self._token.current()}"),)


def _follow_tls(files: TlsFiles) -> FollowedFiles[_TlsContent]:
    ca = None if files.ca == SYSTEM_CA else Path(files.ca)
    pair = None if files.cert is None or files.key is None else (Path(files.cert), Path(files.key))

    def load() -> _TlsContent:
        return _TlsContent(
            ca_pem=None if ca is None else read_ca(ca),
            certificate=None if pair is None else read_certificate(*pair, side="client"),
        )

    paths = [path for path in (ca, *(pair or ())) if path is not None]
    return FollowedFiles(paths, load, on_change=lambda _: _log.info("TLS files read anew"), on_failure=_report)


def _follow_token(path: Path) -> FollowedFiles[str]:
    return FollowedFiles(
        [path],
        lambda: read_tokens(path)[0],
        on_change=lambda _: _log.info("token read anew", token_file=f"{path}"),
        on_failure=_report,
    )


def _report(error: CredentialFileError) -> None:
    _log.warning("a file of the teacher's credentials can't be used; what was read last stays in use", error=f"{error}")


def _as_name(host: str | None) -> str | None:
    """A host that a certificate would name; an address is compared as it is."""
    if host is None:
        return None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return None
