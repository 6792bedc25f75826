"""Placement policies: who is chosen, why, and that the same inputs choose the same."""

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.policies import least_tokens, place
from gateway.routing.types import Cause, ClusterSnapshot, Placement, Rejection, ReplicaView, RequestView

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
