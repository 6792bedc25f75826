"""Owns what `bench clients` leaves behind: its plan, what each client measured, how far they agree, targets, the table.
Pure."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev

from rich import box
from rich.table import Table

from bench.outside_clients import OURS, PACKAGES, Export, Workload
from bench.results import EngineKind, Setting
from bench.stats import in_turns
from bench.targets import ReportTarget

CLOSE_ENOUGH = 0.05
"""Of our figure; so far another client's may be from it, or as far as twice the spread of their runs."""
UNLIKE = 0.01
"""Lengths, or shares of a cache, that differ by more are told."""
MORE_CORES = 0.05
"""A client that needs so many cores more than ours is told."""


@dataclass(frozen=True)
class ClientsPlan:
    """Each of `clients` has a turn in each of `rounds`, under the same workload with prompts of its own. `config` is
    what was served, or `url` says where that was already; `engine` is None where a server does not tell."""

    config: str
    url: str | None
    engine: EngineKind | None
    clients: tuple[str, ...]
    workload: Workload
    rounds: int
    seed: int

    def turns(self) -> list[tuple[int, str]]:
        """Round and client of each, in the order of the run."""
        return in_turns(self.clients, self.rounds)


@dataclass(frozen=True)
class ClientRun:
    """One client in one round. `cpu_s` is what it used from its start to its end, `cores` how many it kept busy while
    it measured, `took_s` how long it ran."""

    round: int
    client: str
    export: Export
    cpu_s: float
    cores: float | None
    took_s: float


@dataclass(frozen=True)
class TurnFailure:
    """A turn that gave no figures."""

    round: int
    client: str
    error: str
    log_tail: str


@dataclass(frozen=True)
class Spread:
    """A figure's median over the rounds, and their standard deviation as a share of it; 0 of a single round."""

    median: float
    spread: float


@dataclass(frozen=True)
class Figures:
    """One client over all rounds. `cores`, `cpu_s` and lengths are medians."""

    client: str
    ttft_p50_ms: Spread
    itl_p50_ms: Spread
    tokens_per_s: Spread
    ttft_p99_ms: float
    num_requests: int
    num_failed: int
    prompt_tokens: float
    output_tokens: float
    cached_share: float | None
    cores: float | None
    cpu_s: float


FIGURES: Mapping[str, Callable[[Figures], Spread]] = {
    "TTFT p50": lambda figures: figures.ttft_p50_ms,
    "tokens/s": lambda figures: figures.tokens_per_s,
    "ITL p50": lambda figures: figures.itl_p50_ms,
}
JUDGED = ("TTFT p50", "tokens/s")


@dataclass(frozen=True)
class Agreement:
    """Another client's figure over ours, and how far from 1 that may be."""

    client: str
    figure: str
    ratio: float
    allowed: float

    @property
    def share_of_allowed(self) -> float:
        return abs(self.ratio - 1) / self.allowed

    @property
    def is_met(self) -> bool:
        return self.share_of_allowed <= 1


@dataclass(frozen=True)
class ClientsReport:
    """The content of the JSON file. `complete` is false when the run was interrupted."""

    complete: bool
    plan: ClientsPlan
    setting: Setting
    runs: tuple[ClientRun, ...] = ()
    failures: tuple[TurnFailure, ...] = ()
    figures: tuple[Figures, ...] = ()
    agreements: tuple[Agreement, ...] = ()

    @property
    def heading(self) -> str:
        """What must not be overlooked."""
        if self.plan.engine is EngineKind.SIMULATED:
            return "SIMULATED engine: no figure is a figure of a model"
        return "" if self.plan.engine is not None else "engine: the server does not tell whether it is a real one"

    def of(self, client: str) -> Figures | None:
        return next((one for one in self.figures if one.client == client), None)

    def agreement(self, client: str, figure: str) -> Agreement | None:
        return next((one for one in self.agreements if (one.client, one.figure) == (client, figure)), None)

    @property
    def num_failed(self) -> int:
        return sum(run.export.num_failed for run in self.runs)


def cores_between(samples: Sequence[tuple[float, float]], begin_s: float, end_s: float) -> float | None:
    """Cores in use between two times, from the times and CPU seconds of samples; None unless they cover that."""

    def used_s(at_s: float) -> float | None:
        for (before_s, before), (after_s, after) in itertools.pairwise(samples):
            if before_s <= at_s <= after_s and before_s < after_s:
                return before + (after - before) * (at_s - before_s) / (after_s - before_s)
        return None

    begin, end = used_s(begin_s), used_s(end_s)
    return None if begin is None or end is None or end_s <= begin_s else (end - begin) / (end_s - begin_s)


def evaluate(
    plan: ClientsPlan,
    setting: Setting,
    runs: Sequence[ClientRun],
    failures: Sequence[TurnFailure],
    *,
    complete: bool,
) -> ClientsReport:
    by_client = {name: [run for run in runs if run.client == name] for name in plan.clients}
    figures = tuple(_figures(own) for own in by_client.values() if own)
    ours = next((one for one in figures if one.client == OURS), None)
    agreements = (
        []
        if ours is None
        else [_agreement(ours, theirs, name) for theirs in figures if theirs is not ours for name in FIGURES]
    )
    return ClientsReport(complete, plan, setting, tuple(runs), tuple(failures), figures, tuple(agreements))


def _figures(runs: Sequence[ClientRun]) -> Figures:
    exports = [run.export for run in runs]
    cores = [run.cores for run in runs if run.cores is not None]
    cached = [one.cached_share for one in exports if one.cached_share is not None]
    return Figures(
        runs[0].client,
        _spread([one.ttft_p50_ms for one in exports]),
        _spread([one.itl_p50_ms for one in exports]),
        _spread([one.tokens_per_s for one in exports]),
        median(one.ttft_p99_ms for one in exports),
        sum(one.num_requests for one in exports),
        sum(one.num_failed for one in exports),
        median(one.prompt_tokens for one in exports),
        median(one.output_tokens for one in exports),
        median(cached) if cached else None,
        median(cores) if cores else None,
        median(run.cpu_s for run in runs),
    )


def _spread(values: Sequence[float]) -> Spread:
    middle = median(values)
    return Spread(middle, stdev(values) / middle if len(values) > 1 and middle else 0.0)


def _agreement(ours: Figures, theirs: Figures, name: str) -> Agreement:
    own, other = FIGURES[name](ours), FIGURES[name](theirs)
    return Agreement(
        theirs.client, name, other.median / own.median, max(CLOSE_ENOUGH, 2 * own.spread, 2 * other.spread)
    )


def _target(client: str, figure: str) -> ReportTarget[ClientsReport]:
    def share(report: ClientsReport) -> float | None:
        found = report.agreement(client, figure)
        return None if found is None else found.share_of_allowed

    name = f"{client}: how far {figure} is from ours, over what is allowed ({CLOSE_ENOUGH:.0%}, or twice the spread)"
    return ReportTarget(name, share, 1)


TARGETS = (
    *(_target(client, figure) for client in PACKAGES for figure in JUDGED),
    ReportTarget[ClientsReport]("requests that failed, of all clients", lambda report: report.num_failed, 0),
    ReportTarget[ClientsReport]("turns that failed, of all clients", lambda report: len(report.failures), 0),
)


COLUMNS = (
    "client", "requests", "failed", "TTFT ms\np50/p99", "over\nours", "ITL ms\np50", "over\nours", "tokens/s",
    "over\nours", "prompt/answer\ntokens", "from\na cache", "cores", "CPU s\nin all",
)  # fmt: skip


def table(report: ClientsReport) -> Table:
    found = Table(box=box.SIMPLE_HEAD, title=report.heading or None, title_justify="left")
    for column in COLUMNS:
        found.add_column(column, justify="left" if column == "client" else "right", no_wrap=True)

    def shown(figure: Spread, digits: int) -> str:
        return f"{figure.median:.{digits}f} ±{figure.spread:.1%}"

    for one in report.figures:
        over = {figure: report.agreement(one.client, figure) for figure in FIGURES}
        ratio = {name: "" if agreement is None else f"{agreement.ratio:.3f}" for name, agreement in over.items()}
        found.add_row(
            one.client,
            f"{one.num_requests}",
            f"{one.num_failed}",
            f"{shown(one.ttft_p50_ms, 1)}/{one.ttft_p99_ms:.0f}",
            ratio["TTFT p50"],
            shown(one.itl_p50_ms, 2),
            ratio["ITL p50"],
            shown(one.tokens_per_s, 1),
            ratio["tokens/s"],
            f"{one.prompt_tokens:.1f}/{one.output_tokens:.1f}",
            "" if one.cached_share is None else f"{one.cached_share:.1%}",
            "" if one.cores is None else f"{one.cores:.2f}",
            f"{one.cpu_s:.0f}",
        )
    return found


def conclusions(report: ClientsReport) -> Iterator[str]:
    """In words, from the figures: how far each figure is off, and what else was not alike."""
    ours = report.of(OURS)
    if ours is None:
        return
    for one in report.agreements:
        theirs = report.of(one.client)
        if theirs is not None:
            own, other = FIGURES[one.figure](ours).median, FIGURES[one.figure](theirs).median
            verdict = "agrees" if one.is_met else "differs"
            yield (
                f"{one.client}, {one.figure}: {verdict}, {one.ratio - 1:+.1%} ({other:.4g} against {own:.4g}; "
                f"allowed {one.allowed:.1%})"
            )
    for theirs in report.figures:
        if theirs is ours:
            continue
        if abs(theirs.prompt_tokens / ours.prompt_tokens - 1) > UNLIKE:
            yield f"{theirs.client}: prompts of {theirs.prompt_tokens:.1f} tokens, ours of {ours.prompt_tokens:.1f}"
        if abs(theirs.output_tokens / ours.output_tokens - 1) > UNLIKE:
            yield f"{theirs.client}: answers of {theirs.output_tokens:.1f} tokens, ours of {ours.output_tokens:.1f}"
        cached = [one.cached_share or 0.0 for one in (theirs, ours)]
        if abs(cached[0] - cached[1]) > UNLIKE:
            yield f"{theirs.client}: {cached[0]:.1%} of its prompts came from a cache, of ours {cached[1]:.1%}"
        if theirs.cores is not None and ours.cores is not None and theirs.cores - ours.cores > MORE_CORES:
            yield (
                f"{theirs.client}: kept {theirs.cores:.2f} cores busy, ours {ours.cores:.2f}, of the "
                f"{report.setting.num_cores} that it shares with the server"
            )
