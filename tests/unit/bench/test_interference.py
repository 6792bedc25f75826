"""What long prompts do to running streams: when they arrive, what is measured, who is compared with whom."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.commands.app import app
from bench.interference import InterferenceExperiment, make_systems
from bench.interference_report import (
    TARGETS,
    InterferencePlan,
    InterferenceReport,
    Storm,
    conclusions,
    evaluate,
    storm,
    table,
)
from bench.stats import Chunk, Exchange, inter_token_gaps_s
from bench.systems import StartFailed
from gateway.settings import load
from tests.unit.bench.test_agents_report import SETTING
from tests.unit.bench.test_overhead import FakeSystem

CONFIGS = Path(__file__).parents[3] / "configs"
PLAN = InterferencePlan(
    config=str(CONFIGS / "local.yaml"),
    chunks=(512, 2048),
    rates_per_s=(0.0, 2.0),
    streams=2,
    prompt_tokens=8,
    answer_tokens=10,
    storm_tokens=40,
    storm_answer_tokens=2,
    window_s=10.0,
    rounds=2,
    seed=0,
)


def exchange(*at_s: float, error: str | None = None) -> Exchange:
    """Sent at 0, with a token at each of these times."""
    return Exchange(0.0, at_s[-1] if at_s else 0.0, tuple(Chunk(s, 1) for s in at_s), tuple(range(len(at_s))), error)


def test_prompts_arrive_as_often_as_asked_for_and_alike_for_every_system() -> None:
    long = dataclasses.replace(PLAN, window_s=1000.0)
    times = long.arrivals(0, 2.0)
    assert times == long.arrivals(0, 2.0) != long.arrivals(1, 2.0)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert all(0 < s < 1000 for s in times)
    assert long.arrivals(0, 0.0) == []


def test_systems_go_in_the_other_order_every_other_round() -> None:
    names = ["split", "aggregated-512", "aggregated-2048"]
    assert PLAN.turns() == [(0, name) for name in names] + [(1, name) for name in reversed(names)]


def test_only_tokens_that_come_in_the_window_count_and_those_that_come_together_share_a_gap() -> None:
    chunks = [Chunk(1.0, 1), Chunk(2.0, 1), Chunk(4.0, 2), Chunk(9.0, 1)]
    assert inter_token_gaps_s(chunks, 1.5, 8.0) == [1.0, 1.0, 1.0]


def test_a_storm_is_measured_by_its_streams_and_by_its_prompts() -> None:
    streams = [exchange(1.0, 2.0, 3.0, 7.0), exchange(error="HTTP 500")]
    prompts = [exchange(2.0, 5.0), exchange(4.0, 20.0), exchange(error="HTTP 429")]
    found = storm(1, "split", 2.0, (0.0, 10.0), streams, prompts)
    assert (found.itl_p50_ms, found.itl_max_ms) == (1000.0, 4000.0)
    assert found.stream_tokens_per_s == 0.4
    assert (found.num_prompts, found.num_in_window, found.prompt_ttft_p50_ms) == (3, 1, 3000.0)
    assert (found.num_failed, found.errors) == (2, ("HTTP 429", "HTTP 500"))
    with pytest.raises(ValueError, match="HTTP 500"):
        storm(1, "split", 2.0, (0.0, 10.0), streams[1:], [])


def one(system: str, rate: float, p99_ms: float, round: int = 0) -> Storm:
    return Storm(round, system, rate, 5.0, p99_ms, 2 * p99_ms, 100.0, 4, 3, 50.0, 90.0, 0)


def report() -> InterferenceReport:
    figures = {
        ("split", 2.0): (30.0, 50.0),
        ("aggregated-512", 2.0): (90.0, 110.0),
        ("aggregated-2048", 2.0): (300, 500),
    }
    storms = [one(*cell, p99_ms, number) for cell, both in figures.items() for number, p99_ms in enumerate(both)]
    return evaluate(PLAN, SETTING, storms, complete=True)


def test_split_is_compared_with_the_best_aggregated_by_medians_over_the_rounds() -> None:
    found = report()
    best = found.best_aggregated(2.0)
    assert best is not None
    assert (best.system, best.itl_p99_ms, best.share_in_window) == ("aggregated-512", 100.0, 0.75)
    assert found.itl_ratio(2.0) == found.worst_itl_ratio() == 0.4
    assert found.itl_ratio(0.0) is None
    (target,) = TARGETS
    assert not target.is_met_by(found)
    assert target.is_met_by(evaluate(PLAN, SETTING, [one("split", 2.0, 1.0), *found.storms[2:]], complete=True))
    (line,) = conclusions(found)
    assert "2.5 times lower than with aggregated-512 (40 against 100 ms)" in line
    assert table(found).row_count == 3


def test_systems_differ_in_their_pools_and_steps(tmp_path: Path) -> None:
    made = make_systems(PLAN, load(CONFIGS / "local.yaml"), tmp_path)
    assert list(made) == list(PLAN.systems)


def experiment(systems: dict[str, FakeSystem], monkeypatch: pytest.MonkeyPatch) -> InterferenceExperiment:
    monkeypatch.setattr("bench.interference.SETTLE_S", 0.05)
    plan = dataclasses.replace(PLAN, chunks=(512,), window_s=0.4, rates_per_s=(0.0, 20.0))
    return InterferenceExperiment(plan, dict(systems), load(CONFIGS / "local.yaml"), SETTING, lambda _: None)


def fakes(diary: list[str]) -> dict[str, FakeSystem]:
    return {name: FakeSystem(name, diary) for name in ("split", "aggregated-512")}


def test_every_system_has_its_turn_under_every_storm_and_only_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    diary, saved = list[str](), list[int]()
    systems = fakes(diary)
    ours = experiment(systems, monkeypatch)
    ours.run(lambda: saved.append(len(ours.report.storms)))
    names = ["split", "aggregated-512", "aggregated-512", "split"]
    assert diary == [f"{what} {name}" for name in names for what in ("start", "stop")]
    found = ours.report
    assert found.complete
    assert [(s.system, s.rate_per_s) for s in found.storms] == [(name, rate) for name in names for rate in (0.0, 20.0)]
    assert saved == [*range(1, 9), 8]
    under = [s for s in found.storms if s.rate_per_s]
    assert all(s.num_prompts == len(found.plan.arrivals(s.round, 20.0)) > 0 for s in under)
    assert sum(s.num_failed for s in found.storms) == 0
    for system in systems.values():
        assert system.server.most_in_flight > PLAN.streams
        assert {len(body["prompt"]) for body in system.server.bodies} == {PLAN.prompt_tokens, PLAN.storm_tokens}


def test_a_system_that_does_not_start_ends_the_run_and_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StartFailed("no")

    diary = list[str]()
    systems = fakes(diary)
    systems["split"].on_start = fail
    ours = experiment(systems, monkeypatch)
    with pytest.raises(StartFailed):
        ours.run(lambda: None)
    assert diary == ["start split", "stop split"]
    assert not ours.report.complete


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "configs/simulated.yaml"], "simulates its engines"),
        (["--chunks", "none"], "--chunks is 'none'"),
        (["--rates", "-1"], "--rates is '-1'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    result = CliRunner().invoke(app, ["interference", *arguments])
    assert result.exit_code == 2
    assert says in result.output
