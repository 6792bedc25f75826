"""The report of a soak: what is summed, what is claimed, which targets are met."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.results import Setting, write_json
from bench.soak_report import SoakPlan, SoakReport, claim, evaluate, table, targets, total
from bench.world import Counts, WorldResult

SETTING = Setting("2026-11-24T00:00:00+00:00", {}, "", False, "cpu", 2, 8.0)
PLAN = SoakPlan(requests=1000, seed=3, shards=2, world_requests=600)
GOOD = Counts(
    requests=500,
    answered=490,
    left=10,
    further_turns=300,
    sequences=520,
    deltas=20_800,
    met=50,
    touched=60,
    faults={"link breaks": 2},
    fault_kinds={"pull_failed": 1},
)


def report(*counts: Counts, complete: bool = True, took_s: float = 2.0) -> SoakReport:
    results = [WorldResult(number, part, "digest", ()) for number, part in enumerate(counts)]
    return evaluate(PLAN, SETTING, results, took_s, complete=complete)


def missed(of: SoakReport) -> list[str]:
    return [target.name for target in targets(PLAN) if not target.is_met_by(of)]


def test_every_world_has_a_seed_of_its_own_and_the_last_one_the_rest() -> None:
    assert PLAN.worlds() == [(3_000_000, 600), (3_000_001, 400)]
    assert replace(PLAN, shards=7).worlds() == PLAN.worlds()


def test_counts_are_summed_kind_by_kind() -> None:
    summed = total([GOOD, replace(GOOD, faults={"link breaks": 1, "pull fails": 4})])
    assert (summed.requests, summed.deltas) == (1000, 41_600)
    assert summed.faults == {"link breaks": 3, "pull fails": 4}


def test_nothing_bad_in_a_thousand_is_below_three_in_a_thousand() -> None:
    good = report(GOOD, GOOD)
    assert good.bound_per_request == 0.003
    assert "0 in 1,000 simulated requests" in good.claim
    assert "below 3e+03 in a million with 95% confidence" in good.claim
    assert "It is a simulation" in good.claim
    assert (good.reports_per_request, good.touched_share, good.requests_per_s) == (40.0, 0.12, 500.0)
    assert missed(good) == []


@pytest.mark.parametrize("name", ["wrong", "failed", "duplicated", "hung", "left_behind", "rejected"])
def test_one_bad_thing_proves_nothing_and_misses_a_target(name: str) -> None:
    bad = report(GOOD, replace(GOOD, **{name: 1}))
    assert bad.bound_per_request is None
    assert "no bound is claimed" in bad.claim
    assert len(missed(bad)) == 1


def test_each_other_target_can_be_missed() -> None:
    assert missed(report(GOOD, took_s=1.0)) == ["requests simulated"]
    assert missed(report(GOOD, replace(GOOD, deltas=0))) == ["reports a request"]
    assert missed(report(GOOD, replace(GOOD, touched=0))) == ["requests that met a fault"]
    assert missed(report(GOOD, replace(GOOD, further_turns=0))) == ["further turns of sessions"]
    assert missed(report(GOOD, GOOD, took_s=10.0)) == ["1,000,000 requests at this rate"]
    assert len(missed(report(GOOD, GOOD, complete=False))) == len(targets(PLAN))


def test_a_report_of_nothing_claims_nothing() -> None:
    nothing = report(complete=False)
    assert claim(nothing.counts) == "nothing was simulated"
    assert "interrupted" in str(table(nothing).title)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    write_json(report(GOOD, GOOD), tmp_path / "soak.json")
    assert msgspec.json.decode((tmp_path / "soak.json").read_bytes(), type=SoakReport) == report(GOOD, GOOD)
