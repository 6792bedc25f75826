"""What is counted of a receipt: deadlines, waits, hand-offs, pace, tenants, what splitting gains."""

from dataclasses import replace

import pytest
from prometheus_client import REGISTRY

from gateway import metrics
from gateway.routing.costs import Costs, HandoffCost, PoolCosts, ReadCost, StepCost
from gateway.routing.joint import Joint, split_gain_s
from gateway.routing.policies import place
from gateway.routing.receipts import Outcome, Receipt, Times
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
from tests.unit.gateway.rig import PROMPT, Rig
from tests.unit.virtual_time import simulate

DEADLINE_S = 2.0


@pytest.fixture(scope="module")
def receipt() -> Receipt:
    """Of a prompt that was split, with a deadline of its own, and of a tenant."""
    receipts: list[Receipt] = []

    async def main() -> None:
        async with Rig() as rig:
            hints = Hints(Priority.HIGH, ttft_deadline_s=DEADLINE_S, tenant="alice")
            group = rig.orchestrator.new_group("counted", 1, hints=hints)
            await rig.finished(rig.add(PROMPT, 6, group=group))
            receipts.append(rig.receipt("counted"))

    simulate(main)
    return receipts[0]


class Grown:
    """How much series grow by what is done within."""

    def __init__(self, *series: tuple[str, dict[str, str]]):
        self._series = series

    def __enter__(self) -> "Grown":
        self._before = [self._value(*one) for one in self._series]
        return self

    def __exit__(self, *_: object) -> None:
        self.by = [self._value(*one) - before for one, before in zip(self._series, self._before, strict=True)]

    @staticmethod
    def _value(name: str, labels: dict[str, str]) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0


def met(answer: str, priority: str = "high") -> tuple[str, dict[str, str]]:
    return "baton_ttft_deadlines_total", {"met": answer, "priority": priority}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome("finished", ttft_ms=1999.0), [1, 0]),
        (Outcome("finished", ttft_ms=2001.0), [0, 1]),
        (Outcome("failed", duration_ms=100.0), [0, 1]),
        (Outcome("aborted", ttft_ms=1999.0, duration_ms=9000.0), [1, 0]),
        (Outcome("aborted", duration_ms=1999.0), [0, 0]),
        (Outcome("aborted", duration_ms=2001.0), [0, 1]),
    ],
)
def test_a_deadline_is_met_by_a_first_token_and_missed_by_none(
    receipt: Receipt, outcome: Outcome, expected: list[float]
) -> None:
    with Grown(met("yes"), met("no")) as grown:
        metrics.count(replace(receipt, outcome=outcome))
    assert grown.by == expected


def test_without_a_deadline_of_its_own_the_usual_one_counts(receipt: Receipt) -> None:
    assert receipt.admission_config is not None
    usual = replace(receipt, request=replace(receipt.request, hints=Hints()))
    late_ms = receipt.admission_config.ttft_deadline_s * 1000 + 1
    with Grown(met("yes", "normal"), met("no", "normal")) as grown:
        metrics.count(replace(usual, outcome=Outcome("finished", ttft_ms=2001.0)))
        metrics.count(replace(usual, outcome=Outcome("finished", ttft_ms=late_ms)))
    assert grown.by == [1, 1]


def test_what_a_split_prompt_has_waited_is_that_of_the_engine_that_read_it(receipt: Receipt) -> None:
    names = [
        ("baton_queue_wait_seconds_sum", {"priority": "high"}),
        ("baton_tenant_queue_wait_seconds_sum", {"tenant": "alice"}),
        ("baton_tenant_queue_wait_seconds_count", {"tenant": "alice"}),
        ("baton_handoff_seconds_sum", {}),
        ("baton_handoff_seconds_count", {}),
        ("baton_tenant_requests_total", {"tenant": "alice", "status": "finished"}),
    ]
    times = Times(prefill_wait=400.0, decode_wait=3000.0)
    with Grown(*names) as grown:
        metrics.count(replace(receipt, outcome=Outcome("finished", kv_blocks_moved=2, times_ms=times)))
    assert grown.by == pytest.approx([0.4, 0.4, 1, 3.0, 1, 1])


def test_what_decode_reads_alone_waits_there_and_is_no_handoff(receipt: Receipt) -> None:
    alone = replace(receipt, placement=replace(receipt.placement, prefill=None))
    wait, handoffs = ("baton_queue_wait_seconds_sum", {"priority": "high"}), ("baton_handoff_seconds_count", {})
    with Grown(wait, handoffs) as grown:
        metrics.count(replace(alone, outcome=Outcome("finished", times_ms=Times(decode_wait=3000.0))))
    assert grown.by == pytest.approx([3.0, 0])


def test_an_answers_pace_is_of_its_tokens_after_the_first_of_each_choice(receipt: Receipt) -> None:
    pace = "baton_tpot_seconds_sum", {"split": "yes"}
    two = replace(receipt, request=replace(receipt.request, num_choices=2))
    with Grown(pace) as grown:
        metrics.count(replace(two, outcome=Outcome("finished", output_tokens=12, times_ms=Times(decode=500.0))))
    assert grown.by == pytest.approx([0.1])
    with Grown(pace, ("baton_tpot_seconds_count", {"split": "yes"})) as grown:
        metrics.count(replace(two, outcome=Outcome("finished", output_tokens=2, times_ms=Times(decode=500.0))))
        metrics.count(replace(two, outcome=Outcome("aborted", output_tokens=9, times_ms=Times(decode=500.0))))
    assert grown.by == [0, 0]


def test_a_refusal_is_its_tenants_whatever_the_cause() -> None:
    alice = "baton_tenant_requests_total", {"tenant": "alice", "status": "refused"}
    nobody = "baton_tenant_requests_total", {"tenant": "none", "status": "refused"}
    limit = "baton_tenant_refusals_total", {"tenant": "alice", "cause": "deadline"}
    with Grown(alice, nobody, limit) as grown:
        metrics.count_rejection(Rejection(429, "too much", 1, Cause.DEADLINE), Priority.LOW, "alice")
        metrics.count_rejection(Rejection(429, "too much", 1, Cause.DEADLINE), Priority.LOW)
    assert grown.by == [1, 1, 0]


# What each second costs here: reading a token takes 10 ms, a hand-off 1 s and 0.1 s a block, a step nothing.
COSTS = Costs(
    prefill=PoolCosts(ReadCost(0.0, 0.01, 0.0), StepCost(0.0, 0.0, 0.0)),
    decode=PoolCosts(ReadCost(0.0, 0.01, 0.0), StepCost(0.0, 0.0, 0.0)),
    handoff=HandoffCost(1.0, 0.1),
)
REQUEST = RequestView("r", num_prompt_tokens=320, max_tokens=10)
SPLIT = Placement("p", "d", "any", "because")


def snapshot(writing: int = 0) -> ClusterSnapshot:
    prefill = ReplicaView("p", 0, 0, 100, 0, block_size_tokens=32)
    decode = ReplicaView("d", writing, 0, 100, 0, block_size_tokens=32)
    return ClusterSnapshot((prefill,), (decode,), costs=COSTS)


def test_splitting_costs_the_handoff_and_saves_what_others_would_have_paused() -> None:
    # Both read in 3.2 s, and the hand-off of ten blocks takes two.
    assert split_gain_s(REQUEST, SPLIT, snapshot()) == pytest.approx(-2.0)
    assert split_gain_s(REQUEST, SPLIT, snapshot(writing=3)) == pytest.approx(3 * 3.2 - 2.0)


def test_what_is_not_split_gains_nothing_by_it() -> None:
    assert split_gain_s(REQUEST, replace(SPLIT, prefill=None), snapshot()) is None


@pytest.mark.parametrize("writing", [0, 3])
def test_the_policy_splits_where_that_gains(writing: int) -> None:
    decided = place(Joint(), REQUEST, snapshot(writing), seed=1)
    gain_s = split_gain_s(REQUEST, SPLIT, snapshot(writing))
    assert isinstance(decided, Placement)
    assert gain_s is not None
    assert (decided.prefill is not None) == (gain_s > 0)


@pytest.mark.parametrize(("writing", "expected"), [(0, [0, 2.0]), (3, [7.6, 0])])
def test_gains_and_losses_are_counted_apart(receipt: Receipt, writing: int, expected: list[float]) -> None:
    less = "baton_split_predicted_seconds_total", {"costs": "less"}
    more = "baton_split_predicted_seconds_total", {"costs": "more"}
    with Grown(less, more) as grown:
        metrics.count(replace(receipt, request=REQUEST, placement=SPLIT, snapshot=snapshot(writing)))
    assert grown.by == pytest.approx(expected)
