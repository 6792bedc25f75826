"""The gateway's view of its pools: what reports and its own sendings add up to, also beside another gateway."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import (
    BlockChanges,
    EngineInfo,
    EngineLoad,
    EngineTimes,
    FinishReason,
    InFlight,
    Phase,
    PrefillFacts,
    TokenDelta,
    WorkerReport,
)
from engine.reports import LOAD_INTERVAL_S
from gateway.cluster import RECENT_REQUESTS, TRUSTED_AFTER_TOKENS, Cluster, Replica
from gateway.routing.policies import least_tokens, place
from gateway.routing.types import ReplicaView
from tests.unit.gateway.rig import OTHER_PROMPT, PROMPT, Gateway, Rig
from tests.unit.simulated_config import BLOCK, CONFIG
from tests.unit.virtual_time import now_s, simulate

INFO = EngineInfo("simulated", "model", 256, 8, 64, 1024, [], max_num_seqs=4)
VIEW = ReplicaView("d1", 0, 0, 64, 0, max_num_seqs=4, block_size_tokens=8)


def report(
    replica_id: str,
    sequence: int = 0,
    blocks_used: int = 0,
    info: EngineInfo | None = None,
    others: InFlight | None = None,
    blocks: BlockChanges | None = None,
) -> WorkerReport:
    load = EngineLoad(num_kv_blocks_used=blocks_used)
    return WorkerReport(replica_id, Phase.DECODE, sequence, [], load, info, others or InFlight(), blocks)


def cluster_of(*replica_ids: str, clock: Callable[[], float] = time.monotonic) -> Cluster:
    cluster = Cluster(clock)
    for replica_id in replica_ids:
        cluster.add(replica_id, Phase.PREFILL if replica_id.startswith("p") else Phase.DECODE).ready = True
    return cluster


def replica_of(cluster: Cluster, replica_id: str) -> Replica:
    replica = cluster.get(replica_id)
    assert replica is not None
    return replica


def in_flight(cluster: Cluster, replica_id: str) -> tuple[dict[str, int], int]:
    replica = replica_of(cluster, replica_id)
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
    expected = msgspec.structs.replace(VIEW, in_flight_requests=2, in_flight_tokens=113, num_kv_blocks_used=5)
    assert cluster.snapshot().decode == (expected,)


def test_what_is_in_flight_is_ones_own_and_what_others_were_reported_to_have() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r1", 100)
    cluster.fold(report("d1", info=INFO, others=InFlight(3, 40, 30)))
    expected = msgspec.structs.replace(VIEW, in_flight_requests=4, in_flight_tokens=140, queued_tokens=30)
    assert cluster.snapshot().decode == (expected,)
    cluster.produced("d1", "r1", 2)
    cluster.fold(report("d1", 1, others=InFlight(1, 7)))
    expected = msgspec.structs.replace(VIEW, in_flight_requests=2, in_flight_tokens=109)
    assert cluster.snapshot().decode == (expected,)
    assert in_flight(cluster, "d1") == ({"r1": 102}, 102)


def test_cached_blocks_follow_the_reports() -> None:
    cluster = cluster_of("d1")
    replica = replica_of(cluster, "d1")
    cluster.fold(report("d1", info=INFO, blocks=BlockChanges([b"1", b"2"], [], cleared=True)))
    cluster.fold(report("d1", 1))
    cluster.fold(report("d1", 2, blocks=BlockChanges([b"3"], [b"1"])))
    assert set(replica.blocks) == {b"2", b"3"}
    cluster.fold(report("d1", info=INFO, blocks=BlockChanges([b"4"], [], cleared=True)))
    assert set(replica.blocks) == {b"4"}


def cached_tokens(cluster: Cluster, *hashes: bytes) -> int:
    return cluster.snapshot(hashes).cached("d1")


def test_a_snapshot_for_a_prompt_says_what_each_replica_has_cached_of_it() -> None:
    cluster = cluster_of("d1")
    prompt = (b"1", b"2", b"3")
    assert cluster.block_size_tokens == 0
    cluster.fold(report("d1", info=INFO, blocks=BlockChanges([b"1", b"2", b"4"], [], cleared=True)))
    assert cluster.block_size_tokens == INFO.block_size_tokens
    assert cached_tokens(cluster, *prompt) == 2 * INFO.block_size_tokens
    assert cached_tokens(cluster) == 0
    cluster.fold(report("d1", 1, blocks=BlockChanges([b"3"], [b"4"])))
    assert cached_tokens(cluster, *prompt) == 3 * INFO.block_size_tokens
    cluster.fold(report("d1", 2, blocks=BlockChanges([bytes([n, n]) for n in range(64)], [b"3"])))
    assert cached_tokens(cluster, b"1", b"2") == 0, "the mirror has overflowed"
    cluster.fold(report("d1", 3, blocks=BlockChanges([b"1"], [])))
    assert cached_tokens(cluster, *prompt) == INFO.block_size_tokens
    cluster.detach("d1")
    cluster.fold(report("d1", info=INFO))
    replica_of(cluster, "d1").ready = True
    assert cached_tokens(cluster, *prompt) == 0


def test_a_replica_holds_no_more_blocks_than_its_engine_has() -> None:
    cluster = cluster_of("d1")
    replica = replica_of(cluster, "d1")
    cluster.fold(report("d1", info=INFO, blocks=BlockChanges([bytes([n]) for n in range(64)], [], cleared=True)))
    assert len(replica.blocks) == 64
    cluster.fold(report("d1", 1, blocks=BlockChanges([b"one more"], [])))
    assert (len(replica.blocks), replica.blocks.num_overflows) == (0, 1)


def test_a_detached_replica_is_known_for_nothing_but_what_was_sent_to_it() -> None:
    cluster = cluster_of("d1")
    replica = replica_of(cluster, "d1")
    cluster.sent("d1", "r", 100)
    cluster.fold(report("d1", info=INFO, others=InFlight(3, 40), blocks=BlockChanges([b"1"], [], cleared=True)))
    cluster.detach("d1")
    assert (replica.ready, replica.attached, len(replica.blocks)) == (False, False, 0)
    assert replica.all_in_flight == InFlight(1, 100)


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


# -- what admission is decided from


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def first_delta(request_id: str, computed: int, cached: int = 0, external: int = 0, **more: Any) -> TokenDelta:
    facts = PrefillFacts(computed + cached + external, computed, cached, external)
    return TokenDelta(request_id, [1], prefill=facts, **more)


def tell(cluster: Cluster, replica_id: str, *deltas: TokenDelta, load: EngineLoad | None = None) -> None:
    phase = Phase.PREFILL if replica_id.startswith("p") else Phase.DECODE
    cluster.fold(WorkerReport(replica_id, phase, 1, list(deltas), load or EngineLoad()))


def test_a_prompt_is_queued_at_prefill_until_it_is_read() -> None:
    cluster = cluster_of("p1", "d1")
    cluster.sent("p1", "r1", 100)
    cluster.sent("p1", "r2", 20)
    assert cluster.snapshot().prefill[0].queued_tokens == 120
    tell(cluster, "p1", first_delta("r1", 100, finish_reason=FinishReason.LENGTH))
    assert cluster.snapshot().prefill[0].queued_tokens == 20
    cluster.ended("p1", "r1")
    cluster.ended("p1", "r2")
    assert cluster.snapshot().prefill[0].queued_tokens == 0


def test_a_prompt_is_queued_at_decode_from_its_submission_to_its_first_token() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r", 100)
    assert cluster.snapshot().decode[0].queued_tokens == 0, "another engine reads it first"
    cluster.queued("d1", "r")
    assert cluster.snapshot().decode[0].queued_tokens == 100
    tell(cluster, "d1", TokenDelta("r", []))
    assert cluster.snapshot().decode[0].queued_tokens == 100
    tell(cluster, "d1", first_delta("r", 100))
    assert cluster.snapshot().decode[0].queued_tokens == 0


def test_a_prompt_that_fails_or_is_sent_again_is_queued_no_more_than_once() -> None:
    cluster = cluster_of("d1")
    for _ in range(2):
        cluster.sent("d1", "r", 100)
        cluster.queued("d1", "r")
        cluster.queued("d1", "r")
    assert cluster.snapshot().decode[0].queued_tokens == 100
    tell(cluster, "d1", TokenDelta("r", [], FinishReason.ERROR))
    assert cluster.snapshot().decode[0].queued_tokens == 0
    cluster.queued("d1", "unknown")
    assert cluster.snapshot().decode[0].queued_tokens == 0


def test_nothing_is_queued_on_a_replica_whose_reports_broke_off() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r", 100)
    cluster.queued("d1", "r")
    cluster.detach("d1")
    assert replica_of(cluster, "d1").all_in_flight == InFlight(1, 100, 0)
    cluster.ended("d1", "r")
    assert replica_of(cluster, "d1").all_in_flight == InFlight()


def test_the_prefill_rate_says_nothing_before_the_engine_has_read_enough() -> None:
    cluster = cluster_of("p1")
    load = EngineLoad(prefill_tokens_per_s=50.0, prompt_tokens_computed_total=TRUSTED_AFTER_TOKENS - 1)
    tell(cluster, "p1", load=load)
    assert cluster.snapshot().prefill[0].prefill_tokens_per_s == 0.0
    tell(cluster, "p1", load=msgspec.structs.replace(load, prompt_tokens_computed_total=TRUSTED_AFTER_TOKENS))
    assert cluster.snapshot().prefill[0].prefill_tokens_per_s == 50.0


def test_the_computed_share_is_of_the_prompts_an_engine_has_read_lately() -> None:
    cluster = cluster_of("p1")
    assert cluster.snapshot().prefill[0].computed_share == 1.0
    tell(cluster, "p1", first_delta("r1", 100), first_delta("r2", 20, cached=280))
    tell(cluster, "p1", first_delta("r3", 1, external=999))
    assert cluster.snapshot().prefill[0].computed_share == pytest.approx(120 / 400)
    for _ in range(RECENT_REQUESTS):
        tell(cluster, "p1", first_delta("r", 0, cached=10))
    assert cluster.snapshot().prefill[0].computed_share == 0.0


def test_a_place_in_decodes_batch_is_held_from_the_first_computing_to_the_end() -> None:
    clock = Clock()
    cluster = cluster_of("d1", clock=clock)
    for request_id, seconds in (("r1", 2.0), ("r2", 4.0)):
        cluster.sent("d1", request_id, 100)
        clock.now_s += 1000.0
        tell(cluster, "d1", first_delta(request_id, 1, external=99, times=EngineTimes(500.0, 0.5)))
        tell(cluster, "d1", TokenDelta(request_id, [2]))
        clock.now_s += seconds
        cluster.ended("d1", request_id)
        cluster.ended("d1", request_id)
    assert cluster.snapshot().decode[0].slot_s == pytest.approx((2.5 + 4.5) / 2)


def test_a_request_that_never_ran_held_no_place() -> None:
    cluster = cluster_of("d1")
    cluster.sent("d1", "r", 100)
    tell(cluster, "d1", first_delta("a warm-up", 9))
    cluster.ended("d1", "r")
    cluster.ended("d1", "a warm-up")
    assert cluster.snapshot().decode[0].slot_s == 0.0


# -- two gateways over the same workers


def own(gateway: Gateway, replica_id: str) -> InFlight:
    replica = replica_of(gateway.cluster, replica_id)
    return InFlight(len(replica.in_flight), replica.in_flight_tokens, replica.queued_tokens)


def others(gateway: Gateway, replica_id: str) -> InFlight:
    return replica_of(gateway.cluster, replica_id).others_in_flight


def test_each_gateway_sees_what_the_other_has_sent_within_a_report_interval() -> None:
    """What a gateway is told of the other is what the other knew at most one interval before, at every moment."""

    async def main() -> None:
        # Decode alone, so that a request is on its worker from the moment it is sent.
        async with Rig(prefill=0, decode=2) as rig:
            other = await rig.another_gateway("other")
            pairs = [(one, two, replica) for one, two in ((rig, other), (other, rig)) for replica in rig.workers]
            history: dict[tuple[int, str], list[tuple[float, InFlight]]] = {}
            seen: set[InFlight] = set()
            arrivals = {5: rig, 40: other, 41: rig, 90: other, 200: other, 300: rig, 301: rig}
            for tick in range(1500):
                if gateway := arrivals.get(tick):
                    gateway.add([tick, *PROMPT], 30)
                await asyncio.sleep(0.001)
                for _, sender, replica_id in pairs:
                    history.setdefault((id(sender), replica_id), []).append((now_s(), own(sender, replica_id)))
                for reader, sender, replica_id in pairs:
                    told = others(reader, replica_id)
                    begin_s = now_s() - LOAD_INTERVAL_S - 0.002
                    recent = [value for at_s, value in history[id(sender), replica_id] if at_s >= begin_s]
                    assert told in recent, f"{replica_id} is said to hold {told}; its sender knew {recent}"
                    seen.add(told)
            assert len(seen) > 30
            assert {in_flight.num_requests for in_flight in seen} >= {0, 1, 2}

    simulate(main)


@pytest.mark.parametrize("replica_id", ["prefill-0", "decode-0"])
def test_both_gateways_count_the_same_while_nothing_moves(replica_id: str) -> None:
    async def main() -> None:
        # Steps so long that the reports of one are all read before the next.
        slow = replace(CONFIG, latency=replace(CONFIG.latency, prefill_fixed_s=1.0, decode_step_s=1.0))
        async with Rig(engines={"prefill-0": slow, "decode-0": slow}) as rig:
            other = await rig.another_gateway("other")
            rig.add(PROMPT, 4)
            other.add(OTHER_PROMPT[: 2 * BLOCK], 4)
            worker_has = set[int]()
            while rig.orchestrator.num_in_flight or other.orchestrator.num_in_flight:
                await asyncio.sleep(0.25)
                views = [
                    {view.replica_id: view for view in (*snapshot.prefill, *snapshot.decode)}[replica_id]
                    for snapshot in (rig.cluster.snapshot(), other.cluster.snapshot())
                ]
                if replica_id == "decode-0" and own(rig, "prefill-0") != InFlight():
                    continue  # decode's share is reserved by its gateway from the placement on, before decode has it
                if replica_id == "decode-0" and own(other, "prefill-0") != InFlight():
                    continue
                counts = [(v.in_flight_requests, v.in_flight_tokens, v.queued_tokens) for v in views]
                assert counts[0] == counts[1]
                worker_has.add(views[0].in_flight_tokens)
            assert len(worker_has) > (1 if replica_id == "prefill-0" else 3)

    simulate(main)


def test_a_gateway_avoids_the_replica_that_another_one_has_loaded() -> None:
    async def main() -> None:
        async with Rig(prefill=0, decode=2) as rig:
            other = await rig.another_gateway("other")
            for _ in range(6):
                first = other.add(PROMPT, 40)
                loaded = other.receipt(first).placement.decode
                await rig.loads_are_told()
                request_id = rig.add(OTHER_PROMPT, 40)
                placed = rig.receipt(request_id)
                assert placed.placement.decode != loaded
                (view,) = [view for view in placed.snapshot.decode if view.replica_id == loaded]
                assert view.in_flight_tokens > len(PROMPT)
                assert place(least_tokens, placed.request, placed.snapshot, placed.seed) == placed.placement
                await other.finished(first)
                await rig.finished(request_id)
                await rig.loads_are_told()

    simulate(main)


def test_a_gateway_that_ends_leaves_nothing_in_flight_behind() -> None:
    async def main() -> None:
        async with Rig(prefill=0) as rig:
            other = await rig.another_gateway("other")
            request_id = other.add(PROMPT, 100)
            await other.writing(request_id)
            await rig.loads_are_told()
            assert others(rig, "decode-0").num_requests == 1
            await rig.leave(other)
            await rig.loads_are_told()
            assert others(rig, "decode-0") == InFlight()

    simulate(main)
