"""The gateway's view of its pools: what reports and its own sendings add up to."""

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import EngineInfo, EngineLoad, Phase, WorkerReport
from gateway.cluster import Cluster
from gateway.routing.types import ReplicaView

INFO = EngineInfo("simulated", "model", 256, 8, 64, 1024, [])


def report(replica_id: str, sequence: int = 0, blocks_used: int = 0, info: EngineInfo | None = None) -> WorkerReport:
    return WorkerReport(replica_id, Phase.DECODE, sequence, [], EngineLoad(num_kv_blocks_used=blocks_used), info)


def cluster_of(*replica_ids: str) -> Cluster:
    cluster = Cluster()
    for replica_id in replica_ids:
        cluster.add(replica_id, Phase.PREFILL if replica_id.startswith("p") else Phase.DECODE).ready = True
    return cluster


def in_flight(cluster: Cluster, replica_id: str) -> tuple[dict[str, int], int]:
    replica = cluster.get(replica_id)
    assert replica is not None
    return replica.in_flight, replica.in_flight_tokens


def test_a_pool_is_in_the_order_of_its_ids_and_holds_one_phase() -> None:
    cluster = cluster_of("d2", "p1", "d1", "p2")
    assert [replica.replica_id for replica in cluster.pool(Phase.DECODE)] == ["d1", "d2"]
    assert [replica.replica_id for replica in cluster.pool(Phase.PREFILL)] == ["p1", "p2"]


def test_a_snapshot_holds_ready_replicas_only() -> None:
    cluster = cluster_of("d1", "d2", "p1")
    cluster.add("d3", Phase.DECODE)
    snapshot = cluster.snapshot()
    assert [view.replica_id for view in snapshot.decode] == ["d1", "d2"]
    assert [view.replica_id for view in snapshot.prefill] == ["p1"]


def test_a_replica_is_attached_from_its_first_report_on() -> None:
    cluster = cluster_of("d1")
    replica = cluster.get("d1")
    assert replica is not None
    assert not replica.attached
    cluster.fold(report("d1", info=INFO))
    cluster.fold(report("d1", 1))
    assert replica.attached
    assert replica.info == INFO


def test_a_snapshot_shows_what_was_reported_and_what_was_sent() -> None:
    cluster = cluster_of("d1")
    cluster.fold(report("d1", info=INFO))
    cluster.fold(report("d1", 1, blocks_used=5))
    cluster.sent("d1", "r1", 100)
    cluster.sent("d1", "r2", 10)
    cluster.produced("d1", "r1", 3)
    assert cluster.snapshot().decode == (ReplicaView("d1", 2, 113, 64, 5),)


def test_a_snapshot_does_not_change_afterwards() -> None:
    cluster = cluster_of("d1")
    before = cluster.snapshot()
    cluster.sent("d1", "r", 100)
    assert before.decode[0].in_flight_tokens == 0


def test_a_report_of_a_replica_that_is_gone_is_ignored() -> None:
    cluster = cluster_of("d1")
    cluster.remove("d1")
    cluster.fold(report("d1", info=INFO))
    assert cluster.get("d1") is None


def test_a_request_that_is_sent_again_counts_once() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r", 100)
    cluster.produced("d1", "r", 5)
    cluster.sent("d1", "r", 40)
    assert in_flight(cluster, "d1") == ({"r": 40}, 40)


def test_tokens_of_a_request_that_has_ended_do_not_count() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r", 100)
    cluster.ended("d1", "r")
    cluster.ended("d1", "r")
    cluster.produced("d1", "r", 5)
    assert in_flight(cluster, "d1") == ({}, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "produced", "ended"]),
            st.sampled_from(["d1", "p1", "gone"]),
            st.sampled_from(["r1", "r2", "r3"]),
            st.integers(0, 50),
        )
    )
)
def test_tokens_in_flight_are_the_sum_of_the_requests_in_flight(events: list[tuple[str, str, str, int]]) -> None:
    cluster = cluster_of("d1", "p1")
    for what, replica_id, request_id, tokens in events:
        if what == "ended":
            cluster.ended(replica_id, request_id)
        else:
            getattr(cluster, what)(replica_id, request_id, tokens)
        for known in ("d1", "p1"):
            requests, total = in_flight(cluster, known)
            assert total == sum(requests.values())
    for replica_id in ("d1", "p1"):
        for request_id in ("r1", "r2", "r3"):
            cluster.ended(replica_id, request_id)
        assert in_flight(cluster, replica_id) == ({}, 0)
