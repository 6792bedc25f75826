"""The policy `baton`: what it costs everyone decides, together for both pools."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.costs import Costs, HandoffCost, PoolCosts, ReadCost, StepCost
from gateway.routing.joint import CANDIDATES, Joint
from gateway.routing.policies import POLICIES, place
from gateway.routing.predict import predict
from gateway.routing.types import ClusterSnapshot, Placement, ReplicaView, RequestView

BLOCK = 10
COSTS = Costs(
    prefill=PoolCosts(ReadCost(0.0, 0.001, 0.0), StepCost(0.0, 0.0, 0.0)),
    decode=PoolCosts(ReadCost(0.0, 0.001, 0.0), StepCost(0.01, 0.001, 0.0)),
    handoff=HandoffCost(0.01, 0.001),
    output_tokens=10.0,
)
REQUEST = RequestView("r", num_prompt_tokens=1000, max_tokens=10)
BATON = Joint()


def replica(replica_id: str, **fields: float) -> ReplicaView:
    view = ReplicaView(replica_id, 0, 0, 1000, 0, max_num_seqs=64, block_size_tokens=BLOCK)
    return msgspec.structs.replace(view, **fields)


def cluster(
    prefill: list[ReplicaView], decode: list[ReplicaView], now_s: float = 0.0, costs: Costs = COSTS, **cached: int
) -> ClusterSnapshot:
    return ClusterSnapshot(tuple(prefill), tuple(decode), True, cached, costs, now_s)


def placed(
    snapshot: ClusterSnapshot, request: RequestView = REQUEST, policy: Joint = BATON, seed: int = 0
) -> Placement:
    placement = place(policy, request, snapshot, seed)
    assert isinstance(placement, Placement)
    return placement


def test_an_idle_decode_replica_reads_the_prompt_itself_for_then_there_is_no_handoff() -> None:
    placement = placed(cluster([replica("p0")], [replica("d0")]))
    assert (placement.prefill, placement.decode) == (None, "d0")
    assert placement.reason.startswith("decode reads the prompt itself: ")


def test_answers_that_would_pause_make_the_split_pay() -> None:
    busy = replica("d0", in_flight_requests=4, in_flight_tokens=400)
    assert placed(cluster([replica("p0")], [busy])).prefill == "p0"


def test_a_short_rest_is_read_by_decode_where_the_rest_is_cached() -> None:
    """Reading 10 tokens delays 4 answers for 0.04 s in all; a prefill replica without the prompt needs a second."""
    busy = replica("d0", in_flight_requests=4, in_flight_tokens=400)
    assert placed(cluster([replica("p0")], [busy], d0=990)).prefill is None
    # Where prefill has it cached too, only the hand-off counts.
    assert placed(cluster([replica("p0")], [busy], d0=900, p0=990)).prefill == "p0"


def test_a_session_stays_where_its_prompt_is_cached_until_that_is_overloaded() -> None:
    def chosen(read_until_s: float) -> str | None:
        holder = replica("p0", read_until_s=read_until_s, in_flight_requests=1)
        busy = replica("d0", in_flight_requests=9, in_flight_tokens=900)
        return placed(cluster([holder, replica("p1")], [busy], p0=800)).prefill

    assert chosen(read_until_s=0.4) == "p0"
    assert chosen(read_until_s=5.0) == "p1"


def test_the_queue_is_what_is_left_of_it_now() -> None:
    busy = replica("d0", in_flight_requests=9, in_flight_tokens=900)
    early, late = replica("p0", read_until_s=10.0), replica("p1", read_until_s=11.0)
    assert placed(cluster([early, late], [busy], now_s=9.0)).prefill == "p0"
    prediction = predict(REQUEST, Placement("p1", "d0", "x", ""), cluster([early, late], [busy], now_s=9.0))
    assert prediction.wait_s == pytest.approx(2.0)


def test_decode_is_chosen_by_what_the_answer_costs_everyone_there() -> None:
    costs = replace(COSTS, decode=PoolCosts(COSTS.decode.read, StepCost(0.01, 0.01, 0.0)))
    many = replica("d0", in_flight_requests=6, in_flight_tokens=60)
    few = replica("d1", in_flight_requests=2, in_flight_tokens=6000)
    placement = placed(cluster([replica("p0")], [many, few], costs=costs))
    assert placement.decode == "d1", "fewer answers are slowed down, although there are more tokens"


def test_a_full_kv_cache_is_waited_for() -> None:
    full = replica("d0", in_flight_requests=1, in_flight_tokens=9_900, slot_s=30.0)
    crowded = replica("d1", in_flight_requests=8, in_flight_tokens=800)
    assert placed(cluster([replica("p0")], [full, crowded])).decode == "d1"


def test_what_sessions_will_want_back_is_not_displaced_without_need() -> None:
    promised = replica("d0", promised_tokens=9_900.0)
    other = replica("d1", in_flight_requests=1, in_flight_tokens=10)
    snapshot = cluster([replica("p0")], [promised, other])
    assert placed(cluster([replica("p0")], [replica("d0"), other])).decode == "d0"
    assert placed(snapshot).decode == "d1"
    assert placed(snapshot, policy=Joint(keeps_promised=False)).decode == "d0"


BUSY = replica("d0", in_flight_requests=4, in_flight_tokens=400)
"""Reading a long rest itself would cost its four answers more than a hand-off costs."""


def asking(prefill: list[ReplicaView], decode: list[ReplicaView], **cached: int) -> ClusterSnapshot:
    return replace(cluster(prefill, decode, **cached), can_ask=True)


def test_decode_is_asked_for_what_it_alone_has_cached() -> None:
    """Prefill would read 600 tokens more in 0.6 s; to ask costs 0.01 s, five times, and a hand-off of 0.07 s."""
    snapshot = asking([replica("p0")], [BUSY], d0=600)
    placement = placed(snapshot)
    assert (placement.prefill, placement.decode, placement.ask) == ("p0", "d0", "d0")
    assert "on p0, which fetches 600 tokens of d0," in placement.reason
    # 0.01 s for the last block of what is asked, 0.01 + 60 * 0.001 s for the fetch, 0.4 s for the rest.
    assert placement.scores["p0"] == pytest.approx(0.01 + 4 * 0.01 + 0.07 + 0.4)
    prediction = predict(REQUEST, placement, snapshot)
    assert (prediction.cached_tokens, prediction.ask_s) == (600, pytest.approx(0.08))
    assert prediction.read_s == pytest.approx(0.4)
    assert placed(replace(snapshot, can_ask=False)).ask is None


def test_nobody_is_asked_for_what_prefill_has_or_reads_as_fast() -> None:
    assert placed(asking([replica("p0")], [BUSY], d0=600, p0=600)).ask is None
    assert placed(asking([replica("p0")], [BUSY], d0=600, p0=590)).ask is None, "10 tokens are read in 0.01 s"
    assert placed(asking([replica("p0")], [BUSY], d0=60)).ask is None, "60 tokens are read in 0.06 s"
    assert placed(asking([replica("p0")], [BUSY])).ask is None


def test_who_has_most_cached_is_asked_also_when_another_one_answers() -> None:
    holder = replica("d1", in_flight_requests=20, in_flight_tokens=9_000, slot_s=50.0)
    placement = placed(asking([replica("p0")], [BUSY, holder, replica("d2", in_flight_requests=5)], d1=900, d2=100))
    assert (placement.prefill, placement.ask) == ("p0", "d1")
    assert placement.decode != "d1"


def test_of_a_prompt_that_is_cached_whole_the_last_block_is_not_asked_for() -> None:
    snapshot = asking([replica("p0")], [BUSY], d0=1000)
    assert snapshot.askable_tokens("d0", 1000) == 990
    assert snapshot.askable_tokens("d0", 1005) == 1000
    assert snapshot.askable_tokens(None, 1000) == 0


def test_prefill_without_the_prompt_that_can_ask_may_beat_the_one_that_has_it() -> None:
    holder = replica("p0", read_until_s=0.5, in_flight_requests=1)
    far = asking([holder, replica("p1")], [BUSY], p0=800, d0=800)
    assert (placed(far).prefill, placed(far).ask) == ("p1", "d0")
    assert placed(replace(far, can_ask=False)).prefill == "p0"


def test_its_parts_can_be_left_out() -> None:
    snapshot = cluster([replica("p0"), replica("p1")], [replica("d0")], p1=900)
    assert placed(snapshot, policy=Joint(conditional_split=False)).prefill == "p1"
    without = {
        placed(snapshot, policy=Joint(conditional_split=False, affinity=False), seed=n).prefill for n in range(9)
    }
    assert without == {"p0", "p1"}
    unfair = [replica("d0", in_flight_requests=1, in_flight_tokens=9), replica("d1", in_flight_tokens=10)]
    assert placed(cluster([], unfair)).decode == "d1"
    assert placed(cluster([], unfair), policy=Joint(joint=False)).decode == "d0"


def test_in_large_pools_the_least_loaded_and_those_with_the_most_cached_are_scored() -> None:
    pool = [replica(f"d{n:03}", in_flight_tokens=n, in_flight_requests=1) for n in range(100)]
    placement = placed(cluster([], pool, d090=500))
    scored = {name.split()[0] for name in placement.scores}
    assert len(scored) <= 2 * CANDIDATES
    assert {"d000", "d090"} <= scored
    assert placement.decode == "d090"


numbers = st.integers(0, 50)
pools = st.lists(
    st.builds(
        lambda requests, tokens, until, promised: (requests, tokens, until, promised),
        numbers, st.integers(0, 20_000), st.floats(0, 50), st.floats(0, 20_000),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@given(
    pools,
    pools,
    st.dictionaries(st.sampled_from(["p0", "p3", "d0", "d7"]), st.integers(0, 100).map(lambda n: n * BLOCK)),
    numbers,
    st.booleans(),
)
def test_a_placement_is_among_the_pools_and_comes_out_the_same_again(
    prefill: list[tuple[int, int, float, float]],
    decode: list[tuple[int, int, float, float]],
    cached: dict[str, int],
    seed: int,
    can_ask: bool,
) -> None:
    def views(name: str, rows: list[tuple[int, int, float, float]]) -> list[ReplicaView]:
        return [
            replica(f"{name}{n}", in_flight_requests=a, in_flight_tokens=b, read_until_s=c, promised_tokens=d)
            for n, (a, b, c, d) in enumerate(rows)
        ]

    snapshot = replace(cluster(views("p", prefill), views("d", decode), **cached), can_ask=can_ask)
    placement = placed(snapshot, seed=seed)
    assert placement.ask is None or (can_ask and placement.prefill and snapshot.cached(placement.ask))
    assert placement.decode in {view.replica_id for view in snapshot.decode}
    assert placement.prefill in {None, *(view.replica_id for view in snapshot.prefill)}
    kept = msgspec.json.decode(msgspec.json.encode(snapshot), type=ClusterSnapshot)
    assert place(POLICIES["baton"], REQUEST, kept, seed) == placement
