"""Clients side by side: turns, what each run leaves, who agrees with whom, and what happens to one that fails."""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bench import cpu, outside
from bench.commands.app import app
from bench.cpu import ProcessCpu, Role
from bench.outside import ClientsExperiment, TreeCpu
from bench.outside_clients import AIPERF, CLIENTS, GUIDELLM, OURS, Export, Workload
from bench.outside_report import (
    CLOSE_ENOUGH,
    TARGETS,
    ClientRun,
    ClientsPlan,
    ClientsReport,
    conclusions,
    cores_between,
    evaluate,
    table,
)
from bench.results import EngineKind
from gateway.runtime import processes
from gateway.runtime.processes import ProcessId
from tests.unit.bench.test_agents_report import SETTING
from tests.unit.bench.test_outside_clients import EXPORTS
from tests.unit.bench.test_overhead import FakeSystem

PLAN = ClientsPlan("c.yaml", None, EngineKind.VLLM, tuple(CLIENTS), Workload(250, 64, 4, 1.0, 1.0), rounds=3, seed=5)
EXPORT = Export(100, 0, 30.0, 60.0, 6.0, 500.0, 250.0, 64.0, 0.0)


def run(client: str, number: int = 0, cores: float = 0.1, **changes: float) -> ClientRun:
    return ClientRun(number, client, replace(EXPORT, **changes), 5.0, cores, 70.0)


def report(*runs: ClientRun) -> ClientsReport:
    return evaluate(PLAN, SETTING, runs, (), complete=True)


def test_clients_go_in_the_other_order_every_other_round() -> None:
    names = list(CLIENTS)
    assert [name for _, name in PLAN.turns()] == [*names, *reversed(names), *names]


def test_a_client_agrees_within_five_percent_of_our_median() -> None:
    ours = [run(OURS, number, ttft_p50_ms=ttft) for number, ttft in enumerate((29.9, 30.0, 30.1))]
    near = report(*ours, run(AIPERF.name, ttft_p50_ms=31.4)).agreement(AIPERF.name, "TTFT p50")
    far = report(*ours, run(AIPERF.name, ttft_p50_ms=31.6)).agreement(AIPERF.name, "TTFT p50")
    assert near is not None
    assert far is not None
    assert (near.allowed, near.is_met, far.is_met) == (CLOSE_ENOUGH, True, False)
    assert far.ratio == pytest.approx(31.6 / 30)


@pytest.mark.parametrize("noisy", [OURS, AIPERF.name])
def test_runs_that_differ_among_themselves_may_differ_by_twice_that(noisy: str) -> None:
    runs = [
        run(name, number, tokens_per_s=500.0 + 50.0 * number * (name == noisy))
        for name in (OURS, AIPERF.name)
        for number in range(3)
    ]
    found = report(*runs).agreement(AIPERF.name, "tokens/s")
    assert found is not None
    assert found.allowed == pytest.approx(2 * 50 / 550)
    assert found.is_met


def test_targets_judge_ttft_and_tokens_of_each_other_client_and_failures() -> None:
    runs = [run(OURS), run(AIPERF.name, itl_p50_ms=60.0), run(GUIDELLM.name)]
    assert [target.is_met_by(report(*runs)) for target in TARGETS] == [True] * 6
    runs[2] = run(GUIDELLM.name, ttft_p50_ms=20.0, tokens_per_s=400.0, num_failed=1)
    assert [target.is_met_by(report(*runs)) for target in TARGETS] == [True, True, False, False, False, True]
    assert [target.is_met_by(report()) for target in TARGETS] == [False] * 4 + [True, True]


def test_what_was_not_alike_is_told_in_words() -> None:
    assert len(list(conclusions(report(run(OURS), run(AIPERF.name))))) == 3
    unlike = run(AIPERF.name, cores=0.9, prompt_tokens=300.0, output_tokens=50.0, cached_share=0.5, ttft_p50_ms=45.0)
    lines = list(conclusions(report(run(OURS), unlike)))
    assert lines[0] == "aiperf, TTFT p50: differs, +50.0% (45 against 30; allowed 5.0%)"
    assert [line.partition(": ")[2] for line in lines[3:]] == [
        "prompts of 300.0 tokens, ours of 250.0",
        "answers of 50.0 tokens, ours of 64.0",
        "50.0% of its prompts came from a cache, of ours 0.0%",
        "kept 0.90 cores busy, ours 0.10, of the 2 that it shares with the server",
    ]
    assert list(conclusions(report(unlike))) == []


def test_simulated_engines_are_named_in_the_table() -> None:
    simulated = evaluate(replace(PLAN, engine=EngineKind.SIMULATED), SETTING, [run(OURS)], (), complete=True)
    assert "SIMULATED" in str(table(simulated).title)
    assert table(report(run(OURS), run(AIPERF.name))).row_count == 2


def test_cores_are_those_in_use_between_two_times() -> None:
    samples = [(0.0, 1.0), (10.0, 1.0), (20.0, 6.0), (30.0, 6.0)]
    assert cores_between(samples, 12.0, 18.0) == pytest.approx(0.5)
    assert cores_between(samples, 5.0, 25.0) == pytest.approx(0.25)
    assert cores_between(samples, 5.0, 31.0) is None
    assert cores_between(samples, 5.0, 5.0) is None
    assert cores_between([], 0.0, 1.0) is None


def test_cpu_time_of_what_has_ended_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = ProcessId(7, 1), ProcessId(8, 2)
    seen = [{parent: 1.0}, {parent: 1.5, child: 2.0}, {parent: 1.75}]
    monkeypatch.setattr(processes, "descendants", lambda _root: [])
    monkeypatch.setattr(cpu, "read", lambda _ids: {id: ProcessCpu(Role.SERVER, "", s) for id, s in seen.pop(0).items()})
    tree = TreeCpu(parent)
    assert [tree.used_s() for _ in range(3)] == [1.0, 3.5, 3.75]


SCRIPT = """
import json, os, pathlib, sys
exports = json.loads(os.environ["EXPORTS"])
name, *arguments = sys.argv[1:]
assert os.environ.get("HF_HUB_OFFLINE") == {"bench load": "2", "aiperf": None, "guidellm": "1"}[name]
assert (name == "bench load") == ("PYTHONPATH" in os.environ), "packages of another environment"
folder = next(p for a in arguments for p in [a.rpartition("path=")[2]] if "baton-bench-" in a)
target = pathlib.Path(folder)
(target / "profile_export_aiperf.json" if target.is_dir() else target).write_text(json.dumps(exports[name]))
"""


def programs(script: str = SCRIPT) -> dict[str, Sequence[str]]:
    """In the place of each client a process that leaves an export at once."""
    return {name: [sys.executable, "-c", script, name] for name in CLIENTS}


@pytest.fixture
def _exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTS", json.dumps(EXPORTS))
    monkeypatch.setenv("PYTHONPATH", "packages")
    monkeypatch.setenv("HF_HUB_OFFLINE", "2")


def experiment(system: FakeSystem | None, of: dict[str, Sequence[str]], plan: ClientsPlan = PLAN) -> ClientsExperiment:
    return ClientsExperiment(plan, system, "m", Path("/tokenizer"), of, SETTING, lambda _: None)


@pytest.mark.usefixtures("_exports")
def test_each_client_has_its_turns_at_one_server_that_is_stopped_afterwards() -> None:
    diary, saved = list[str](), list[int]()
    ours = experiment(FakeSystem("baton", diary), programs(), replace(PLAN, rounds=2))
    ours.run(lambda: saved.append(len(ours.report.runs)))
    assert diary == ["start baton", "stop baton"]
    assert ours.report.complete
    assert [(one.round, one.client) for one in ours.report.runs] == replace(PLAN, rounds=2).turns()
    assert {one.export.tokens_per_s for one in ours.report.runs} == {150.0}
    assert all(one.cpu_s > 0 for one in ours.report.runs)
    assert saved == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.usefixtures("_exports")
@pytest.mark.parametrize(
    ("script", "says", "tail"),
    [
        ("print('no such model'); raise SystemExit(3)", "bench load ended with code 3", "no such model"),
        ("print('all is well')", "bench load: .*No such file", "all is well"),
    ],
)
def test_a_turn_that_fails_is_noted_with_what_the_client_said_and_the_others_go_on(
    script: str, says: str, tail: str
) -> None:
    diary = list[str]()
    ours = experiment(FakeSystem("baton", diary), {**programs(), OURS: [sys.executable, "-c", script]})
    ours.run(lambda: None)
    assert diary == ["start baton", "stop baton"]
    found = ours.report
    assert found.complete
    assert [(one.round, one.client, one.log_tail) for one in found.failures] == [(n, OURS, tail) for n in range(3)]
    assert all(re.match(says, one.error) for one in found.failures)
    assert [one.client for one in found.figures] == [AIPERF.name, GUIDELLM.name]
    assert not TARGETS[-1].is_met_by(found)


def test_a_client_that_does_not_end_is_stopped_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"

    def clock() -> float:
        return 1e6 if begun.exists() else 0.0

    monkeypatch.setattr(outside, "time", SimpleNamespace(monotonic=clock, time=time.time))
    script = f"""
import pathlib, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
pathlib.Path({str(begun)!r}).touch()
signal.pause()
"""
    ours = experiment(None, programs(script), replace(PLAN, url="http://there", clients=(OURS,), rounds=1))
    ours.run(lambda: None)
    assert [one.error for one in ours.report.failures] == ["bench load did not end within 92 s"]
    assert processes.marked(processes.this_process()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--clients", "bench load,wrk"], "--clients names wrk"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--url", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    result = CliRunner().invoke(app, ["clients", *arguments])
    assert result.exit_code == 2
    assert says in result.output
