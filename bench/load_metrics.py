"""Owns what is read out of a server's Prometheus pages: bytes of KV that its engines fetched, and what its pools hold.
Pure.

A page is Baton's, which names its pools, or that of one vLLM server, whose pool is the one it was asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

ONLY_POOL = "engines"
_KV_MOVED = ("baton_kv_moved_bytes_total", "vllm:nixl_bytes_transferred_sum")
_KV_ASKED = ("baton_kv_asked_bytes_total",)
_VLLM_REQUESTS = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}
_VLLM_KV_USE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True)
class Counters:
    """Bytes of KV cache that a server's engines have fetched from each other since they started."""

    kv_moved_bytes: float
    kv_asked_bytes: float


@dataclass(frozen=True)
class PoolSample:
    """What the engines of a pool held at a moment, in seconds from the run's start: requests that run and wait, and the
    used share of the KV blocks."""

    at_s: float
    pool: str
    num_running: float
    num_waiting: float
    kv_use: float


def counters(page: str) -> Counters | None:
    """None where the page is of no such server. One whose engines have not fetched anything shows no such sample."""
    moved = asked = 0.0
    is_known = False
    for family in text_string_to_metric_families(page):
        is_known |= family.name.startswith(("baton_", "vllm:"))
        moved += sum(sample.value for sample in family.samples if sample.name in _KV_MOVED)
        asked += sum(sample.value for sample in family.samples if sample.name in _KV_ASKED)
    return Counters(moved, asked) if is_known else None


def pool_samples(page: str, pool: str, at_s: float) -> Iterator[PoolSample]:
    """One for each pool of which the page tells; `pool` is the name of a vLLM server's."""
    families = {family.name: family for family in text_string_to_metric_families(page)}
    if "baton_pool_requests" in families:
        requests = _by_labels(families["baton_pool_requests"], "pool", "state")
        blocks = _by_labels(families["baton_pool_kv_blocks"], "pool", "state")
        for name in dict.fromkeys(name for name, _ in requests):
            used, total = blocks.get((name, "used"), 0.0), blocks.get((name, "total"), 0.0)
            kv_use = used / total if total else 0.0
            yield PoolSample(at_s, name, requests[name, "running"], requests[name, "waiting"], kv_use)
    elif _VLLM_KV_USE in families:
        held = {state: sum(s.value for s in families[name].samples) for name, state in _VLLM_REQUESTS.items()}
        shares = [sample.value for sample in families[_VLLM_KV_USE].samples]
        yield PoolSample(at_s, pool, held["running"], held["waiting"], sum(shares) / len(shares) if shares else 0.0)


def _by_labels(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels[label] for label in labels): sample.value for sample in family.samples}
