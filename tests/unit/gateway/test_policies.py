"""Placement policies: who is chosen, why, and that the same inputs choose the same."""

import random
from dataclasses import replace
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.policies import POLICIES, Dynamo, LlmD, dynamo, least_tokens, llm_d, place
from gateway.routing.types import (
    Cause,
    ClusterSnapshot,
    Placement,
    Rejection,
    ReplicaView,
    RequestView,
    SessionView,
)
from gateway.settings import PolicyName

REQUEST = RequestView("r", num_prompt_tokens=100, max_tokens=10)
WHOLE = RequestView("r", num_prompt_tokens=100, max_tokens=10, needs_whole_prompt=True)


def views(**tokens: int) -> tuple[ReplicaView, ...]:
    return tuple(ReplicaView(replica_id, 1, number, 64, 0) for replica_id, number in tokens.items())


def placed(request: RequestView, snapshot: ClusterSnapshot, seed: int = 0) -> Placement:
    placement = place(least_tokens, request, snapshot, seed)
    assert isinstance(placement, Placement)
    return placement


def test_the_fewest_tokens_in_flight_win_in_each_pool() -> None:
    snapshot = ClusterSnapshot(prefill=views(p0=50, p1=7, p2=90), decode=views(d0=12, d1=500, d2=11))
    placement = placed(REQUEST, snapshot)
    assert (placement.prefill, placement.decode, placement.policy) == ("p1", "d2", "least-tokens")
    assert placement.reason == "fewest tokens in flight: 7 on p1, 11 on d2"
    assert placement.scores == {"p0": 50.0, "p1": 7.0, "p2": 90.0, "d0": 12.0, "d1": 500.0, "d2": 11.0}


def test_ties_are_drawn_among_the_best_only() -> None:
    snapshot = ClusterSnapshot(prefill=views(p0=0, p1=0, p2=1), decode=views(d0=3, d1=3, d2=3, d3=4))
    placements = [placed(REQUEST, snapshot, seed) for seed in range(100)]
    assert {placement.prefill for placement in placements} == {"p0", "p1"}
    assert {placement.decode for placement in placements} == {"d0", "d1", "d2"}


def formats(pool: tuple[ReplicaView, ...], **formats: str) -> tuple[ReplicaView, ...]:
    return tuple(msgspec.structs.replace(view, kv_format=formats[view.replica_id]) for view in pool)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_who_reads_can_hand_over_to_who_writes(policy: Any) -> None:
    prefill = formats(views(p0=0, p1=90, p2=95), p0="old", p1="new", p2="new")
    for decode_tokens in ({"d0": 12, "d1": 500}, {"d0": 500, "d1": 12}):
        snapshot = ClusterSnapshot(prefill, formats(views(**decode_tokens), d0="old", d1="new"))
        for seed in range(20):
            request = replace(REQUEST, number=seed)
            placement = place(policy, request, snapshot, seed)
            assert isinstance(placement, Placement)
            if placement.prefill is not None:
                assert (placement.prefill == "p0") == (placement.decode == "d0")


def test_a_decode_replica_that_no_prefill_replica_can_hand_over_to_reads_itself() -> None:
    snapshot = ClusterSnapshot(formats(views(p0=0), p0="old"), formats(views(d0=1), d0="new"), expects_prefill=True)
    placement = placed(REQUEST, snapshot)
    assert (placement.prefill, placement.decode, placement.degraded) == (None, "d0", True)


def test_without_prefill_replicas_decode_reads_the_prompt() -> None:
    placement = placed(REQUEST, ClusterSnapshot(prefill=(), decode=views(d0=1)))
    assert (placement.prefill, placement.decode) == (None, "d0")
    assert placement.reason == "decode reads the prompt itself: no prefill replica is available"


@pytest.mark.parametrize("expects_prefill", [True, False])
def test_a_placement_without_prefill_is_degraded_only_where_there_should_be_prefill(expects_prefill: bool) -> None:
    empty = ClusterSnapshot(prefill=(), decode=views(d0=1), expects_prefill=expects_prefill)
    assert placed(REQUEST, empty).degraded is expects_prefill
    assert not placed(WHOLE, empty).degraded
    assert not placed(REQUEST, replace(empty, prefill=views(p0=1))).degraded


def test_a_request_that_needs_its_whole_prompt_is_not_split() -> None:
    placement = placed(WHOLE, ClusterSnapshot(prefill=views(p0=0), decode=views(d0=1)))
    assert (placement.prefill, placement.decode) == (None, "d0")
    assert "prompt logprobs" in placement.reason


def test_without_decode_replicas_there_is_no_placement() -> None:
    snapshot = ClusterSnapshot(prefill=views(p0=0), decode=())
    expected = Rejection(503, "no decode replica is available", 5, Cause.NO_DECODE)
    assert place(least_tokens, REQUEST, snapshot, 0) == expected


pools = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(0, 2))


@given(prefill=pools, decode=pools, seed=st.integers(0, 2**32 - 1), whole=st.booleans())
def test_a_placement_is_a_function_of_its_inputs_and_chooses_what_is_there(
    prefill: dict[str, int], decode: dict[str, int], seed: int, whole: bool
) -> None:
    snapshot = ClusterSnapshot(views(**prefill), views(**decode))
    request = WHOLE if whole else REQUEST
    first = place(least_tokens, request, snapshot, seed)
    random.seed(1)
    assert msgspec.msgpack.encode(place(least_tokens, request, snapshot, seed)) == msgspec.msgpack.encode(first)
    if not decode:
        assert isinstance(first, Rejection)
        return
    assert isinstance(first, Placement)
    assert decode[first.decode] == min(decode.values())
    assert (first.prefill is None) == (whole or not prefill)
    if first.prefill is not None:
        assert prefill[first.prefill] == min(prefill.values())


# -- the others


def by(policy: str, request: RequestView, snapshot: ClusterSnapshot, seed: int = 0) -> Placement:
    placement = place(POLICIES[policy], request, snapshot, seed)
    assert isinstance(placement, Placement)
    assert placement.policy == policy
    return placement


def replica(replica_id: str, **more: float) -> ReplicaView:
    view = ReplicaView(replica_id, 0, 0, 64, 0, block_size_tokens=10, prefill_tokens_per_s=100.0)
    return msgspec.structs.replace(view, **more)


BOTH = ClusterSnapshot(prefill=views(p0=0, p1=0, p2=0), decode=views(d0=0, d1=0))


def test_the_configuration_names_every_policy() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_the_rules_of_all(policy: str) -> None:
    rejection = place(POLICIES[policy], REQUEST, ClusterSnapshot(prefill=views(p0=0), decode=()), 0)
    assert isinstance(rejection, Rejection)
    assert (rejection.status, rejection.cause) == (503, Cause.NO_DECODE)
    assert by(policy, WHOLE, BOTH).prefill is None
    assert by(policy, REQUEST, replace(BOTH, prefill=(), expects_prefill=True)).degraded
    placement = by(policy, REQUEST, BOTH)
    assert placement.prefill in (None, "p0", "p1", "p2")
    assert placement.decode in ("d0", "d1")
    assert placement.reason
    assert placement == by(policy, REQUEST, BOTH)


def test_round_robin_goes_through_both_pools() -> None:
    placements = [by("round-robin", replace(REQUEST, number=number), BOTH) for number in range(4)]
    assert [p.prefill for p in placements] == ["p0", "p1", "p2", "p0"]
    assert [p.decode for p in placements] == ["d0", "d1", "d0", "d1"]


def test_session_affinity_stays_where_the_session_was_while_that_is_there() -> None:
    later = replace(REQUEST, number=1, session=SessionView(3, "p2", "d0"))
    placement = by("session-affinity", later, BOTH)
    assert (placement.prefill, placement.decode) == ("p2", "d0")
    gone = replace(BOTH, prefill=views(p0=0, p1=0))
    assert by("session-affinity", later, gone).prefill == "p1"
    first = replace(REQUEST, number=1, session=SessionView())
    assert (
        by("session-affinity", first, BOTH).prefill
        == by("session-affinity", replace(first, session=None), BOTH).prefill
    )


def test_dynamo_adds_the_uncached_prefill_to_what_is_in_flight_in_blocks() -> None:
    prefill = (replica("p0"), replica("p1", queued_tokens=10), replica("p2", in_flight_tokens=90))
    decode = (replica("d0", in_flight_tokens=10), replica("d1"))
    placement = by("dynamo", REQUEST, ClusterSnapshot(prefill, decode, cached_tokens={"p0": 80, "d0": 100}))
    assert placement.scores == {"p0": 2.0, "p1": 11.0, "p2": 19.0, "d0": 11.0, "d1": 10.0}
    assert (placement.prefill, placement.decode) == ("p0", "d1")
    assert placement.reason == "lowest cost in blocks: 2 on p0, 10 on d1"


def test_published_policies_take_other_constants() -> None:
    prefill = (replica("p0", queued_tokens=10), replica("p1", in_flight_tokens=40))
    snapshot = ClusterSnapshot(prefill, (replica("d0"),), cached_tokens={"p0": 20, "p1": 30})
    costs = place(dynamo(Dynamo(2.0, 0.5)), REQUEST, snapshot, 0)
    assert isinstance(costs, Placement)
    assert costs.scores == {"p0": 20.0, "p1": 21.0, "d0": 20.0}
    weights = place(llm_d(LlmD(1.0, 0.0, 10.0, affine_share=0.3)), REQUEST, snapshot, 0)
    assert isinstance(weights, Placement)
    assert weights.scores == {"p1": 4.0, "d0": 1.0}


def test_llm_d_weighs_queue_cache_and_prefix() -> None:
    prefill = (
        replica("p0", in_flight_requests=4, num_kv_blocks_used=32),
        replica("p1", in_flight_requests=0, num_kv_blocks_used=0),
        replica("p2", in_flight_requests=2, num_kv_blocks_used=16),
    )
    snapshot = ClusterSnapshot(prefill, (replica("d0"),), cached_tokens={"p0": 70, "p2": 50})
    placement = by("llm-d", REQUEST, snapshot)
    expected = {"p0": 0 + 1.0 + 2.1, "p1": 2 + 2 + 0, "p2": 1 + 1.5 + 1.5, "d0": 4.0}
    assert placement.scores == pytest.approx(expected)
    assert placement == by("llm-d", REQUEST, snapshot)
    assert placement.prefill in ("p1", "p2")


@pytest.mark.parametrize(("queued_tokens", "prefill"), [(400, "p0"), (700, "p1")])
def test_llm_d_s_affinity_gives_way_to_a_first_token_five_seconds_later(queued_tokens: int, prefill: str) -> None:
    holder = replica("p0", queued_tokens=queued_tokens, in_flight_requests=9, num_kv_blocks_used=64)
    snapshot = ClusterSnapshot((holder, replica("p1")), (replica("d0"),), cached_tokens={"p0": 80})
    placement = by("llm-d", REQUEST, snapshot)
    assert placement.prefill == prefill
