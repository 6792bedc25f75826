"""What a comparison says: medians, differences that every round shows, and sentences that follow from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.compare_plan import parse_contestants, plan
from bench.compare_report import CompareReport, CompareRun, Difference, evaluate, goodput_difference, targets
from bench.compare_words import conclusions, table
from bench.load_metrics import PoolSample
from bench.load_plan import LoadPlan, ServerFacts, ServerKind, Slo
from bench.load_report import End, LoadReport, ProcessUse, Use
from bench.load_report import evaluate as evaluate_load
from bench.results import EngineKind, StartFailure
from tests.unit.bench.test_load_report import turn
from tests.unit.bench.test_results import SETTING

SLO = Slo("own", 1_000, 100)
LOAD = LoadPlan("agents", None, None, 10.0, 0.0, 1.0, 0, "salt", (SLO,), max_lateness_ms=1e4)
PLAN = plan(parse_contestants(["aggregated", "split"]), "c.yaml", (1.0, 2.0), (), 2, LOAD, 1.0, 1)
USE = Use(10.0, 1.0, 0.0, (ProcessUse("engine", "e", 15.0, 100.0),), 2.0**20, 0.0)
SERVER = ServerFacts("http://there", "m", ServerKind.BATON, EngineKind.VLLM)


def load(num_in_time: int, num_late: int = 0, ttft_s: float = 0.5, server: ServerFacts = SERVER) -> LoadReport:
    """Of so many turns, the late of which waited 5 s."""
    turns = [turn(1.0, ttft_ms=ttft_s * 1000) for _ in range(num_in_time)]
    turns += [turn(1.0, ttft_ms=5_000.0, ended_s=7.0) for _ in range(num_late)]
    pools = [PoolSample(1.0, "decode", 1.0, 0.0, 0.5)]
    return evaluate_load(LOAD, SETTING, server, turns, [], 0, USE, pools, complete=True)


def report(
    goodputs: dict[tuple[str, float], tuple[int, ...]], failures: tuple[StartFailure, ...] = (), complete: bool = True
) -> CompareReport:
    """In each round so many turns in time of 200, by tens."""
    runs = [
        CompareRun(number, system, rate, load(10 * num, 10 * (20 - num)))
        for (system, rate), each in goodputs.items()
        for number, num in enumerate(each)
    ]
    return evaluate(PLAN, SETTING, runs, failures, 60.0, complete=complete)


AHEAD = {("aggregated", 1.0): (10, 10), ("split", 1.0): (11, 11), ("aggregated", 2.0): (8, 9), ("split", 2.0): (14, 12)}


def words(of: CompareReport) -> str:
    return "\n".join(conclusions(of))


def test_figures_are_medians_over_the_rounds() -> None:
    figures = report(AHEAD).of("split", 2.0)
    assert figures is not None
    assert figures.goodput_per_s == pytest.approx((13.0,))
    assert figures.kept_share == pytest.approx((0.65,))
    assert (figures.kv_moved_mib, figures.cores, figures.num_rounds) == (1.0, {"engine": 1.5}, 2)


def test_cores_are_not_told_where_the_engines_are_elsewhere() -> None:
    here = replace(USE, processes=(ProcessUse("server", "what deploys it", 0.1, 100.0),))
    runs = [replace(run, load=replace(run.load, use=here)) for run in report(AHEAD).runs]
    figures = evaluate(PLAN, SETTING, runs, (), 60.0, complete=True).of("split", 2.0)
    assert figures is not None
    assert figures.cores == {}


def test_a_difference_is_that_of_the_best_of_each_round() -> None:
    found = goodput_difference(report(AHEAD), "split", "aggregated", PLAN.rates_per_s, SLO)
    assert found is not None
    assert found.ratios == pytest.approx((1.4, 1.2))
    assert found.counts == (260, 200)


def test_few_turns_are_chance_and_many_are_not() -> None:
    assert Difference((1.4, 1.4), (140, 100)).is_clear
    assert not Difference((1.4, 1.4), (14, 10)).is_clear
    assert not Difference((1.4, 0.9), (140, 100)).is_clear
    assert not Difference((1.04, 1.04), (10_400, 10_000)).is_clear
    assert Difference((0.5, 0.5)).is_clear, "a latency"
    assert not Difference((0.5,)).is_clear


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ((14, 12), "Splitting pays here (1.30 times, 260 turns against 200) by own"),
        ((6, 8), "Splitting does not pay here (0.70 times, 140 turns against 200) by own"),
        (
            (12, 9),
            "No difference between split and aggregated beyond chance: these runs do not tell whether splitting pays",
        ),
    ],
)
def test_the_answer_follows_from_the_figures(split: tuple[int, ...], says: str) -> None:
    said = words(report({("aggregated", 1.0): (10, 10), ("split", 1.0): split}))
    assert says in said
    assert "own (TTFT 1000 ms, TPOT 100 ms): at best split keeps" in said


def test_it_says_where_it_turns() -> None:
    turned = AHEAD | {("split", 1.0): (5, 6)}
    assert "It is ahead at 2 trajectories/s and behind at 1." in words(report(turned))


def test_latencies_are_compared_rate_by_rate() -> None:
    runs = [
        CompareRun(number, system, 1.0, load(9, ttft_s=ttft_s))
        for number in range(2)
        for system, ttft_s in (("aggregated", 0.4), ("split", 0.2))
    ]
    said = words(evaluate(PLAN, SETTING, runs, (), 1.0, complete=True))
    assert "split against aggregated at 1 trajectories/s: TTFT p50 0.50 times, TTFT p99 0.50 times" in said


def test_one_round_may_be_chance_and_says_so() -> None:
    one = replace(PLAN, rounds=1)
    runs = [CompareRun(0, "aggregated", 1.0, load(10)), CompareRun(0, "split", 1.0, load(20))]
    said = words(evaluate(one, SETTING, runs, (), 1.0, complete=True))
    assert "split against aggregated in one round, which may be chance (2.00 times, 20 turns against 10)" in said
    assert "One round only" in said


def test_a_run_that_is_invalid_is_left_out_and_named() -> None:
    late = replace(load(20), why_invalid=("the generator fell behind",))
    runs = [CompareRun(0, "aggregated", 1.0, load(10)), CompareRun(0, "split", 1.0, late)]
    found = evaluate(PLAN, SETTING, runs, (), 1.0, complete=True)
    assert found.of("split", 1.0) is None
    assert "Left out: split at 1 trajectories/s in round 1: the generator fell behind." in words(found)


def test_a_system_that_keeps_nothing_is_called_that() -> None:
    none = report({("aggregated", 1.0): (0, 0), ("split", 1.0): (0, 0)})
    assert "neither split nor aggregated keeps it for a single turn" in words(none)


def test_what_did_not_start_is_said() -> None:
    found = report(AHEAD, (StartFailure("router", 0, "pip has no index", ""),))
    assert "router did not start and is missing: pip has no index" in words(found)


def test_rates_that_nobody_feels_are_called_too_low() -> None:
    idle = {(system, rate): (20, 20) for system in PLAN.systems for rate in PLAN.rates_per_s}
    assert "the limit is beyond it" in words(report(idle))
    assert "the limit is beyond it" not in words(report(AHEAD))


def test_simulated_engines_cannot_be_overlooked() -> None:
    server = replace(SERVER, engine=EngineKind.SIMULATED)
    runs = [CompareRun(0, "aggregated", 1.0, load(1, server=server))]
    assert "SIMULATED" in evaluate(PLAN, SETTING, runs, (), 1.0, complete=True).heading
    assert report(AHEAD).heading == ""
    random = evaluate(replace(PLAN, has_random_weights=True), SETTING, [], (), 1.0, complete=True)
    assert "RANDOM weights" in random.heading
    assert "INTERRUPTED" in report(AHEAD, complete=False).heading


def test_every_rate_and_system_has_its_row() -> None:
    assert table(report(AHEAD)).row_count == 4


def test_targets_count_valid_runs_failures_and_minutes() -> None:
    whole = report(AHEAD)
    assert [target.is_met_by(whole) for target in targets(PLAN, is_quick=True)] == [True, True, True]
    fewer = report({cell: each for cell, each in AHEAD.items() if cell[1] == 1.0})
    assert [target.is_met_by(fewer) for target in targets(PLAN, is_quick=False)] == [False, True]


def test_the_page_needs_nothing_else_and_holds_words_figures_and_all_pictures(tmp_path: Path) -> None:
    compare_page = pytest.importorskip("bench.compare_page")
    path = tmp_path / "page.html"
    compare_page.draw(report(AHEAD | {("split", 1.0): (5, 6)}), path)
    page = path.read_text()
    assert "Splitting pays here" in page
    for title, _, _ in compare_page.PICTURES:
        assert f"<h2>{title}</h2>" in page
    assert "<script src=" not in page
    assert "cdn" not in page.split("<body>")[1]


def test_an_interrupted_page_without_figures_can_be_drawn(tmp_path: Path) -> None:
    compare_page = pytest.importorskip("bench.compare_page")
    compare_page.draw(evaluate(PLAN, SETTING, [], (), 1.0, complete=False), tmp_path / "page.html")
    assert "INTERRUPTED run" in (tmp_path / "page.html").read_text()


def test_turns_that_failed_are_in_no_distribution() -> None:
    compare_page = pytest.importorskip("bench.compare_page")
    run = CompareRun(0, "split", 1.0, replace(load(2), turns=tuple(replace(t, end=End.FAILED) for t in load(2).turns)))
    assert compare_page.measured_rows(run) == []
    assert len(compare_page.measured_rows(CompareRun(0, "split", 1.0, load(2)))) == 2
