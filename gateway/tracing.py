"""Owns the way of traces out of this process: whose trace a request belongs to, and its spans to an OTLP collector."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version

from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.routing.receipts import Receipt, TraceContext
from gateway.routing.types import Rejection
from gateway.spans import Span, refusal_span, spans_of

PATH = "/v1/traces"
MAX_WAITING = 8192
"""Spans that wait for the collector, of 700 requests or more; a trace that does not fit in is left out whole."""

MAX_INSTANCES = 1024
"""Whose resources are kept at hand; to make one takes longer than its span."""

BATCH_EVERY_MS = 1000

EXPORT_TIMEOUT_S = 5.0
"""Of one batch, with the exporter's own retries."""

LAST_CALL_S = 2.0
"""So long the end of a gateway may wait for the collector."""


class Tracer:
    """Spans of this gateway's requests. Nothing but `flush` and `close` waits: a thread of the SDK's talks to the
    collector."""

    def __init__(
        self, endpoint: str, sample_ratio: float, gateway_id: str, dropped: Callable[[str, int], None]
    ) -> None:
        """`endpoint`: the collector's OTLP/HTTP address, without the path. `dropped` is told why (`full`, `refused`)
        and how many spans no collector has got; from the SDK's thread too."""
        # It would log what clients write into these headers.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        self._dropped = dropped
        self._sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._ids = RandomIdGenerator()
        self._parents = TraceContextTextMapPropagator()
        baton = Resource.create({SERVICE_NAME: "baton"})
        self._gateway_id = gateway_id
        self._resource = lru_cache(MAX_INSTANCES)(
            lambda instance: baton.merge(Resource({SERVICE_INSTANCE_ID: instance}))
        )
        self._scope = InstrumentationScope("baton", version("baton-gateway"))
        self._exporter = _Counting(OTLPSpanExporter(endpoint.rstrip("/") + PATH, timeout=EXPORT_TIMEOUT_S), dropped)
        self._processor = BatchSpanProcessor(self._exporter, MAX_WAITING, BATCH_EVERY_MS)
        self._num_given = 0

    def begin(self, headers: Mapping[str, str]) -> TraceContext | None:
        """A prompt's place in the trace that its HTTP headers tell of (`spans.trace_headers`); in a new one if they
        tell of none that is well formed. None: it is not to be traced, by its client or by the ratio."""
        context = self._parents.extract(headers)
        parent = otel.get_current_span(context).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        if not self._sampler.should_sample(context, trace_id, "request").decision.is_sampled():
            return None
        parent_id = otel.format_span_id(parent.span_id) if parent.is_valid else None
        return TraceContext(otel.format_trace_id(trace_id), self._new_id(), parent_id, parent.trace_state.to_header())

    def closed(self, receipt: Receipt) -> None:
        if receipt.trace is not None:
            self._give(receipt.trace, spans_of(receipt, self._new_id))

    def refused(self, request_id: str, trace: TraceContext, received_s: float, rejection: Rejection) -> None:
        """`received_s`: monotonic time."""
        end_ns = time.time_ns()
        start_ns = end_ns - round((time.monotonic() - received_s) * 1e9)
        self._give(trace, [refusal_span(request_id, trace.span_id, start_ns, end_ns, rejection)])

    def flush(self) -> None:
        """Sends what waits; returns when that is done, or after LAST_CALL_S."""
        _for_a_while(self._processor.force_flush)

    def close(self) -> None:
        """As `flush`, for good: what was not sent by then is lost."""
        _for_a_while(self._processor.shutdown)
        self._exporter.shutdown()

    def _new_id(self) -> str:
        return otel.format_span_id(self._ids.generate_span_id())

    def _give(self, trace: TraceContext, spans: Sequence[Span]) -> None:
        if self._num_given - self._exporter.num_taken + len(spans) > MAX_WAITING:
            self._dropped("full", len(spans))
            return
        self._num_given += len(spans)
        trace_id, state = int(trace.trace_id, 16), otel.TraceState.from_header([trace.state])
        for span in spans:
            self._processor.on_end(self._readable(span, trace, trace_id, state))

    def _readable(self, span: Span, trace: TraceContext, trace_id: int, state: otel.TraceState) -> ReadableSpan:
        def context(span_id: str, is_remote: bool = False) -> otel.SpanContext:
            return otel.SpanContext(trace_id, int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED), state)

        is_request = span.parent_id is None
        parent_id = trace.parent_id if span.parent_id is None else span.parent_id
        return ReadableSpan(
            name=span.name,
            context=context(span.span_id),
            parent=None if parent_id is None else context(parent_id, is_remote=is_request),
            resource=self._resource(span.replica or self._gateway_id),
            attributes=span.attributes,
            events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
            kind=otel.SpanKind.SERVER if is_request else otel.SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR if span.failed else StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def _for_a_while(action: Callable[[], object]) -> None:
    """The SDK's own time limits do not hold while a batch is under way."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(LAST_CALL_S)


class _Counting(SpanExporter):
    """An exporter that counts what it was given, and tells what it could not send."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[str, int], None]) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self._is_closed = False
        self.num_taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.num_taken += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._dropped("refused", len(spans))
        return result

    def shutdown(self) -> None:
        """What is being sent has its time; its retries end, and what comes later is refused."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()
