"""A scripted teacher on a real gRPC server, for faults that a healthy service can't produce."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.arrays import ScoreArrays
from protos.codec import manifest_to_pb, scores_to_pb, wire_dtype_from_pb
from protos.manifest import Capability, Manifest, TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1.teacher_pb2_grpc import TeacherServiceServicer, add_TeacherServiceServicer_to_server
from trainer.teacher.canary import canary_token_ids

Context = grpc.aio.ServicerContext
Step = Callable[[pb.ScoreRequest, Context], Awaitable[pb.ScoreResponse]]
ManifestStep = Callable[[Context], Awaitable[None]]


def stub_manifest(
    *,
    model_name: str = "stub",
    tokenizer: TokenizerManifest | None = None,
    vocab_rows: int = 32,
    max_num_logprobs: int = 16,
    max_request_tokens: int = 256,
    max_request_bytes: int = 1 << 16,
    capabilities: frozenset[Capability] = frozenset(),
) -> Manifest:
    """A small teacher's manifest."""
    return Manifest(
        model_name=model_name,
        weights_digest=None,
        tokenizer=tokenizer,
        vocab_rows=vocab_rows,
        dtype="float32",
        max_model_len=max_request_tokens,
        max_num_logprobs=max_num_logprobs,
        max_request_tokens=max_request_tokens,
        max_request_bytes=max_request_bytes,
        capabilities=capabilities,
        engine="fake",
        engine_version="1",
        service_version="1",
    )


def uniform_answer(request: pb.ScoreRequest, manifest: Manifest) -> pb.ScoreResponse:
    """What a teacher that finds all tokens equally likely answers."""
    S, K, V = len(request.token_ids) - request.score_start, request.num_logprobs, manifest.vocab_rows
    scores = ScoreArrays(
        sampled_logprobs=np.full(S, -np.log(V), dtype=np.float32),
        topk_token_ids=np.tile(np.arange(K, dtype=np.int32), (S, 1)) if K else None,
        topk_logprobs=np.full((S, K), -np.log(V), dtype=np.float32) if K else None,
        log_tail_mass=np.full(S, np.log((V - K) / V), dtype=np.float32) if K else None,
    )
    wire_dtype = wire_dtype_from_pb(request.wire_dtype)
    return scores_to_pb(scores, wire_dtype=wire_dtype, manifest_digest=manifest.digest)


async def abort(
    context: Context, code: grpc.StatusCode, reason: str | None, message: str, retry_delay_s: float | None
) -> NoReturn:
    """End a call with the contract's error details; `reason` None leaves them out."""
    if reason is None:
        await context.abort(code, message)
    details = [Any(), Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(reason=reason, domain="teacher.v1", metadata={"limit": "7"}))
    if retry_delay_s is None:
        details.pop()
    else:
        delay = Duration(seconds=int(retry_delay_s), nanos=int(retry_delay_s % 1 * 1e9))
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    await context.abort_with_status(
        rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=details))
    )


def fails(
    code: grpc.StatusCode, reason: str | None = None, *, retry_delay_s: float | None = None, message: str = "scripted"
) -> Step:
    """A step that ends the call with an error."""

    async def step(_request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        await abort(context, code, reason, message, retry_delay_s)

    return step


def answers(response: pb.ScoreResponse) -> Step:
    """A step that answers whatever it is given."""

    async def step(_request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
        return response

    return step


async def hangs(_request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
    """A step that never answers."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class _Health(health.aio.HealthServicer):
    """The standard one, silent while its stub is frozen."""

    def __init__(self, stub: TeacherStub) -> None:
        super().__init__()
        self._stub = stub

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """See the contract."""
        self._stub.num_checks += 1
        if self._stub.num_silent_checks:
            self._stub.num_silent_checks -= 1
            await asyncio.Event().wait()
        await self._stub.thawed.wait()
        return await super().Check(request, context)


@dataclass
class TeacherStub(TeacherServiceServicer):
    """Plays its scripts, one step per call, and answers uniformly when they are empty."""

    manifest: Manifest = field(default_factory=stub_manifest)
    script: deque[Step] = field(default_factory=deque)
    """Steps of the next Score calls."""
    manifest_script: deque[ManifestStep] = field(default_factory=deque)
    """Steps before the next manifests; one may abort."""
    requests: list[pb.ScoreRequest] = field(default_factory=list)
    """Every Score request but the canaries, in order of arrival."""
    canary_script: deque[Step] = field(default_factory=deque)
    """Steps of the next canaries."""
    num_canaries: int = 0
    """Canaries that came."""
    num_manifests: int = 0
    """Manifests that were asked for."""
    thawed: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: nothing is answered, not even health, as by a process that was stopped."""
    has_health: bool = True
    """Whether there is a health service."""
    num_checks: int = 0
    """Health checks that came."""
    num_silent_checks: int = 0
    """How many of the next health checks are never answered."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: uniform answers wait."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a Score request is in."""
    num_running: int = 0
    """Score calls under way."""
    max_running: int = 0
    """Most Score calls that were under way at once."""
    num_cancelled: int = 0
    """Score calls that the client took back."""
    endpoint: str = ""
    """`127.0.0.1:port`."""
    server: grpc.aio.Server | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.thawed.set()
        self.health = _Health(self)

    async def start(self) -> None:
        """Serve on a free port of this machine, or on the one from before."""
        self.server = grpc.aio.server()
        add_TeacherServiceServicer_to_server(self, self.server)
        if self.has_health:
            self.health = _Health(self)
            await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        port = self.server.add_insecure_port(self.endpoint or "127.0.0.1:0")
        self.endpoint = f"127.0.0.1:{port}"
        await self.server.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What its health says."""
        status = health_pb2.HealthCheckResponse
        await self.health.set("", status.SERVING if is_serving else status.NOT_SERVING)

    async def GetManifest(self, request: pb.GetManifestRequest, context: Context) -> pb.GetManifestResponse:  # noqa: N802
        """See the contract."""
        self.num_manifests += 1
        await self.thawed.wait()
        if self.manifest_script:
            await self.manifest_script.popleft()(context)
        return pb.GetManifestResponse(manifest=manifest_to_pb(self.manifest))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        """See the contract."""
        if list(request.token_ids) == canary_token_ids(self.manifest):
            return await self._answer_canary(request, context)
        self.requests.append(request)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        self.arrived.set()
        try:
            await self.thawed.wait()
            if self.script:
                return await self.script.popleft()(request, context)
            await self.gate.wait()
            return uniform_answer(request, self.manifest)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    async def _answer_canary(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        self.num_canaries += 1
        await self.thawed.wait()
        if self.canary_script:
            return await self.canary_script.popleft()(request, context)
        return uniform_answer(request, self.manifest)

    async def stop(self) -> None:
        """Close the port and every connection at once."""
        if self.server is not None:
            await self.server.stop(grace=0)


@asynccontextmanager
async def running_stub(manifest: Manifest | None = None, *, has_health: bool = True) -> AsyncIterator[TeacherStub]:
    """A stub that serves on a free port of this machine."""
    stub = TeacherStub(manifest=manifest or stub_manifest(), has_health=has_health)
    await stub.start()
    try:
        yield stub
    finally:
        await stub.stop()


class _Swallow(asyncio.Protocol):
    """Accepts a connection and ignores whatever comes."""

    def __init__(self, transports: list[asyncio.BaseTransport]) -> None:
        self._transports = transports

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.append(transport)


@asynccontextmanager
async def black_hole() -> AsyncIterator[str]:
    """`host:port` of a server that accepts connections, reads, and never says a word."""
    transports: list[asyncio.BaseTransport] = []
    server = await asyncio.get_running_loop().create_server(lambda: _Swallow(transports), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        # a connection accepted at the last moment is made known in the loop's next turns, and ended in those after
        for _ in range(5):
            for transport in transports:
                transport.close()
            await asyncio.sleep(0)
        await server.wait_closed()
