"""Bearer tokens over both doors: who needs one, what is said to who has none, and their replacement under load."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from teacher_service.access import AcceptedTokens
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import SettingsError
from teacher_service.telemetry import build_logger
from teacher_service.transports.caller import CallError, calling
from teacher_service.transports.caller_credentials import CallerCredentials
from tests.security.conftest import OTHER_TOKEN, TOKEN
from tests.support.service import Service, outcome_of_rpc_error, raw_stream, running_service, score_request
from tests.support.service_process import services
from tests.support.steady_calls import steady_calls
from tests.support.waiting import until
from trainer.errors import TeacherCredentialsError
from trainer.teacher import Credentials, RetryPolicy, TeacherClient

BOUND_S = 20.0
WRONG = [
    None,
    f"Bearer {OTHER_TOKEN}",
    f"Bearer {TOKEN[:-1]}",
    f"Bearer {TOKEN}x",
    f"Basic {TOKEN}",
    "Bearer",
    TOKEN,
    "Bearer \u00fc\u00fc",
]


def put(path: Path, *tokens: str) -> None:
    """Write a token file in place, as an editor may."""
    path.write_text("".join(f"{token}\n" for token in tokens))


def process_list_entry(pid: int) -> str:
    """What others may see of a process: its command line and, as the same user, its environment."""
    return "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "environ"))


def client_of(endpoint: str, token_file: Path | None, **settings: Any) -> TeacherClient:
    credentials = Credentials(token_file=None if token_file is None else f"{token_file}")
    return TeacherClient(endpoints=[endpoint], credentials=credentials, **settings)


def with_token(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def reflected(service: Service, metadata: Any = None) -> list[str]:
    """Names of the services, as reflection tells them."""
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    call = stub.ServerReflectionInfo(metadata=metadata, timeout=BOUND_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    call.cancel()
    return [one.name for one in answer.list_services_response.service]


@pytest.mark.parametrize("value", WRONG)
async def test_no_or_a_wrong_token_is_refused_on_both_doors(token_file: Path, value: str | None) -> None:
    """UNAUTHENTICATED and 401, with the remedy, and without the token."""
    async with running_service(FakeEngine(), token_file=token_file) as service:
        headers = {} if value is None else {"authorization": value.encode("latin-1")}
        for path in ("/v1/manifest", "/metrics", "/docs", "/openapi.json", "/nothing"):
            answer = await service.http.get(path, headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (401, "UNAUTHENTICATED")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await service.http.post("/v1/score", json={}, headers=headers)).status_code == 401
        texts = [answer.text]
        if value is None or value.isascii():
            metadata = None if value is None else (("authorization", value),)
            for call in (service.stub.Score(score_request([1, 2], 1), metadata=metadata, timeout=BOUND_S),):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                outcome = outcome_of_rpc_error(caught.value)
                assert (outcome.code, outcome.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
                texts.append(outcome.message)
        for text in texts:
            assert "--token-file" in text
            assert "actor_rollout_ref.teacher.token_file" in text
            assert not (value and len(value) > 10 and value.split()[-1] in text)


async def test_the_right_token_opens_both_doors(token_file: Path) -> None:
    """Scoring, manifest, stream, reflection, metrics, documentation; for the trainer and for commands."""
    async with running_service(FakeEngine(), token_file=token_file) as service:
        headers = {"authorization": f"bearer {TOKEN}"}
        for path in ("/v1/manifest", "/metrics", "/docs", "/openapi.json"):
            assert (await service.http.get(path, headers=headers)).status_code == 200
        assert "teacher.v1.TeacherService" in await reflected(service, with_token(TOKEN))
        async with client_of(service.addresses.grpc, token_file) as client:
            assert (await client.score([1, 2, 3], score_start=1, num_logprobs=1)).num_scored == 2
        endpoint = service.addresses.grpc
        async with calling(endpoint, client_name="x", credentials=CallerCredentials(token_file=token_file)) as caller:
            assert (await caller.get_manifest()).vocab_rows == 32
        async with calling(endpoint, client_name="x") as caller:
            with pytest.raises(CallError, match="the call has no token"):
                await caller.get_manifest()


async def test_who_has_no_token_can_ask_for_health_alone(token_file: Path) -> None:
    """Probes have none; reflection and streams need one, and are refused without waiting for a message."""
    async with running_service(FakeEngine(), token_file=token_file) as service:
        health = health_pb2_grpc.HealthStub(service.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=BOUND_S)).status == 1
        for path in ("/healthz", "/readyz"):
            assert (await service.http.get(path)).status_code == 200
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(service)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stream = raw_stream(service, BOUND_S)
        assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_metrics_can_be_opened_and_self_description_closed(token_file: Path) -> None:
    """--metrics-without-token, --no-reflection, --no-http-docs."""
    async with running_service(
        FakeEngine(), token_file=token_file, metrics_without_token=True, reflection=False, http_docs=False
    ) as service:
        assert (await service.http.get("/metrics")).status_code == 200
        headers = {"authorization": f"Bearer {TOKEN}"}
        for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
            assert (await service.http.get(path, headers=headers)).status_code == 404
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(service, with_token(TOKEN))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("given", [None, OTHER_TOKEN])
async def test_the_first_contact_without_the_right_token_ends_at_once(
    token_file: Path, tmp_path: Path, given: str | None
) -> None:
    """Although the client would wait a minute for a teacher that is not there yet."""
    mine = None if given is None else tmp_path / "mine"
    if mine is not None and given is not None:
        put(mine, given)
    async with running_service(FakeEngine(), token_file=token_file) as service, asyncio.timeout(BOUND_S):
        with pytest.raises(TeacherCredentialsError, match="token_file") as caught:
            async with client_of(service.addresses.grpc, mine, connect_timeout_s=60.0, wait_ready_s=60.0):
                pass
    assert caught.value.reason == "UNAUTHENTICATED"
    assert given is None or given not in f"{caught.value}"


async def test_a_token_is_replaced_under_load_without_a_lost_call(token_file: Path, tmp_path: Path) -> None:
    """Added to the service's file, put into the client's, the old one removed; shown in no list of processes or log."""
    mine = tmp_path / "mine"
    put(mine, TOKEN)
    with services(tmp_path, 1, "--token-file", f"{token_file}", "--log-level", "debug") as (one,):
        async with (
            asyncio.timeout(60.0),
            client_of(one.endpoint, mine, health_period_s=0.5, canary_period_s=0.5) as client,
            steady_calls(client) as calls,
        ):
            await calls.more(32)
            put(token_file, TOKEN, OTHER_TOKEN)
            await calls.more(32)
            put(mine, OTHER_TOKEN)
            await calls.more(32)
            put(token_file, OTHER_TOKEN)
            await calls.more(64)
            assert [replica.last_error for replica in client.replicas] == [None]
        log = one.log_path.read_text()
        shown = log + process_list_entry(one._process.pid)
        assert TOKEN not in shown
        assert OTHER_TOKEN not in shown
    assert "UNAUTHENTICATED" not in log
    assert log.count("tokens read anew") == 2


async def test_calls_outlast_a_token_that_is_refused_for_a_while(token_file: Path, tmp_path: Path) -> None:
    """The service's file is changed first: calls are tried again within their time, and none is lost."""
    mine = tmp_path / "mine"
    put(mine, TOKEN)
    async with (
        asyncio.timeout(60.0),
        running_service(FakeEngine(), token_file=token_file) as service,
        client_of(
            service.addresses.grpc, mine, health_period_s=0.5, total_timeout_s=40.0, retry=RetryPolicy(max_delay_s=0.5)
        ) as client,
        steady_calls(client) as calls,
    ):
        await calls.more(16)
        put(token_file, OTHER_TOKEN)
        await until(lambda: any(one.last_error for one in client.replicas))
        assert "token_file" in f"{client.replicas[0].last_error}"
        put(mine, OTHER_TOKEN)
        await calls.more(32)


async def test_a_call_whose_token_stays_refused_ends_in_its_own_time(token_file: Path, tmp_path: Path) -> None:
    """With what is wrong, and where to change it."""
    mine = tmp_path / "mine"
    put(mine, TOKEN)
    async with (
        running_service(FakeEngine(), token_file=token_file) as service,
        client_of(service.addresses.grpc, mine, total_timeout_s=2.0) as client,
    ):
        put(token_file, OTHER_TOKEN)
        async with asyncio.timeout(BOUND_S + 2.0):
            with pytest.raises(Exception, match=r"none that this service accepts.*token_file"):
                await client.score([1, 2, 3], score_start=1, num_logprobs=1)


async def test_a_token_in_plain_text_to_another_machine_is_warned_of(token_file: Path) -> None:
    """Once per client, and not on this machine."""
    for endpoint, num_warnings in (("127.0.0.1:1", 0), ("192.0.2.1:1", 1)):
        with capture_logs() as logs, pytest.raises(Exception, match=r"127.0.0.1|192.0.2.1"):
            async with client_of(endpoint, token_file, connect_timeout_s=0.2):
                pass
        lines = [line["event"] for line in logs if "plain text" in line["event"]]
        assert len(lines) == num_warnings


async def test_secrets_are_shown_nowhere(token_file: Path) -> None:
    """Not in the log, the metrics, the manifest, or an error; the account's name is a hash."""
    async with running_service(FakeEngine(), token_file=token_file, log_level="debug") as service:
        headers = {"authorization": f"Bearer {TOKEN}"}
        await service.http.post("/v1/score", json={"token_ids": [1, 2], "score_start": 1}, headers=headers)
        await service.http.post("/v1/score", json={}, headers={"authorization": f"Bearer {OTHER_TOKEN}"})
        await service.stub.Score(score_request([1, 2], 1), metadata=with_token(TOKEN))
        shown = [
            service.log.getvalue(),
            (await service.http.get("/metrics", headers=headers)).text,
            (await service.http.get("/v1/manifest", headers=headers)).text,
            repr(service.server._settings),
            repr(Credentials(token_file=f"{token_file}")),
        ]
    assert '"client": "token:' in shown[0]
    assert 'teacher_requests_total{method="HTTP",reason="UNAUTHENTICATED"} 1.0' in shown[1]
    for text in shown:
        assert TOKEN not in text
        assert OTHER_TOKEN not in text


def test_a_token_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    """With the flag, the file and the remedy."""
    for content, said in ((None, "can't be read"), ("", "holds no token"), ("short", "has 5 characters")):
        path = tmp_path / "tokens"
        if content is not None:
            path.write_text(content)
        with pytest.raises(SettingsError, match=f"--token-file: .*{said}"):
            AcceptedTokens(path, build_logger(level="info", log_format="json"))


async def test_an_account_has_a_bounded_share(token_file: Path, tmp_path: Path) -> None:
    """Under whatever names it calls; another account's sequences pass by."""
    put(token_file, TOKEN, OTHER_TOKEN)
    engine = FakeEngine()
    engine.scoring_gate.clear()
    async with running_service(engine, token_file=token_file, max_client_inflight_requests=2) as service:
        admission = service.server._scorer.admission
        calls = [
            asyncio.ensure_future(
                service.stub.Score(
                    score_request([1, 2, number], 1), metadata=(*with_token(TOKEN), ("x-client-id", f"name-{number}"))
                )
            )
            for number in range(5)
        ]
        await until(lambda: (admission.inflight_requests, admission.queued_requests) == (2, 3))
        other = asyncio.ensure_future(service.stub.Score(score_request([3, 4], 1), metadata=with_token(OTHER_TOKEN)))
        await until(lambda: (admission.inflight_requests, admission.queued_requests) == (3, 3))
        engine.scoring_gate.set()
        await asyncio.gather(other, *calls)
        assert (admission.inflight_requests, admission.queued_requests) == (0, 0)


async def test_who_calls_cannot_be_told_by_a_header() -> None:
    """Without tokens the account is the connection's host, also for who is on this machine."""
    async with running_service(FakeEngine()) as service, httpx.AsyncClient() as http:
        url = f"{service.addresses.http_url}/v1/score"
        await http.post(url, json={}, headers={"x-forwarded-for": "192.0.2.7"})
        assert '"client": "127.0.0.1"' in service.log.getvalue()
        assert "192.0.2.7" not in service.log.getvalue()
