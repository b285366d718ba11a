"""Readiness, deadlines, overload, drain and death, as a caller sees them."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.config import ServiceSettings
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import AddressError, EngineDeadError, EngineStartError
from teacher_service.server import TeacherServer
from teacher_service.telemetry import Telemetry, build_logger
from teacher_service.types import ScoreJob
from tests.support.service import (
    DOORS,
    Door,
    Service,
    by_http_protobuf,
    by_json,
    by_unary,
    gated_engine,
    json_of,
    running_service,
    score_request,
)
from tests.support.waiting import TIMEOUT_S, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_NAMES = ("", "teacher.v1.TeacherService")
GOOD = score_request(range(8), 5, 1)


def health_stub(service: Service) -> Any:
    return health_pb2_grpc.HealthStub(service.channel)


async def health(service: Service) -> set[int]:
    """Status under the service's own name and the overall one."""
    stub = health_stub(service)
    return {
        (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)).status
        for name in HEALTH_NAMES
    }


async def http_status(service: Service, path: str) -> int:
    return (await service.http.get(path)).status_code


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_a_request_before_readiness_is_refused_and_works_after(door: Door) -> None:
    """Both ports are open while the model loads; work is refused with NOT_READY and a delay."""
    engine = FakeEngine()
    engine.loading_gate.clear()
    async with running_service(engine, ready=False) as service:
        outcome = await door(service, GOOD)
        assert (outcome.reason, outcome.code) == ("NOT_READY", "UNAVAILABLE")
        assert outcome.retry_delay_s == 1.0
        assert await health(service) == {NOT_SERVING}
        assert [await http_status(service, path) for path in ("/healthz", "/readyz", "/v1/manifest")] == [200, 503, 503]
        engine.loading_gate.set()
        await asyncio.wait_for(service.server.ready.wait(), TIMEOUT_S)
        assert (await door(service, GOOD)).reason == "OK"
        assert await health(service) == {SERVING}
        assert [await http_status(service, path) for path in ("/healthz", "/readyz", "/v1/manifest")] == [200, 200, 200]


def events(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


async def test_a_long_load_says_how_far_it_is_and_how_long_it_took(tmp_path: Path) -> None:
    """A line in each period, which ends with the load; the time stands in the last line and in a metric."""
    (tmp_path / "model.safetensors").write_bytes(bytes(12345))
    engine, log = FakeEngine(), io.StringIO()
    engine.loading_gate.clear()
    telemetry = Telemetry(build_logger(level="info", log_format="json", file=log))
    settings = ServiceSettings(engine="fake", model=str(tmp_path), grpc_port=0, http_port=0)
    server = TeacherServer(settings, engine, telemetry, progress_period_s=0.001)
    stop = asyncio.Event()
    async with server.listening():
        life = asyncio.create_task(server.run(stop=stop, abort=asyncio.Event()))
        await until(lambda: [line["event"] for line in events(log)].count("loading") >= 2)
        assert telemetry.registry.get_sample_value("teacher_engine_load_seconds") == 0
        engine.loading_gate.set()
        await asyncio.wait_for(server.ready.wait(), TIMEOUT_S)
        stop.set()
        await asyncio.wait_for(life, TIMEOUT_S)
    lines = events(log)
    loading = [line for line in lines if line["event"] == "loading"]
    assert {line["weights_bytes"] for line in loading} == {12345}
    assert all(line["resident_bytes"] > 0 for line in loading)
    assert [line["load_s"] for line in loading] == sorted(line["load_s"] for line in loading)
    [ready] = [line for line in lines if line["event"] == "ready"]
    assert lines.index(ready) > lines.index(loading[-1])
    took_s = telemetry.registry.get_sample_value("teacher_engine_load_seconds")
    assert took_s is not None
    assert took_s > 0
    assert ready["load_s"] == round(took_s, 1)


async def test_a_failed_load_reports_no_longer() -> None:
    """The task that writes the lines ends with the load, however that ends."""
    engine, log = FakeEngine(start_error=EngineStartError("no model")), io.StringIO()
    telemetry = Telemetry(build_logger(level="info", log_format="json", file=log))
    server = TeacherServer(ServiceSettings(engine="fake", grpc_port=0, http_port=0), engine, telemetry)
    before = asyncio.all_tasks()
    with pytest.raises(EngineStartError, match="no model"):
        await server.run(stop=asyncio.Event(), abort=asyncio.Event())
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_watcher_of_health_sees_every_turn() -> None:
    """Watch tells of loading, serving and draining without being asked again."""
    engine = gated_engine()
    engine.loading_gate.clear()
    async with running_service(engine, ready=False) as service:
        watch = health_stub(service).Watch(health_pb2.HealthCheckRequest(service=HEALTH_NAMES[1]), timeout=TIMEOUT_S)
        seen = [(await watch.read()).status]
        engine.loading_gate.set()
        seen.append((await watch.read()).status)
        service.stop.set()
        seen.append((await watch.read()).status)
        watch.cancel()
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_a_deadline_ends_the_call_and_takes_the_work_out_of_the_engine(door: Door) -> None:
    """A caller whose time runs out is told so, and the engine sees the cancellation."""
    engine = gated_engine()
    async with running_service(engine) as service:
        outcome = await door(service, GOOD, timeout_s=1.0)
        assert outcome.code == "DEADLINE_EXCEEDED"
        await until(lambda: len(engine.cancelled) == 1)
        assert not engine.running
        engine.scoring_gate.set()
        assert (await door(service, GOOD)).reason == "OK"


async def test_a_deadline_holds_in_the_queue_too() -> None:
    """Work whose time runs out while it waits never reaches the engine."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=1) as service:
        first = asyncio.create_task(by_unary(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        outcome = await by_json(service, GOOD, timeout_s=0.5)
        assert outcome.reason == "DEADLINE_EXCEEDED"
        assert 0 < float(outcome.metadata["limit"]) <= 0.5  # less what the body took to arrive
        engine.scoring_gate.set()
        assert (await first).reason == "OK"
        assert len(engine.finished) == 1


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_the_service_bounds_the_time_of_callers_that_do_not(door: Door) -> None:
    """Nothing runs for ever: max_timeout_s holds whatever the caller allows."""
    engine = gated_engine()
    async with running_service(engine, max_timeout_s=0.5) as service:
        outcome = await door(service, GOOD, timeout_s=TIMEOUT_S)
        assert (outcome.reason, outcome.code) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert len(engine.cancelled) == 1


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_a_full_queue_refuses_with_a_delay(door: Door) -> None:
    """One sequence in the engine, one waiting: the third is refused with RESOURCE_EXHAUSTED and told when to retry."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=1, max_queued_requests=1) as service:
        accepted = [asyncio.create_task(by_unary(service, GOOD)) for _ in range(2)]
        await until(lambda: service.server.queued_requests == 1)
        outcome = await door(service, GOOD)
        assert (outcome.reason, outcome.code) == ("OVERLOADED", "RESOURCE_EXHAUSTED")
        assert outcome.retry_delay_s is not None
        assert outcome.retry_delay_s > 0
        assert outcome.metadata["max_queued_requests"] == "1"
        engine.scoring_gate.set()
        assert [(await one).reason for one in accepted] == ["OK", "OK"]


async def test_a_client_that_names_itself_gets_its_own_share() -> None:
    """Over gRPC and HTTP: a greedy client fills the queue, and one with another name still gets in, at its cost."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=1, max_queued_requests=3) as service:
        request = score_request([1, 2, 3], 1)
        greedy = [asyncio.create_task(by_unary(service, request)) for _ in range(4)]
        await engine.wait_running(1)
        await until(lambda: service.server.queued_requests == 3)
        metadata = (("x-client-id", "modest"),)
        modest = asyncio.ensure_future(service.stub.Score(request, metadata=metadata, timeout=TIMEOUT_S))
        first = await next(asyncio.as_completed(greedy))
        assert (first.reason, first.retry_delay_s) == ("OVERLOADED", 1.0)
        headers = {"x-client-id": "third", "content-type": "application/json"}
        third = asyncio.create_task(service.http.post("/v1/score", content=json_of(request), headers=headers))
        await until(lambda: sum(task.done() for task in greedy) == 2)
        engine.scoring_gate.set()
        await modest
        assert (await third).status_code == 200
        assert sorted([one.reason for one in await asyncio.gather(*greedy)]) == ["OK", "OK", "OVERLOADED", "OVERLOADED"]
        assert {json.loads(line).get("client") for line in service.log.getvalue().splitlines()} >= {
            "127.0.0.1", "127.0.0.1/modest", "127.0.0.1/third"
        }  # fmt: skip


async def test_http_overload_names_the_delay_in_whole_seconds() -> None:
    """Retry-After is rounded up, for clients that know no problem+json."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=1, max_queued_requests=0) as service:
        accepted = asyncio.create_task(by_unary(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        answer = await service.http.post("/v1/score", json={"token_ids": [1, 2], "score_start": 1})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        engine.scoring_gate.set()
        await accepted


@pytest.mark.parametrize("door", [by_json, by_http_protobuf], ids=lambda door: door.__name__)
async def test_a_caller_that_hangs_up_takes_its_work_along(door: Door) -> None:
    """An HTTP caller that closes its connection frees the engine."""
    engine = gated_engine()
    async with running_service(engine) as service:
        calling = asyncio.create_task(door(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        calling.cancel()
        await until(lambda: not engine.running)
        assert len(engine.cancelled) == 1


async def test_a_cancelled_unary_call_takes_its_work_along() -> None:
    """So does a gRPC caller that cancels."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.Score(GOOD)
        await until(lambda: len(engine.running) == 1)
        call.cancel()
        await until(lambda: not engine.running)
        assert len(engine.cancelled) == 1


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_drain_finishes_what_is_in_flight_and_refuses_the_rest(door: Door) -> None:
    """Work in the engine and in the queue is answered; new work is UNAVAILABLE; health says NOT_SERVING."""
    engine = gated_engine()
    async with running_service(engine, max_inflight_requests=1) as service:
        accepted = [asyncio.create_task(door(service, GOOD)) for _ in range(2)]
        await until(lambda: service.server.queued_requests == 1)
        service.stop.set()
        await until(lambda: "draining" in service.log.getvalue())
        outcome = await door(service, GOOD)
        assert (outcome.reason, outcome.code) == ("DRAINING", "UNAVAILABLE")
        assert await health(service) == {NOT_SERVING}
        assert await http_status(service, "/readyz") == 503
        assert await http_status(service, "/healthz") == 200
        engine.scoring_gate.set()
        assert [(await one).reason for one in accepted] == ["OK", "OK"]
        await asyncio.wait_for(service.life, TIMEOUT_S)
    assert engine.is_closed


async def test_a_drain_that_takes_too_long_tells_its_callers() -> None:
    """After drain_timeout_s the rest is dropped with DRAINING, which a client may retry elsewhere."""
    engine = gated_engine()
    async with running_service(engine, drain_timeout_s=0.05) as service:
        accepted = asyncio.create_task(by_unary(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        service.stop.set()
        assert (await accepted).reason == "DRAINING"
        await asyncio.wait_for(service.life, TIMEOUT_S)
        assert len(engine.cancelled) == 1


async def test_abort_ends_a_drain_at_once() -> None:
    """A second signal does not wait for drain_timeout_s."""
    engine = gated_engine()
    async with running_service(engine, drain_timeout_s=1000.0) as service:
        accepted = asyncio.create_task(by_unary(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        service.stop.set()
        service.abort.set()
        assert (await accepted).reason == "DRAINING"
        await asyncio.wait_for(service.life, TIMEOUT_S)


async def test_a_stop_while_the_model_loads_ends_without_error() -> None:
    """There is nothing to finish: loading is given up, the engine closed, and callers are told DRAINING."""
    engine = FakeEngine()
    engine.loading_gate.clear()
    async with running_service(engine, ready=False) as service:
        service.stop.set()
        await asyncio.wait_for(service.life, TIMEOUT_S)
        assert (await by_unary(service, GOOD)).reason == "DRAINING"
    assert engine.is_closed


class HungEngine(FakeEngine):
    """Dies without telling its jobs: they hang."""

    async def score(self, job: ScoreJob) -> Any:
        """See `Engine.score`."""
        self.running.add(job.request_id)
        await asyncio.Event().wait()


@pytest.mark.parametrize("engine_class", [FakeEngine, HungEngine])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_a_dead_engine_ends_calls_health_and_service(engine_class: type[FakeEngine], door: Door) -> None:
    """Calls in flight get ENGINE_DEAD even from an engine that leaves them hanging; the service ends with the cause."""
    engine = engine_class()
    engine.scoring_gate.clear()
    async with running_service(engine) as service:
        calling = asyncio.create_task(door(service, GOOD))
        await until(lambda: len(engine.running) == 1)
        engine.die(RuntimeError("out of memory on device 0"))
        outcome = await asyncio.wait_for(calling, TIMEOUT_S)
        assert (outcome.reason, outcome.code) == ("ENGINE_DEAD", "UNAVAILABLE")
        with pytest.raises(EngineDeadError, match="RuntimeError: out of memory on device 0"):
            await asyncio.wait_for(service.life, TIMEOUT_S)
        assert await health(service) == {NOT_SERVING}
        assert [await http_status(service, path) for path in ("/healthz", "/readyz")] == [503, 503]
        assert (await door(service, GOOD)).reason == "ENGINE_DEAD"


async def test_a_model_that_cannot_be_loaded_ends_the_service() -> None:
    """The error of the engine is the one that the process ends with."""
    engine = FakeEngine(start_error=EngineStartError("no weights in /nowhere; pass another --model"))
    async with running_service(engine, ready=False) as service:
        with pytest.raises(EngineStartError, match="no weights in /nowhere"):
            await asyncio.wait_for(service.life, TIMEOUT_S)
    assert engine.is_closed


class BrokenEngine(FakeEngine):
    """Fails in a way that no engine should."""

    async def score(self, job: ScoreJob) -> Any:
        """See `Engine.score`."""
        raise KeyError("secret path /srv/weights")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_an_unexpected_failure_is_logged_and_not_leaked(door: Door) -> None:
    """The caller gets INTERNAL and a request id; the log has the traceback under that id; the service lives on."""
    async with running_service(BrokenEngine()) as service:
        outcome = await door(service, GOOD)
        assert (outcome.reason, outcome.code) == ("INTERNAL", "INTERNAL")
        assert "secret" not in outcome.message
        assert outcome.metadata["request_id"] in outcome.message
        lines = [json.loads(line) for line in service.log.getvalue().splitlines()]
        logged = [line for line in lines if line["event"] == "request failed unexpectedly"]
        assert [line["request_id"] for line in logged] == [outcome.metadata["request_id"]]
        assert "secret path /srv/weights" in json.dumps(logged[0]["exception"])
        assert await health(service) == {SERVING}


async def test_metrics_count_what_happened() -> None:
    """Outcomes by method and reason, and the positions that were scored."""
    async with running_service(FakeEngine()) as service:
        await by_unary(service, GOOD)
        await by_unary(service, score_request([], 1))
        await by_json(service, GOOD)
        metrics = await service.metrics()
    assert metrics['teacher_requests_total{method="Score",reason="OK"}'] == 1
    assert metrics['teacher_requests_total{method="Score",reason="EMPTY_SEQUENCE"}'] == 1
    assert metrics['teacher_requests_total{method="POST /v1/score",reason="OK"}'] == 1
    assert metrics["teacher_tokens_scored_total"] == 6
    assert metrics["teacher_tokens_total"] == 16
    for name in ("queue", "engine", "encode"):
        assert metrics[f"teacher_{name}_seconds_count"] == 2
    request_bytes = len(GOOD.SerializeToString()) + len(score_request([], 1).SerializeToString())
    assert metrics["teacher_received_bytes_total"] > request_bytes
    assert metrics["teacher_sent_bytes_total"] > 2 * 4 * 3  # at least a logprob for each position
    assert metrics["teacher_inflight_requests"] == metrics["teacher_queued_requests"] == 0


async def test_two_services_in_one_process_count_apart() -> None:
    """Metrics belong to a service instance, not to the process."""
    async with running_service(FakeEngine()) as first, running_service(FakeEngine()) as second:
        await by_unary(first, GOOD)
        assert (await first.metrics())["teacher_tokens_scored_total"] == 3
        assert (await second.metrics())["teacher_tokens_scored_total"] == 0


async def test_a_body_beyond_grpcs_own_cap_is_refused_unread() -> None:
    """Far above the limit gRPC itself refuses, with the same code."""
    async with running_service(FakeEngine(), max_request_bytes=4096) as service:
        outcome = await by_unary(service, b"\x00" * 2**21)
        assert (outcome.reason, outcome.code) == ("", "RESOURCE_EXHAUSTED")
        assert (await by_unary(service, GOOD)).reason == "OK"


async def test_a_hung_up_connection_is_no_error_in_the_log() -> None:
    """Cancelled work is counted as such and logged without a traceback."""
    engine = gated_engine()
    async with running_service(engine) as service:
        call = service.stub.Score(GOOD)
        await until(lambda: len(engine.running) == 1)
        call.cancel()
        await until(lambda: "CANCELLED" in service.log.getvalue())
        assert "exception" not in service.log.getvalue()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_manifest_is_the_same_over_grpc_and_http() -> None:
    """Both name the engine's and the service's bounds, whichever is tighter."""
    engine = FakeEngine(vocab_rows=40, max_model_len=100, max_num_logprobs=20)
    async with running_service(engine, max_num_logprobs=8, max_inflight_tokens=64, max_request_bytes=2048) as service:
        message = (await service.stub.GetManifest(pb.GetManifestRequest(), timeout=TIMEOUT_S)).manifest
        body = (await service.http.get("/v1/manifest")).json()
    bounds = ("max_model_len", "max_request_tokens", "max_num_logprobs", "max_request_bytes", "vocab_rows")
    assert [body[name] for name in bounds] == [100, 64, 8, 2048, 40]
    for name in (*bounds, "digest", "model_name", "dtype", "engine", "engine_version", "service_version"):
        assert getattr(message, name) == body[name]
    assert body["capabilities"] == [
        "candidates",
        "entropy",
        "exact_tail_mass",
        "idempotency",
        "temperature",
        "wire_bfloat16",
        "wire_float16",
    ]
    assert len(message.capabilities) == 7
    assert not message.HasField("weights_digest")
    assert "weights_digest" not in body


@pytest.mark.parametrize("transport", ["grpc", "http"])
async def test_a_taken_port_is_refused(transport: str) -> None:
    """A port has one owner: a second service fails instead of sharing it."""
    async with running_service(FakeEngine()) as first:
        address: str = getattr(first.addresses, transport)
        with pytest.raises(AddressError, match=f"can't listen on {address}.*--{transport}-port"):
            async with running_service(FakeEngine(), **{f"{transport}_port": int(address.split(":")[1])}):
                pytest.fail("two services share a port")


@pytest.mark.parametrize("symbol", ["TeacherService", "TeacherService.Score", "ScoreRequest", "Capability"])
async def test_reflection_describes_the_service(symbol: str) -> None:
    """What grpcurl list and describe ask for: names of the services, and the file that defines a symbol of ours."""
    async with running_service(FakeEngine()) as service:
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        call = stub.ServerReflectionInfo(timeout=TIMEOUT_S)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {one.name for one in (await call.read()).list_services_response.service}
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"teacher.v1.{symbol}"))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
    assert {"teacher.v1.TeacherService", "grpc.health.v1.Health"} <= names
    file = FileDescriptorProto.FromString(files[0])
    assert [method.name for method in file.service[0].method] == ["GetManifest", "Score", "ScoreStream"]


async def test_openapi_describes_bodies_and_problems() -> None:
    """The request's fields, both content types and the problem form stand in /openapi.json; /docs shows it."""
    async with running_service(FakeEngine()) as service:
        spec = (await service.http.get("/openapi.json")).json()
        assert await http_status(service, "/docs") == 200
    operation = spec["paths"]["/v1/score"]["post"]
    content = operation["requestBody"]["content"]
    assert set(content) == {"application/json", "application/x-protobuf"}
    assert content["application/json"]["schema"]["required"] == ["token_ids", "score_start"]
    assert content["application/json"]["schema"]["additionalProperties"] is False
    assert "application/problem+json" in operation["responses"]["429"]["content"]
    assert set(spec["paths"]) == {"/v1/score", "/v1/manifest", "/healthz", "/readyz", "/metrics"}
