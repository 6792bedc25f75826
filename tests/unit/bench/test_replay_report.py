"""The report holds ours against the best of the others, on equal hardware, and against the oracle."""

import dataclasses
from pathlib import Path

import msgspec
import pytest

from bench.replay_plan import RunFigures, RunPlan, Shape, TrajectoryResult, TurnResult, figures
from bench.replay_plot import draw
from bench.replay_report import (
    ReplayPlan,
    ReplayReport,
    TraceFigures,
    goodput_table,
    run_tables,
    targets,
    tuning_table,
)
from bench.replay_search import Goodput, Tuned
from bench.results import gather_setting, write_json

TRACE = "some/trace"
SPLIT, AGGREGATED = Shape(2, 2), Shape(0, 4)


def run_plan(policy: str, shape: Shape, load: float, rate_per_s: float, seed: int) -> RunPlan:
    return RunPlan(TRACE, policy, shape, rate_per_s, seed, "m", 10, load=load)


def run(policy: str, shape: Shape, load: float, session_s: float, seed: int = 0, ttft_s: float = 1.0) -> RunFigures:
    turn = TurnResult(0.0, ttft_s, ttft_s + 1.0, 100, 10, 90, 80, 20, 5, cold_s=1.0, num_refusals=0)
    trajectory = TrajectoryResult("t", session_s, session_s / 2, session_s, 100.0, 50.0, 100.0)
    plan = run_plan(policy, shape, load, 1.0, seed)
    return figures(plan, [turn], [trajectory], 1, 10.0, (5.0, 20.0), 1.0)


def goodput(policy: str, shape: Shape, rate_per_s: float, seed: int = 0) -> Goodput:
    return Goodput(run_plan(policy, shape, 0.5, rate_per_s, seed), 5, 1.0)


def report(*runs: RunFigures, goodputs: tuple[Goodput, ...] = ()) -> ReplayReport:
    plan = ReplayPlan(
        (TRACE,), ("baton", "dynamo", "llm-d"), (SPLIT, AGGREGATED), (0, 1), "m", 10, (0.25, 1.0), (), (), 1
    )
    return ReplayReport(True, plan, gather_setting(), (TraceFigures(TRACE, 3, 9, 0, 2.5),), goodputs, tuple(runs))


def test_the_gap_in_goodput_lies_between_the_best_other_on_any_shape_and_the_bound() -> None:
    found = (
        goodput("dynamo", SPLIT, 2.0),
        goodput("dynamo", SPLIT, 4.0, seed=1),
        goodput("llm-d", AGGREGATED, 4.0),
        goodput("baton", SPLIT, 7.0),
        goodput("baton", AGGREGATED, 1.0),
    )
    # Seeds are averaged; four GPUs make a bound of 10.
    assert report(goodputs=found).mean_goodput_per_s(TRACE, "dynamo", SPLIT) == 3.0
    assert report(goodputs=found).goodput_gap_closed(TRACE) == pytest.approx((7 - 4) / (10 - 4))
    assert report(goodputs=found[:3]).goodput_gap_closed(TRACE) is None


def test_the_gap_in_session_time_is_of_p99_at_saturation() -> None:
    runs = (
        run("dynamo", SPLIT, 1.0, 300.0),
        run("llm-d", AGGREGATED, 1.0, 180.0),
        run("llm-d", AGGREGATED, 1.0, 220.0, seed=1),
        run("baton", SPLIT, 1.0, 140.0),
        run("baton", SPLIT, 0.25, 999.0),
    )
    # The least is 100 s, the best other 200.
    assert report(*runs).session_gap_closed(TRACE) == pytest.approx(0.6)
    assert report(*runs[:3]).session_gap_closed(TRACE) is None


def test_with_headroom_the_worst_figure_against_the_best_other_counts() -> None:
    runs = (
        run("dynamo", SPLIT, 0.25, 200.0, ttft_s=1.0),
        run("llm-d", AGGREGATED, 0.25, 190.0, ttft_s=2.0),
        run("baton", SPLIT, 0.25, 190.0, ttft_s=1.1),
    )
    assert report(*runs).headroom_ratio(TRACE) == pytest.approx(1.1)
    assert report(runs[0], runs[2]).headroom_ratio(TRACE) == pytest.approx(1.1)
    assert report(*runs[:2]).headroom_ratio(TRACE) is None


def test_a_target_is_missed_where_nothing_was_measured_and_met_by_its_figure() -> None:
    nothing = report()
    assert [target.is_met_by(nothing) for target in targets(nothing.plan)] == [False, False, False]
    runs = [
        run(policy, SPLIT, load, 100.0 if policy == "baton" else 200.0)
        for policy in ("baton", "dynamo")
        for load in (0.25, 1.0)
    ]
    whole = report(*runs, goodputs=(goodput("baton", SPLIT, 8.0), goodput("dynamo", SPLIT, 5.0)))
    assert [target.is_met_by(whole) for target in targets(whole.plan)] == [True, True, True]
    assert all("trace: " in target.line(whole) for target in targets(whole.plan))


def test_without_a_trajectory_that_ended_the_rest_is_there_still(tmp_path: Path) -> None:
    turn = TurnResult(0.0, 1.0, 2.0, 100, 10, 90, 80, 20, 5, cold_s=1.0, num_refusals=0)
    alone = figures(run_plan("dynamo", SPLIT, 1.0, 1.0, 0), [turn], [], 1, 10.0, (5.0, 20.0), 1.0)
    assert (alone.hit_rate, alone.hit_rate_ceiling, alone.prefill_busy, alone.decode_busy) == (0.8, 0.9, 0.25, 1.0)
    assert report(alone).session_gap_closed(TRACE) is None
    with pytest.raises(ValueError, match="no turn was measured"):
        figures(alone.plan, [], [], 0, 10.0, (0.0, 0.0), 0.0)


def test_the_constants_a_policy_was_tuned_to_hold_for_its_trace_and_shape() -> None:
    best = dataclasses.replace(run_plan("dynamo", SPLIT, 0.5, 1.0, seed=1000), constants="scale 2")
    whole = dataclasses.replace(report(), tuned=(Tuned(best, (("", 0.8), ("scale 2", 0.9)), 1.0),))
    assert whole.constants(run_plan("dynamo", SPLIT, 0.0, 0.0, seed=0)) == "scale 2"
    assert whole.constants(run_plan("dynamo", AGGREGATED, 0.0, 0.0, seed=0)) == ""
    assert whole.constants(run_plan("llm-d", SPLIT, 0.0, 0.0, seed=0)) == ""
    assert tuning_table(whole).row_count == 1


def test_file_tables_and_picture_hold_what_was_measured(tmp_path: Path) -> None:
    whole = report(run("dynamo", SPLIT, 1.0, 200.0), goodputs=(goodput("dynamo", SPLIT, 5.0),))
    write_json(whole, tmp_path / "r.json")
    written = msgspec.json.decode((tmp_path / "r.json").read_bytes())
    assert written["runs"][0]["session_s"]["p99"] == 200.0
    assert goodput_table(whole).row_count == 2
    assert [table.row_count for table in run_tables(whole)] == [1, 1]
    draw(dataclasses.replace(whole, complete=False), tmp_path / "r.html")
    assert "dynamo" in (tmp_path / "r.html").read_text()
