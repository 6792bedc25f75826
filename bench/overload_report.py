"""Owns what `bench overload` leaves behind: its plan, figures, targets, the JSON file, the table."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from bench.results import EngineKind, Setting
from bench.stats import Percentiles, percentiles
from bench.targets import ReportTarget
from gateway.routing.types import Priority

WINDOW_S = 1.0
NORMAL_WINDOWS = 3
"""So many windows in a row must be normal for an overload to be over: one may be by luck."""
FIFTHS = 5


@dataclass(frozen=True)
class OverloadPlan:
    """What is measured: `factor` times as many requests as are answered at the best rate, for `overload_s`, each of use
    only if its first token comes within `deadline_s`. Before and after it is `normal_share` of the best rate."""

    engine: EngineKind
    deadline_s: float
    factor: float
    overload_s: float
    capacity_s: float
    normal_s: float = 0.0
    normal_share: float = 0.6
    seed: int = 0
    config: str = ""


@dataclass(frozen=True)
class Asked:
    """One request and what came of it. `ttft_s` None: it was not answered; `status` is of its HTTP response, 0 for
    none. `is_typed`: a refusal says what kind of error it is, why, and when to try again."""

    at_s: float
    priority: Priority
    status: int
    ttft_s: float | None = None
    predicted_s: float | None = None
    retry_after_s: int | None = None
    is_typed: bool = False
    streams: bool = True

    @property
    def is_answered(self) -> bool:
        return self.status == 200

    @property
    def is_refused(self) -> bool:
        return self.status in (429, 503)


@dataclass(frozen=True)
class Rate:
    """What came of one offered rate."""

    offered_per_s: float
    goodput_per_s: float


@dataclass(frozen=True)
class ScenarioFigures:
    """One scenario in virtual time. Goodput is answers per second whose first token came within the deadline.
    `recovered_s`: from the end of the overload until, three seconds in a row, nobody was refused and the median TTFT
    was the p90 before the overload at most. `sequences_drift`: those in flight in the overload's last fifth over those
    in its second. `prediction_error_s`: what TTFT was less what was predicted, of the requests taken in the overload.
    """

    name: str
    peak: Rate
    rates: tuple[Rate, ...]
    overload: Rate
    num_asked: int
    num_refused: int
    num_untyped: int
    refused_share: dict[str, float]
    retry_after_s: tuple[int, int]
    normal_ttft_ms: Percentiles
    overload_ttft_ms: Percentiles
    prediction_error_s: Percentiles
    recovered_s: float | None
    sequences_max: int
    sequences_drift: float
    left_in_flight: int
    took_s: float

    @property
    def goodput_ratio(self) -> float:
        return self.overload.goodput_per_s / self.peak.goodput_per_s

    @property
    def num_inversions(self) -> int:
        """Classes of which a larger share was refused than of the next lower one."""
        shares = [self.refused_share[priority] for priority in Priority]
        return sum(higher > lower for lower, higher in itertools.pairwise(shares))


@dataclass(frozen=True)
class LiveFigures:
    """One run over real engines. `capacity_per_s` is what as many clients as `concurrency` were answered, each asking
    anew when it had its answer. TTFT is of streaming requests, as their clients saw it. `memory_mib` is the gateway's,
    every few seconds of the overload."""

    concurrency: int
    capacity_per_s: float
    offered_per_s: float
    answered_per_s: float
    in_time_share: float
    num_asked: int
    num_refused: int
    num_streams_refused: int
    num_untyped: int
    num_failed: int
    refused_share: dict[str, float]
    retry_after_s: tuple[int, int]
    capacity_ttft_ms: Percentiles
    overload_ttft_ms: Percentiles
    after_ttft_ms: Percentiles
    memory_mib: tuple[float, ...]
    errors: tuple[str, ...] = ()

    @property
    def memory_growth(self) -> float:
        """The mean of the last third over that of the second."""
        third = max(len(self.memory_mib) // 3, 1)
        return mean(self.memory_mib[-third:]) / mean(self.memory_mib[-2 * third : -third])


@dataclass(frozen=True)
class OverloadReport:
    """The content of the JSON file."""

    complete: bool
    plan: OverloadPlan
    setting: Setting
    scenarios: tuple[ScenarioFigures, ...] = ()
    live: LiveFigures | None = None


def goodput_per_s(asked: Sequence[Asked], deadline_s: float, seconds: float) -> float:
    return sum(one.ttft_s is not None and one.ttft_s <= deadline_s for one in asked) / seconds


def refused_shares(asked: Sequence[Asked]) -> dict[str, float]:
    """Of each class, which share was refused; 0 for a class that nobody asked for."""
    shares: dict[str, float] = {}
    for priority in Priority:
        of_class = [one.is_refused for one in asked if one.priority is priority]
        shares[priority] = sum(of_class) / len(of_class) if of_class else 0.0
    return shares


def retry_after_range(asked: Sequence[Asked]) -> tuple[int, int]:
    """The shortest and the longest that was told; (0, 0) if nobody was."""
    told = [one.retry_after_s for one in asked if one.retry_after_s is not None]
    return (min(told), max(told)) if told else (0, 0)


def ttft_ms(asked: Sequence[Asked]) -> Percentiles:
    """Of those that were answered; zeros if none was."""
    return percentiles([one.ttft_s * 1000 for one in asked if one.ttft_s is not None] or [0.0])


def recovered_s(after: Sequence[Asked], ended_s: float, normal_p90_ms: float) -> float | None:
    """From the end of an overload to the first of NORMAL_WINDOWS windows in a row in which nobody was refused or lost
    and the median TTFT was `normal_p90_ms` at most; None if there are none. Nobody asking is normal."""
    windows: dict[int, list[Asked]] = {}
    for one in after:
        windows.setdefault(int((one.at_s - ended_s) / WINDOW_S), []).append(one)
    in_a_row = 0
    for number in range(max(windows, default=-1) + 1):
        window = windows.get(number, [])
        is_normal = all(one.is_answered for one in window) and ttft_ms(window).p50 <= normal_p90_ms
        in_a_row = in_a_row + 1 if is_normal else 0
        if in_a_row == NORMAL_WINDOWS:
            return (number + 1 - NORMAL_WINDOWS) * WINDOW_S
    return None


def drift(samples: Sequence[float]) -> float:
    """The mean of the last fifth over that of the second; the first is for getting there."""
    fifth = max(len(samples) // FIFTHS, 1)
    return mean(samples[-fifth:]) / max(mean(samples[fifth : 2 * fifth]), 1e-9)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


OverloadTarget = ReportTarget[OverloadReport]


def _worst(
    figure: Callable[[ScenarioFigures], float], of: Callable[[list[float]], float] = max
) -> Callable[[OverloadReport], float | None]:
    return lambda report: of([figure(scenario) for scenario in report.scenarios]) if report.complete else None


def _live(figure: Callable[[LiveFigures], float]) -> Callable[[OverloadReport], float | None]:
    return lambda report: None if report.live is None else figure(report.live)


SIMULATED_TARGETS = (
    OverloadTarget("goodput under overload, of the peak", _worst(lambda s: s.goodput_ratio, min), 0.95, is_floor=True),
    OverloadTarget(
        "TTFT normal again after the overload",
        _worst(lambda s: math.inf if s.recovered_s is None else s.recovered_s),
        5,
        " s",
    ),
    OverloadTarget(
        "refusals without status, reason or Retry-After, and requests lost", _worst(lambda s: s.num_untyped), 0
    ),
    OverloadTarget("classes refused more than a lower one", _worst(lambda s: s.num_inversions), 0),
    OverloadTarget(
        "sequences in flight, end of the overload over its beginning", _worst(lambda s: s.sequences_drift), 1.1
    ),
    OverloadTarget("sequences, tokens and places left in the end", _worst(lambda s: s.left_in_flight), 0),
)
LIVE_TARGETS = (
    OverloadTarget("refusals without status, reason or Retry-After", _live(lambda f: f.num_untyped), 0),
    OverloadTarget("streaming requests refused", _live(lambda f: f.num_streams_refused), 1, is_floor=True),
    OverloadTarget("requests neither answered nor refused", _live(lambda f: f.num_failed), 0),
    OverloadTarget(
        "gateway's memory, last third of the overload over its second", _live(lambda f: f.memory_growth), 1.05
    ),
)


def targets(engine: EngineKind) -> tuple[OverloadTarget, ...]:
    return LIVE_TARGETS if engine is EngineKind.VLLM else SIMULATED_TARGETS


def table(report: OverloadReport) -> Table:
    """A figure per row, a scenario per column."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.title = "" if report.complete else "interrupted run"
    shown.title_justify = "left"
    if report.plan.engine is EngineKind.SIMULATED:
        shown.title = f"SIMULATED engines, virtual time {shown.title}: no figure is a figure of a model"
    shown.add_column("")
    columns = [_scenario_rows(scenario) for scenario in report.scenarios]
    names = [scenario.name for scenario in report.scenarios]
    if report.live is not None:
        columns, names = [_live_rows(report.live)], ["real engines"]
    for name in names:
        shown.add_column(name, justify="right")
    for row in zip(*columns, strict=True):
        shown.add_row(row[0][0], *(value for _, value in row))
    return shown


def _scenario_rows(figures: ScenarioFigures) -> list[tuple[str, str]]:
    peak, overload = figures.peak, figures.overload
    return [
        ("peak: offered, goodput per s", f"{peak.offered_per_s:.1f}, {peak.goodput_per_s:.1f}"),
        ("overload: offered, goodput per s", f"{overload.offered_per_s:.1f}, {overload.goodput_per_s:.1f}"),
        ("goodput of the peak", f"{figures.goodput_ratio:.1%}"),
        ("asked, refused", f"{figures.num_asked:,}, {figures.num_refused:,}"),
        ("refused of low, normal, high", _shares(figures.refused_share)),
        ("Retry-After s", f"{figures.retry_after_s[0]} to {figures.retry_after_s[1]}"),
        ("TTFT ms before: p50, p90, p99", _percentiles(figures.normal_ttft_ms)),
        ("TTFT ms in the overload", _percentiles(figures.overload_ttft_ms)),
        ("TTFT less prediction, s", _percentiles(figures.prediction_error_s, 2)),
        ("normal again after", "never" if figures.recovered_s is None else f"{figures.recovered_s:.0f} s"),
        ("sequences at once, drift", f"{figures.sequences_max}, {figures.sequences_drift:.2f}"),
        ("CPU time", f"{figures.took_s:.0f} s"),
    ]


def _live_rows(figures: LiveFigures) -> list[tuple[str, str]]:
    memory = figures.memory_mib
    return [
        (f"{figures.concurrency} clients: answers per s", f"{figures.capacity_per_s:.1f}"),
        ("overload: offered, answered per s", f"{figures.offered_per_s:.1f}, {figures.answered_per_s:.1f}"),
        ("first token within the deadline, of those answered", f"{figures.in_time_share:.1%}"),
        (
            "asked, refused, of them streaming",
            f"{figures.num_asked:,}, {figures.num_refused:,}, {figures.num_streams_refused:,}",
        ),
        ("refused of low, normal, high", _shares(figures.refused_share)),
        ("Retry-After s", f"{figures.retry_after_s[0]} to {figures.retry_after_s[1]}"),
        ("failed", str(figures.num_failed)),
        ("TTFT ms at capacity: p50, p90, p99", _percentiles(figures.capacity_ttft_ms)),
        ("TTFT ms in the overload", _percentiles(figures.overload_ttft_ms)),
        ("TTFT ms after it", _percentiles(figures.after_ttft_ms)),
        ("gateway's memory MiB", f"{memory[0]:.0f} to {memory[-1]:.0f}" if memory else "-"),
    ]


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{shares[priority]:.0%}" for priority in Priority)


def _percentiles(figures: Percentiles, digits: int = 0) -> str:
    return f"{figures.p50:.{digits}f}, {figures.p90:.{digits}f}, {figures.p99:.{digits}f}"
