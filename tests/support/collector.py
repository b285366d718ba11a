"""A collector of traces: OTLP over gRPC, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectedSpan:
    """One span that came."""

    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what comes. `collecting` makes and ends it."""

    def __init__(self) -> None:
        self.spans: list[CollectedSpan] = []
        self.endpoint = ""
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""

    def Export(self, request: otlp.ExportTraceServiceRequest, context: object) -> otlp.ExportTraceServiceResponse:  # noqa: N802
        """See OTLP."""
        for resource in request.resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.spans += [
                CollectedSpan(
                    service=names["service.name"],
                    name=span.name,
                    trace_id=span.trace_id,
                    span_id=span.span_id,
                    parent_id=span.parent_span_id,
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        return otlp.ExportTraceServiceResponse()

    def chain(self, lowest: CollectedSpan) -> list[str]:
        """The names of a span and of those above it, as far as they came."""
        by_id = {(one.trace_id, one.span_id): one for one in self.spans}
        names, found = [lowest.name], by_id.get((lowest.trace_id, lowest.parent_id))
        while found is not None:
            names.append(found.name)
            found = by_id.get((found.trace_id, found.parent_id))
        return names


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of this machine."""
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(1))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0)
