"""The figures of an overload: goodput, recovery, drift, targets."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.overload_report import (
    LIVE_TARGETS,
    SIMULATED_TARGETS,
    Asked,
    LiveFigures,
    OverloadPlan,
    OverloadReport,
    Rate,
    ScenarioFigures,
    drift,
    goodput_per_s,
    recovered_s,
    refused_shares,
    retry_after_range,
    table,
    targets,
    ttft_ms,
)
from bench.results import EngineKind, Setting, write_json
from bench.stats import Percentiles
from gateway.routing.types import Priority

NORMAL = Priority.NORMAL
PLAN = OverloadPlan(EngineKind.SIMULATED, 2.0, 5.0, 600.0, 120.0, 60.0)
SETTING = Setting("2026-11-24T00:00:00+00:00", {}, "", False, "cpu", 2, 8.0)
ANY = Percentiles(1.0, 2.0, 3.0)
SCENARIO = ScenarioFigures(
    name="prefill is scarce",
    peak=Rate(20.0, 19.0),
    rates=(Rate(20.0, 19.0),),
    overload=Rate(95.0, 18.5),
    num_asked=57_000,
    num_refused=46_000,
    num_untyped=0,
    refused_share={"low": 1.0, "normal": 0.8, "high": 0.1},
    retry_after_s=(1, 2),
    normal_ttft_ms=ANY,
    overload_ttft_ms=ANY,
    prediction_error_s=ANY,
    recovered_s=3.0,
    sequences_max=60,
    sequences_drift=1.0,
    left_in_flight=0,
    took_s=20.0,
)
LIVE = LiveFigures(
    concurrency=16,
    capacity_per_s=30.0,
    offered_per_s=60.0,
    answered_per_s=29.0,
    in_time_share=0.99,
    num_asked=3600,
    num_refused=1800,
    num_streams_refused=1300,
    num_untyped=0,
    num_failed=0,
    refused_share={"low": 0.9, "normal": 0.5, "high": 0.1},
    retry_after_s=(1, 2),
    capacity_ttft_ms=ANY,
    overload_ttft_ms=ANY,
    after_ttft_ms=ANY,
    memory_mib=(500.0, 510.0, 510.0, 510.0, 511.0, 511.0),
)


def answered(at_s: float, ttft_s: float, priority: Priority = NORMAL) -> Asked:
    return Asked(at_s, priority, 200, ttft_s)


def refused(at_s: float, priority: Priority = NORMAL, retry_after_s: int = 1) -> Asked:
    return Asked(at_s, priority, 429, retry_after_s=retry_after_s, is_typed=True)


def test_goodput_is_what_was_answered_in_time() -> None:
    asked = [answered(0, 1.0), answered(0, 2.0), answered(0, 2.1), refused(0), Asked(0, NORMAL, 500)]
    assert goodput_per_s(asked, deadline_s=2.0, seconds=4.0) == 0.5
    assert ttft_ms(asked).p50 == 2000.0


def test_refusals_are_counted_by_class() -> None:
    asked = [refused(0, Priority.LOW), refused(0, Priority.LOW), answered(0, 1.0), refused(0, NORMAL, 7)]
    assert refused_shares(asked) == {"low": 1.0, "normal": 0.5, "high": 0.0}
    assert retry_after_range(asked) == (1, 7)
    assert retry_after_range([]) == (0, 0)


@pytest.mark.parametrize(
    ("after", "expected_s"),
    [
        ([], None),
        ([answered(100.5, 0.1), answered(109.0, 0.2)], 0.0),
        ([answered(100.5, 0.3), answered(109.0, 0.1)], 1.0),
        ([answered(100.1, 0.1), refused(102.9), answered(109.0, 0.1)], 3.0),
        ([answered(102.1, 0.1), answered(102.2, 0.9), answered(102.3, 0.9), answered(109.0, 0.1)], 3.0),
        ([answered(102.1, 0.1), answered(102.2, 0.1), answered(102.3, 0.9)], 0.0),
        ([Asked(101.0, NORMAL, 0), answered(103.5, 0.9), answered(109.0, 0.1)], 4.0),
        ([answered(100.5, 0.1), answered(103.5, 0.9)], 0.0),
        ([answered(101.5, 0.9), answered(103.5, 0.9)], None),
    ],
)
def test_recovery_ends_where_three_seconds_in_a_row_are_normal(after: list[Asked], expected_s: float | None) -> None:
    assert recovered_s(after, ended_s=100.0, normal_p90_ms=200.0) == expected_s


def test_drift_leaves_out_the_first_fifth() -> None:
    assert drift([0, 0, 10, 10, 50, 50, 50, 50, 20, 20]) == 2.0
    assert drift([5.0] * 3) == 1.0


def test_targets_are_met_or_missed_by_the_worst_scenario() -> None:
    good = OverloadReport(True, PLAN, SETTING, (SCENARIO,))
    assert all(target.is_met_by(good) for target in SIMULATED_TARGETS)
    worse = replace(
        SCENARIO,
        overload=Rate(95.0, 17.0),
        recovered_s=6.0,
        num_untyped=1,
        refused_share={"low": 0.1, "normal": 0.2, "high": 0.1},
        sequences_drift=1.5,
        left_in_flight=1,
    )
    report = OverloadReport(True, PLAN, SETTING, (SCENARIO, worse))
    assert not any(target.is_met_by(report) for target in SIMULATED_TARGETS)
    never = OverloadReport(True, PLAN, SETTING, (SCENARIO, replace(SCENARIO, recovered_s=None)))
    assert [target.is_met_by(never) for target in SIMULATED_TARGETS].count(False) == 1
    assert not any(target.is_met_by(OverloadReport(False, PLAN, SETTING)) for target in SIMULATED_TARGETS)
    assert "not measured" in SIMULATED_TARGETS[0].line(OverloadReport(False, PLAN, SETTING))


def test_real_engines_have_targets_of_their_own() -> None:
    report = OverloadReport(True, PLAN, SETTING, live=LIVE)
    assert targets(EngineKind.VLLM) is LIVE_TARGETS
    assert all(target.is_met_by(report) for target in LIVE_TARGETS)
    growing = replace(
        LIVE,
        memory_mib=(500.0, 500.0, 500.0, 500.0, 600.0, 600.0),
        num_failed=1,
        num_untyped=1,
        num_streams_refused=0,
    )
    assert growing.memory_growth == pytest.approx(1.2)
    assert not any(target.is_met_by(OverloadReport(True, PLAN, SETTING, live=growing)) for target in LIVE_TARGETS)


@pytest.mark.parametrize(
    "report",
    [
        OverloadReport(True, PLAN, SETTING, (SCENARIO, replace(SCENARIO, recovered_s=None))),
        OverloadReport(True, PLAN, SETTING, live=LIVE),
    ],
)
def test_a_report_survives_its_file_and_has_a_table(tmp_path: Path, report: OverloadReport) -> None:
    write_json(report, tmp_path / "report.json")
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=OverloadReport) == report
    assert table(report).row_count > 5
