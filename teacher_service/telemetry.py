"""One record per request, turned into metrics and a log line when the request ends."""

from __future__ import annotations

import asyncio
import enum
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

import structlog
from opentelemetry.trace import Span, SpanKind
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from structlog.typing import FilteringBoundLogger, Processor

from protos import tracing
from teacher_service.errors import ClientGoneError, InternalError, TeacherServiceError

REASON_OK = "OK"
_SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class AnswerSource(enum.StrEnum):
    """Where the answer to a request comes from."""

    COMPUTED = "computed"
    """From a computation of its own."""
    JOINED = "joined"
    """From one that was under way for an equal request."""
    CACHE = "cache"
    """From the answers kept."""


@dataclass(kw_only=True, slots=True)
class RequestRecord:
    """What is known of one request while it runs; each layer fills in its part."""

    method: str
    """Name of the method, e.g. `Score`, `ScoreStream`, `POST /v1/score`."""
    client: str = ""
    """Who asks, as admission tells clients apart."""
    account: str = ""
    """The part of it that the client can't choose: its token's id, or its host."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names the request in logs, errors and the engine."""
    num_tokens: int = 0
    """N of the sequence."""
    num_scored: int = 0
    """S of the sequence."""
    num_logprobs: int = 0
    """K that was asked for."""
    queue_s: float = 0.0
    """Seconds waiting for admission."""
    engine_s: float = 0.0
    """Seconds in the engine."""
    received_bytes: int = 0
    """Of the request's message or body."""
    sent_bytes: int = 0
    """Of the answer's."""
    encode_s: float = 0.0
    """Seconds turning arrays into bytes."""
    source: AnswerSource = AnswerSource.COMPUTED
    """Where its answer comes from."""
    waiting_since_s: float | None = None
    """When it began to wait for admission, by `time.perf_counter`; None: it never did."""
    reason: str = REASON_OK
    """How it ended: OK, CANCELLED, or an error's reason."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a computation is, for each request that waits for it. Times by `time.perf_counter`."""

    admitted_s: float | None = None
    """When it entered the engine; None: not yet."""
    finished_s: float | None = None
    """When it left the engine; None: not yet."""

    def tell(self, record: RequestRecord, *, since_s: float) -> None:
        """Note for a request that has waited since then how long that was in the queue and in the engine."""
        until_s = time.perf_counter() if self.finished_s is None else self.finished_s
        admitted_s = until_s if self.admitted_s is None else self.admitted_s
        record.queue_s = max(0.0, admitted_s - since_s)
        record.engine_s = max(0.0, until_s - max(admitted_s, since_s))
        record.waiting_since_s = since_s


def build_logger(*, level: str, log_format: str, file: TextIO = sys.stderr) -> FilteringBoundLogger:
    """A logger of its own; structlog's global configuration is left alone.

    Args:
        level: lowest level to log, e.g. `info`.
        log_format: `json` for one object per line, `console` for people.
        file: where the lines go.
    """
    if log_format == "json":
        form: list[Processor] = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        form = [structlog.dev.ConsoleRenderer(colors=file.isatty())]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *form,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    return logger


class Telemetry:
    """Metrics and log of one service instance; its registry is its own."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        self.logger = logger
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "teacher_requests_total", "Requests by method and outcome.", ["method", "reason"], registry=self.registry
        )
        self._tokens = Counter(
            "teacher_tokens_total", "Tokens of answered sequences, prompts included.", registry=self.registry
        )
        self._tokens_scored = Counter(
            "teacher_tokens_scored_total", "Positions that were scored and answered.", registry=self.registry
        )
        self._received = Counter(
            "teacher_received_bytes_total", "Bytes of requests to score, before transport.", registry=self.registry
        )
        self._sent = Counter("teacher_sent_bytes_total", "Bytes of answers, before transport.", registry=self.registry)
        deduplicated = Counter(
            "teacher_deduplicated_requests_total",
            "Repeated requests that were not computed again: `joined` one under way, or answered from the `cache`.",
            ["source"],
            registry=self.registry,
        )
        self._deduplicated = {
            source: deduplicated.labels(source) for source in (AnswerSource.JOINED, AnswerSource.CACHE)
        }
        self._engine_info = Gauge(
            "teacher_engine_route",
            "1 for the engine and the way of scoring that it takes (`fast` or `flat` for vllm), with the reason where "
            "it is not the fastest.",
            ["engine", "route", "reason"],
            registry=self.registry,
        )
        self._engine_load_s = Gauge(
            "teacher_engine_load_seconds",
            "Seconds that the engine took to load the model; 0 while it loads.",
            registry=self.registry,
        )
        self._queue_s = self._histogram("teacher_queue_seconds", "Seconds waiting for admission.")
        self._engine_s = self._histogram("teacher_engine_seconds", "Seconds in the engine.")
        self._encode_s = self._histogram("teacher_encode_seconds", "Seconds turning arrays into bytes.")
        self._total_s = self._histogram("teacher_request_seconds", "Seconds from a request's arrival to its answer.")

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Offer a gauge that is read when metrics are collected."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def engine_loaded(self, engine: str, route: str, *, reason: str | None, load_s: float) -> None:
        """Say which engine scores, how, why not in its fastest way, and how long it took to load."""
        self._engine_info.labels(engine, route, reason or "").set(1)
        self._engine_load_s.set(load_s)

    @contextmanager
    def request(self, method: str, carrier: Mapping[str, str] | None = None) -> Iterator[RequestRecord]:
        """Follow one request: fill in the record inside; metrics, a log line and spans follow at the end.

        Args:
            method: its name.
            carrier: its metadata or headers, which may hold a trace's context.

        Raises:
            InternalError: something unexpected was raised inside; it is logged with its traceback, and the caller
                is told the request's id alone.
        """
        record = RequestRecord(method=method)
        with tracing.span(f"teacher {method}", carrier=carrier or {}, kind=SpanKind.SERVER) as span:
            try:
                with self._followed(record):
                    yield record
            finally:
                if span.is_recording():
                    _describe(span, record)

    @contextmanager
    def _followed(self, record: RequestRecord) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        except TeacherServiceError as exc:
            record.reason = exc.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.reason = ClientGoneError.reason
            raise
        except Exception as exc:
            record.reason = InternalError.reason
            self.logger.exception("request failed unexpectedly", request_id=record.request_id)
            raise InternalError(
                f"the service failed on this request; its log names the cause under request id {record.request_id}",
                metadata={"request_id": record.request_id},
            ) from exc
        finally:
            self._finish(record, total_s=time.perf_counter() - began_s)

    def _finish(self, record: RequestRecord, *, total_s: float) -> None:
        self._requests.labels(record.method, record.reason).inc()
        self._received.inc(record.received_bytes)
        self._sent.inc(record.sent_bytes)
        if record.source in self._deduplicated:
            self._deduplicated[record.source].inc()
        if record.reason == REASON_OK and record.num_scored:
            self._tokens.inc(record.num_tokens)
            self._tokens_scored.inc(record.num_scored)
            if record.source is AnswerSource.COMPUTED:
                self._queue_s.observe(record.queue_s)
                self._engine_s.observe(record.engine_s)
            self._encode_s.observe(record.encode_s)
            self._total_s.observe(total_s)
        log = self.logger.debug if record.reason == REASON_OK else self.logger.info
        log(
            "request",
            **({} if (trace_id := tracing.trace_id()) is None else {"trace_id": trace_id}),
            method=record.method,
            reason=record.reason,
            source=record.source,
            request_id=record.request_id,
            client=record.client,
            num_tokens=record.num_tokens,
            num_scored=record.num_scored,
            num_logprobs=record.num_logprobs,
            queue_s=round(record.queue_s, 6),
            engine_s=round(record.engine_s, 6),
            encode_s=round(record.encode_s, 6),
            total_s=round(total_s, 6),
        )

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, buckets=_SECONDS_BUCKETS, registry=self.registry)


def _describe(span: Span, record: RequestRecord) -> None:
    """What a request's span says of it, and where its time went."""
    span.set_attributes(
        {
            "gkd.reason": record.reason,
            "gkd.request_id": record.request_id,
            "gkd.source": record.source.value,
            "gkd.num_tokens": record.num_tokens,
            "gkd.num_scored": record.num_scored,
            "gkd.num_logprobs": record.num_logprobs,
        }
    )
    if record.waiting_since_s is not None:
        tracing.add_past_span("queue", began_s=record.waiting_since_s, seconds=record.queue_s)
        tracing.add_past_span("engine", began_s=record.waiting_since_s + record.queue_s, seconds=record.engine_s)
