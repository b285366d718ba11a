"""Files with tokens and certificates: what is taken, what is refused in which words, and when they are read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from protos.credential_files import CredentialFileError, FollowedFiles, read_ca, read_certificate, read_tokens
from tests.support.certificates import Authority, key_pem

TOKEN, OTHER = "a1" * 16, "b2" * 16


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def test_every_line_is_a_token(tmp_path: Path) -> None:
    """In their order; blank lines and remarks don't count."""
    path = tmp_path / "tokens"
    path.write_text(f"# since March\n{TOKEN}\n\n  {OTHER}  \n")
    assert read_tokens(path) == (TOKEN, OTHER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no token"),
        ("# nothing yet\n", "holds no token"),
        ("geheimnis\n", "line 1 of the token file .* has 9 characters"),
        (f"{TOKEN}\nzwei Geheimnisse ohne Ende\n", "line 2 .* is no token"),
        ("geheimnisse-über-sechzehn", "no ASCII text"),
    ],
)
def test_what_is_no_token_is_refused_without_being_shown(tmp_path: Path, content: str, said: str) -> None:
    """The error names file, line and remedy, and nothing of what stands there."""
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(CredentialFileError, match=said) as caught:
        read_tokens(path)
    assert "openssl rand -hex 32" in f"{caught.value}"
    assert "eheimnis" not in f"{caught.value}"


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_certificate_and_its_key_are_read(authority: Authority, side: str) -> None:
    """Both as they stand, and when the certificate ends."""
    pair = authority.sign("teacher")
    found = read_certificate(pair.cert, pair.key, side=side)  # type: ignore[arg-type] # mypy does not check tests
    assert (found.chain_pem, found.key_pem) == (pair.cert.read_bytes(), pair.key.read_bytes())
    assert found.expires.endswith("GMT")
    assert "PRIVATE KEY" not in repr(found)


@pytest.mark.parametrize("side", ["server", "client"])
def test_an_expired_certificate_is_refused(authority: Authority, side: str) -> None:
    """Before anybody is shown it."""
    pair = authority.sign("teacher", days=-1)
    with pytest.raises(CredentialFileError, match=r"teacher.pem can't be used: certificate has expired; make a new"):
        read_certificate(pair.cert, pair.key, side=side)  # type: ignore[arg-type] # mypy does not check tests


def test_files_that_are_no_pair_are_refused(authority: Authority, tmp_path: Path) -> None:
    """Missing, of another certificate, encrypted, or no PEM: each in its own words."""
    pair, other, junk, locked = authority.sign("a"), authority.sign("b"), tmp_path / "junk", tmp_path / "locked"
    junk.write_text("no PEM")
    locked.write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1()), b"password"))
    for cert, key, said in [
        (tmp_path / "none", pair.key, "certificate .*none can't be read: No such file"),
        (pair.cert, tmp_path / "none", "private key .*none can't be read: No such file"),
        (pair.cert, other.key, "b.key does not belong to the certificate .*a.pem"),
        (pair.cert, locked, "locked is encrypted.*openssl pkey"),
        (junk, pair.key, "can't be used .*must be PEM"),
    ]:
        with pytest.raises(CredentialFileError, match=said):
            read_certificate(cert, key, side="server")


def test_a_ca_is_a_file_of_certificates(authority: Authority, tmp_path: Path) -> None:
    """Anything else is refused."""
    assert read_ca(authority.cert) == authority.cert.read_bytes()
    junk = tmp_path / "junk"
    junk.write_text("no PEM")
    with pytest.raises(CredentialFileError, match="junk holds no certificate"):
        read_ca(junk)


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    """Once per change; while they are missing or wrong, what was read last stays, and that is told once."""
    path, changes, failures = tmp_path / "tokens", [], []
    path.write_text(TOKEN)
    followed = FollowedFiles(
        [path], lambda: read_tokens(path), on_change=changes.append, on_failure=lambda exc: failures.append(f"{exc}")
    )
    assert followed.current() == (TOKEN,)
    path.unlink()
    assert [followed.current() for _ in range(3)] == [(TOKEN,)] * 3
    path.write_text("short")
    assert [followed.current() for _ in range(3)] == [(TOKEN,)] * 3
    assert len(failures) == 2
    path.write_text(f"{TOKEN}\n{OTHER}")
    assert [followed.current() for _ in range(3)] == [(TOKEN, OTHER)] * 3
    assert changes == [(TOKEN, OTHER)]
