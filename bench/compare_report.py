"""Owns what `bench compare` leaves behind: every run, the medians over the rounds, how sure a difference is, targets.

Pure. What it means in words is in `compare_words`, the pictures are in `compare_page`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.compare_plan import ComparePlan
from bench.cpu import Role
from bench.load_plan import Slo
from bench.load_report import LoadFigures, LoadReport
from bench.results import EngineKind, Setting, StartFailure
from bench.stats import Percentiles, medians
from bench.targets import ReportTarget

CLEAR_RATIO = 1.05
"""Less than that apart is no difference."""
MOST_MINUTES = 12.0
"""On a CPU with `--quick`: fifteen minutes from a clean clone, less what `make setup` takes."""


@dataclass(frozen=True)
class CompareRun:
    """One system under one rate in one round."""

    round: int
    system: str
    rate_per_s: float
    load: LoadReport

    @property
    def is_valid(self) -> bool:
        return self.load.complete and not self.load.why_invalid

    def goodput_per_s(self, slo: Slo) -> float:
        """0 without a turn that was measured."""
        figures = self.load.figures
        return next(one.goodput_per_s for one in figures.slos if one.slo == slo) if figures else 0.0

    def num_kept(self, slo: Slo) -> int:
        """Turns behind that."""
        figures = self.load.figures
        return round(self.goodput_per_s(slo) * figures.window_s) if figures else 0


@dataclass(frozen=True)
class SystemFigures:
    """Medians over the valid rounds of one system under one rate; `goodput_per_s` and `kept_share` are by service level
    in the plan's order, `cores` by role, and empty where the engines' processes are not on this machine or not ours.
    None: not told, or nothing to take it from."""

    system: str
    rate_per_s: float
    num_rounds: int
    offered_per_s: float
    tokens_per_s: float
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    e2e_ms: Percentiles | None
    goodput_per_s: tuple[float, ...]
    kept_share: tuple[float, ...]
    cached_share: float | None
    kv_moved_mib: float | None
    cores: dict[str, float]
    num_refused: int
    num_failed: int


@dataclass(frozen=True)
class CompareReport:
    """The content of the JSON file. `complete` is false when the run was interrupted; `num_kv_...` and the like are in
    the runs, each of which is a report of `bench load`."""

    complete: bool
    plan: ComparePlan
    setting: Setting
    took_s: float
    start_failures: tuple[StartFailure, ...] = ()
    runs: tuple[CompareRun, ...] = ()
    figures: tuple[SystemFigures, ...] = ()

    @property
    def baseline(self) -> str:
        """What the others are compared with."""
        return self.plan.systems[0]

    @property
    def engines(self) -> frozenset[EngineKind | None]:
        """Of all systems that were measured; None is a server that does not tell."""
        return frozenset(run.load.server.engine for run in self.runs)

    @property
    def heading(self) -> str:
        """What must not be overlooked."""
        words = [] if self.complete else ["INTERRUPTED run"]
        if EngineKind.SIMULATED in self.engines:
            words.append("SIMULATED engines: no figure is a figure of a model")
        if self.plan.has_random_weights:
            words.append("RANDOM weights: answers mean nothing, and their lengths are forced")
        if None in self.engines:
            words.append("a server does not tell whether its engines are real")
        return "; ".join(words)

    def of(self, system: str, rate_per_s: float) -> SystemFigures | None:
        return next((f for f in self.figures if (f.system, f.rate_per_s) == (system, rate_per_s)), None)

    def valid_runs(self, system: str, rate_per_s: float) -> list[CompareRun]:
        return [run for run in self.runs if run.is_valid and (run.system, run.rate_per_s) == (system, rate_per_s)]


@dataclass(frozen=True)
class Difference:
    """A figure of one system over that of another, round by round. `counts`: how many turns stand behind each of the
    two, of a figure that counts them."""

    ratios: tuple[float, ...]
    counts: tuple[int, int] | None = None

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def is_clear(self) -> bool:
        """All rounds, and two at least, say the same, and counts are further apart than chance has them: twice the
        standard deviation of the difference of two Poisson counts."""
        beyond = max(self.ratio, 1 / self.ratio if self.ratio else math.inf) >= CLEAR_RATIO
        sides = {ratio > 1 for ratio in self.ratios}
        ours, theirs = self.counts or (0, 0)
        is_chance = self.counts is not None and abs(ours - theirs) <= 2 * math.sqrt(ours + theirs)
        return beyond and not is_chance and len(sides) == 1 and len(self.ratios) > 1


Figure = Callable[[CompareRun], float | None]


def difference(report: CompareReport, of: str, to: str, rate_per_s: float, figure: Figure) -> Difference | None:
    """Under one rate; None where nothing can be compared."""
    ratios: list[float] = []
    for number in range(report.plan.rounds):
        found = [_run(report, system, number, rate_per_s) for system in (of, to)]
        ours, theirs = (None if run is None else figure(run) for run in found)
        if ours is not None and theirs:
            ratios.append(ours / theirs)
    return Difference(tuple(ratios)) if ratios else None


def goodput_difference(
    report: CompareReport, of: str, to: str, rates_per_s: Sequence[float], slo: Slo
) -> Difference | None:
    """Of the best goodput that each shows in a round under any of the rates."""
    ratios: list[float] = []
    counts = [0, 0]
    for number in range(report.plan.rounds):
        each = [[_run(report, system, number, rate) for rate in rates_per_s] for system in (of, to)]
        best = [
            max((run for run in runs if run), key=lambda run: run.goodput_per_s(slo), default=None) for runs in each
        ]
        ours, theirs = best
        if ours is None or theirs is None or not theirs.goodput_per_s(slo):
            continue
        ratios.append(ours.goodput_per_s(slo) / theirs.goodput_per_s(slo))
        counts[0] += ours.num_kept(slo)
        counts[1] += theirs.num_kept(slo)
    return Difference(tuple(ratios), (counts[0], counts[1])) if ratios else None


def _run(report: CompareReport, system: str, round: int, rate_per_s: float) -> CompareRun | None:
    return next((run for run in report.valid_runs(system, rate_per_s) if run.round == round), None)


def evaluate(
    plan: ComparePlan,
    setting: Setting,
    runs: Sequence[CompareRun],
    start_failures: Iterable[StartFailure],
    took_s: float,
    *,
    complete: bool,
) -> CompareReport:
    cells = [(system, rate) for rate in plan.rates_per_s for system in plan.systems]
    by_cell = [[run for run in runs if run.is_valid and (run.system, run.rate_per_s) == cell] for cell in cells]
    figures = tuple(_figures(plan, own) for own in by_cell if own)
    return CompareReport(complete, plan, setting, took_s, tuple(start_failures), tuple(runs), figures)


def _figures(plan: ComparePlan, runs: Sequence[CompareRun]) -> SystemFigures:
    """Of valid runs, which have figures."""
    loads = [run.load for run in runs]
    each = [load.figures for load in loads if load.figures is not None]
    moved = [load.use.kv_moved_bytes for load in loads if load.use.kv_moved_bytes is not None]
    cached = [one.cached_share for one in each if one.cached_share is not None]
    roles = dict.fromkeys(process.role for load in loads for process in load.use.processes)
    if Role.ENGINE not in roles:
        roles.clear()
    slos = range(len(plan.load.slos))
    return SystemFigures(
        runs[0].system,
        runs[0].rate_per_s,
        len(runs),
        median(one.offered_per_s for one in each),
        median(one.tokens_per_s for one in each),
        _percentiles(each, lambda one: one.ttft_ms),
        _percentiles(each, lambda one: one.itl_ms),
        _percentiles(each, lambda one: one.tpot_ms),
        _percentiles(each, lambda one: one.e2e_ms),
        tuple(median(one.slos[slo].goodput_per_s for one in each) for slo in slos),
        tuple(median(one.slos[slo].kept_share for one in each) for slo in slos),
        median(cached) if cached else None,
        median(moved) / 2**20 if moved else None,
        {role: median(_cores(load, role) for load in loads) for role in roles},
        sum(one.num_refused for one in each),
        sum(one.num_failed for one in each),
    )


def _percentiles(figures: Sequence[LoadFigures], of: Callable[[LoadFigures], Percentiles | None]) -> Percentiles | None:
    found = [one for one in map(of, figures) if one is not None]
    return medians(found) if found else None


def _cores(load: LoadReport, role: str) -> float:
    return sum(process.cpu_s for process in load.use.processes if process.role == role) / load.use.ran_s


def targets(plan: ComparePlan, *, is_quick: bool) -> tuple[ReportTarget[CompareReport], ...]:
    """The time is one of the quick run on this machine's CPUs."""
    found = [
        ReportTarget[CompareReport](
            "runs of all systems, rates and rounds that are valid",
            lambda report: sum(run.is_valid for run in report.runs),
            len(plan.systems) * plan.rounds * (len(plan.rates_per_s) or len(plan.shares)),
            is_floor=True,
        ),
        ReportTarget[CompareReport](
            "requests that failed, refusals apart", lambda report: sum(f.num_failed for f in report.figures), 0
        ),
    ]
    if is_quick:
        found.append(
            ReportTarget[CompareReport]("from start to report", lambda report: report.took_s / 60, MOST_MINUTES, " min")
        )
    return tuple(found)
