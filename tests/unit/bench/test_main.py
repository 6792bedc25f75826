"""The command line: what it refuses, what it leaves behind, and its exit codes. Nothing is started."""

import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer import Exit
from typer.testing import CliRunner

from bench import commands, emitter, load_server, overhead, overload, overload_live, streams
from bench.commands.app import app
from bench.commands.terminal import Outcome, attempt, end, make_console
from bench.load import LoadExperiment
from bench.load_plan import ServerFacts, ServerKind
from bench.load_report import LoadReport, Use, evaluate
from bench.overhead import Experiment
from bench.overload_report import OverloadReport
from bench.results import StartFailure
from bench.stream_report import StreamsReport
from bench.systems import StartFailed
from bench.workloads import longest_turn_tokens
from gateway.runtime import processes
from gateway.runtime.processes import HealPlan
from tests.unit.bench.test_overload_report import SCENARIO
from tests.unit.bench.test_results import read_json

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
Act = Callable[[Experiment], None]


@pytest.fixture(autouse=True)
def _nothing_is_started_and_signals_are_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processes, "heal", lambda _base: HealPlan([], []))
    monkeypatch.setattr(overhead.Experiment, "run", lambda _experiment: pytest.fail("the experiment ran"))
    monkeypatch.setattr(streams.StreamsExperiment, "run", lambda _experiment: pytest.fail("the experiment ran"))
    monkeypatch.setattr(emitter, "measure", lambda *_: 1e-5)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*options: str, config: str = "local.yaml", command: str = "overhead") -> tuple[int, str]:
    result = CliRunner().invoke(app, [command, "--config", str(CONFIGS / config), *options])
    return result.exit_code, result.output


@pytest.fixture
def on_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], None]:
    """Makes the experiment do something else."""

    def replace(act: Act) -> None:
        monkeypatch.setattr(overhead.Experiment, "run", act)

    return replace


def nothing(_experiment: Experiment) -> None:
    pass


def test_each_module_of_commands_is_a_command_of_its_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    registered = {one.callback.__name__: one.callback.__module__ for one in app.registered_commands if one.callback}
    assert registered == {name: f"bench.commands.{name}" for name in modules - {"app", "options", "terminal"}}


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


def test_a_run_over_simulated_engines_says_so_and_is_judged_by_targets_of_its_own(
    tmp_path: Path, on_run: Callable[[Act], None]
) -> None:
    on_run(nothing)
    options = ("--engine", "simulated", "--check", "--json", str(tmp_path / "report.json"))
    code, output = run(*options, config="simulated.yaml")
    assert code == 1
    assert output.count("not measured") == 4
    assert output.count("SIMULATED engines, 1 ms a step") == 2
    report = read_json(tmp_path / "report.json")
    assert (report.plan.engine, report.plan.systems) == ("simulated", ("bare", "router", "baton"))
    assert [emitter.cpu_s_per_1000_tokens for emitter in report.emitters] == [0.01] * len(report.plan.cells())


@pytest.mark.parametrize(
    ("command", "options", "config", "message"),
    [
        ("overhead", ["--engine", "simulated"], "local.yaml", "use configs/simulated.yaml"),
        ("overhead", [], "simulated.yaml", "pass --engine simulated"),
        (
            "overhead",
            ["--engine", "simulated", "--systems", "bare-equal"],
            "simulated.yaml",
            "choose from bare, router",
        ),
        ("streams", [], "local.yaml", "is not one simulated engine; use configs/simulated.yaml"),
        ("streams", ["--streams", "1000000000"], "simulated.yaml", "raise `ulimit -Hn`"),
    ],
)
def test_real_and_simulated_engines_are_not_mixed_up(
    command: str, options: list[str], config: str, message: str
) -> None:
    code, output = run(*options, config=config, command=command)
    assert code == 2
    assert message in output


def test_interrupted_streams_leave_a_report_that_says_so_and_misses_its_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_interrupted(_experiment: streams.StreamsExperiment) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(streams.StreamsExperiment, "run", be_interrupted)
    path = tmp_path / "report.json"
    code, output = run("--quick", "--check", "--json", str(path), config="simulated.yaml", command="streams")
    assert code == 130
    assert output.count("missed") == 7
    report = msgspec.json.decode(path.read_bytes(), type=StreamsReport)
    assert (report.complete, report.plan.streams, report.figures) == (False, 1_000, None)


def test_streams_that_do_not_start_make_the_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_experiment: streams.StreamsExperiment) -> None:
        raise StartFailed("baton: baton-serve ended with code 1", "no memory")

    monkeypatch.setattr(streams.StreamsExperiment, "run", fail)
    code, output = run("--quick", config="simulated.yaml", command="streams")
    assert code == 1
    assert "no memory" in output


def test_an_overload_is_judged_by_the_targets_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload.Overload, "run", lambda _overload: SCENARIO)
    path = tmp_path / "report.json"
    code, output = run("--check", "--quick", "--json", str(path), command="overload")
    assert code == 0, output
    assert output.count("met ") == 6
    report = msgspec.json.decode(path.read_bytes(), type=OverloadReport)
    assert (report.complete, len(report.scenarios)) == (True, len(overload.SCENARIOS))
    assert report.plan.overload_s == 60.0

    monkeypatch.setattr(overload.Overload, "run", lambda _overload: replace(SCENARIO, num_untyped=1))
    code, output = run("--check", command="overload")
    assert code == 1
    assert output.count("missed") == 1


def test_an_interrupted_overload_leaves_a_report_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_interrupted(_overload: overload.Overload) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(overload.Overload, "run", be_interrupted)
    path = tmp_path / "report.json"
    code, output = run("--check", "--json", str(path), command="overload")
    assert code == 130
    assert output.count("missed") == 6
    assert msgspec.json.decode(path.read_bytes(), type=OverloadReport).complete is False


def test_an_overload_of_real_engines_that_do_not_start_makes_the_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_overload: overload_live.LiveOverload) -> None:
        raise StartFailed("baton: baton-serve ended with code 1", "no memory")

    monkeypatch.setattr(overload_live.LiveOverload, "run", fail)
    code, output = run("--engine", "vllm", "--overload-s", "5", command="overload")
    assert code == 1
    assert "no memory" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a workload: agents, chat"),
        (["no-such"], "there is no workload and no file no-such; there are agents, chat"),
        (["chat", "--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["chat", "--slo", "fast"], "--slo: 'fast' is no service level"),
        (["chat", "--duration-s", "5", "--warm-up-s", "5"], "nothing is measured"),
        (["chat", "--url", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9"),
    ],
)
def test_a_load_that_cannot_be_is_refused_in_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["load", *options])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[LoadExperiment]:
    """The loads that would have been run; each gives an empty report."""
    begun: list[LoadExperiment] = []

    def run_nothing(experiment: LoadExperiment) -> LoadReport:
        begun.append(experiment)
        return evaluate(
            experiment.plan, experiment.setting, experiment.server, [], [], 0, Use(1.0, 1.0, 0.0), [], complete=False
        )

    served = ServerFacts("http://there", "m", ServerKind.OTHER, None, max_model_len=8192)
    monkeypatch.setattr(load_server, "facts", lambda *_: served)
    monkeypatch.setattr(LoadExperiment, "run", run_nothing)
    return begun


def test_a_load_is_cut_to_the_servers_context_and_says_so(loads: list[LoadExperiment], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["load", "agents", "--scale", "0.06", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 130, "it was interrupted"
    assert "turns are left out" in result.output
    (begun,) = loads
    assert begun.plan.num_cut_turns > 0
    assert begun.plan.scale == 4 / 64, "the factor that was used"
    assert begun.plan.num_turns == begun.trace.num_turns
    assert longest_turn_tokens(begun.trace) <= begun.plan.max_model_len == 8192
    read = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=LoadReport)
    assert not read.complete
    assert read.why_invalid == ("no turn was measured",)


def test_a_load_of_which_no_turn_fits_is_refused(loads: list[LoadExperiment]) -> None:
    result = CliRunner().invoke(app, ["load", "agents"])
    assert result.exit_code == 2
    assert "no turn of agents fits 8,192 tokens; make all shorter with --scale" in result.output
    assert not loads


def test_each_load_has_text_of_its_own_unless_it_is_told_which(loads: list[LoadExperiment]) -> None:
    for options in ([], [], ["--salt", "same"]):
        CliRunner().invoke(app, ["load", "chat", *options])
    first, second, third = (one.plan.salt for one in loads)
    assert first != second
    assert third == "same"


def test_a_load_of_one_length_asks_for_just_that(loads: list[LoadExperiment]) -> None:
    CliRunner().invoke(app, ["load", "fixed:250/64"])
    (begun,) = loads
    (turn,) = begun.trace.trajectories[0].root.turns
    assert (turn.num_prompt_tokens, turn.num_output_tokens) == (250, 64)
    result = CliRunner().invoke(app, ["load", "fixed:250"])
    assert result.exit_code == 2
    assert "as in fixed:250/64" in result.output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StartFailed("no core", "its last line"), "does not start: no core\nits last line\n"),
        (TimeoutError(), "failed: TimeoutError()\n"),
        (KeyboardInterrupt(), "interrupted; all is kept\n"),
    ],
)
def test_what_ends_an_experiment_is_said_and_its_report_still_made(
    error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with attempt(make_console(), TimeoutError, kept="all is kept") as outcome:
        raise error
    assert capsys.readouterr().out == said
    assert outcome.has_failed == (not isinstance(error, KeyboardInterrupt))
    assert not outcome.is_whole


def test_an_error_that_ends_an_experiment_is_no_interruption() -> None:
    def code(*, is_whole: bool, failed: bool, outcome: Outcome) -> int:
        with pytest.raises(Exit) as ended:
            end(is_whole, failed, outcome)
        return ended.value.exit_code

    assert code(is_whole=False, failed=False, outcome=Outcome(has_failed=True)) == 1
    assert code(is_whole=False, failed=True, outcome=Outcome()) == 130
    assert code(is_whole=True, failed=True, outcome=Outcome(is_whole=True)) == 1
    end(True, 0, Outcome(is_whole=True))


def test_an_error_nobody_expects_is_raised() -> None:
    with pytest.raises(RuntimeError), attempt(make_console(), TimeoutError):
        raise RuntimeError
