"""`bench decisions`: the gateway is measured, and the report holds its figures against the targets."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.decisions import AT_ONCE, NUM_WARM_UP, TURNS, decide, load, turn_of
from bench.decisions_report import Decision, DecisionsPlan, DecisionsReport, Load, tables, targets
from bench.results import gather_setting
from bench.stats import Percentiles
from gateway.routing.policies import POLICIES

PLAN = DecisionsPlan(("baton",), replicas=(2, 4), requests=(64, 128), decisions=5, prompt_tokens=2_000)


@pytest.mark.parametrize("policy", POLICIES)
def test_decisions_of_every_policy_are_timed(policy: str) -> None:
    decision = decide(PLAN, 4, policy, seed=0)
    assert (decision.policy, decision.replicas) == (policy, 4)
    assert 0 < decision.decision_ms.p50 <= decision.decision_ms.p99


def test_all_requests_of_a_load_are_served() -> None:
    measured = load(PLAN, 4, 128, "baton", seed=0)
    assert (measured.replicas, measured.requests) == (4, 128)
    assert measured.request_ms > 0


def test_the_work_is_the_same_at_the_beginning_and_at_the_end_of_a_load() -> None:
    had: Counter[int] = Counter()
    for first in range(0, NUM_WARM_UP + 100 * AT_ONCE, AT_ONCE):
        asked = [turn_of(number) for number in range(first, first + AT_ONCE)]
        assert len({session for session, _ in asked}) == AT_ONCE, "no session has two turns at once"
        if first >= NUM_WARM_UP:
            assert Counter(turn for _, turn in asked) == dict.fromkeys(range(TURNS), AT_ONCE // TURNS)
            assert all(had[session] == turn for session, turn in asked), "its turns before have been there"
        had.update(session for session, _ in asked)


REPORT = DecisionsReport(
    True,
    PLAN,
    gather_setting(),
    (Decision("baton", 4, Percentiles(0.4, 0.6, 0.9)),),
    (Load("baton", 16, 64, 0.5, 0.5, 0.5), Load("baton", 16, 128, 0.55, 0.5, 0.55)),
    (Load("baton", 2, 64, 0.5, 0.5, 0.5), Load("baton", 4, 64, 0.8, 0.5, 0.5)),
)


def test_the_targets_are_judged_by_the_most_replicas_and_requests() -> None:
    lines = [target.line(REPORT) for target in targets(PLAN)]
    assert all("met" in line for line in lines), lines
    slow = replace(REPORT, decisions=(Decision("baton", 4, Percentiles(0.6, 0.6, 1.1)),))
    assert [target.is_met_by(slow) for target in targets(PLAN)] == [False, False, True, True]
    growing = replace(REPORT, by_requests=(REPORT.by_requests[0], replace(REPORT.by_requests[1], last_tenth_ms=0.7)))
    assert [target.is_met_by(growing) for target in targets(PLAN)] == [True, True, False, True]
    steep = replace(REPORT, by_replicas=(REPORT.by_replicas[0], replace(REPORT.by_replicas[1], request_ms=1.1)))
    assert [target.is_met_by(steep) for target in targets(PLAN)] == [True, True, True, False]


def test_what_was_not_measured_is_missed_and_shown_as_missing() -> None:
    empty = replace(REPORT, decisions=(), by_requests=(), by_replicas=())
    assert not any(target.is_met_by(empty) for target in targets(PLAN))
    assert tables(empty)[0].row_count == 1
