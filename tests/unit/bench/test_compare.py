"""The comparison's run: turns, rates that are found, systems that do not start, Ctrl-C."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from bench import load_server
from bench.compare import CompareExperiment, CompareFailed
from bench.compare_plan import ComparePlan, parse_contestants, plan
from bench.load import LoadExperiment
from bench.load_plan import LoadPlan, ServerFacts, ServerKind, Slo
from bench.load_report import LoadReport, Use, evaluate
from bench.results import EngineKind
from bench.systems import StartFailed, System
from bench.traces import Session, Trace, Trajectory, Turn
from gateway.runtime.processes import ProcessId
from tests.unit.bench.test_load_report import turn
from tests.unit.bench.test_results import SETTING

LOAD = LoadPlan("agents", None, None, 10.0, 0.0, 1.0, 0, "salt", (Slo("own", 1_000, 100),), max_lateness_ms=1e4)
PLAN = plan(parse_contestants(["aggregated", "split"]), "c.yaml", (1.0, 2.0), (), 2, LOAD, 5.0, 3)
TRACE = Trace("t", 4, (Trajectory("a", Session((Turn(4, 1, (0,)),)), 1),))


@dataclass
class FakeSystem:
    """Writes down what is done with it."""

    name: str
    log: list[str]
    starts: bool = True
    url: str = "http://there"
    engine_is_inside: bool = False
    pages: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        self.log.append(f"start {self.name}")
        if not self.starts:
            raise StartFailed("no", "tail")

    def stop(self) -> None:
        self.log.append(f"stop {self.name}")

    def processes(self) -> list[ProcessId]:
        return []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of what was started, stopped and loaded; every load answers ten turns."""
    lines: list[str] = []

    def loaded(experiment: LoadExperiment) -> LoadReport:
        load = experiment.plan
        lines.append(f"{load.rate_per_s or load.concurrency} {load.salt}")
        turns = [turn(1.0 + number / 10) for number in range(10)]
        return evaluate(load, SETTING, experiment.server, turns, [], 0, Use(10.0, 1.0, 0.0), [], complete=True)

    monkeypatch.setattr(LoadExperiment, "run", loaded)
    served = ServerFacts("http://there", "m", ServerKind.OTHER, EngineKind.VLLM)
    monkeypatch.setattr(load_server, "facts", lambda *_: served)
    return lines


def experiment(log: list[str], of: ComparePlan = PLAN, missing: tuple[str, ...] = ()) -> CompareExperiment:
    systems: dict[str, System] = {name: FakeSystem(name, log, name not in missing) for name in of.systems}
    return CompareExperiment(of, systems, TRACE, range(9), None, None, SETTING, lambda _: None, lambda *_: None)


def nothing() -> None:
    """Saves nothing."""


def test_systems_take_turns_are_woken_and_never_run_together(log: list[str]) -> None:
    made = experiment(log)
    made.run(nothing)
    assert log == [
        "start aggregated", "3 salt-wake-0", "1.0 salt-0-1", "2.0 salt-0-2", "stop aggregated",
        "start split", "3 salt-wake-0", "1.0 salt-0-1", "2.0 salt-0-2", "stop split",
        "start split", "3 salt-wake-1", "1.0 salt-1-1", "2.0 salt-1-2", "stop split",
        "start aggregated", "3 salt-wake-1", "1.0 salt-1-1", "2.0 salt-1-2", "stop aggregated",
    ]  # fmt: skip
    assert made.report.complete
    assert len(made.report.figures) == 4


def test_rates_are_found_once_with_the_baseline(log: list[str]) -> None:
    made = experiment(log, replace(PLAN, rates_per_s=(), shares=(0.5, 1.0)))
    made.run(nothing)
    assert log.count("3 salt-calibration") == 1
    assert log.index("3 salt-calibration") < log.index("start split")
    assert made.report.plan.rates_per_s == (1.0, 2.0), "ten turns in five seconds, of one turn a trajectory"


def test_a_system_that_does_not_start_is_left_out_and_the_others_go_on(log: list[str]) -> None:
    of = replace(PLAN, contestants=parse_contestants(["aggregated", "router", "split"]))
    made = experiment(log, of, missing=("router",))
    made.run(nothing)
    assert log.count("start router") == log.count("stop router") == 1
    assert [failure.system for failure in made.report.start_failures] == ["router"]
    assert made.report.complete


def test_with_one_system_left_there_is_no_comparison(log: list[str]) -> None:
    made = experiment(log, missing=("split",))
    with pytest.raises(CompareFailed, match="fewer than two systems start"):
        made.run(nothing)
    assert log[-1] == "stop split"


def test_simulated_and_real_engines_are_not_compared(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter((EngineKind.VLLM, EngineKind.SIMULATED))
    monkeypatch.setattr(
        load_server, "facts", lambda *_: ServerFacts("http://there", "m", ServerKind.BATON, next(kinds))
    )
    with pytest.raises(CompareFailed, match="they cannot be compared"):
        experiment(log).run(nothing)
    assert log[-1] == "stop split"


def test_a_server_that_is_not_there_is_one_line(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> ServerFacts:
        raise load_server.ServerError("cannot reach it")

    monkeypatch.setattr(load_server, "facts", unreachable)
    with pytest.raises(CompareFailed, match="aggregated: cannot reach it"):
        experiment(log).run(nothing)


def test_ctrl_c_in_a_load_stops_the_system_and_keeps_what_there_is(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[[LoadExperiment], LoadReport] = LoadExperiment.run

    def interrupted(one: LoadExperiment) -> LoadReport:
        return replace(whole(one), complete=one.plan.rate_per_s != 2.0)

    monkeypatch.setattr(LoadExperiment, "run", interrupted)
    made = experiment(log)
    with pytest.raises(KeyboardInterrupt):
        made.run(nothing)
    assert log[-1] == "stop aggregated"
    assert [run.rate_per_s for run in made.report.runs] == [1.0]
    assert not made.report.complete
