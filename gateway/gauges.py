"""Owns what a gateway tells of this moment, at each scrape: the pools as it sees them, and what waits in it.

Gateways see the same pools: what they tell of them must not be added up, but taken once, by `max` or `min` over the
label `gateway`. What waits in a gateway is its own. Each HELP says which it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from engine.protocol import Phase
from gateway.cluster import Cluster, Replica
from gateway.metrics import NO_TENANT
from gateway.orchestrator import Orchestrator, Waiting
from gateway.routing.types import Priority

SEEN = "All gateways see the same: take the max over gateways, never the sum"
OWN = "Each gateway has its own: add them up"
OWN_LONGEST = "Each gateway has its own: take the max over gateways"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the configuration asks for; of pools that are scaled, what Serve is to run now."""

    replicas: Mapping[Phase, int]
    gateways: int
    ttft_deadline_s: float
    tenants: Sequence[str] = ()


def families(orchestrator: Orchestrator, expected: Expected) -> list[Metric]:
    """One family for each kind of gauge."""
    return [
        *_configured(expected),
        *_pools(orchestrator.cluster, expected),
        *_waiting(list(orchestrator.waiting()), expected),
        _gauge(
            "baton_gateway_sequences",
            f"Sequences that a gateway holds: each choice of each prompt that was taken and has not ended. {OWN}",
            {(): orchestrator.num_in_flight},
        ),
    ]


def _configured(expected: Expected) -> Iterator[Metric]:
    yield _gauge("baton_gateways_wanted", f"Gateways by the configuration. {SEEN}", {(): expected.gateways})
    yield _gauge(
        "baton_ttft_deadline_seconds",
        f"Deadline of a first token where the client names none, by the configuration. {SEEN}",
        {(): expected.ttft_deadline_s},
    )


def _pools(cluster: Cluster, expected: Expected) -> Iterator[Metric]:
    pools = {phase: cluster.pool(phase) for phase in Phase if expected.replicas[phase] or cluster.pool(phase)}
    attached = {phase: [replica for replica in pool if replica.attached] for phase, pool in pools.items()}
    replicas: dict[tuple[str, ...], float] = {}
    blocks: dict[tuple[str, ...], float] = {}
    requests: dict[tuple[str, ...], float] = {}
    for phase, pool in pools.items():
        replicas[phase, "wanted"] = expected.replicas[phase]
        replicas[phase, "ready"] = sum(replica.ready for replica in pool)
        loads = [replica.load for replica in attached[phase]]
        blocks[phase, "total"] = sum(replica.info.num_kv_blocks for replica in attached[phase] if replica.info)
        blocks[phase, "used"] = sum(load.num_kv_blocks_used for load in loads)
        requests[phase, "running"] = sum(load.num_running_requests for load in loads)
        requests[phase, "waiting"] = sum(load.num_waiting_requests for load in loads)
    yield _gauge(
        "baton_pool_replicas",
        "Replicas of a pool: wanted by the configuration, or by the demand where that sizes the pool, and ready for "
        "this gateway's requests. Take the max of what is wanted and the min of what is ready over gateways, never the "
        "sum",
        replicas,
        ("pool", "state"),
    )
    yield _gauge("baton_pool_kv_blocks", f"KV blocks of a pool's engines. {SEEN}", blocks, ("pool", "state"))
    yield _gauge(
        "baton_pool_fullest_kv_use_ratio",
        f"Used share of the KV blocks of the engine that has the fewest left. {SEEN}",
        {(phase,): max(map(_kv_use, pool), default=0.0) for phase, pool in attached.items()},
        ("pool",),
    )
    yield _gauge(
        "baton_pool_requests", f"Requests in a pool's engines, of all gateways. {SEEN}", requests, ("pool", "state")
    )


def _kv_use(replica: Replica) -> float:
    num_blocks = replica.info.num_kv_blocks if replica.info else 0
    return replica.load.num_kv_blocks_used / num_blocks if num_blocks else 0.0


def _waiting(waiting: Sequence[Waiting], expected: Expected) -> Iterator[Metric]:
    number: dict[tuple[str, ...], float] = {(priority,): 0 for priority in Priority}
    oldest_s: dict[tuple[str, ...], float] = {(priority,): 0.0 for priority in Priority}
    tenants_oldest_s: dict[tuple[str, ...], float] = {(name,): 0.0 for name in expected.tenants or (NO_TENANT,)}
    for one in waiting:
        priority, tenant = (one.hints.priority,), (one.hints.tenant or NO_TENANT,)
        number[priority] += 1
        oldest_s[priority] = max(oldest_s[priority], one.waited_s)
        tenants_oldest_s[tenant] = max(tenants_oldest_s.get(tenant, 0.0), one.waited_s)
    yield _gauge(
        "baton_waiting_requests",
        f"Prompts that were taken and have no token yet, by the priority they asked for. {OWN}",
        number,
        ("priority",),
    )
    yield _gauge(
        "baton_oldest_wait_seconds",
        f"For how long the oldest prompt without a token has waited, by the priority it asked for. {OWN_LONGEST}",
        oldest_s,
        ("priority",),
    )
    yield _gauge(
        "baton_tenant_oldest_wait_seconds",
        f"For how long a tenant's oldest prompt without a token has waited. {OWN_LONGEST}",
        tenants_oldest_s,
        ("tenant",),
    )


def _gauge(
    name: str, documentation: str, values: Mapping[tuple[str, ...], float], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
