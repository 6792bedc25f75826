"""`baton serve` with a collector: the trace of one request arrives whole."""

from pathlib import Path

import httpx
import pytest
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.cluster.running import running
from tests.collector import Collector, Received, collecting

CONFIGS = Path(__file__).parents[2] / "configs"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = {"front_end", "decide", "transit", "decode_wait", "decode_compute", "decode"}
SECRET = "a prompt that nobody else is to read"


def traced_config(folder: Path, collector: Collector) -> Path:
    config = yaml.safe_load((CONFIGS / "simulated.yaml").read_text())
    config["model"]["path"] = str(CONFIGS / "models" / "mini")
    config["tracing"] = {"otlp_endpoint": collector.url}
    path = folder / "traced.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ask(url: str, **headers: str) -> dict:
    """A receipt of a streamed chat."""
    body = {
        "model": "baton-mini",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 20,
        "stream": True,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60.0)
    assert response.status_code == 200, response.text
    return httpx.get(f"{url}/baton/receipts/{response.headers['x-baton-request-id']}").json()


def assert_whole(spans: list[Received], receipt: dict) -> Span:
    """One request with each stage once, in its parent's time. Returns the request's span."""
    assert sorted(received.name for received in spans) == sorted({"request", *STAGES})
    by_name = {received.name: received for received in spans}
    request = by_name["request"].span
    assert by_name["request"].attributes["baton.request_id"] == receipt["request_id"]
    assert by_name["request"].attributes["baton.output_tokens"] == 20
    assert by_name["request"].duration_ms == pytest.approx(receipt["outcome"]["duration_ms"], abs=0.01)
    for stage in STAGES:
        span = by_name[stage].span
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
        assert by_name[stage].duration_ms == pytest.approx(receipt["outcome"]["times_ms"][stage], abs=0.01)
        is_engines = stage in ("decode_wait", "decode_compute")
        assert (by_name[stage].resource["service.instance.id"] == receipt["placement"]["decode"]) == is_engines
    return request


@pytest.mark.timeout(300)
def test_the_trace_of_one_request_arrives_whole_at_a_collector(tmp_path: Path) -> None:
    with collecting() as collector, running(traced_config(tmp_path, collector), "gateway.app:build") as run:
        url = f"http://127.0.0.1:{run.port}"
        not_kept = TRACE_ID[::-1]
        ask(url, traceparent=f"00-{not_kept}-{PARENT_ID}-00")
        receipt = ask(url, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01", tracestate="vendor=1")
        spans = collector.wait_for_trace(TRACE_ID, 1 + len(STAGES))
        request = assert_whole(spans, receipt)
        assert request.parent_span_id.hex() == PARENT_ID
        assert {received.span.trace_state for received in spans} == {"vendor=1"}
        assert receipt["trace"]["span_id"] == request.span_id.hex()
        assert SECRET not in repr([received.span for received in collector.spans])
        other = ask(url, traceparent="rubbish")
        spans = collector.wait_for_trace(other["trace"]["trace_id"], 1 + len(STAGES))
        assert assert_whole(spans, other).parent_span_id == b""
        assert collector.trace(not_kept) == []
