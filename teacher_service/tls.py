"""The service's certificate, and the authority of its clients' certificates, kept up to date while it runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from protos.credential_files import Certificate, CredentialFileError, FollowedFiles, read_ca, read_certificate
from teacher_service.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TlsMaterial:
    """What the files held at one moment."""

    certificate: Certificate
    """The service's."""
    client_ca_pem: bytes | None
    """Who signs clients' certificates; None: clients need none."""
    context: ssl.SSLContext
    """The same for a server of the standard library."""


class ServerTls:
    """The files' content now: a new connection is met with what they say, without a restart."""

    def __init__(self, *, cert: Path, key: Path, client_ca: Path | None, logger: FilteringBoundLogger) -> None:
        """Read the files.

        Raises:
            SettingsError: they can't be used.
        """
        self.wants_client_certificates = client_ca is not None
        """Whether a client must show a certificate."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._logger = logger
        try:
            self._files = FollowedFiles(
                [cert, key] if client_ca is None else [cert, key, client_ca],
                self._load,
                on_change=self._report,
                on_failure=lambda exc: logger.error(
                    "the TLS files can't be used; what was read last stays in force", error=f"{exc}"
                ),
            )
        except CredentialFileError as exc:
            raise SettingsError(f"--tls-cert, --tls-key, --tls-client-ca: {exc}") from exc
        self._report(self.current())

    def current(self) -> TlsMaterial:
        """What is in force for a connection that begins now."""
        return self._files.current()

    def http_context(self) -> ssl.SSLContext:
        """For a listener that keeps one context for good: each handshake takes the material of its moment."""
        front = self.current().context

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            context = self.current().context
            if connection.context is not context:
                connection.context = context

        front.sni_callback = choose
        return front

    def _load(self) -> TlsMaterial:
        certificate = read_certificate(self._cert, self._key, side="server")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key)
        client_ca_pem = None
        if self._client_ca is not None:
            client_ca_pem = read_ca(self._client_ca)
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # a resumed session is not verified again, and would outlive its CA here
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return TlsMaterial(certificate=certificate, client_ca_pem=client_ca_pem, context=context)

    def _report(self, material: TlsMaterial) -> None:
        self._logger.info("certificate read", tls_cert=f"{self._cert}", expires=material.certificate.expires)
