"""Traces through both services, by OpenTelemetry: from a training step through the client to the engine.

Off unless OpenTelemetry's own variables name a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`). Between processes the context
travels as W3C `traceparent`; a training step is one trace, whose ids every process of the run derives by itself.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Where spans are sent; with neither set, there are none."""
STEP = "gkd.step"
"""Name of a training step's span."""

_W3C = TraceContextTextMapPropagator()
_TRACE_BYTES, _SPAN_BYTES = 16, 8
_FLUSH_MS = 3000
"""A collector that is gone must not hold up the end of a run."""
_tracer = trace.get_tracer("gkd")
_next_ids: ContextVar[SpanContext | None] = ContextVar("next_ids", default=None)
_started = False


def start_tracing(service_name: str) -> bool:
    """Send this process's spans to the collector that the environment names; returns whether it names one.

    Args:
        service_name: what the spans are said to come from, unless OTEL_SERVICE_NAME says otherwise.
    """
    global _started  # as the provider itself: one for the process
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return False
    if not _started:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        os.environ.setdefault("OTEL_SERVICE_NAME", service_name)
        os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", "1000")  # Ray ends its workers without a word
        trace.set_tracer_provider(provider_for(OTLPSpanExporter()))
        _started = True
    return True


def provider_for(exporter: SpanExporter, *, at_once: bool = False) -> TracerProvider:
    """A provider whose step spans have the ids that other processes expect.

    Args:
        exporter: takes the spans.
        at_once: whether each goes out when it ends, and not in batches by a thread.
    """
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            given = _next_ids.get()
            return super().generate_trace_id() if given is None else given.trace_id

        def generate_span_id(self) -> int:
            given = _next_ids.get()
            return super().generate_span_id() if given is None else given.span_id

    provider = TracerProvider(id_generator=Ids())
    provider.add_span_processor(SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter))
    return provider


def flush() -> None:
    """Send what has ended: for a process that may be killed next."""
    force_flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force_flush is not None:
        force_flush(_FLUSH_MS)


@contextmanager
def span(name: str, *, carrier: Mapping[str, str] | None = None, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A span around what happens inside; it notes what is raised.

    Args:
        name: of low cardinality.
        carrier: metadata or headers of the call that is served; None: the parent is the span around this one.
        kind: its role.
    """
    parent = None if carrier is None else _W3C.extract(carrier, context=otel_context.Context())
    with _tracer.start_as_current_span(name, context=parent, kind=kind) as current:
        yield current


def metadata() -> tuple[tuple[str, str], ...]:
    """What a call carries so that the other side's spans join this one's trace; empty outside of a recorded span."""
    if not trace.get_current_span().is_recording():
        return ()
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return tuple(carrier.items())


def trace_id() -> str | None:
    """The current trace's id for logs, as 32 hex digits; None outside of a recorded span."""
    current = trace.get_current_span()
    return f"{current.get_span_context().trace_id:032x}" if current.is_recording() else None


def add_past_span(name: str, *, began_s: float, seconds: float) -> None:
    """A span below the current one for what was measured otherwise.

    Args:
        name: its name.
        began_s: when it began, by `time.perf_counter`.
        seconds: how long it took.
    """
    if not trace.get_current_span().is_recording():
        return
    began_ns = time.time_ns() - int((time.perf_counter() - began_s) * 1e9)
    _tracer.start_span(name, start_time=began_ns).end(began_ns + int(seconds * 1e9))


@contextmanager
def in_step(run_id: str, step: int) -> Iterator[None]:
    """Spans inside belong to the trace of a training step, whichever process they are in."""
    token = otel_context.attach(trace.set_span_in_context(NonRecordingSpan(_step_context(run_id, step))))
    try:
        yield
    finally:
        otel_context.detach(token)


def start_step(run_id: str, step: int) -> Span:
    """The root span of a training step's trace. Whoever starts it ends it.

    Args:
        run_id: of the training run, and of no other.
        step: its number.
    """
    token = _next_ids.set(_step_context(run_id, step))
    try:
        return _tracer.start_span(STEP, context=otel_context.Context(), attributes={"gkd.step": step})
    finally:
        _next_ids.reset(token)


def _step_context(run_id: str, step: int) -> SpanContext:
    digest = hashlib.sha256(f"{run_id}|{step}".encode()).digest()
    trace_bytes, span_bytes = digest[:_TRACE_BYTES], digest[_TRACE_BYTES : _TRACE_BYTES + _SPAN_BYTES]
    number = int.from_bytes(trace_bytes)
    return SpanContext(number, int.from_bytes(span_bytes), is_remote=True, trace_flags=_flags_of(number))


def _flags_of(trace_number: int) -> TraceFlags:
    """Whether the provider's sampler takes a trace: every process comes to the same answer, by the trace's id."""
    sampler = getattr(trace.get_tracer_provider(), "sampler", None)
    if sampler is None:
        return TraceFlags(TraceFlags.DEFAULT)
    result = sampler.should_sample(None, trace_number, STEP)
    return TraceFlags(TraceFlags.SAMPLED if result.decision.is_sampled() else TraceFlags.DEFAULT)
