"""Owns what `bench scaling` leaves behind: days of pools that are sized as they go, against pools of a fixed size."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from bench.day import DayFigures, Traffic
from bench.replay_plan import SLO_SHARE, Shape
from bench.results import Setting
from bench.targets import ReportTarget
from gateway.scaling.planner import Verdict

GPU_HOURS = 0.8
"""Of the cheapest fixed pools that keep as many turns in time."""


@dataclass(frozen=True)
class ScalingPlan:
    """What is run: each traffic and seed with sized pools, which have at most `most` replicas, and with each of
    `static`."""

    trace: str
    policy: str
    model: str
    traffics: tuple[tuple[str, Traffic], ...]
    seeds: tuple[int, ...]
    static: tuple[Shape, ...]
    most: tuple[Shape, ...]
    shards: int


@dataclass(frozen=True)
class DayFailed:
    """What a run raised."""

    name: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """One traffic and seed: sized pools, and the cheapest fixed ones that keep at least as many turns in time; None if
    none of those that were tried does."""

    traffic: str
    seed: int
    scaled: DayFigures
    static: DayFigures | None

    @property
    def ratio(self) -> float | None:
        """Of GPU-hours."""
        return self.scaled.gpu_s / self.static.gpu_s if self.static is not None else None


@dataclass(frozen=True)
class ScalingReport:
    complete: bool
    plan: ScalingPlan
    setting: Setting
    days: tuple[DayFigures, ...] = ()
    failed: tuple[DayFailed, ...] = field(default=())

    def of(self, traffic: Traffic, seed: int) -> list[DayFigures]:
        """By GPU-hours."""
        found = [day for day in self.days if day.plan.traffic == traffic and day.plan.run.seed == seed]
        return sorted(found, key=lambda day: day.gpu_s)

    def comparisons(self) -> Iterator[Comparison]:
        for name, traffic in self.plan.traffics:
            for seed in self.plan.seeds:
                days = self.of(traffic, seed)
                for scaled in (day for day in days if day.plan.scaled):
                    enough = (d for d in days if not d.plan.scaled and d.slo_share >= scaled.slo_share)
                    yield Comparison(name, seed, scaled, next(enough, None))

    def worst_ratio(self) -> float | None:
        """For each traffic and seed by the sized pools that need fewest GPU-hours and keep the service level."""
        best: dict[tuple[str, int], float | None] = {}
        for one in self.comparisons():
            if one.scaled.slo_share >= SLO_SHARE and (one.traffic, one.seed) not in best:
                best[one.traffic, one.seed] = one.ratio
        ratios = [best.get((name, seed)) for name, _ in self.plan.traffics for seed in self.plan.seeds]
        known = [ratio for ratio in ratios if ratio is not None]
        return max(known) if len(known) == len(ratios) else None


def targets() -> Iterator[ReportTarget[ScalingReport]]:
    yield ReportTarget(
        "GPU-hours of a day over those of the cheapest fixed pools with as many turns in time, the worst day",
        ScalingReport.worst_ratio,
        GPU_HOURS,
    )


def day_line(day: DayFigures) -> str:
    """One run, when it has ended."""
    return (
        f"{day.plan.name} seed {day.plan.run.seed}: {day.gpu_hours:.1f} GPU-hours, {day.slo_share:.1%} of "
        f"{day.num_turns:,} turns in time, {day.num_started} replicas started, {day.num_left} left, "
        f"{day.cpu_s:.0f} s CPU"
    )


def day_tables(report: ScalingReport) -> Iterator[Table]:
    """One for each traffic and seed."""
    for name, traffic in report.plan.traffics:
        for seed in report.plan.seeds:
            table = Table(title=f"{name}, seed {seed}", box=box.SIMPLE_HEAD)
            for column in (
                "pools",
                "GPU-hours\nall/prefill",
                "turns in time\nall/TTFT/TPOT",
                "worst hour",
                "TTFT s\np50/p99",
                "turn s\np50/p99",
                "cached",
                "failed",
                "proposed\nright/wrong",
            ):
                table.add_column(column, justify="left" if column == "pools" else "right", no_wrap=True)
            for day in report.of(traffic, seed):
                table.add_row(
                    f"sized, at most {day.plan.most}" if day.plan.scaled else str(day.plan.run.shape),
                    f"{day.gpu_hours:.1f}/{day.prefill_gpu_s / 3600:.1f}",
                    f"{day.slo_share:.1%}/{day.ttft_share:.1%}/{day.tpot_share:.1%}",
                    f"{min(share for share in day.hourly_share if share is not None):.1%}",
                    f"{day.ttft_s.p50:.2f}/{day.ttft_s.p99:.1f}",
                    f"{day.turn_s.p50:.1f}/{day.turn_s.p99:.0f}",
                    f"{day.hit_rate:.1%}",
                    f"{day.num_failed}",
                    _proposed(day),
                )
            yield table


def _proposed(day: DayFigures) -> str:
    if day.plan.scaled:
        return ""
    right, wrong = (
        sum(number for name, number in day.scored.items() if name.endswith(verdict))
        for verdict in (Verdict.RIGHT, Verdict.WRONG)
    )
    return f"{right}/{wrong}"
