"""Owns what `bench replay` leaves behind: the report, ours against the others, the JSON file, tables."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from bench.replay_plan import SLO, SLO_SHARE, RunFigures, RunPlan, Shape
from bench.replay_search import Failed, Goodput, Tuned
from bench.replay_tuning import TUNING_LOAD, TUNING_SEED
from bench.results import Setting
from bench.stats import Percentiles
from bench.targets import ReportTarget

OURS = "baton"
HEADROOM = 0.25
"""Of the best other policy's goodput: with so much load there is room for everybody."""
SATURATION = 1.0
HEADROOM_LIMIT = 1.02
GAP_CLOSED = 0.5


@dataclass(frozen=True)
class TraceFigures:
    """A trace as the model can hold it. `bound_per_gpu_s`: trajectories per second and GPU by the oracle."""

    path: str
    num_trajectories: int
    num_turns: int
    num_cut_turns: int
    bound_per_gpu_s: float


@dataclass(frozen=True)
class ReplayPlan:
    """What is replayed. `loads` are shares of the best other policy's goodput. `rates_per_s`, trajectories per
    second, and `shares_of_bound` stand in their place: with either there is no search for the goodput. `reverse`:
    prefill may fetch from decode (docs/adr/0017). `tunes`: policies with constants are tuned to each trace and shape
    first. `kv_factor` is of `engine.roofline.Roofline`."""

    traces: tuple[str, ...]
    policies: tuple[str, ...]
    shapes: tuple[Shape, ...]
    seeds: tuple[int, ...]
    model: str
    turns: int
    loads: tuple[float, ...]
    rates_per_s: tuple[float, ...]
    shares_of_bound: tuple[float, ...]
    shards: int
    reverse: bool = False
    tunes: bool = False
    kv_factor: float = 1.0

    @property
    def searches(self) -> bool:
        return not (self.rates_per_s or self.shares_of_bound)


@dataclass(frozen=True)
class ReplayReport:
    """`load` of a run of `runs` is of the saturation, that is the best other policy's goodput; without a search for the
    goodput, of the oracle's bound."""

    complete: bool
    plan: ReplayPlan
    setting: Setting
    traces: tuple[TraceFigures, ...] = ()
    goodputs: tuple[Goodput, ...] = ()
    runs: tuple[RunFigures, ...] = ()
    failed: tuple[Failed, ...] = field(default=())
    tuned: tuple[Tuned, ...] = ()

    def constants(self, plan: RunPlan) -> str:
        """What a plan's policy was tuned to; "" are its own."""
        found = (one.plan.constants for one in self.tuned if _is_of(one.plan, plan.trace, plan.policy, plan.shape))
        return next(found, "")

    def mean_goodput_per_s(self, trace: str, policy: str, shape: Shape) -> float | None:
        """Over the seeds; None if none was searched for."""
        found = [g.rate_per_s for g in self.goodputs if _is_of(g.plan, trace, policy, shape)]
        return mean(found) if found else None

    def best_goodput_per_s(self, trace: str, *, ours: bool) -> float | None:
        """Over shapes, and over policies: ours alone, or all others."""
        found = [
            goodput
            for policy in self.plan.policies
            if (policy == OURS) == ours
            for shape in self.plan.shapes
            if (goodput := self.mean_goodput_per_s(trace, policy, shape)) is not None
        ]
        return max(found, default=None)

    def bound_per_s(self, trace: str) -> float:
        """Of the largest shape."""
        return self.bound_per_gpu_s(trace) * max(shape.num_gpus for shape in self.plan.shapes)

    def bound_per_gpu_s(self, trace: str) -> float:
        return next(figures.bound_per_gpu_s for figures in self.traces if figures.path == trace)

    def goodput_gap_closed(self, trace: str) -> float | None:
        """Of the gap between the best other policy and the oracle's bound, the share that ours closes."""
        ours, others = self.best_goodput_per_s(trace, ours=True), self.best_goodput_per_s(trace, ours=False)
        if ours is None or others is None:
            return None
        return (ours - others) / (self.bound_per_s(trace) - others)

    def cell(self, trace: str, load: float, policy: str, shape: Shape) -> list[RunFigures]:
        """The runs of all seeds."""
        return [run for run in self.runs if _is_of(run.plan, trace, policy, shape) and run.plan.load == load]

    def best(self, trace: str, load: float, figure: Callable[[RunFigures], float], *, ours: bool) -> float | None:
        """The lowest mean over the seeds of a figure, over shapes and over ours or all other policies."""
        cells = [
            self.cell(trace, load, policy, shape)
            for policy in self.plan.policies
            if (policy == OURS) == ours
            for shape in self.plan.shapes
        ]
        means = [mean([figure(run) for run in cell]) for cell in cells if cell]
        return min((value for value in means if not math.isnan(value)), default=None)

    def session_gap_closed(self, trace: str) -> float | None:
        """At saturation, in p99 session completion."""
        ours = self.best(trace, SATURATION, lambda run: run.session_s.p99, ours=True)
        others = self.best(trace, SATURATION, lambda run: run.session_s.p99, ours=False)
        least = self.best(trace, SATURATION, lambda run: run.least_session_s.p99, ours=False)
        if ours is None or others is None or least is None or others <= least:
            return None
        return (others - ours) / (others - least)

    def headroom_ratio(self, trace: str) -> float | None:
        """The worst of TTFT, turn time and session completion (means) at low load, over the best of the others."""
        ratios: list[float] = []
        for figure in (
            lambda run: run.ttft_mean_s,
            lambda run: run.turn_mean_s,
            lambda run: run.session_mean_s,
        ):
            ours, others = (self.best(trace, HEADROOM, figure, ours=one) for one in (True, False))
            if ours is None or others is None:
                return None
            ratios.append(ours / others)
        return max(ratios)


def _is_of(plan: RunPlan, trace: str, policy: str, shape: Shape) -> bool:
    return plan.trace == trace and plan.policy == policy and plan.shape == shape


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def targets(plan: ReplayPlan) -> Iterator[ReportTarget[ReplayReport]]:
    for path in plan.traces:
        name = Path(path).name
        yield ReportTarget(
            f"{name}: gap to the bound closed in goodput",
            lambda report, path=path: report.goodput_gap_closed(path),
            GAP_CLOSED,
            is_floor=True,
        )
        yield ReportTarget(
            f"{name}: gap to the bound closed in p99 session completion at saturation",
            lambda report, path=path: report.session_gap_closed(path),
            GAP_CLOSED,
            is_floor=True,
        )
        yield ReportTarget(
            f"{name}: at {HEADROOM:.0%} load, the worst of TTFT, turn and session time over the best other's",
            lambda report, path=path: report.headroom_ratio(path),
            HEADROOM_LIMIT,
        )


def run_line(figures: RunFigures) -> str:
    """One run, while it goes on."""
    plan = figures.plan
    return (
        f"{Path(plan.trace).name} {plan.shape} {plan.policy} seed {plan.seed} {plan.rate_per_s * 60:.3g}/min: "
        f"{figures.slo_share:.1%} in SLO, TTFT {figures.ttft_s.p50:.2f}/{figures.ttft_s.p99:.1f} s, "
        f"{figures.num_turns:,} of {figures.num_turns_in_all:,} turns, {figures.cpu_s:.0f} s CPU"
    )


def tuning_table(report: ReplayReport) -> Table:
    table = Table(
        title=f"Constants: share of turns in SLO at {TUNING_LOAD:g} times the goodput with the policy's own, "
        f"seed {TUNING_SEED}; the best are used from here on",
        box=box.SIMPLE_HEAD,
    )
    for column in ("trace", "shape", "policy", "its own", "best", "constants"):
        table.add_column(column)
    for tuned in report.tuned:
        plan, tried = tuned.plan, dict(tuned.tried)
        best = "its own" if not plan.constants else plan.constants
        shares = f"{tried['']:.1%}", f"{tried[plan.constants]:.1%}"
        table.add_row(Path(plan.trace).name, str(plan.shape), plan.policy, *shares, best)
    return table


def goodput_table(report: ReplayReport) -> Table:
    table = Table(
        title=f"Goodput: trajectories per minute with {SLO_SHARE:.0%} of turns in SLO (TTFT {SLO.ttft_s:g} s + "
        f"{SLO.ttft_per_read:g} x cold, TPOT {SLO.tpot_s * 1000:g} ms), mean of seeds; and as a share of the bound",
        box=box.SIMPLE_HEAD,
    )
    for column in ("trace", "shape"):
        table.add_column(column)
    for policy in report.plan.policies:
        table.add_column(policy, justify="right")
    table.add_column("bound", justify="right")
    for trace in report.plan.traces:
        for shape in report.plan.shapes:
            bound = report.bound_per_gpu_s(trace) * shape.num_gpus
            found = [report.mean_goodput_per_s(trace, policy, shape) for policy in report.plan.policies]
            cells = ["-" if one is None else f"{one * 60:.3g} ({one / bound:.1%})" for one in found]
            table.add_row(Path(trace).name, str(shape), *cells, f"{bound * 60:.3g}")
    return table


Column = tuple[tuple[Callable[[RunFigures], float], str], ...]
"""Figures of one column, and how each is written."""


def _of(percentiles: Callable[[RunFigures], Percentiles], style: str, scale: float = 1.0) -> Column:
    """p50, p90 and p99."""
    return tuple(
        (lambda run, name=name: getattr(percentiles(run), name) * scale, style) for name in ("p50", "p90", "p99")
    )


TIMES: Mapping[str, Column] = {
    "in SLO": ((lambda run: run.slo_share, ".1%"),),
    "TTFT s\nmean/p50/p90/p99": ((lambda run: run.ttft_mean_s, ".2f"), *_of(lambda run: run.ttft_s, ".3g")),
    "TPOT ms\np50/p90/p99": _of(lambda run: run.tpot_s, ".3g", 1000),
    "turn s\nmean/p50/p90/p99": ((lambda run: run.turn_mean_s, ".2f"), *_of(lambda run: run.turn_s, ".3g")),
    "session s\nmean/p50/p90/p99": ((lambda run: run.session_mean_s, ".0f"), *_of(lambda run: run.session_s, ".0f")),
    "without pauses\np50/p90/p99": _of(lambda run: run.busy_s, ".0f"),
    "of the least\np50/p99": tuple(_of(lambda run: run.slowdown, ".3g")[index] for index in (0, 2)),
}
RESOURCES: Mapping[str, Column] = {
    "cached\nof at most": ((lambda run: run.hit_rate, ".1%"), (lambda run: run.hit_rate_ceiling, ".1%")),
    "KV moved\nTB": ((lambda run: run.kv_moved_bytes / 1e12, ".2f"),),
    "from decode\nTB/turns": (
        (lambda run: run.kv_asked_bytes / 1e12, ".2f"),
        (lambda run: run.num_asked_turns, ",.0f"),
    ),
    "GPUs busy\nP/D": ((lambda run: run.prefill_busy, ".0%"), (lambda run: run.decode_busy, ".0%")),
    "GPU seconds\nP/D": ((lambda run: run.prefill_gpu_s, ",.0f"), (lambda run: run.decode_gpu_s, ",.0f")),
    "refused": ((lambda run: run.num_refusals, ".0f"),),
    "turns\nmeasured/all": ((lambda run: run.num_turns, ",.0f"), (lambda run: run.num_turns_in_all, ",.0f")),
    "CPU s": ((lambda run: run.cpu_s, ".0f"),),
}


def run_tables(report: ReplayReport) -> Iterator[Table]:
    """Two for each trace and load: times, and what they took."""
    for trace in report.plan.traces:
        runs = [run for run in report.runs if run.plan.trace == trace]
        for load in sorted({run.plan.load for run in runs if run.plan.load is not None}):
            per_minute = sorted({f"{run.plan.rate_per_s * 60:.3g}" for run in runs if run.plan.load == load})
            of = "the best other's goodput" if report.plan.searches else "the bound"
            where = f"{Path(trace).name}, {', '.join(per_minute)} trajectories a minute, {load:.3g} of {of}"
            for columns in (TIMES, RESOURCES):
                table = Table(title=f"{where}, mean of seeds", box=box.SIMPLE_HEAD)
                for name in ("shape", "policy"):
                    table.add_column(name, no_wrap=True)
                for name in columns:
                    table.add_column(name, justify="right", no_wrap=True)
                for shape in report.plan.shapes:
                    for policy in report.plan.policies:
                        if cell := report.cell(trace, load, policy, shape):
                            table.add_row(str(shape), policy, *(_written(cell, one) for one in columns.values()))
                yield table


def _written(cell: Sequence[RunFigures], column: Column) -> str:
    return "/".join(format(mean([figure(run) for run in cell]), style) for figure, style in column)
