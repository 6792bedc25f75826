"""What the planner proposes, and how it is held against what then happened."""

from dataclasses import replace

import pytest

from engine.protocol import Phase
from gateway.scaling.planner import Action, Observation, Plan, PlannerMemory, ReplicaHealth, Verdict, plan
from gateway.scaling.sizing import PoolSizes

WELL = (
    ReplicaHealth("prefill-0", Phase.PREFILL, True),
    ReplicaHealth("decode-0", Phase.DECODE, True, 1.0),
    ReplicaHealth("decode-1", Phase.DECODE, True, 1.0),
)
FITS = PoolSizes(1, 2)


class Days:
    """Observations ten seconds apart, and all that was planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.memory = PlannerMemory()
        self.plans: list[Plan] = []

    def see(
        self,
        *changed: ReplicaHealth,
        wanted: PoolSizes = FITS,
        needed: PoolSizes | None = None,
        kept_share: float | None = 1.0,
        without: str = "",
        times: int = 1,
    ) -> Plan:
        by_id = {one.replica_id: one for one in (*WELL, *changed) if one.replica_id != without}
        for _ in range(times):
            self.now_s += 10.0
            seen = Observation(self.now_s, tuple(by_id.values()), wanted, needed or wanted, kept_share)
            self.plans.append(plan(seen, self.memory))
            self.memory = self.plans[-1].memory
        return self.plans[-1]

    @property
    def proposed(self) -> list[tuple[Action, str]]:
        return [(p.action, p.subject) for one in self.plans for p in one.proposals]

    @property
    def verdicts(self) -> list[tuple[Action, Verdict]]:
        return [(s.proposal.action, s.verdict) for one in self.plans for s in one.scored]


def lost(replica: ReplicaHealth) -> ReplicaHealth:
    return replace(replica, ready=False)


def slow(replica: ReplicaHealth, times: float = 3.0) -> ReplicaHealth:
    return replace(replica, slowness=times)


@pytest.fixture
def days() -> Days:
    return Days()


def test_pools_that_are_well_and_fit_need_nothing(days: Days) -> None:
    days.see(times=100)
    assert (days.proposed, days.verdicts) == ([], [])


def test_a_replica_that_comes_and_goes_should_be_left_alone_and_is_right_if_it_goes_again(days: Days) -> None:
    for _ in range(3):
        days.see()
        days.see(lost(WELL[1]))
    days.see(times=25)
    assert days.proposed == [(Action.QUARANTINE, "decode-0")]
    days.see(times=5)
    assert days.verdicts == [(Action.QUARANTINE, Verdict.RIGHT)]


def test_one_loss_is_not_enough(days: Days) -> None:
    days.see()
    days.see(lost(WELL[1]), times=5)
    days.see(times=5)
    assert days.proposed == []


def test_a_replica_that_is_slow_for_long_is_proposed_for_quarantine_and_then_for_its_end(days: Days) -> None:
    days.see(slow(WELL[1]), times=3)
    assert days.proposed == []
    days.see(slow(WELL[1]), times=40)
    assert (Action.QUARANTINE, "decode-0") in days.proposed
    assert (Action.REPLACE, "decode-0") in days.proposed
    assert (Action.QUARANTINE, Verdict.RIGHT) in days.verdicts


def test_one_that_recovers_by_itself_was_no_case_for_quarantine(days: Days) -> None:
    days.see(slow(WELL[1]), times=6)
    days.see(times=35)
    assert days.proposed == [(Action.QUARANTINE, "decode-0")]
    assert days.verdicts == [(Action.QUARANTINE, Verdict.WRONG)]


def test_an_idle_replica_is_neither_slow_nor_cured(days: Days) -> None:
    days.see(slow(WELL[1]))
    days.see(replace(WELL[1], slowness=None), times=5)
    assert days.proposed == [(Action.QUARANTINE, "decode-0")]


def test_hand_offs_that_fail_count_from_when_the_planner_first_looked(days: Days) -> None:
    failing = replace(WELL[0], num_transfer_failures=7)
    days.see(failing, times=3)
    assert days.proposed == []
    days.see(replace(failing, num_transfer_failures=10), times=3)
    assert days.proposed == [(Action.QUARANTINE, "prefill-0")]


def test_failures_of_long_ago_do_not_count(days: Days) -> None:
    for number in range(40):
        days.see(replace(WELL[0], num_transfer_failures=number // 20), times=10)
    assert days.proposed == []


def test_a_replica_that_left_proves_that_it_had_to(days: Days) -> None:
    days.see(slow(WELL[1]), times=5)
    days.see(without="decode-0", wanted=PoolSizes(1, 1))
    assert days.verdicts == [(Action.QUARANTINE, Verdict.RIGHT)]


@pytest.mark.parametrize(
    ("kept_share", "verdict"), [(0.8, Verdict.RIGHT), (0.99, Verdict.WRONG), (None, Verdict.UNKNOWN)]
)
def test_more_replicas_were_right_if_turns_were_late_without_them(
    days: Days, kept_share: float | None, verdict: Verdict
) -> None:
    days.see(wanted=PoolSizes(1, 4), kept_share=kept_share, times=30)
    assert (days.proposed, days.verdicts) == ([(Action.GROW, "decode")], [])
    days.see(wanted=PoolSizes(1, 4), kept_share=kept_share)
    assert days.verdicts == [(Action.GROW, verdict)]


@pytest.mark.parametrize(
    ("needed", "kept_share", "verdict"),
    [
        (PoolSizes(1, 1), 0.99, Verdict.RIGHT),
        (PoolSizes(1, 2), 0.99, Verdict.WRONG),
        (PoolSizes(1, 1), 0.9, Verdict.WRONG),
    ],
)
def test_fewer_replicas_were_right_if_nothing_needed_the_others(
    days: Days, needed: PoolSizes, kept_share: float, verdict: Verdict
) -> None:
    days.see(wanted=PoolSizes(1, 1), needed=needed, kept_share=kept_share, times=30)
    assert (days.proposed, days.verdicts) == ([(Action.SHRINK, "decode")], [])
    days.see(wanted=PoolSizes(1, 1), needed=needed, kept_share=kept_share)
    assert days.verdicts == [(Action.SHRINK, verdict)]


def test_what_somebody_did_proves_nothing(days: Days) -> None:
    days.see(wanted=PoolSizes(1, 3))
    days.see(ReplicaHealth("decode-2", Phase.DECODE, True), wanted=PoolSizes(1, 3))
    assert days.verdicts == [(Action.GROW, Verdict.UNKNOWN)]


def test_a_proposal_is_made_anew_when_its_time_is_over(days: Days) -> None:
    days.see(wanted=PoolSizes(1, 3), kept_share=0.9, times=60)
    assert days.proposed == [(Action.GROW, "decode")] * 2
