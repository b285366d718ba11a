"""How the commands that call a running service prove who they are, and know the service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from protos.credential_files import CredentialFileError, read_ca, read_certificate, read_tokens
from teacher_service.access import AUTHORIZATION
from teacher_service.errors import SettingsError

SYSTEM_CA = Path("system")
"""Stands for the public authorities that gRPC brings along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerCredentials:
    """What a caller shows. Each field is a flag."""

    tls_ca: Path | None = None
    """PEM file of the CA that signed the service's certificate, or `system`. None: plain text."""
    tls_cert: Path | None = None
    """PEM file of the caller's own certificate."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_server_name: str | None = None
    """Name that the service's certificate must have; None: the endpoint's own."""
    token_file: Path | None = None
    """File whose first line is the token."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise SettingsError(f"{given} is given without {missing}; pass both, or neither")
        if self.tls_ca is None and (self.tls_cert or self.tls_server_name):
            raise SettingsError(
                "--tls-ca is missing, so nothing would be encrypted; pass a PEM file, or `system` for the public "
                "authorities"
            )

    @property
    def handshake_hint(self) -> str:
        """What to look at where a service closes new connections without a word."""
        if self.tls_ca is None:
            return "if it serves with TLS, pass --tls-ca"
        if self.tls_cert is None:
            return "if it wants client certificates, pass --tls-cert and --tls-key"
        return "it may refuse the client certificate: the service's --tls-client-ca must have signed it"

    def open_channel(self, endpoint: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """A channel to `host:port`.

        Raises:
            SettingsError: a TLS file can't be used.
        """
        if self.tls_ca is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        try:
            ca_pem = None if self.tls_ca == SYSTEM_CA else read_ca(self.tls_ca)
            key_pem = chain_pem = None
            if self.tls_cert is not None and self.tls_key is not None:
                own = read_certificate(self.tls_cert, self.tls_key, side="client")
                key_pem, chain_pem = own.key_pem, own.chain_pem
        except CredentialFileError as exc:
            raise SettingsError(f"--tls-ca, --tls-cert, --tls-key: {exc}") from exc
        name = self.tls_server_name
        names = () if name is None else (("grpc.ssl_target_name_override", name),)
        return grpc.aio.secure_channel(
            endpoint, grpc.ssl_channel_credentials(ca_pem, key_pem, chain_pem), options=(*options, *names)
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries.

        Raises:
            SettingsError: the token file can't be used.
        """
        if self.token_file is None:
            return ()
        try:
            return ((AUTHORIZATION, f"Bearer {read_tokens(self.token_file)[0]}"),)
        except CredentialFileError as exc:
            raise SettingsError(f"--token-file: {exc}") from exc


def tls_fault_in(details: str) -> str | None:
    """What is wrong with the service's side of TLS, by gRPC's words; None where that is not what failed."""
    _, failed, cause = details.partition("CERTIFICATE_VERIFY_FAILED: ")
    if failed:
        cause = cause.partition(":")[0].strip()
        if "expired" in cause:
            return f"its certificate is past its time ({cause}); renew it"
        return f"the CA of --tls-ca did not sign its certificate ({cause}); pass the CA that did"
    if "Hostname Verification Check failed" in details:
        return "its certificate is for another name; call it by a name in it, or pass one as --tls-server-name"
    if "WRONG_VERSION_NUMBER" in details:
        return "it answers in plain text; leave out --tls-ca, or serve with --tls-cert and --tls-key"
    return None
