"""Traces: one for a training step, from the trainer through the client and the wire to the engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from protos import tracing
from teacher_service.engine.fake import FakeEngine
from tests.support.collector import collecting
from tests.support.service import running_service
from tests.support.waiting import until
from trainer.teacher import TeacherClient

ROOT = Path(__file__).parents[2]
REQUEST = {"token_ids": [1, 2, 3, 4], "score_start": 2, "num_logprobs": 2}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What this process exports during the test."""
    exporter = InMemorySpanExporter()
    provider = tracing.provider_for(exporter, at_once=True)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("gkd"))
    yield exporter
    provider.shutdown()


def named(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    """The only span of a name."""
    [found] = [one for one in spans.get_finished_spans() if one.name == name]
    return found


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


async def test_a_step_is_one_trace_down_to_the_engine(spans: InMemorySpanExporter) -> None:
    """Each span's parent is the one that waited for it, across the wire and between processes that share no word."""
    async with running_service(FakeEngine()) as service:
        async with TeacherClient(endpoints=[service.addresses.grpc]) as teacher:
            spans.clear()  # the canary and the first contact belong to no step
            with tracing.in_step("run", 3):
                await teacher.score([1, 2, 3, 4, 5], score_start=2, num_logprobs=4)
        tracing.start_step("run", 3).end()
    chain = [named(spans, name) for name in ("gkd.step", "teacher score", "teacher attempt", "teacher Score")]
    assert {ids(one)[0] for one in chain} == {ids(chain[0])[0]}
    assert chain[0].parent is None
    for above, below in itertools.pairwise(chain):
        assert below.parent is not None
        assert below.parent.span_id == ids(above)[1], below.name
    served = chain[-1]
    assert served.attributes is not None
    assert dict(served.attributes) | {"gkd.request_id": ""} == {
        "gkd.reason": "OK", "gkd.request_id": "", "gkd.source": "computed",
        "gkd.num_tokens": 5, "gkd.num_scored": 3, "gkd.num_logprobs": 4,
    }  # fmt: skip
    for name in ("queue", "engine"):
        part = named(spans, name)
        assert part.parent is not None
        assert part.parent.span_id == ids(served)[1]
        assert part.start_time is not None
        assert part.end_time is not None
        assert served.start_time is not None
        assert served.start_time - 1_000_000 <= part.start_time <= part.end_time
    assert chain[2].attributes is not None
    assert chain[2].attributes["server.address"] == service.addresses.grpc


async def test_steps_and_runs_have_traces_of_their_own(spans: InMemorySpanExporter) -> None:
    """Ids follow from run and step alone."""
    steps = [("a", 1), ("a", 2), ("b", 1), ("a", 1)]
    for run, step in steps:
        tracing.start_step(run, step).end()
    found = [ids(one)[0] for one in spans.get_finished_spans()]
    assert found[0] == found[3]
    assert len(set(found)) == 3


async def test_a_log_line_names_its_trace(spans: InMemorySpanExporter) -> None:
    """Over HTTP too, whose headers carry the same context; and the span says how a refused request ended."""
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with running_service(FakeEngine()) as service:
        answer = await service.http.post("/v1/score", json=REQUEST, headers={"traceparent": parent})
        assert answer.status_code == 200
        answer = await service.http.post(
            "/v1/score", json={**REQUEST, "score_start": 9}, headers={"traceparent": parent}
        )
        assert answer.status_code == 400
        lines = [json.loads(line) for line in service.log.getvalue().splitlines()]
    logged = [one["trace_id"] for one in lines if one.get("method") == "POST /v1/score"]
    assert logged == ["0123456789abcdef0123456789abcdef"] * 2
    served = [one for one in spans.get_finished_spans() if one.name == "teacher POST /v1/score"]
    assert [(one.attributes or {})["gkd.reason"] for one in served] == ["OK", "SCORE_START_OUT_OF_RANGE"]


async def test_without_a_collector_nothing_is_sent() -> None:
    """No header, no ids in the log; and the variables that would name a collector are not set."""
    assert not tracing.start_tracing("test")
    with tracing.in_step("run", 1), tracing.span("x") as span:
        assert not span.is_recording()
        assert tracing.metadata() == ()
        assert tracing.trace_id() is None
    async with running_service(FakeEngine()) as service:
        await service.http.post("/v1/score", json=REQUEST)
        assert "trace_id" not in service.log.getvalue()


@asynccontextmanager
async def served_with(endpoint: str, port_file: Path) -> AsyncIterator[str]:
    """The service as a process, told where the collector is; its HTTP address."""
    command = [
        sys.executable,
        "-m",
        "teacher_service",
        "serve",
        "--engine",
        "fake",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, "--port-file", f"{port_file}", cwd=ROOT, env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    )
    try:
        await until(port_file.exists)
        yield json.loads(port_file.read_text())["http"]  # noqa: ASYNC240  # a line
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_collector_gets_the_spans(tmp_path: Path) -> None:
    """By OTLP over gRPC, at the latest when the service ends."""
    with collecting() as collector:
        async with served_with(collector.endpoint, tmp_path / "ports") as http, httpx.AsyncClient() as client:
            answer = await client.post(f"http://{http}/v1/score", json=REQUEST, timeout=20)
            assert answer.status_code == 200
        found = {(one.service, one.name) for one in collector.spans}
    assert ("gkd-teacher", "teacher POST /v1/score") in found
