"""TLS and client certificates on real sockets: who gets in, and what everybody else is told, in bounded time."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from teacher_service.config import load_settings
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import SettingsError
from teacher_service.transports.caller import CallError, calling
from teacher_service.transports.caller_credentials import CallerCredentials
from tests.support.certificates import Authority, Pair
from tests.support.service import Service, running_service
from tests.support.steady_calls import steady_calls
from trainer.errors import ConfigError, TeacherCredentialsError, TeacherError, TeacherUnavailableError
from trainer.teacher import Credentials, TeacherClient, TlsFiles

BOUND_S = 30.0
"""For a refusal; the client is told to look for a teacher for CONNECT_S."""
CONNECT_S = 2.5
HEALTHCHECK = Path(__file__).parents[2] / "docker" / "healthcheck.py"
SHORT_LIFE_S = 3.0
"""Of a certificate that expires under a service that runs."""


def client_of(service: Service, tls: TlsFiles | None, **settings: Any) -> TeacherClient:
    return TeacherClient(
        endpoints=[service.addresses.grpc],
        connect_timeout_s=CONNECT_S,
        credentials=Credentials(tls=tls),
        **settings,
    )


async def refusal(service: Service, tls: TlsFiles | None, **settings: Any) -> TeacherError:
    """What a client is told on entering."""
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(TeacherError) as caught:
            async with client_of(service, tls, **settings):
                pass
    return caught.value


async def bench_refusal(service: Service, **credentials: Any) -> CallError:
    """What a command is told."""
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(CallError) as caught:
            async with calling(
                service.addresses.grpc, client_name="test", credentials=CallerCredentials(**credentials)
            ) as caller:
                await caller.get_manifest(timeout_s=CONNECT_S)
    return caught.value


async def over_https(service: Service, ca: Path, pair: Pair | None = None) -> httpx.Response:
    context = ssl.create_default_context(cafile=f"{ca}")
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    async with httpx.AsyncClient(verify=context, timeout=BOUND_S) as http:
        return await http.get(f"{service.addresses.http_url}/v1/manifest")


async def container_check(service: Service, **variables: Path) -> tuple[int, str]:
    """What the image's health check says, its exit code first."""
    port = service.addresses.http_url.rpartition(":")[2]
    environment = {"TEACHER_HTTP_PORT": port, **{name: f"{path}" for name, path in variables.items()}}
    process = await asyncio.create_subprocess_exec(
        sys.executable, HEALTHCHECK, env=environment, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def serving(pair: Pair, **more: Any) -> Any:
    return running_service(FakeEngine(), tls_cert=pair.cert, tls_key=pair.key, **more)


async def test_the_right_ca_works_on_both_doors(authority: Authority, server: Pair) -> None:
    """gRPC for the trainer and for commands, and HTTP."""
    async with serving(server) as service:
        async with client_of(service, TlsFiles(ca=f"{authority.cert}")) as client:
            assert (await client.score([1, 2, 3], score_start=1, num_logprobs=2)).num_scored == 2
        async with calling(
            service.addresses.grpc, client_name="test", credentials=CallerCredentials(tls_ca=authority.cert)
        ) as caller:
            assert (await caller.get_manifest()).vocab_rows == 32
        assert (await over_https(service, authority.cert)).status_code == 200
        assert service.addresses.http_url.startswith("https://")


async def test_the_images_health_check_gets_through(authority: Authority, server: Pair) -> None:
    """In plain text, by TLS, and where every client must show a certificate."""
    async with running_service(FakeEngine()) as service:
        assert await container_check(service) == (0, "/readyz says 200\n")
    async with serving(server) as service:
        assert await container_check(service, TEACHER_TLS_CERT=server.cert) == (0, "/readyz says 200\n")
    async with serving(server, tls_client_ca=authority.cert) as service:
        told = {"TEACHER_TLS_CERT": server.cert, "TEACHER_TLS_CLIENT_CA": authority.cert}
        status, said = await container_check(service, **told)
        assert status == 1
        assert "name one in HEALTHCHECK_CERT" in said
        pair = authority.sign("kubelet")
        shown = {"HEALTHCHECK_CERT": pair.cert, "HEALTHCHECK_KEY": pair.key}
        assert await container_check(service, **told, **shown) == (0, "/readyz says 200\n")


@pytest.mark.parametrize(
    ("names", "days", "use", "said"),
    [
        (("localhost", "127.0.0.1"), 1, "stranger", "tls.ca did not sign its certificate"),
        (("teacher.example",), 1, "authority", "tls.server_name to a name in it"),
    ],
)
async def test_a_teacher_that_is_not_the_right_one_is_refused_at_once(
    authority: Authority, stranger: Authority, names: tuple[str, ...], days: float, use: str, said: str
) -> None:
    """Another CA or another name: waiting would not help, so nobody waits."""
    ca = {"authority": authority, "stranger": stranger}[use].cert
    async with serving(authority.sign("server", names=names, days=days)) as service:
        error = await refusal(service, TlsFiles(ca=f"{ca}"))
        assert isinstance(error, TeacherCredentialsError)
        assert error.reason == "TLS_FAILED"
        assert said in error.message
        assert service.addresses.grpc in error.message
        told = await bench_refusal(service, tls_ca=ca)
        assert told.reason == "TLS_FAILED"
        assert "--tls-" in told.message
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await over_https(service, ca)


async def test_a_name_of_the_certificate_can_be_asked_for(authority: Authority) -> None:
    """Where the endpoint is called otherwise than the certificate."""
    async with serving(authority.sign("server", names=("teacher.example",))) as service:
        async with client_of(service, TlsFiles(ca=f"{authority.cert}", server_name="teacher.example")):
            pass
        port = service.addresses.grpc.rpartition(":")[2]

        async def resolve(_name: str) -> list[str]:
            return [service.addresses.grpc]

        # a resolved name is what its replicas' certificates are for, whatever their addresses
        async with TeacherClient(
            endpoints=f"teacher.example:{port}",
            connect_timeout_s=CONNECT_S,
            resolve=resolve,
            credentials=Credentials(tls=TlsFiles(ca=f"{authority.cert}")),
        ):
            pass


async def test_an_expired_certificate_is_seen_by_the_client(authority: Authority) -> None:
    """A service that outlived its certificate; one that has expired already does not start with it."""
    expired = authority.sign("expired", days=-1)
    with pytest.raises(SettingsError, match=r"expired.pem can't be used: certificate has expired"):
        async with serving(expired):
            pass
    # its own service starts while it still is good
    async with serving(authority.sign("short", days=SHORT_LIFE_S / 86_400)) as service:
        await asyncio.sleep(SHORT_LIFE_S)
        error = await refusal(service, TlsFiles(ca=f"{authority.cert}"))
        assert isinstance(error, TeacherCredentialsError)
        assert "certificate has expired" in error.message
        assert "past its time" in (await bench_refusal(service, tls_ca=authority.cert)).message
        with pytest.raises(httpx.ConnectError, match="certificate has expired"):
            await over_https(service, authority.cert)


async def test_plain_text_and_tls_tell_each_other_apart(authority: Authority, server: Pair) -> None:
    """A client without TLS at a port with it, and the other way round."""
    async with serving(server) as service:
        error = await refusal(service, None)
        assert isinstance(error, TeacherUnavailableError)
        assert "if it serves with TLS, set actor_rollout_ref.teacher.tls.ca" in error.message
        assert "if it serves with TLS, pass --tls-ca" in (await bench_refusal(service)).message
        async with httpx.AsyncClient(timeout=BOUND_S) as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.get(f"http://{service.addresses.http}/healthz")
    async with running_service(FakeEngine()) as plain:
        error = await refusal(plain, TlsFiles(ca=f"{authority.cert}"))
        assert isinstance(error, TeacherCredentialsError)
        assert "it answers in plain text" in error.message
        assert "it answers in plain text" in (await bench_refusal(plain, tls_ca=authority.cert)).message


async def test_a_client_certificate_is_wanted(authority: Authority, stranger: Authority, server: Pair) -> None:
    """Its own CA's lets in; none, or a stranger's, does not."""
    good, bad = authority.sign("client", names=("trainer",)), stranger.sign("other", names=("trainer",))
    ca = f"{authority.cert}"
    async with serving(server, tls_client_ca=authority.cert) as service:
        async with client_of(service, TlsFiles(ca=ca, cert=f"{good.cert}", key=f"{good.key}")):
            pass
        assert (await over_https(service, authority.cert, good)).status_code == 200
        error = await refusal(service, TlsFiles(ca=ca))
        assert "if it wants client certificates, set actor_rollout_ref.teacher.tls.cert" in error.message
        error = await refusal(service, TlsFiles(ca=ca, cert=f"{bad.cert}", key=f"{bad.key}"))
        assert "it may refuse the client certificate" in error.message
        told = await bench_refusal(service, tls_ca=authority.cert)
        assert "pass --tls-cert and --tls-key" in told.message
        for pair in (None, bad):
            with pytest.raises((httpx.ReadError, httpx.ConnectError)):
                await over_https(service, authority.cert, pair)


async def test_files_that_cannot_be_used_are_named(authority: Authority, server: Pair, tmp_path: Path) -> None:
    """By the client before anything is sent, and by the command line."""
    async with serving(server) as service:
        error = await refusal(service, TlsFiles(ca=f"{tmp_path / 'none'}"))
        assert (type(error), error.reason) == (TeacherCredentialsError, "CREDENTIAL_FILE")
        assert "none can't be read" in error.message
    with pytest.raises(ConfigError, match=r"tls.cert is given without tls.key"):
        TlsFiles(ca="x", cert="y")
    for given, said in [
        ({"tls_cert": server.cert}, "--tls-cert is given without --tls-key"),
        ({"tls_key": server.key}, "--tls-key is given without --tls-cert"),
        ({"tls_client_ca": authority.cert}, "--tls-client-ca is given without --tls-cert"),
    ]:
        with pytest.raises(SettingsError, match=said):
            load_settings({"engine": "fake", **given})


async def test_a_new_certificate_needs_no_restart(authority: Authority, stranger: Authority, server: Pair) -> None:
    """Both doors show it to the next connection; a pair that does not fit is not taken, and calls go on."""
    trusted = authority.cert.read_text() + stranger.cert.read_text()
    both = authority.cert.with_name("both.pem")
    both.write_text(trusted)
    async with (
        serving(server) as service,
        client_of(service, TlsFiles(ca=f"{both}")) as client,
        steady_calls(client) as calls,
    ):
        await calls.more(16)
        old_key = server.key.read_bytes()
        made = stranger.sign("next")
        server.key.write_bytes(made.key.read_bytes())
        assert (await over_https(service, authority.cert)).status_code == 200  # the old pair stays in force
        server.cert.write_bytes(made.cert.read_bytes())
        assert (await over_https(service, stranger.cert)).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await over_https(service, authority.cert)
        assert (await refusal(service, TlsFiles(ca=f"{authority.cert}"))).reason == "TLS_FAILED"
        async with client_of(service, TlsFiles(ca=f"{stranger.cert}")):
            pass
        await calls.more(16)
        log = service.log.getvalue()
    assert "does not belong to the certificate" in log
    assert old_key.decode() not in log


async def test_another_ca_for_clients_needs_no_restart(
    authority: Authority, stranger: Authority, server: Pair, tmp_path: Path
) -> None:
    """Who was let in by the old one alone is not any more, over HTTP and gRPC."""
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(authority.cert.read_bytes())
    old, new = authority.sign("old", names=("trainer",)), stranger.sign("new", names=("trainer",))
    ca = f"{authority.cert}"
    async with serving(server, tls_client_ca=client_ca) as service:
        assert (await over_https(service, authority.cert, old)).status_code == 200
        client_ca.write_bytes(stranger.cert.read_bytes())
        assert (await over_https(service, authority.cert, new)).status_code == 200
        async with client_of(service, TlsFiles(ca=ca, cert=f"{new.cert}", key=f"{new.key}")):
            pass
        with pytest.raises((httpx.ReadError, httpx.ConnectError)):
            await over_https(service, authority.cert, old)
        assert "may refuse" in (await refusal(service, TlsFiles(ca=ca, cert=f"{old.cert}", key=f"{old.key}"))).message


async def test_a_client_takes_a_new_ca_when_it_connects_again(
    authority: Authority, stranger: Authority, server: Pair, tmp_path: Path
) -> None:
    """Its channels are made anew after a failure, with what the files hold then."""
    ca = tmp_path / "trusted.pem"
    ca.write_bytes(authority.cert.read_bytes())
    with capture_logs() as logs:
        async with (
            serving(server) as service,
            client_of(service, TlsFiles(ca=f"{ca}"), health_period_s=0.5) as client,
        ):
            port = int(service.addresses.grpc.rpartition(":")[2])
            await service.close_ports()
            ca.write_bytes(stranger.cert.read_bytes())
            async with serving(stranger.sign("next"), grpc_port=port):
                scores = await client.score([1, 2, 3], score_start=1, num_logprobs=2)
    assert scores.num_scored == 2
    assert any(line["event"] == "TLS files read anew" for line in logs)
