"""Owns an OpenTelemetry collector for tests: it takes OTLP over HTTP, and keeps the spans that come."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Received:
    """A span as it came: the protocol's message, and the attributes of the resource that it is of."""

    span: Span
    resource: dict[str, Any]

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def attributes(self) -> dict[str, Any]:
        return _values(self.span.attributes)

    @property
    def duration_ms(self) -> float:
        return (self.span.end_time_unix_nano - self.span.start_time_unix_nano) / 1e6


class Collector:
    """`status` is what it answers; while `gate` is cleared it answers nothing."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        self.paths: list[str] = []
        self._spans: list[Received] = []

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        request = ExportTraceServiceRequest.FromString(body)
        self._spans += [
            Received(span, _values(of_resource.resource.attributes))
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    @property
    def spans(self) -> list[Received]:
        return list(self._spans)

    def trace(self, trace_id: str) -> list[Received]:
        return [received for received in self.spans if received.span.trace_id.hex() == trace_id]

    def wait_for_trace(self, trace_id: str, num_spans: int) -> list[Received]:
        end_s = time.monotonic() + DEADLINE_S
        while len(self.trace(trace_id)) < num_spans:
            assert time.monotonic() < end_s, f"no {num_spans} spans of {trace_id} within {DEADLINE_S} s: {self.spans}"
            time.sleep(0.02)
        return self.trace(trace_id)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.gate.wait(DEADLINE_S)
            if collector.status == 200:
                collector.take(self.path, body)
            self.send_response(collector.status)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _values(attributes: Any) -> dict[str, Any]:
    def value(attribute: KeyValue) -> Any:
        return getattr(attribute.value, attribute.value.WhichOneof("value") or "string_value")

    return {attribute.key: value(attribute) for attribute in attributes}
