"""What Prometheus pages tell: Baton's of its pools, vLLM's of one server."""

from bench.load_metrics import Counters, PoolSample, counters, pool_samples

BATON = """\
# TYPE baton_kv_moved_bytes counter
baton_kv_moved_bytes_total{gateway="a"} 10.0
baton_kv_moved_bytes_total{gateway="b"} 5.0
baton_kv_moved_bytes_created{gateway="a"} 99.0
# TYPE baton_pool_requests gauge
baton_pool_requests{pool="prefill",state="running"} 1.0
baton_pool_requests{pool="prefill",state="waiting"} 2.0
baton_pool_requests{pool="decode",state="running"} 3.0
baton_pool_requests{pool="decode",state="waiting"} 0.0
# TYPE baton_pool_kv_blocks gauge
baton_pool_kv_blocks{pool="prefill",state="total"} 8.0
baton_pool_kv_blocks{pool="prefill",state="used"} 2.0
"""
VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
# TYPE vllm:nixl_bytes_transferred histogram
vllm:nixl_bytes_transferred_bucket{le="+Inf"} 2.0
vllm:nixl_bytes_transferred_count 2.0
vllm:nixl_bytes_transferred_sum 4096.0
"""


def test_bytes_are_sums_over_gateways() -> None:
    assert counters(BATON) == Counters(15.0, 0.0)


def test_bytes_are_read_of_a_vllm_server_too() -> None:
    assert counters(VLLM) == Counters(4096.0, 0.0)


def test_an_engine_that_fetched_nothing_yet_shows_no_sample_and_counts_none() -> None:
    assert counters("# TYPE baton_requests counter\nbaton_requests_total 1.0\n") == Counters(0.0, 0.0)


def test_a_page_of_something_else_counts_nothing() -> None:
    assert counters("# TYPE other_total counter\nother_total 1.0\n") is None
    assert list(pool_samples("# TYPE other_total counter\nother_total 1.0\n", "x", 0.0)) == []


def test_a_page_of_baton_tells_of_each_pool_also_of_one_that_has_no_engine_yet() -> None:
    assert list(pool_samples(BATON, "unused", 1.5)) == [
        PoolSample(1.5, "prefill", 1.0, 2.0, 0.25),
        PoolSample(1.5, "decode", 3.0, 0.0, 0.0),
    ]


def test_a_page_of_vllm_tells_of_its_engines_together() -> None:
    assert list(pool_samples(VLLM, "decode", 2.0)) == [PoolSample(2.0, "decode", 3.0, 4.0, 0.375)]
