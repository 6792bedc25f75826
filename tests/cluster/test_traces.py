"""`baton serve` with two gateways and a collector: the trace of each request arrives whole, whichever gateway took it,
and also if the run ends at once after it."""

from concurrent.futures import ThreadPoolExecutor
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
GATEWAYS_STAGES = {"request", "front_end", "decide", "transit", "decode"}
NUM_ASKS = 8
SECRET = "a prompt that nobody else is to read"


def traced_config(folder: Path, collector: Collector) -> Path:
    config = yaml.safe_load((CONFIGS / "simulated.yaml").read_text())
    config["model"]["path"] = str(CONFIGS / "models" / "mini")
    config["pools"]["decode"]["num_cpus"] = 0.5
    config["gateway"] = {"replicas": 2, "num_cpus": 0.5}
    config["tracing"] = {"otlp_endpoint": collector.url}
    path = folder / "traced.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def answered(url: str, **headers: str) -> str:
    """The id of a streamed chat that has ended, over a connection of its own: HAProxy chooses a gateway for each."""
    body = {
        "model": "baton-mini",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 20,
        "stream": True,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60.0)
    assert response.status_code == 200, response.text
    return response.headers["x-baton-request-id"]


def receipt_of(url: str, request_id: str) -> dict:
    return httpx.get(f"{url}/baton/receipts/{request_id}", timeout=60.0).json()


def assert_whole(spans: list[Received], receipt: dict) -> Span:
    """One request with each stage once, in its parent's time. Returns the request's span."""
    assert sorted(received.name for received in spans) == sorted({"request", *STAGES})
    by_name = {received.name: received for received in spans}
    request = by_name["request"].span
    assert by_name["request"].attributes["baton.request_id"] == receipt["request_id"]
    assert by_name["request"].attributes["baton.output_tokens"] == 20
    assert by_name["request"].duration_ms == pytest.approx(receipt["outcome"]["duration_ms"], abs=0.01)
    (first_token_ns,) = [event.time_unix_nano for event in request.events if event.name == "first_token"]
    for stage in STAGES:
        span = by_name[stage].span
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
        told_ms, lasted_ms = receipt["outcome"]["times_ms"][stage], by_name[stage].duration_ms
        # A worker's clock may have a stage end after the first token, which a trace does not show.
        is_cut = lasted_ms < told_ms and span.end_time_unix_nano == first_token_ns
        assert is_cut or lasted_ms == pytest.approx(told_ms, abs=0.01)
        is_engines = stage in ("decode_wait", "decode_compute")
        assert (by_name[stage].resource["service.instance.id"] == receipt["placement"]["decode"]) == is_engines
    return request


def gateway_of(spans: list[Received]) -> str:
    """Which has sent a trace, all of it."""
    (gateway,) = {span.resource["service.instance.id"] for span in spans if span.name in GATEWAYS_STAGES}
    return gateway


@pytest.mark.timeout(300)
def test_each_trace_arrives_whole_whichever_gateway_took_the_request_and_also_the_last(tmp_path: Path) -> None:
    with collecting() as collector:
        with running(traced_config(tmp_path, collector), "gateway.app:build") as run:
            url = f"http://127.0.0.1:{run.port}"
            not_kept = TRACE_ID[::-1]
            answered(url, traceparent=f"00-{not_kept}-{PARENT_ID}-00")
            asked = answered(url, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01", tracestate="vendor=1")
            receipt = receipt_of(url, asked)
            spans = collector.wait_for_trace(TRACE_ID, 1 + len(STAGES))
            request = assert_whole(spans, receipt)
            assert request.parent_span_id.hex() == PARENT_ID
            assert {received.span.trace_state for received in spans} == {"vendor=1"}
            assert receipt["trace"]["span_id"] == request.span_id.hex()

            gateways: set[str] = set()
            for request_id in [answered(url, traceparent="rubbish") for _ in range(NUM_ASKS)]:
                other = receipt_of(url, request_id)
                spans = collector.wait_for_trace(other["trace"]["trace_id"], 1 + len(STAGES))
                assert assert_whole(spans, other).parent_span_id == b""
                gateways.add(gateway_of(spans))
            assert len(gateways) == 2
            assert SECRET not in repr([received.span for received in collector.spans])

            last = [f"{number:032x}" for number in range(1, 1 + NUM_ASKS)]
            with ThreadPoolExecutor(NUM_ASKS) as pool:
                list(pool.map(lambda id: answered(url, traceparent=f"00-{id}-{PARENT_ID}-01"), last))
        for trace_id in last:
            assert sorted(received.name for received in collector.trace(trace_id)) == sorted({"request", *STAGES})
        assert {gateway_of(collector.trace(trace_id)) for trace_id in last} == gateways
        assert collector.trace(not_kept) == []
