"""Admission: what is predicted, who is refused first, and what a refusal says."""

import itertools
import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields

from gateway.routing.admission import AdmissionConfig, Admitted, admit
from gateway.routing.types import (
    Cause,
    ClusterSnapshot,
    Hints,
    Placement,
    Priority,
    Rejection,
    ReplicaView,
    RequestView,
)

CONFIG = AdmissionConfig(ttft_deadline_s=10.0, low_share=0.5, normal_share=0.8, high_share=1.0)
REQUEST = RequestView("r", num_prompt_tokens=1000, max_tokens=10)
SPLIT = Placement("p", "d", "policy", "reason")
LOCAL = Placement(None, "d", "policy", "reason")
PREFILL = ReplicaView("p", 0, 0, 100, 0, prefill_tokens_per_s=1000.0, block_size_tokens=100)
DECODE = ReplicaView("d", 0, 0, 1000, 0, prefill_tokens_per_s=500.0, max_num_seqs=8, block_size_tokens=100)


def decided(
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    placement: Placement = SPLIT,
    config: AdmissionConfig = CONFIG,
    deadline_s: float | None = None,
    priority: Priority = Priority.NORMAL,
    **request: Any,
) -> Admitted | Rejection:
    snapshot = ClusterSnapshot((with_fields(PREFILL, **prefill or {}),), (with_fields(DECODE, **decode or {}),))
    return admit(replace(REQUEST, hints=Hints(priority, deadline_s), **request), placement, snapshot, config)


def admitted(*args: Any, **kwargs: Any) -> Admitted:
    result = decided(*args, **kwargs)
    assert isinstance(result, Admitted), result
    return result


def refused(*args: Any, **kwargs: Any) -> Rejection:
    result = decided(*args, **kwargs)
    assert isinstance(result, Rejection), result
    return result


# -- what is predicted


def test_a_request_waits_for_the_prompts_before_it_and_reads_its_own() -> None:
    taken = admitted({"queued_tokens": 2500})
    assert (taken.queue_s, taken.read_s, taken.slot_wait_s) == (2.5, 1.0, 0.0)
    assert (taken.predicted_ttft_s, taken.budget_s) == (3.5, 8.0)


def test_only_the_share_of_prompts_that_is_not_cached_takes_time() -> None:
    taken = admitted({"queued_tokens": 2500, "computed_share": 0.1})
    assert (taken.queue_s, taken.read_s) == pytest.approx((0.25, 0.1))


def test_without_a_prefill_replica_the_decode_replicas_own_queue_and_rate_count() -> None:
    taken = admitted({"queued_tokens": 10**9}, {"queued_tokens": 500}, LOCAL)
    assert (taken.queue_s, taken.read_s) == (1.0, 2.0)


def test_a_request_waits_until_as_many_have_ended_as_decode_runs_too_many() -> None:
    # 8 places, each held for 4 s: two become free a second. The 11th and this one wait for 4 to become free.
    taken = admitted({}, {"in_flight_requests": 11, "slot_s": 4.0})
    assert taken.slot_wait_s == pytest.approx(2.0)
    assert taken.predicted_ttft_s == pytest.approx(2.0), "prefill's second goes by meanwhile"
    assert admitted({}, {"in_flight_requests": 7, "slot_s": 4.0}).slot_wait_s == 0.0


def test_the_choices_of_a_prompt_need_a_place_each() -> None:
    assert admitted({}, {"in_flight_requests": 7, "slot_s": 4.0}, num_choices=3).slot_wait_s == pytest.approx(1.0)


def test_kv_blocks_bound_the_places_as_well() -> None:
    # 20 in flight with 10,000 tokens, and this one with 1,000: 120.5 blocks, so that 60 hold 10.5 such requests, and
    # half of one has no use.
    decode = {"max_num_seqs": 0, "num_kv_blocks": 60, "in_flight_requests": 20, "in_flight_tokens": 10_000}
    slots = 60 * 21 / 120.5 - 0.5
    taken = admitted({}, decode | {"slot_s": 2.0})
    assert taken.slot_wait_s == pytest.approx((21 - slots) * 2.0 / slots)
    assert admitted({}, decode | {"slot_s": 2.0, "num_kv_blocks": 124}).slot_wait_s == 0.0


def test_what_was_waited_before_counts() -> None:
    assert admitted(waited_s=2.0).predicted_ttft_s == 3.0
    assert refused(waited_s=8.5).cause is Cause.DEADLINE


def test_what_was_not_measured_yet_refuses_nobody() -> None:
    prefill = {"prefill_tokens_per_s": 0.0, "queued_tokens": 10**9}
    taken = admitted(prefill, {"in_flight_requests": 1000, "slot_s": 0.0}, deadline_s=0.001)
    assert taken.predicted_ttft_s == 0.0
    unknown = {"max_num_seqs": 0, "num_kv_blocks": 0, "in_flight_requests": 10**6, "slot_s": 9.0}
    assert admitted({}, unknown).slot_wait_s == 0.0


# -- who is refused


@pytest.mark.parametrize(("priority", "most"), [(Priority.LOW, 4.0), (Priority.NORMAL, 7.0), (Priority.HIGH, 9.0)])
def test_a_class_may_use_its_share_of_the_deadline(priority: Priority, most: float) -> None:
    assert admitted({"queued_tokens": int(most * 1000)}, priority=priority).predicted_ttft_s == most + 1
    assert refused({"queued_tokens": int(most * 1000) + 1}, priority=priority).cause is Cause.DEADLINE


def test_a_deadline_of_the_clients_own_takes_the_place_of_the_configurations() -> None:
    assert admitted({"queued_tokens": 70_000}, deadline_s=100.0).budget_s == 80.0
    assert refused({"queued_tokens": 1000}, deadline_s=2.0).status == 429


def test_a_long_prompt_is_taken_while_little_is_before_it() -> None:
    long = {"num_prompt_tokens": 50_000}
    assert admitted({"queued_tokens": 4000}, **long).predicted_ttft_s == 54.0
    assert refused({"queued_tokens": 4001}, **long).cause is Cause.DEADLINE


def test_a_long_prompt_is_refused_if_the_client_itself_has_no_time_for_it() -> None:
    rejection = refused(num_prompt_tokens=50_000, deadline_s=20.0)
    assert (rejection.cause, rejection.retry_after_s) == (Cause.DEADLINE, 60), "no waiting would help"


def test_decode_without_a_place_in_time_refuses() -> None:
    rejection = refused({}, {"in_flight_requests": 47, "slot_s": 2.0})
    assert (rejection.cause, rejection.retry_after_s) == (Cause.DEADLINE, 2)


@pytest.mark.parametrize("where", ["prefill", "decode", "local"])
def test_no_more_than_so_many_requests_wait_for_a_replica_whatever_is_predicted(where: str) -> None:
    config = replace(CONFIG, max_queued_requests_per_replica=5)
    placement = LOCAL if where == "local" else SPLIT

    def views(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return ({"in_flight_requests": number}, {}) if where == "prefill" else ({}, {"in_flight_requests": 8 + number})

    admitted(*views(4), placement=placement, config=config)
    rejection = refused(*views(5), placement=placement, config=config)
    assert (rejection.status, rejection.cause) == (429, Cause.QUEUE_FULL)
    assert rejection.reason == "5 requests wait for their replica already"


# -- what a refusal says


def test_a_refusal_says_why_and_when_to_try_again() -> None:
    rejection = refused({"queued_tokens": 10_500})
    assert rejection.status == 429
    assert rejection.reason == (
        "the predicted time to the first token, 11.5 s, is above 8 s: "
        "priority normal may use 80% of the deadline of 10 s"
    )
    # 3.5 s later the queue is as long as it may be.
    assert rejection.retry_after_s == 4


@pytest.mark.parametrize(("queued", "retry_after_s"), [(7001, 1), (8000, 1), (8001, 2), (50_000, 43), (10**6, 60)])
def test_the_time_to_try_again_is_a_second_at_least_and_bounded(queued: int, retry_after_s: int) -> None:
    assert refused({"queued_tokens": queued}).retry_after_s == retry_after_s


@pytest.mark.parametrize("shares", [(0.6, 0.5, 1.0), (0.5, 0.9, 0.8), (0.0, 0.5, 1.0), (0.5, 0.8, 1.1)])
def test_shares_that_do_not_grow_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="grow from low to high"):
        AdmissionConfig(10.0, *shares)


# -- whatever the cluster looks like

# Near each other: a deadline of seconds, queues of seconds, prompts of seconds.

numbers = st.integers(0, 30_000)
times = st.just(0.0) | st.floats(0, 20)
views = st.builds(
    ReplicaView,
    replica_id=st.just("x"),
    in_flight_requests=st.integers(0, 60),
    in_flight_tokens=numbers,
    num_kv_blocks=st.integers(0, 2000),
    num_kv_blocks_used=numbers,
    queued_tokens=st.sampled_from([0, 500, 2000]) | numbers,
    prefill_tokens_per_s=st.sampled_from([0.0, 1000.0, 1000.0, 1000.0]) | st.floats(1, 50_000),
    computed_share=st.just(1.0) | st.floats(0, 1),
    slot_s=times,
    max_num_seqs=st.integers(0, 64),
    block_size_tokens=st.sampled_from([0, 16, 32, 128]),
)
requests = st.builds(
    RequestView,
    request_id=st.just("r"),
    num_prompt_tokens=st.integers(1, 30_000),
    max_tokens=st.just(10),
    num_choices=st.integers(1, 16),
    hints=st.builds(Hints, st.sampled_from(Priority), st.none() | st.floats(0.001, 30)),
    waited_s=times,
)
configs = st.builds(
    lambda deadline_s, shares, most: AdmissionConfig(deadline_s, *sorted(shares), max_queued_requests_per_replica=most),
    st.floats(1, 30),
    st.tuples(*[st.floats(0.01, 1)] * 3),
    st.sampled_from([1, 50, 1000, 1000, 1000, 1000]),
)


@given(prefill=views, decode=views, is_local=st.booleans(), request=requests, config=configs)
@settings(max_examples=500)
def test_whatever_refuses_a_class_refuses_every_lower_one_with_the_same_deadline(
    prefill: ReplicaView, decode: ReplicaView, is_local: bool, request: RequestView, config: AdmissionConfig
) -> None:
    snapshot = ClusterSnapshot((with_fields(prefill, replica_id="p"),), (with_fields(decode, replica_id="d"),))

    def is_refused(priority: Priority) -> bool:
        hints = replace(request.hints, priority=priority)
        return isinstance(
            admit(replace(request, hints=hints), LOCAL if is_local else SPLIT, snapshot, config), Rejection
        )

    verdicts = [is_refused(priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    for lower, higher in itertools.pairwise(verdicts):
        assert lower or not higher


@given(prefill=views, decode=views, is_local=st.booleans(), request=requests, config=configs)
def test_a_decision_is_a_function_of_what_a_receipt_keeps_and_is_typed(
    prefill: ReplicaView, decode: ReplicaView, is_local: bool, request: RequestView, config: AdmissionConfig
) -> None:
    placement = LOCAL if is_local else SPLIT
    snapshot = ClusterSnapshot((with_fields(prefill, replica_id="p"),), (with_fields(decode, replica_id="d"),))
    first = admit(request, placement, snapshot, config)
    kept = msgspec.json.decode(msgspec.json.encode([request, snapshot, config]))
    again = admit(
        msgspec.convert(kept[0], RequestView),
        placement,
        msgspec.convert(kept[1], ClusterSnapshot),
        msgspec.convert(kept[2], AdmissionConfig),
    )
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(first)
    if isinstance(first, Rejection):
        assert first.status == 429
        assert 1 <= first.retry_after_s <= config.max_retry_after_s
        assert first.reason
    else:
        assert math.isfinite(first.predicted_ttft_s)


@given(prefill=views, decode=views, request=requests, config=configs, more=st.integers(1, 100_000))
def test_no_one_is_taken_because_more_waits(
    prefill: ReplicaView, decode: ReplicaView, request: RequestView, config: AdmissionConfig, more: int
) -> None:
    before = with_fields(prefill, replica_id="p")
    num_requests = before.in_flight_requests + 1
    after = with_fields(before, queued_tokens=before.queued_tokens + more, in_flight_requests=num_requests)
    decodes = (with_fields(decode, replica_id="d"),)
    if isinstance(admit(request, SPLIT, ClusterSnapshot((before,), decodes), config), Rejection):
        assert isinstance(admit(request, SPLIT, ClusterSnapshot((after,), decodes), config), Rejection)
