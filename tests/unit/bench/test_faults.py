"""The faults' experiment without a run: what it keeps, what it skips, what its command line refuses."""

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from bench import faults
from bench.commands.app import app
from bench.fault_cases import Case, all_cases
from bench.fault_report import AnswerReport, CaseResult, Observed, Struck
from bench.faults import COLD_START_FILE, ColdStart, Experiment, read_result, write_result
from gateway.runtime import processes
from gateway.runtime.processes import HealPlan
from gateway.settings import load

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CASE = all_cases()[0]
OBSERVED = Observed("8 tokens", (Struck("decode-core", 7, "d", 2),), 0.1, "", 0.1, "", 20.0, "", "")
ANSWER = AnswerReport(
    "target", "complete", True, "", 200, "", None, 9, -1.0, -0.5, 2.0, "id", "finished", ("pull_failed",), ("words",)
)


def result(case: Case = CASE) -> CaseResult:
    return CaseResult(
        case.name, case.victim, case.blow, case.moment, case.kind, ("a row",), "seed", "now", "commit", 9.0, True, 50.0,
        OBSERVED, (ANSWER,), (),
    )  # fmt: skip


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_result(tmp_path, CASE) is None
    write_result(tmp_path, result())
    assert read_result(tmp_path, CASE) == result()
    assert [file.name for file in tmp_path.iterdir()] == [f"{CASE.name}.json"]


def test_a_result_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / f"{CASE.name}.json").write_text("{")
    assert read_result(tmp_path, CASE) is None


def experiment(folder: Path, again: bool) -> tuple[Experiment, list[str]]:
    said: list[str] = []
    config = CONFIGS / "faults.yaml"
    return Experiment(config, load(config), folder, [CASE], again, "commit", said.append), said


def test_a_case_with_a_result_is_not_run_again_unless_told_so(tmp_path: Path) -> None:
    write_result(tmp_path, result())
    (tmp_path / COLD_START_FILE).write_bytes(msgspec.json.encode(ColdStart(29.6)))
    kept, said = experiment(tmp_path, again=False)
    asyncio.run(kept.run())
    assert kept.results == {CASE.name: result()}
    assert kept.cold_start_s == 29.6
    assert said == [f"0 of 1 cases to run; results: {tmp_path}"]
    assert experiment(tmp_path, again=True)[0].results == {}


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "heal", lambda _base: HealPlan([], []))
    monkeypatch.setattr(faults, "measure_cold_start_s", lambda _config: pytest.fail("something was started"))

    def invoke(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["faults", "--config", str(CONFIGS / "faults.yaml"), *options])
        return done.exit_code, done.output

    return invoke


def test_a_case_that_does_not_exist_is_refused(invoked, tmp_path: Path) -> None:
    code, output = invoked("--cases", "no-such-*", "--results", str(tmp_path))
    assert code == 2
    assert "no case is called" in output


@pytest.mark.parametrize("config", ["simulated.yaml", "aggregated.yaml"])
def test_a_configuration_without_real_engines_in_both_pools_is_refused(invoked, tmp_path: Path, config: str) -> None:
    code, output = invoked("--config", str(CONFIGS / config), "--results", str(tmp_path))
    assert code == 2
    assert "must have real engines in both pools" in output


def test_what_is_there_is_shown_and_judged(invoked, tmp_path: Path) -> None:
    write_result(tmp_path, result())
    report = tmp_path / "report.json"
    options = ("--cases", CASE.name, "--results", str(tmp_path), "--json", str(report), "--check")
    code, output = invoked(*options)
    assert code == 0, output
    assert "0 of 1 answers, 0 allowed" in output
    written = msgspec.json.decode(report.read_bytes())
    assert (written["complete"], written["planned"]) == (True, [CASE.name])
    write_result(tmp_path, replace(result(), answers=(replace(ANSWER, end="broken", expected=False),)))
    assert invoked(*options)[0] == 1


@pytest.mark.parametrize(("num_missed", "num_runs", "is_good"), [(0, 1, True), (2, 3, True), (5, 3, False)])
def test_a_case_whose_moment_does_not_come_about_is_begun_again(
    num_missed: int, num_runs: int, is_good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / COLD_START_FILE).write_bytes(msgspec.json.encode(ColdStart(29.6)))
    kept, said = experiment(tmp_path, again=False)
    runs: list[Case] = []

    async def run_case(_site, case: Case, *_more) -> CaseResult:
        runs.append(case)
        missed = replace(result(), problems=("the moment did not come about",), never_struck=True)
        return missed if len(runs) <= num_missed else result()

    async def well_site() -> None:
        return None

    monkeypatch.setattr(faults, "run_case", run_case)
    monkeypatch.setattr(kept, "_well_site", well_site)
    asyncio.run(kept.run())
    assert len(runs) == num_runs
    assert kept.results[CASE.name].is_good is is_good
    assert sum("did not come about" in line for line in said) == min(num_missed, 3) + (not is_good)
