"""The real service on loopback ports of its own, and the doors through which a request can reach it."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1.teacher_pb2_grpc import TeacherServiceStub
from teacher_service.config import ServiceSettings
from teacher_service.engine.base import Engine
from teacher_service.engine.fake import FakeEngine
from teacher_service.server import Addresses, TeacherServer
from teacher_service.telemetry import Telemetry, build_logger
from tests.support.waiting import TIMEOUT_S

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass
class Service:
    """A service under test."""

    server: TeacherServer
    addresses: Addresses
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    stop: asyncio.Event
    abort: asyncio.Event
    life: asyncio.Task[None]
    log: io.StringIO
    ports: AsyncExitStack
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = TeacherServiceStub(self.channel)

    async def close_ports(self) -> None:
        """What the process does last; `life` should be over."""
        await self.ports.aclose()

    async def metrics(self) -> dict[str, float]:
        """Every sample by name and labels, as the text format writes them."""
        text = (await self.http.get("/metrics")).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


@asynccontextmanager
async def running_service(
    engine: Engine, *, ready: bool = True, ready_timeout_s: float = TIMEOUT_S, **settings: Any
) -> AsyncIterator[Service]:
    """Serve an engine; at the end, whatever happened, ports and tasks are gone.

    Args:
        engine: scores.
        ready: whether to wait until it serves.
        ready_timeout_s: how long; the engine's error is raised before.
        settings: differ from the defaults.
    """
    given = {"engine": "fake", "grpc_port": 0, "http_port": 0, "drain_timeout_s": TIMEOUT_S} | settings
    log = io.StringIO()
    telemetry = Telemetry(build_logger(level="debug", log_format="json", file=log))
    server = TeacherServer(ServiceSettings(**given), engine, telemetry)
    stop, abort = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as ports:
        addresses = await ports.enter_async_context(server.listening())
        life = asyncio.create_task(server.run(stop=stop, abort=abort))
        async with (
            grpc.aio.insecure_channel(addresses.grpc, options=UNLIMITED) as channel,
            httpx.AsyncClient(base_url=f"http://{addresses.http}", timeout=TIMEOUT_S) as http,
        ):
            try:
                if ready:
                    await _wait_ready(server, life, ready_timeout_s)
                yield Service(server, addresses, channel, http, stop, abort, life, log, ports)
            finally:
                stop.set()
                abort.set()
                await asyncio.wait({life}, timeout=TIMEOUT_S)
                life.cancel()
                await asyncio.gather(life, return_exceptions=True)


async def _wait_ready(server: TeacherServer, life: asyncio.Task[None], timeout_s: float) -> None:
    waiting = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait({waiting, life}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            life.result()
        assert waiting.done(), f"not ready after {timeout_s} s"
    finally:
        waiting.cancel()


@dataclass
class Outcome:
    """What a caller was told, in one form for all doors."""

    reason: str
    """`OK`, or the error's reason."""
    code: str = "OK"
    """gRPC status code; over HTTP the problem's title, which names it."""
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None
    topk_token_ids: list[int] | None = None
    """Most likely token per position, of an answered request that asked for some."""


def gated_engine(**faults: Any) -> FakeEngine:
    """An engine that holds its jobs until the test opens the gate."""
    engine = FakeEngine(**faults)
    engine.scoring_gate.clear()
    return engine


def score_request(token_ids: Iterable[int], score_start: int, num_logprobs: int = 0, **more: Any) -> pb.ScoreRequest:
    return pb.ScoreRequest(token_ids=token_ids, score_start=score_start, num_logprobs=num_logprobs, **more)


async def by_unary(service: Service, request: pb.ScoreRequest | bytes, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Over `Score`; bytes go as they are."""
    try:
        answer = await _raw_unary(service)(_payload(request), timeout=timeout_s)
    except grpc.aio.AioRpcError as exc:
        return outcome_of_rpc_error(exc)
    return outcome_of_answer(pb.ScoreResponse.FromString(answer))


def _raw_unary(service: Service) -> Any:
    return service.channel.unary_unary("/teacher.v1.TeacherService/Score")


def raw_stream(service: Service, timeout_s: float = TIMEOUT_S) -> Any:
    """A ScoreStream call that takes and gives bytes."""
    return service.channel.stream_stream("/teacher.v1.TeacherService/ScoreStream")(timeout=timeout_s)


async def by_stream(service: Service, request: pb.ScoreRequest | bytes, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Over a `ScoreStream` of one message; bytes go as they are."""
    call = raw_stream(service)
    if isinstance(request, bytes):
        payload = request
    else:
        payload = pb.ScoreStreamRequest(id="one", request=request, timeout_s=timeout_s).SerializeToString()
    try:
        await call.write(payload)
        await call.done_writing()
        answer = pb.ScoreStreamResponse.FromString(await call.read())
    except grpc.aio.AioRpcError as exc:
        return outcome_of_rpc_error(exc)
    return outcome_of_stream_answer(answer)


async def by_json(service: Service, request: pb.ScoreRequest | bytes, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Over HTTP in JSON; bytes go as they are."""
    content = request if isinstance(request, bytes) else json_of(request).encode()
    return await _post(service, content, "application/json", timeout_s)


async def by_http_protobuf(service: Service, request: pb.ScoreRequest | bytes, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Over HTTP in protobuf; bytes go as they are."""
    return await _post(service, _payload(request), "application/x-protobuf", timeout_s)


Door = Callable[..., Awaitable[Outcome]]
DOORS: tuple[Door, ...] = (by_unary, by_stream, by_json, by_http_protobuf)


async def _post(service: Service, content: bytes, content_type: str, timeout_s: float) -> Outcome:
    headers = {"content-type": content_type, "x-request-timeout-s": f"{timeout_s}"}
    answer = await service.http.post("/v1/score", content=content, headers=headers)
    if answer.status_code == 200 and content_type == "application/json":
        rows = answer.json().get("topk_token_ids")
        return Outcome("OK", topk_token_ids=None if rows is None else [row[0] for row in rows])
    if answer.status_code == 200:
        return outcome_of_answer(pb.ScoreResponse.FromString(answer.content))
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    return Outcome(
        problem["reason"],
        problem["title"],
        problem["detail"],
        problem["metadata"],
        problem.get("retry_delay_s"),
    )


def json_of(request: pb.ScoreRequest) -> str:
    """The JSON body that asks for the same; NaN and Infinity are written as Python writes them."""
    body: dict[str, Any] = {
        "token_ids": list(request.token_ids),
        "score_start": request.score_start,
        "num_logprobs": request.num_logprobs,
        "return_entropy": request.return_entropy,
    }
    if request.HasField("temperature"):
        body["temperature"] = request.temperature
    if request.HasField("idempotency_key"):
        body["idempotency_key"] = request.idempotency_key
    if request.HasField("candidates"):
        ids = memoryview(request.candidates.token_ids).cast("i").tolist()
        width = request.candidates.count
        body["candidate_token_ids"] = [ids[i : i + width] for i in range(0, len(ids), width)]
    return json.dumps(body)


def _payload(request: pb.ScoreRequest | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def outcome_of_answer(answer: pb.ScoreResponse) -> Outcome:
    ids = memoryview(answer.topk_token_ids).cast("i").tolist()[:: max(answer.num_logprobs, 1)]
    return Outcome("OK", topk_token_ids=ids if answer.num_logprobs else None)


def outcome_of_stream_answer(answer: pb.ScoreStreamResponse) -> Outcome:
    if answer.HasField("response"):
        return outcome_of_answer(answer.response)
    error = answer.error
    return Outcome(
        error.reason,
        code_pb2.Code.Name(error.code),
        error.message,
        dict(error.metadata),
        error.retry_delay_s if error.HasField("retry_delay_s") else None,
    )


def outcome_of_rpc_error(error: grpc.aio.AioRpcError) -> Outcome:
    """Reason and delay from the rich status; a bare status has the reason `""`."""
    outcome = Outcome("", error.code().name, error.details() or "")
    status = rpc_status.from_call(error)
    for detail in [] if status is None else status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "teacher.v1"
            outcome.reason, outcome.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            outcome.retry_delay_s = retry.retry_delay.ToNanoseconds() / 1e9
            assert math.isfinite(outcome.retry_delay_s)
    return outcome
