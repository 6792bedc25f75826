"""The command line: what it refuses, what it leaves behind, and its exit codes. Nothing is started."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import overhead
from bench.__main__ import app
from bench.overhead import Experiment
from bench.results import StartFailure
from gateway.runtime import processes
from gateway.runtime.processes import HealPlan
from tests.unit.bench.test_results import read_json

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
Act = Callable[[Experiment], None]


@pytest.fixture(autouse=True)
def _nothing_is_started_and_signals_are_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processes, "heal", lambda _base: HealPlan([], []))
    monkeypatch.setattr(overhead.Experiment, "run", lambda _experiment: pytest.fail("the experiment ran"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*options: str, config: str = "local.yaml") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["overhead", "--config", str(CONFIGS / config), *options])
    return result.exit_code, result.output


@pytest.fixture
def on_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], None]:
    """Makes the experiment do something else."""

    def replace(act: Act) -> None:
        monkeypatch.setattr(overhead.Experiment, "run", act)

    return replace


def nothing(_experiment: Experiment) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,eight"], "give positive numbers"),
        (["--output-tokens", "0"], "give positive numbers"),
        (["--systems", "bare,llm-d"], "there is no system llm-d"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: list[str], message: str) -> None:
    code, output = run(*options)
    assert code == 2
    assert message in output


def test_a_configuration_that_cannot_be_compared_is_refused() -> None:
    code, output = run(config="aggregated.yaml")
    assert code == 2
    assert "must be one CPU engine" in output


def test_plotting_without_its_library_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, on_run: Callable[[Act], None]
) -> None:
    ran: list[Experiment] = []
    on_run(ran.append)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "bench.plot", raising=False)
    code, output = run("--plot", "picture.html")
    assert code == 2
    assert "install the extra `bench`" in output
    assert not ran


def test_an_interrupted_run_leaves_a_valid_report_that_says_so(tmp_path: Path, on_run: Callable[[Act], None]) -> None:
    def be_interrupted(_experiment: Experiment) -> None:
        signal.raise_signal(signal.SIGTERM)

    on_run(be_interrupted)
    code, _ = run("--json", str(tmp_path / "report.json"))
    assert code == 130
    assert read_json(tmp_path / "report.json").complete is False


def test_a_second_signal_does_not_interrupt_the_stopping(on_run: Callable[[Act], None]) -> None:
    stopped: list[bool] = []

    def be_interrupted_twice(_experiment: Experiment) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            stopped.append(True)

    on_run(be_interrupted_twice)
    assert run()[0] == 130
    assert stopped == [True]


def test_quick_measures_less_and_options_still_count(tmp_path: Path, on_run: Callable[[Act], None]) -> None:
    on_run(nothing)
    assert run("--quick", "--concurrency", "4", "--json", str(tmp_path / "report.json"))[0] == 0
    plan = read_json(tmp_path / "report.json").plan
    assert (plan.systems, plan.concurrency, plan.rounds) == (("bare", "baton", "router-equal"), (4,), 1)


@pytest.mark.parametrize(("options", "expected"), [(["--check"], 1), (["--check", "--quick"], 0), ([], 0)])
def test_a_target_that_was_not_measured_is_missed_unless_the_run_is_quick(
    options: list[str], expected: int, on_run: Callable[[Act], None]
) -> None:
    on_run(nothing)
    code, output = run(*options)
    assert code == expected
    assert output.count("not measured") == (8 if "--check" in options else 0)
    assert output.count("missed") == (8 if expected else 0)


def test_a_system_that_did_not_start_makes_the_run_fail(on_run: Callable[[Act], None]) -> None:
    on_run(lambda experiment: experiment.ledger.add_start_failure(StartFailure("bare", 1, "no memory", "")))
    assert run()[0] == 1
