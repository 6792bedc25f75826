"""What a benchmark leaves behind: the ledger, the JSON file, the tables and the lines of a check."""

import dataclasses
from dataclasses import replace
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.cpu import ProcessCpu, Role, RoleSeconds
from bench.results import (
    EmitterCost,
    EngineKind,
    Ledger,
    Plan,
    Report,
    Round,
    Setting,
    StartFailure,
    cpu_table,
    gather_setting,
    latency_table,
    measured,
    stage_table,
    verdict_line,
    write_json,
)
from bench.stats import Cell, Figures, Metric, Percentiles, Target, Verdict, judge

CELL = Cell(prompt_tokens=250, output_tokens=64, concurrency=8)
PLAN = Plan(
    config="configs/local.yaml",
    systems=("bare", "baton"),
    concurrency=(1, 8),
    prompt_tokens=(250,),
    output_tokens=(64,),
    rounds=3,
    requests=None,
    cell_seconds=30.0,
)
SETTING = Setting("2026-01-01T00:00:00+00:00", {"python": "3.11"}, "abc", True, "a CPU", 2, 24.0)


def some_round(number: int, ttft_ms: float | None, num_failed: int = 0) -> Round:
    shown = None
    if ttft_ms is not None:
        same = Percentiles(ttft_ms, ttft_ms, ttft_ms)
        shown = Figures(
            same, same, same, same, 100.0, 1.0, RoleSeconds(8.0, 1.0, 0.5, 0.25), 1.75, 0.1, 0.05, 0.015, 1.5
        )
    errors = ("1 x HTTP 500",) * num_failed
    return Round(number, 24, num_failed, errors, 24, 2, 3, shown, (ProcessCpu(Role.RAY, "r", 1.0),))


def ledger() -> Ledger:
    book = Ledger(PLAN, SETTING)
    for number, ttft_ms in ((1, 40.0), (2, 20.0), (3, 30.0)):
        book.add("baton", CELL, some_round(number, ttft_ms))
    book.add("bare", CELL, some_round(1, None, num_failed=24))
    book.add("bare", CELL, some_round(2, 20.0))
    book.add_start_failure(StartFailure("bare", 3, "bare: server ended with code 1", "no memory"))
    return book


def read_json(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def printed(report: Report) -> str:
    console = Console(file=StringIO(), width=180)
    console.print(latency_table(report), cpu_table(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_report_holds_the_median_of_the_rounds_that_gave_figures_and_every_round() -> None:
    baton, bare = ledger().report(complete=True).cells
    assert baton.median is not None
    assert baton.median.ttft_ms.p50 == 30.0
    assert [round.number for round in baton.rounds] == [1, 2, 3]
    assert bare.median is not None
    assert (bare.median.ttft_ms.p50, bare.num_failed) == (20.0, 24)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = ledger().report(complete=False)
    write_json(report, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_of_nothing_can_be_written_and_shown(tmp_path: Path) -> None:
    report = Ledger(PLAN, SETTING).report(complete=False)
    write_json(report, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json").cells == ()
    assert "interrupted" in printed(report)


def test_targets_are_judged_by_medians_and_by_all_failures() -> None:
    target = Target(Metric.TTFT, 8, "baton", "bare", 1.5)
    verdict = judge(target, measured(ledger().report(complete=True)))
    assert (verdict.ratio, verdict.num_failed, verdict.is_met) == (1.5, 24, False)


def test_the_tables_show_systems_in_the_plans_order_with_failures_and_differing_answers() -> None:
    lines = [line.split() for line in printed(ledger().report(complete=True)).splitlines()]
    rows = [line for line in lines if "bare" in line or "baton" in line]
    assert [("bare" in row, row[-3:]) for row in rows[:2]] == [
        (True, ["24", "6", "4/48"]),
        (False, ["0", "9", "6/72"]),
    ]
    assert rows[3][-8:] == ["8.00", "1.00", "0.50", "0.25", "1.75", "0.10", "1.5%", "0.05"]


def test_the_stages_of_requests_are_shown_for_systems_that_keep_receipts() -> None:
    book = ledger()
    assert stage_table(book.report(complete=True)) is None
    stages = {"ttft": 21.0, "prefill_wait": 4.0}
    book.add("baton", CELL, dataclasses.replace(some_round(4, 20.0), stages_ms=stages))
    table = stage_table(book.report(complete=True))
    assert table is not None
    assert [list(column.cells) for column in table.columns[1:]] == [["baton"], ["21.0"], ["4.0"]]


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ((0.95, CELL, 0), "baton / bare, TTFT p50 at c=8: at most 1.5: 0.95 (c=8, 250 -> 64 tokens)"),
        ((1.55, CELL, 0), "missed"),
        ((0.95, CELL, 3), "3 requests failed"),
        ((None, None, 0), "not measured"),
    ],
)
def test_a_check_says_target_figure_and_cell_in_one_line(
    verdict: tuple[float | None, Cell | None, int], expected: str
) -> None:
    line = verdict_line(Verdict(Target(Metric.TTFT, 8, "baton", "bare", 1.5), *verdict), needs_figure=True)
    assert expected in line
    assert "\n" not in line


def test_the_cells_of_a_plan_are_all_combinations_and_every_cell_has_enough_requests() -> None:
    assert PLAN.cells() == [Cell(250, 64, 1), Cell(250, 64, 8)]
    assert [PLAN.num_requests(Cell(250, 64, concurrency)) for concurrency in (1, 8, 32)] == [16, 24, 96]


def test_the_setting_names_machine_versions_and_commit() -> None:
    setting = gather_setting()
    assert {"python", "ray", "nixl", "vllm-router"} <= setting.versions.keys()
    assert setting.cpu_model
    assert setting.num_cores > 0
    assert setting.memory_gib > 0


def test_a_report_of_simulated_engines_says_so_over_each_table_and_in_its_file(tmp_path: Path) -> None:
    plan = replace(PLAN, engine=EngineKind.SIMULATED, decode_step_ms=1.0)
    book = Ledger(plan, SETTING, emitters=(EmitterCost(CELL, 0.02),))
    book.add("baton", CELL, some_round(1, 40.0))
    report = book.report(complete=True)
    assert printed(report).count("SIMULATED engines, 1 ms a step: no figure is a figure of a model") == 2
    write_json(report, tmp_path / "report.json")
    assert b'"engine": "simulated"' in (tmp_path / "report.json").read_bytes()
    assert read_json(tmp_path / "report.json") == report
    assert "SIMULATED" not in printed(ledger().report(complete=True))
