"""Owns what `bench soak` leaves behind: its plan, counts, the bound they prove, targets, the JSON file, the table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from rich import box
from rich.table import Table

from bench.results import Setting
from bench.targets import ReportTarget
from bench.world import Counts, WorldResult

RULE_OF_THREE = 3.0
"""Nothing seen in n: with 95% confidence the rate is below 3/n (0.95 = 1 - e**-3)."""
SEEDS_OF_A_RUN = 1_000_000
FULL_REQUESTS = 1_000_000
FULL_LIMIT_S = 3600.0
MAX_PROBLEMS = 50


@dataclass(frozen=True)
class SoakPlan:
    """`requests` are simulated in worlds of `world_requests` each, every world with a seed of its own; `shards`
    processes take turns at the worlds, and how many there are changes nothing about any."""

    requests: int
    seed: int
    shards: int
    world_requests: int

    def worlds(self) -> list[tuple[int, int]]:
        """Seed and requests of each."""
        sizes = [self.world_requests] * (self.requests // self.world_requests)
        if rest := self.requests % self.world_requests:
            sizes.append(rest)
        return [(self.seed * SEEDS_OF_A_RUN + index, size) for index, size in enumerate(sizes)]


@dataclass(frozen=True)
class WorldFigures:
    """One world, and its whole log of events as a digest: the same seed gives the same one."""

    seed: int
    requests: int
    bad: int
    digest: str


@dataclass(frozen=True)
class SoakReport:
    """The content of the JSON file. `complete` is false when the run was interrupted; then the worlds that had not
    ended are left out. `took_s` is real time."""

    complete: bool
    plan: SoakPlan
    setting: Setting
    counts: Counts = field(default_factory=Counts)
    took_s: float = 0.0
    requests_per_s: float = 0.0
    reports_per_request: float = 0.0
    touched_share: float = 0.0
    bound_per_request: float | None = None
    claim: str = ""
    problems: tuple[str, ...] = ()
    worlds: tuple[WorldFigures, ...] = ()


def evaluate(
    plan: SoakPlan, setting: Setting, results: Sequence[WorldResult], took_s: float, *, complete: bool
) -> SoakReport:
    """`reports_per_request` counts, for each choice of a request, the reports that told its client something."""
    counts = total([result.counts for result in results])
    bound = RULE_OF_THREE / counts.requests if counts.requests and not counts.bad else None
    worlds = sorted(
        (WorldFigures(r.seed, r.counts.requests, r.counts.bad, r.digest) for r in results), key=lambda world: world.seed
    )
    return SoakReport(
        complete=complete,
        plan=plan,
        setting=setting,
        counts=counts,
        took_s=took_s,
        requests_per_s=counts.requests / took_s if took_s else 0.0,
        reports_per_request=_share(counts.deltas, counts.sequences),
        touched_share=_share(counts.touched, counts.requests),
        bound_per_request=bound,
        claim=claim(counts),
        problems=tuple([problem for result in results for problem in result.problems][:MAX_PROBLEMS]),
        worlds=tuple(worlds),
    )


def claim(counts: Counts) -> str:
    """What the counts prove, in words."""
    what = f"in {counts.requests:,} simulated requests"
    if counts.bad:
        return f"{counts.bad:,} bad {what}: no bound is claimed"
    if not counts.requests:
        return "nothing was simulated"
    bound = RULE_OF_THREE / counts.requests
    return (
        f"0 {what} were lost, hung, duplicated or answered wrongly: below {bound * 1e6:.3g} in a million with 95% "
        "confidence (rule of three), for the faults and loads that are drawn here. It is a simulation: gateway and "
        "workers are those that ship, engines and network are models"
    )


def total(parts: Sequence[Counts]) -> Counts:
    summed = Counts()
    for spec in fields(Counts):
        values = [getattr(part, spec.name) for part in parts]
        if isinstance(getattr(summed, spec.name), dict):
            tally: Counter[str] = Counter()
            for value in values:
                tally.update(value)
            setattr(summed, spec.name, dict(sorted(tally.items())))
        else:
            setattr(summed, spec.name, sum(values))
    return summed


class SoakTarget(ReportTarget[SoakReport]):
    """Counts are told to the last digit, and a soak that did not come to its end meets no target."""

    limit_format = ",.12g"
    figure_format = ",.10g"

    def is_met_by(self, report: SoakReport) -> bool:
        return report.complete and super().is_met_by(report)


def targets(plan: SoakPlan) -> tuple[SoakTarget, ...]:
    return (
        SoakTarget("requests simulated", lambda r: r.counts.requests, plan.requests, is_floor=True),
        SoakTarget("lost: failed or refused", lambda r: r.counts.failed + r.counts.rejected, 0),
        SoakTarget("hung", lambda r: r.counts.hung, 0),
        SoakTarget("duplicated", lambda r: r.counts.duplicated, 0),
        SoakTarget("answered wrongly", lambda r: r.counts.wrong, 0),
        SoakTarget("KV blocks, reservations, streams or tasks left behind", lambda r: r.counts.left_behind, 0),
        SoakTarget("reports a request", lambda r: round(r.reports_per_request, 2), 32, is_floor=True),
        SoakTarget("requests that met a fault", lambda r: round(100 * r.touched_share, 2), 10, "%", is_floor=True),
        SoakTarget(
            "further turns of sessions",
            lambda r: round(100 * _share(r.counts.further_turns, r.counts.requests), 2),
            50,
            "%",
            is_floor=True,
        ),
        SoakTarget(
            f"{FULL_REQUESTS:,} requests at this rate",
            lambda r: round(FULL_REQUESTS / r.requests_per_s) if r.requests_per_s else FULL_LIMIT_S * 1000,
            FULL_LIMIT_S,
            " s",
        ),
    )


def table(report: SoakReport) -> Table:
    counts = report.counts
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_header=False)
    shown.title = f"SIMULATED engines, virtual time{'' if report.complete else '; interrupted run'}"
    shown.title_justify = "left"
    shown.add_column("")
    shown.add_column("", justify="right")
    rows = [
        ("worlds, each with a seed of its own", f"{len(report.worlds):,}"),
        ("requests", f"{counts.requests:,}"),
        ("of them answered; left by their client", f"{counts.answered:,}; {counts.left:,}"),
        ("further turns of sessions", f"{_share(counts.further_turns, counts.requests):.1%}"),
        ("reports a request", f"{report.reports_per_request:.1f}"),
        ("met a fault, by their receipt", f"{_share(counts.met, counts.requests):.1%}"),
        ("on the replica that a fault hit", f"{_share(counts.hit, counts.requests):.1%}"),
        ("either", f"{report.touched_share:.1%}"),
        ("lost: failed; refused", f"{counts.failed:,}; {counts.rejected:,}"),
        ("hung; duplicated; wrong", f"{counts.hung:,}; {counts.duplicated:,}; {counts.wrong:,}"),
        ("things left behind", f"{counts.left_behind:,}"),
        ("gone with their gateway, not counted", f"{counts.lost_with_gateway:,}"),
        ("served without prefill, for there was none", f"{counts.degraded:,}"),
        ("told to come back later, for there was no decode", f"{counts.turned_away:,}"),
        ("streams that a hanging gateway did not read", f"{counts.unread:,}"),
        ("fetched from decode what it was asked for", f"{counts.asked:,}"),
        ("hand-offs whose lease had to end", f"{counts.leases_ended:,}"),
        ("virtual time", f"{counts.virtual_s / 3600:,.1f} h"),
        ("CPU time; requests per CPU second", f"{counts.cpu_s:,.0f} s; {_share(counts.requests, counts.cpu_s):,.0f}"),
        ("real time; requests per second", f"{report.took_s:,.0f} s; {report.requests_per_s:,.0f}"),
        *((f"fault: {kind}; requests hit", _with_hits(counts, kind)) for kind in counts.faults),
        *((f"receipts: {kind}", f"{number:,}") for kind, number in counts.fault_kinds.items()),
    ]
    for row in rows:
        shown.add_row(*row)
    return shown


def _with_hits(counts: Counts, kind: str) -> str:
    return f"{counts.faults[kind]:,}; {counts.hit_by.get(kind, 0):,}"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
