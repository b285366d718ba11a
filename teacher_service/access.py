"""Who may call, and as whom: bearer tokens from a file, and what may be left open to whom."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from protos.credential_files import CredentialFileError, FollowedFiles, read_tokens
from teacher_service.errors import SettingsError, UnauthenticatedError

AUTHORIZATION = "authorization"
"""Metadata or header with the token: `Bearer TOKEN`."""

_SCHEME = "bearer"
_ID_PREFIX = "token:"
_ID_CHARS = 8
_REMEDY = (
    "send `authorization: Bearer TOKEN` with a token of the file that the service was given as --token-file (the "
    "trainer: actor_rollout_ref.teacher.token_file; bench: --token-file)"
)


class AcceptedTokens:
    """The tokens of a file, every one of which is accepted; what the file says anew is in force at the next call."""

    def __init__(self, path: Path, logger: FilteringBoundLogger) -> None:
        """Read the file.

        Raises:
            SettingsError: it can't be used.
        """
        try:
            self._digests = FollowedFiles(
                [path],
                lambda: tuple(_digest(token) for token in read_tokens(path)),
                on_change=lambda digests: logger.info(
                    "tokens read anew", token_file=f"{path}", num_tokens=len(digests)
                ),
                on_failure=lambda exc: logger.error(
                    "the token file can't be used; the tokens that were read last stay in force", error=f"{exc}"
                ),
            )
        except CredentialFileError as exc:
            raise SettingsError(f"--token-file: {exc}", metadata={"field": "--token-file", "value": f"{path}"}) from exc

    def identify(self, authorization: str | bytes | None) -> str:
        """The id of the token that a call carries: a hash's first digits, fit for logs.

        Args:
            authorization: the metadata's or header's value; None: it has none.

        Raises:
            UnauthenticatedError: there is no token, or it is none of the file's.
        """
        digest = _digest(_token_in(authorization))
        # every one is compared, so that the time tells nothing of where one matched
        matches = [hmac.compare_digest(digest, accepted) for accepted in self._digests.current()]
        if not any(matches):
            raise UnauthenticatedError(f"the call's token is none that this service accepts; {_REMEDY}")
        return f"{_ID_PREFIX}{digest.hex()[:_ID_CHARS]}"


class Access:
    """Tells callers apart, and refuses those that it doesn't know."""

    def __init__(self, tokens: AcceptedTokens | None = None) -> None:
        """Let in who has a token.

        Args:
            tokens: what is accepted; None: whoever can connect.
        """
        self._tokens = tokens

    def account_of(self, authorization: str | bytes | None, host: str) -> str:
        """Whose account a call goes to, by what the caller can't choose: its token's id; its host where none is needed.

        Raises:
            UnauthenticatedError: a token is needed, and the call has none that is accepted.
        """
        return host if self._tokens is None else self._tokens.identify(authorization)


def _token_in(authorization: str | bytes | None) -> str:
    if not authorization:
        raise UnauthenticatedError(f"the call has no token; {_REMEDY}")
    text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
    scheme, _, token = text.partition(" ")
    if scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError(f"the call's authorization is no bearer token; {_REMEDY}")
    return token.strip()


def _digest(token: str) -> bytes:
    # of one length whatever the token, so that the comparison's time does not tell it
    return hashlib.sha256(b"teacher.v1 token:" + token.encode("utf-8", "surrogateescape")).digest()
