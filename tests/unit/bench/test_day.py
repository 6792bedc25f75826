"""A day of traffic, over pools that follow it and over pools of a fixed size."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.commands.app import app
from bench.day import DayFigures, DayPlan, Traffic
from bench.day_experiment import day
from bench.day_report import ScalingPlan, ScalingReport
from bench.replay_plan import RunPlan, Shape
from bench.results import gather_setting
from gateway.scaling.planner import Action, Verdict
from gateway.scaling.sizing import SizingConfig
from tests.unit.bench.traces import write_sessions

MODEL = "qwen3-coder-30b-a3b-fp8-h100"
TRAFFIC = Traffic(0.06, day_s=3000.0, swing=0.9, num_bursts=1, burst_s=300.0, burst_factor=2.0)
THRIFTY = SizingConfig(read_share=0.003, least_margin=1.0, most_margin=1.0, hold_s=300.0)
"""So little of an engine's time may be used that a few small sessions need another one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sessions(tmp_path_factory.mktemp("day") / "sessions", 4)


def plan(folder: Path, shape: Shape, most: Shape | None = None, **more: object) -> DayPlan:
    run = RunPlan(str(folder), "baton", shape, TRAFFIC.first_per_s, 0, MODEL, 0, drains=False)
    usual = DayPlan(run, TRAFFIC, most is not None, most or shape, start_up_s=60.0, sizing=THRIFTY)
    return dataclasses.replace(usual, **more)


def without_cpu(figures: DayFigures) -> DayFigures:
    return dataclasses.replace(figures, cpu_s=0.0)


@pytest.fixture(scope="module")
def scaled(folder: Path) -> DayFigures:
    return day(plan(folder, Shape(1, 1), Shape(2, 6)))


def test_arrivals_follow_the_rate_and_are_those_of_the_seed() -> None:
    traffic = Traffic(1.0, day_s=10_000.0, swing=0.8, num_bursts=0)
    times = list(traffic.arrivals(3))
    assert times == list(traffic.arrivals(3)) != list(traffic.arrivals(4))
    night = sum(at_s < 1000 or at_s > 9000 for at_s in times)
    noon = sum(4000 < at_s < 6000 for at_s in times)
    assert noon > 4 * night
    assert len(times) == pytest.approx(10_000, rel=0.1)


def test_a_burst_is_as_much_more_as_it_says() -> None:
    traffic = Traffic(1.0, num_bursts=1, burst_factor=3.0)
    (begins_s,) = traffic.bursts(0)
    usual = traffic.rate_per_s(begins_s, [])
    assert traffic.rate_per_s(begins_s, [begins_s]) == 3 * usual
    assert traffic.rate_per_s(begins_s + traffic.burst_s, [begins_s]) < 3 * usual
    assert traffic.most_per_s >= 3 * usual


def test_pools_follow_the_day_up_and_down_and_lose_no_turn(scaled: DayFigures) -> None:
    assert scaled.num_failed == scaled.num_refusals == 0
    assert scaled.num_started > 0
    assert scaled.num_left > 0
    sizes = [moment.decode for moment in scaled.moments]
    noon = sizes[len(sizes) // 3 : 2 * len(sizes) // 3]
    assert max(noon) > sizes[0]
    assert all(1 <= moment.prefill <= 2 and 1 <= moment.decode <= 6 for moment in scaled.moments)


def test_a_replica_serves_when_it_has_started_and_counts_from_when_it_was_asked_for(scaled: DayFigures) -> None:
    moments = scaled.moments
    asked = next(i for i, moment in enumerate(moments) if moment.prefill > 1)
    assert moments[asked].prefill_ready == 1
    ready = next(i for i, moment in enumerate(moments) if moment.prefill_ready > 1)
    assert (ready - asked) * scaled.plan.tick_s == pytest.approx(60.0, abs=scaled.plan.tick_s)
    at_least_s = sum(moment.prefill + moment.decode for moment in moments) * scaled.plan.tick_s
    # Those that leave are still counted while they end what they have begun.
    assert scaled.gpu_s >= at_least_s * 0.98


def test_pools_of_a_fixed_size_count_for_the_whole_day(folder: Path) -> None:
    figures = day(plan(folder, Shape(0, 2)))
    assert figures.gpu_s == 2 * TRAFFIC.day_s
    assert (figures.num_started, figures.num_left) == (0, 0)


def test_beside_pools_of_a_fixed_size_what_the_planner_proposes_is_scored_and_not_done(
    folder: Path, scaled: DayFigures
) -> None:
    figures = day(plan(folder, Shape(0, 1)))
    # Nothing is late: what THRIFTY asks for is not needed.
    assert figures.slo_share == 1.0
    assert figures.scored.keys() == {f"{Action.GROW} {Verdict.WRONG}"}
    assert {(moment.prefill, moment.decode) for moment in figures.moments} == {(0, 1)}
    assert scaled.scored == {}


def test_the_same_day_gives_the_same_figures(folder: Path, scaled: DayFigures) -> None:
    again = day(plan(folder, Shape(1, 1), Shape(2, 6)))
    assert without_cpu(again) == without_cpu(scaled)


def report(days: Iterator[DayFigures]) -> ScalingReport:
    plan = ScalingPlan("trace", "baton", MODEL, (("bursty", TRAFFIC),), (0,), (), (), 1)
    return ScalingReport(True, plan, gather_setting(), tuple(days))


@pytest.mark.parametrize(
    ("scaled_share", "shares", "ratio"),
    [
        (0.96, {2: 0.97, 4: 0.99}, 1.5),
        (0.98, {2: 0.97, 4: 0.99}, 0.75),
        (0.995, {2: 0.97, 4: 0.99}, None),
        (0.94, {2: 0.97}, None),
    ],
)
def test_compared_is_with_the_cheapest_fixed_pools_that_keep_as_much_in_time(
    scaled: DayFigures, scaled_share: float, shares: dict[int, float], ratio: float | None
) -> None:
    def days() -> Iterator[DayFigures]:
        yield dataclasses.replace(scaled, slo_share=scaled_share, gpu_s=3.0)
        for number, share in shares.items():
            fixed = dataclasses.replace(scaled.plan, scaled=False, most=Shape(0, number))
            yield dataclasses.replace(scaled, plan=fixed, slo_share=share, gpu_s=float(number))

    assert report(days()).worst_ratio() == ratio


def test_the_command_says_what_it_found(folder: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ["scaling", str(folder), "--hours", "0.5", "--per-minute", "6", "--static", "aggregated-1,aggregated-2"]
    arguments += ["--most", "1x2", "--shards", "1", "--json", str(file), "--plot", str(picture), "--check"]
    result = CliRunner().invoke(app, arguments)
    assert "GPU-hours of a day over those of the cheapest fixed pools" in result.output
    assert result.exit_code in (0, 1), result.output
    data = json.loads(file.read_text())
    assert data["complete"] is True
    assert len(data["days"]) == 3
    assert "turns in time" in picture.read_text()
    # Every run is in the report already.
    again = CliRunner().invoke(app, [*arguments, "--resume", str(file)])
    assert again.exit_code == result.exit_code, again.output
    assert "GPU-hours of a day over" in again.output
    assert "GPU-hours, " not in again.output
    assert json.loads(file.read_text())["days"] == data["days"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--traffic", "nightly", "there are diurnal, bursty"), ("--static", "six", "is no shape"), ("--policy", "x", "x")],
)
def test_what_cannot_be_run_is_one_line(folder: Path, option: str, value: str, says: str) -> None:
    result = CliRunner().invoke(app, ["scaling", str(folder), option, value])
    assert result.exit_code == 2 or result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


def test_hours_without_turns_are_not_a_number(scaled: DayFigures) -> None:
    assert all(share is None or 0 <= share <= 1 for share in scaled.hourly_share)
