"""Files that hold certificates or tokens, as both sides read them: checked, and read again once they change."""

from __future__ import annotations

import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NoReturn, TypeVar

MIN_TOKEN_LENGTH = 16
"""Characters of the shortest token that is taken: a shorter one can be guessed."""
MAX_TOKEN_LENGTH = 512
"""Characters of the longest: headers are bounded."""

_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750, b64token
_MAX_READS = 3
"""Attempts to read files that change meanwhile."""
_HANDSHAKE_ROUNDS = 4

T = TypeVar("T")
Side = Literal["server", "client"]


class CredentialFileError(ValueError):
    """A file is missing or unreadable, or holds something else. The message names the file, never what it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """A certificate with its key."""

    chain_pem: bytes
    """The certificate, and the ones between it and its CA."""
    key_pem: bytes = field(repr=False)
    """Its private key."""
    expires: str
    """When it ends, as OpenSSL writes it."""


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file: one per line, in its order; blank lines and those that begin with # don't count.

    Raises:
        CredentialFileError: the file can't be read, has no token, or one is too short, too long or no bearer token.
    """
    try:
        text = _read(path, "token file").decode("ascii")
    except UnicodeDecodeError as exc:
        raise CredentialFileError(f"the token file {path} is no ASCII text; {_HOW_TO_MAKE}") from exc
    tokens = []
    for number, line in enumerate(text.splitlines(), start=1):
        token = line.strip()
        if token and not token.startswith("#"):
            _check_token(token, f"line {number} of the token file {path}")
            tokens.append(token)
    if not tokens:
        raise CredentialFileError(f"the token file {path} holds no token; {_HOW_TO_MAKE}")
    return tuple(tokens)


_HOW_TO_MAKE = "write one with `openssl rand -hex 32`"


def _check_token(token: str, where: str) -> None:
    if not MIN_TOKEN_LENGTH <= len(token) <= MAX_TOKEN_LENGTH:
        raise CredentialFileError(
            f"{where} has {len(token)} characters, a token has {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH}; {_HOW_TO_MAKE}"
        )
    if _TOKEN.fullmatch(token) is None:
        raise CredentialFileError(
            f"{where} is no token: it may hold letters, digits and -._~+/ with = at its end; {_HOW_TO_MAKE}"
        )


def read_certificate(chain: Path, key: Path, *, side: Side) -> Certificate:
    """A certificate and its key, PEM each, fit to be shown by one side now.

    Args:
        chain: the certificate, followed by the ones between it and its CA.
        key: its private key, not encrypted.
        side: who shows it.

    Raises:
        CredentialFileError: a file can't be read or is no PEM, they don't belong together, the key is encrypted, or the
            certificate has expired, is not valid yet, or is not for that side.
    """
    chain_pem, key_pem = _read(chain, "certificate"), _read(key, "private key")

    def refuse_password() -> NoReturn:
        raise CredentialFileError(
            f"the private key {key} is encrypted, and nobody is there to type its password; decrypt it with "
            f"`openssl pkey -in {key} -out KEY` and protect the file by its mode"
        )

    contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        for context in contexts:
            context.load_cert_chain(chain, key, password=refuse_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise CredentialFileError(
                f"the private key {key} does not belong to the certificate {chain}; name two that were made together"
            ) from exc
        raise CredentialFileError(
            f"the certificate {chain} and the private key {key} can't be used ({exc.reason or exc}); both must be PEM"
        ) from exc
    try:
        return Certificate(chain_pem=chain_pem, key_pem=key_pem, expires=_expiry(chain, *contexts, side=side))
    except ssl.SSLCertVerificationError as exc:
        raise CredentialFileError(
            f"the certificate {chain} can't be used: {exc.verify_message}; make a new one, or set the clock"
        ) from exc
    except ssl.SSLError as exc:
        raise CredentialFileError(f"the certificate {chain} can't be used ({exc.reason or exc})") from exc


def _expiry(chain: Path, server: ssl.SSLContext, client: ssl.SSLContext, *, side: Side) -> str:
    """The end of a certificate that both contexts hold, once one has shown it to the other.

    The standard library reads no dates of a certificate that nobody has shown: so one side shows it, in memory.
    """
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    verifier = client if side == "server" else server
    verifier.verify_mode = ssl.CERT_REQUIRED
    # its issuer is not at hand, and not what is in question
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    verifier.load_verify_locations(chain)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "client": client.wrap_bio(to_client, to_server),
        "server": server.wrap_bio(to_server, to_client, server_side=True),
    }
    for _ in range(_HANDSHAKE_ROUNDS):
        for end in ends.values():
            with suppress(ssl.SSLWantReadError):  # the other side's turn
                end.do_handshake()
    shown = ends["client" if side == "server" else "server"].getpeercert()
    return str((shown or {}).get("notAfter", "at an unknown time"))


def read_ca(path: Path) -> bytes:
    """Certificates of authorities, PEM.

    Raises:
        CredentialFileError: the file can't be read, holds no certificate, or only expired ones.
    """
    content = _read(path, "CA file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise CredentialFileError(
            f"the CA file {path} holds no certificate ({exc.reason or exc}); it must be PEM"
        ) from exc
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs() if "notAfter" in one]
    if ends and max(ends) < time.time():
        raise CredentialFileError(
            f"every certificate of the CA file {path} has expired; make a new CA, or set the clock"
        )
    return content


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise CredentialFileError(
            f"the {what} {path} can't be read: {exc.strerror}; name a file that this user may read"
        ) from exc


Stamp = tuple[tuple[int, int, int] | None, ...]


class FollowedFiles(Generic[T]):
    """What files hold, read again once one of them has changed. Any thread may ask."""

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], T],
        *,
        on_change: Callable[[T], None],
        on_failure: Callable[[CredentialFileError], None],
    ) -> None:
        """Read them.

        Args:
            paths: the files.
            load: reads and checks all of them.
            on_change: told what was read anew.
            on_failure: told, once per change, that what is there now can't be used. What was read last stays in use.

        Raises:
            CredentialFileError: what is there now can't be used.
        """
        self._paths, self._load = tuple(paths), load
        self._on_change, self._on_failure = on_change, on_failure
        self._lock = threading.Lock()
        self._stamp, self._value = self._read()

    def current(self) -> T:
        """What they hold now; what they held last while they are missing or wrong."""
        # a look at the files' times for each call: some microseconds, and no thread that watches
        if self._stamp_now() != self._stamp:
            with self._lock:
                self._reload()
        return self._value

    def _reload(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return  # another thread was first
        try:
            self._stamp, self._value = self._read()
        except CredentialFileError as exc:
            self._stamp = stamp
            self._on_failure(exc)
        else:
            self._on_change(self._value)

    def _read(self) -> tuple[Stamp, T]:
        """Read all files as they are at one moment, and when that was."""
        for _ in range(_MAX_READS):
            stamp = self._stamp_now()
            try:
                value = self._load()
            except OSError as exc:  # gone or changed between two looks at it
                raise CredentialFileError(f"{', '.join(map(str, self._paths))} can't be read: {exc}") from exc
            if stamp == self._stamp_now():
                break
        return stamp, value

    def _stamp_now(self) -> Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
