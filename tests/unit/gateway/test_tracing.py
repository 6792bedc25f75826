"""Traces on their way out: whose they are, by W3C Trace Context, and how they come to a collector, or do not."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway import tracing
from gateway.routing.receipts import Receipt, TraceContext
from gateway.routing.types import Cause, Rejection
from gateway.tracing import Tracer
from tests.collector import collecting
from tests.unit.gateway.test_spans import FETCH, READ, answered

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOBODY = "http://127.0.0.1:9"
DEADLINE_S = 20.0


class Dropped:
    """Counts what is told as dropped."""

    def __init__(self) -> None:
        self.by_cause: Counter[str] = Counter()
        self.was_told = threading.Event()

    def __call__(self, cause: str, num_spans: int) -> None:
        self.by_cause[cause] += num_spans
        self.was_told.set()


@contextmanager
def tracer(url: str = NOBODY, sample_ratio: float = 1.0, dropped: Dropped | None = None) -> Iterator[Tracer]:
    made = Tracer(url, sample_ratio, "gateway-1", dropped or Dropped())
    try:
        yield made
    finally:
        made.close()


def assert_ends(action: Callable[[], None]) -> None:
    """While what could hold it up still does."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def receipt() -> Receipt:
    return answered()


def in_trace(receipt: Receipt, trace: TraceContext | None) -> Receipt:
    assert trace is not None
    return dataclasses.replace(receipt, trace=trace)


class TestWhoseTraceItIs:
    def test_a_clients_trace_goes_on_with_a_span_of_the_requests_own(self) -> None:
        with tracer() as one:
            trace = one.begin({"traceparent": SAMPLED, "tracestate": "vendor=1, other=x:2"})
            assert trace is not None
            assert (trace.trace_id, trace.parent_id, trace.state) == (TRACE_ID, PARENT_ID, "vendor=1,other=x:2")
            assert trace.span_id not in (PARENT_ID, "0" * 16)
            other = one.begin({"traceparent": SAMPLED})
            assert other is not None
            assert other.span_id != trace.span_id

    @pytest.mark.parametrize(
        "parent",
        [
            "",
            "rubbish",
            SAMPLED.upper(),
            SAMPLED[:-1],
            SAMPLED + "-more",
            SAMPLED.replace("00-", "ff-", 1),
            SAMPLED.replace(TRACE_ID, "0" * 32),
            SAMPLED.replace(PARENT_ID, "0" * 16),
            SAMPLED + "\n" + SAMPLED,
            "é" + SAMPLED[1:],
            SAMPLED + "x" * 10_000,
        ],
    )
    def test_a_malformed_parent_is_ignored_with_its_state(self, parent: str) -> None:
        with tracer() as one:
            trace = one.begin({"traceparent": parent, "tracestate": "vendor=1"})
            assert trace is not None
            assert trace.trace_id != TRACE_ID
            assert (trace.parent_id, trace.state) == (None, "")

    def test_a_later_version_is_read_as_far_as_it_is_known(self) -> None:
        with tracer() as one:
            trace = one.begin({"traceparent": SAMPLED.replace("00-", "01-", 1) + "-more"})
            assert trace is not None
            assert (trace.trace_id, trace.parent_id) == (TRACE_ID, PARENT_ID)
            assert trace.headers == {"traceparent": f"00-{TRACE_ID}-{trace.span_id}-01"}

    @pytest.mark.parametrize("state", ["=", "a=1,a=2", "k=" + "v" * 600, ",".join(f"k{n}=1" for n in range(40))])
    def test_a_malformed_or_long_state_is_dropped_and_the_parent_is_kept(
        self, state: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with tracer() as one:
            trace = one.begin({"traceparent": SAMPLED, "tracestate": state})
            assert trace is not None
            assert (trace.parent_id, trace.state) == (PARENT_ID, "")
        assert caplog.text == "", "a client can write into the log"

    @pytest.mark.parametrize("sample_ratio", [0.0, 1.0])
    def test_a_client_with_a_trace_decides_whether_it_is_kept(self, sample_ratio: float) -> None:
        with tracer(sample_ratio=sample_ratio) as one:
            assert one.begin({"traceparent": SAMPLED}) is not None
            assert one.begin({"traceparent": SAMPLED[:-2] + "00"}) is None

    def test_of_the_others_a_share_is_kept(self) -> None:
        kept = {}
        for ratio in (0.0, 0.25, 1.0):
            with tracer(sample_ratio=ratio) as one:
                kept[ratio] = sum(one.begin({}) is not None for _ in range(2000))
        assert (kept[0.0], kept[1.0]) == (0, 2000)
        # Five standard deviations.
        assert abs(kept[0.25] - 500) < 100


class TestOnTheWay:
    def test_one_request_arrives_whole_at_a_collector(self, receipt: Receipt) -> None:
        with collecting() as collector, tracer(collector.url + "/base/") as one:
            one.closed(in_trace(receipt, one.begin({"traceparent": SAMPLED, "tracestate": "vendor=1"})))
            one.close()
            assert set(collector.paths) == {"/base/v1/traces"}
            spans = {received.name: received for received in collector.trace(TRACE_ID)}
            assert len(spans) == len(collector.spans)
            assert set(spans) == {"request", *READ, *FETCH, "decode"}
            request = spans.pop("request")
            assert request.span.parent_span_id.hex() == PARENT_ID
            assert request.span.kind == ProtoSpan.SPAN_KIND_SERVER
            assert {received.span.parent_span_id for received in spans.values()} == {request.span.span_id}
            assert {received.span.kind for received in spans.values()} == {ProtoSpan.SPAN_KIND_INTERNAL}
            assert {received.span.trace_state for received in spans.values()} == {"vendor=1"}
            for name, received in spans.items():
                assert received.duration_ms == pytest.approx(getattr(receipt.outcome.times_ms, name), abs=0.01)

    def test_what_waits_is_sent_at_once_when_asked_for_and_others_later(
        self, receipt: Receipt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracing, "BATCH_EVERY_MS", 3_600_000)
        with collecting() as collector, tracer(collector.url) as one:
            for num_sent in (1, 2):
                one.closed(in_trace(receipt, one.begin({})))
                assert len(collector.spans) == 9 * (num_sent - 1)
                one.flush()
                assert len(collector.spans) == 9 * num_sent

    def test_engines_time_is_that_of_their_own_instance(self, receipt: Receipt) -> None:
        with collecting() as collector, tracer(collector.url) as one:
            one.closed(in_trace(receipt, one.begin({})))
            one.close()
            instances = {received.name: received.resource["service.instance.id"] for received in collector.spans}
            assert {instances[name] for name in READ[-2:]} == {"prefill-0"}
            assert {instances[name] for name in FETCH} == {"decode-0"}
            assert {instances[name] for name in ("request", *READ[:3], "decode")} == {"gateway-1"}
            assert {received.resource["service.name"] for received in collector.spans} == {"baton"}

    def test_a_trace_that_begins_here_has_a_root(self, receipt: Receipt) -> None:
        with collecting() as collector, tracer(collector.url) as one:
            one.closed(in_trace(receipt, one.begin({})))
            one.close()
            assert [received.name for received in collector.spans if not received.span.parent_span_id] == ["request"]

    def test_a_receipt_that_is_not_traced_sends_nothing(self, receipt: Receipt) -> None:
        with collecting() as collector, tracer(collector.url) as one:
            one.closed(dataclasses.replace(receipt, trace=None))
            one.close()
            assert collector.spans == []

    def test_a_refusal_arrives_as_an_error(self) -> None:
        with collecting() as collector, tracer(collector.url) as one:
            trace = one.begin({"traceparent": SAMPLED})
            assert trace is not None
            one.refused("r", trace, 0.0, Rejection(503, "full", 1, Cause.GATEWAY_FULL))
            one.close()
            (received,) = collector.trace(TRACE_ID)
            assert (received.name, received.span.status.code) == ("request", Status.STATUS_CODE_ERROR)
            assert received.attributes["http.response.status_code"] == 503


class TestLost:
    def test_what_a_collector_refuses_is_counted(self, receipt: Receipt) -> None:
        dropped = Dropped()
        with collecting() as collector, tracer(collector.url, dropped=dropped) as one:
            collector.status = 400
            one.closed(in_trace(receipt, one.begin({})))
            one.close()
            assert dropped.by_cause == {"refused": 9}

    def test_the_end_does_not_wait_for_retries(self, receipt: Receipt, monkeypatch: pytest.MonkeyPatch) -> None:
        class Retrying(SpanExporter):
            def __init__(self, endpoint: str, timeout: float) -> None:
                self._is_over = threading.Event()

            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                self._is_over.wait()
                return SpanExportResult.FAILURE

            def shutdown(self) -> None:
                self._is_over.set()

        monkeypatch.setattr(tracing, "OTLPSpanExporter", Retrying)
        monkeypatch.setattr(tracing, "LAST_CALL_S", 0.01)
        dropped = Dropped()
        with tracer(dropped=dropped) as one:
            one.closed(in_trace(receipt, one.begin({})))
            assert_ends(one.close)
        assert dropped.was_told.wait(DEADLINE_S)
        assert dropped.by_cause == {"refused": 9}

    @pytest.mark.parametrize("end", ["flush", "close"])
    def test_the_end_does_not_wait_for_a_collector_that_hangs(
        self, receipt: Receipt, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        monkeypatch.setattr(tracing, "LAST_CALL_S", 0.01)
        with collecting() as collector, tracer(collector.url) as one:
            collector.gate.clear()
            one.closed(in_trace(receipt, one.begin({})))
            assert_ends(getattr(one, end))
            assert collector.spans == []

    def test_more_than_can_wait_is_left_out_by_whole_traces_and_counted(
        self, receipt: Receipt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dropped = Dropped()
        with collecting() as collector, tracer(collector.url, dropped=dropped) as one:
            monkeypatch.setattr(tracing, "MAX_WAITING", 20)
            for _ in range(4):
                one.closed(in_trace(receipt, one.begin({})))
            assert dropped.by_cause == {"full": 2 * 9}
            one.close()
            by_trace = Counter(received.span.trace_id for received in collector.spans)
            assert list(by_trace.values()) == [9, 9]

    def test_a_collector_that_hangs_holds_nobody_up_and_gets_all_when_it_wakes(self, receipt: Receipt) -> None:
        with collecting() as collector, tracer(collector.url) as one:
            collector.gate.clear()
            for _ in range(100):
                one.closed(in_trace(receipt, one.begin({})))
            assert collector.spans == []
            collector.gate.set()
            one.close()
            assert len(collector.spans) == 900
