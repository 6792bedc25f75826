"""Overload in virtual time, over the real orchestrator and workers: what is answered in time, refused, and left over.

The short form of `python -m bench overload`; windows this short leave the peak a few percent of luck.
"""

from dataclasses import replace

import pytest

from bench.overload import SCENARIOS, Overload, Scenario
from bench.overload_report import SIMULATED_TARGETS, OverloadPlan, OverloadReport, ScenarioFigures
from bench.results import EngineKind, Setting

PLAN = OverloadPlan(EngineKind.SIMULATED, deadline_s=2.0, factor=5.0, overload_s=20.0, capacity_s=15.0, normal_s=15.0)
SHORT_GOODPUT_RATIO = 0.9
SETTING = Setting("", {}, "", False, "", 2, 1.0)


@pytest.fixture(scope="module", params=SCENARIOS, ids=lambda scenario: scenario.name)
def figures(request: pytest.FixtureRequest) -> ScenarioFigures:
    scenario: Scenario = request.param
    return Overload(PLAN, scenario).run()


def test_five_times_the_load_meets_the_targets(figures: ScenarioFigures) -> None:
    report = OverloadReport(True, PLAN, SETTING, (figures,))
    goodput, *others = SIMULATED_TARGETS
    for target in (replace(goodput, limit=SHORT_GOODPUT_RATIO), *others):
        assert target.is_met_by(report), f"{target.line(report)}\n{figures}"


def test_the_load_was_far_above_the_capacity_and_was_refused_by_class(figures: ScenarioFigures) -> None:
    assert figures.overload.offered_per_s > 4 * figures.peak.goodput_per_s
    assert figures.num_refused > figures.num_asked / 2
    assert figures.refused_share["low"] > figures.refused_share["high"]
    assert 1 <= figures.retry_after_s[0] <= figures.retry_after_s[1] <= 60
    assert figures.overload_ttft_ms.p50 < PLAN.deadline_s * 1000
