"""HTTP over the scoring core: JSON or protobuf bodies, health, metrics, OpenAPI."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.access import AUTHORIZATION, Access
from teacher_service.admission import Phase
from teacher_service.errors import (
    ClientGoneError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidTimeoutError,
    MethodNotAllowedError,
    NotFoundError,
    TeacherServiceError,
    UnauthenticatedError,
    UnsupportedContentTypeError,
)
from teacher_service.offload import off_loop
from teacher_service.scoring import Scorer
from teacher_service.telemetry import RequestRecord, Telemetry
from teacher_service.tls import ServerTls
from teacher_service.transports import http_models, messages
from teacher_service.transports.http_access import METRICS, TokenGate
from teacher_service.transports.http_models import ManifestAnswer, Problem, ScoreAnswer, ScoreBody, StatusAnswer
from teacher_service.transports.sockets import open_socket

TIMEOUT_HEADER = "X-Request-Timeout-S"
JSON = "application/json"
PROTOBUF = "application/x-protobuf"
PROBLEM = "application/problem+json"

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection: who closes first may cut off a request that is on its way."""
T = TypeVar("T")


class _UvicornServer(uvicorn.Server):
    """uvicorn that leaves signals to the process that runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpTransport:
    """An HTTP server over one scorer, on the event loop of its caller."""

    def __init__(
        self,
        scorer: Scorer,
        telemetry: Telemetry,
        *,
        access: Access,
        tls: ServerTls | None,
        docs: bool,
        metrics_without_token: bool,
    ) -> None:
        """Listen to nothing yet.

        Args:
            scorer: the core.
            telemetry: told of every request.
            access: who may call.
            tls: the certificate to show; None: plain text.
            docs: whether there are /docs and /openapi.json.
            metrics_without_token: whether anybody may read the metrics.
        """
        self._tls = tls
        self._config = uvicorn.Config(
            TokenGate(
                build_app(scorer, telemetry, access, docs=docs),
                access,
                telemetry,
                answer=_problem_response,
                metrics_without_token=metrics_without_token,
            ),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            # who calls is told by the connection, not by a header that anybody on this machine may set
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = _UvicornServer(self._config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port.

        Raises:
            AddressError: the port can't be opened.
        """
        listener = open_socket(host, port, flag="--http-port")
        bound: int = listener.getsockname()[1]
        self._config.load()
        if self._tls is not None:
            # not by files: uvicorn would read them once
            self._config.ssl = self._tls.http_context()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return bound

    async def stop(self, grace_s: float) -> None:
        """Wait for answers being written, and close the port."""
        if self._serving is None:
            return
        self._config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving


def build_app(scorer: Scorer, telemetry: Telemetry, access: Access, *, docs: bool) -> FastAPI:
    """The routes; who may take them is not asked here."""
    app = FastAPI(
        title="Teacher",
        summary="Scores token sequences under a teacher model.",
        version="v1",
        openapi_url="/openapi.json" if docs else None,
    )
    app.add_exception_handler(TeacherServiceError, _answer_service_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    handlers = _Handlers(scorer, telemetry, access)
    app.post(
        "/v1/score",
        response_model=ScoreAnswer,
        responses=_problems(400, 401, 413, 415, 422, 429, 500, 503, 504)
        | {200: {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}},
        openapi_extra=_score_request_schema(),
    )(handlers.score)
    app.get("/v1/manifest", response_model=ManifestAnswer, responses=_problems(401, 500, 503))(handlers.manifest)
    app.get("/healthz", response_model=StatusAnswer, responses=_problems(503))(handlers.healthz)
    app.get("/readyz", response_model=StatusAnswer, responses=_problems(503))(handlers.readyz)
    app.get(METRICS, response_class=Response, responses=_problems(401) | {200: {"content": {CONTENT_TYPE_LATEST: {}}}})(
        handlers.metrics
    )
    return app


class _Handlers:
    def __init__(self, scorer: Scorer, telemetry: Telemetry, access: Access) -> None:
        self._scorer = scorer
        self._telemetry = telemetry
        self._access = access

    async def score(self, request: Request) -> Response:
        """Score one sequence. Send JSON, or a teacher.v1.ScoreRequest as protobuf; the answer has the same form.

        The header X-Request-Timeout-S bounds the seconds it may take.
        """
        with self._telemetry.request("POST /v1/score", request.headers) as record:
            host = "" if request.client is None else request.client.host
            record.account = self._access.account_of(request.headers.get(AUTHORIZATION), host)
            record.client = messages.client_name(request.headers.get(messages.CLIENT_KEY), record.account)
            answer_in = _answer_form(request)
            timeout_s = _timeout_s(request, self._scorer.limits.max_timeout_s)
            began_s = time.monotonic()
            body = await _read_body(request, self._scorer.limits.max_request_bytes, timeout_s)
            record.received_bytes = len(body)
            remaining_s = timeout_s - (time.monotonic() - began_s)
            answer = await _unless_hung_up(request, answer_in(self, body, remaining_s, record))
            record.sent_bytes = len(answer.body)
            return answer

    async def score_json(self, body: bytes, timeout_s: float, record: RequestRecord) -> Response:
        result = await self._scorer.score(http_models.parse_body(body), timeout_s=timeout_s, record=record)
        began_s = time.perf_counter()
        fields = await off_loop(result.scores.size, lambda: http_models.encode_fields(result))
        record.encode_s = time.perf_counter() - began_s
        return Response(http_models.with_timings(fields, record), media_type=JSON)

    async def score_protobuf(self, body: bytes, timeout_s: float, record: RequestRecord) -> Response:
        message = messages.parse(pb.ScoreRequest, body)
        wire_dtype = messages.wire_dtype_of(message)
        result = await self._scorer.score(messages.request_from_pb(message), timeout_s=timeout_s, record=record)
        answer = await messages.result_to_pb(result, wire_dtype, record)
        return Response(answer.SerializeToString(), media_type=PROTOBUF)

    async def manifest(self) -> Response:
        """Say what this teacher is."""
        with self._telemetry.request("GET /v1/manifest"):
            answer = http_models.manifest_answer(self._scorer.manifest())
            return Response(answer.model_dump_json(exclude_none=True), media_type=JSON)

    async def healthz(self) -> StatusAnswer:
        """Whether the process is alive."""
        if self._scorer.phase is Phase.DEAD:
            raise EngineDeadError("the engine is dead and the process is ending; restart it")
        return StatusAnswer(status="alive")

    async def readyz(self) -> StatusAnswer:
        """Whether work is taken."""
        self._scorer.admission.check_open()
        return StatusAnswer(status="ready")

    async def metrics(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(self._telemetry.registry), media_type=CONTENT_TYPE_LATEST)


_ScoreForm = Callable[[_Handlers, bytes, float, RequestRecord], Coroutine[Any, Any, Response]]


def _answer_form(request: Request) -> _ScoreForm:
    content_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if content_type == JSON:
        return _Handlers.score_json
    if content_type == PROTOBUF:
        return _Handlers.score_protobuf
    raise UnsupportedContentTypeError(
        f"content type {content_type[:64]!r} is none that the service reads; send {JSON} or {PROTOBUF}",
        metadata={"field": "content-type", "value": content_type[:64], "limit": f"{JSON}, {PROTOBUF}"},
    )


def _timeout_s(request: Request, max_timeout_s: float) -> float:
    """Seconds the caller allows, at most `max_timeout_s`.

    Raises:
        InvalidTimeoutError: the header is no finite number > 0.
    """
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return max_timeout_s
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidTimeoutError(
            f"{TIMEOUT_HEADER} is {value[:64]!r}; it must be a finite number of seconds > 0",
            metadata={"field": TIMEOUT_HEADER, "value": value[:64], "limit": "(0, inf)"},
        )
    return min(timeout_s, max_timeout_s)


async def _read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body, refused as soon as it is known to be too large: also where it comes in chunks of no stated length."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        messages.check_body_size(int(declared), limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                messages.check_body_size(len(body), limit)
    except TimeoutError as exc:
        raise DeadlineExceededError(
            f"the body did not arrive within {timeout_s:.3f} s; allow more time",
            metadata={"field": TIMEOUT_HEADER, "limit": f"{timeout_s:.3f}"},
        ) from exc
    except ClientDisconnect as exc:
        raise ClientGoneError("the caller hung up while it sent the body") from exc
    return bytes(body)


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels the work once the caller has hung up.

    Raises:
        ClientGoneError: the caller hung up.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError("the caller hung up before the answer; its work was dropped")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hung_up(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer_service_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, TeacherServiceError):
        raise TypeError(f"registered for the service's errors, called with {type(error).__name__}")
    return _problem_response(error)


def _problem_response(error: TeacherServiceError) -> Response:
    headers = {}
    if error.retry_delay_s is not None:
        # the header has whole seconds; the body has the exact delay
        headers["Retry-After"] = f"{math.ceil(error.retry_delay_s)}"
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    problem = http_models.problem_of(error).model_dump_json(exclude_none=True)
    return Response(problem, status_code=error.http_status, media_type=PROBLEM, headers=headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Paths and methods that the service lacks, in the same form as every other error."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"registered for HTTPException, called with {type(error).__name__}")
    path, method = request.url.path[:64], request.method[:16]
    if error.status_code == MethodNotAllowedError.http_status:
        refusal: TeacherServiceError = MethodNotAllowedError(
            f"{path} takes no {method}; /openapi.json lists what it takes",
            metadata={"field": "method", "value": method},
        )
    else:
        refusal = NotFoundError(
            f"{path} is no path of the service; /openapi.json lists them", metadata={"field": "path", "value": path}
        )
    return _problem_response(refusal)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the problem responses."""
    schema = Problem.model_json_schema()
    return {
        status: {"description": "Problem.", "content": {PROBLEM: {"schema": schema}}} for status in sorted(statuses)
    }


def _score_request_schema() -> dict[str, Any]:
    # the body is read by hand, to bound it while it arrives, so FastAPI does not know its schema
    return {
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": ScoreBody.model_json_schema()},
                PROTOBUF: {
                    "schema": {"type": "string", "format": "binary", "description": "A teacher.v1.ScoreRequest."}
                },
            },
        },
        "parameters": [
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "required": False,
                "description": "Seconds the request may take; the service bounds it.",
                "schema": {"type": "number", "exclusiveMinimum": 0},
            }
        ],
    }
