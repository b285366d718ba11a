"""What may be listened on without knowing who calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_service.config import load_settings
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import SettingsError
from tests.support.service import running_service

EVERYWHERE = "0.0.0.0"  # noqa: S104 - the point of these tests


@pytest.mark.parametrize("host", [EVERYWHERE, "::", "192.0.2.1", "teacher.example"])
def test_beyond_loopback_somebody_must_be_known(host: str) -> None:
    """Refused before anything is loaded, with the three remedies."""
    with pytest.raises(SettingsError) as caught:
        load_settings({"engine": "fake", "host": host})
    for remedy in (f"--host {host}", "--token-file", "--tls-client-ca", "--insecure (TEACHER_INSECURE=true)"):
        assert remedy in caught.value.message
    for remedy in ({"token_file": "t"}, {"insecure": "true"}, {"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}):
        assert load_settings({"engine": "fake", "host": host} | remedy).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_is_open_to_this_machine(host: str) -> None:
    """As by default."""
    assert load_settings({"engine": "fake", "host": host}).host == host


def test_a_certificate_alone_does_not_tell_who_calls() -> None:
    """It encrypts, and lets everybody in."""
    with pytest.raises(SettingsError, match="nothing tells who may"):
        load_settings({"engine": "fake", "host": EVERYWHERE, "tls_cert": "c", "tls_key": "k"})


async def test_what_others_could_do_is_logged(token_file: Path) -> None:
    """One warning for a service that is open to all, one for tokens in plain text, none on loopback."""
    for settings, said in [
        ({"host": EVERYWHERE, "insecure": True}, "anybody who reaches this service may use it"),
        ({"host": EVERYWHERE, "token_file": token_file}, "travel in plain text"),
        ({"token_file": token_file}, None),
    ]:
        async with running_service(FakeEngine(), **settings) as service:
            log = service.log.getvalue()
        assert log.count('"warning"') == (said is not None)
        assert said is None or said in log
