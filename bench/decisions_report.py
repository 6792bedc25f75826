"""Owns what `bench decisions` leaves behind: its plan, figures, targets, the JSON file, tables and the plot."""

from dataclasses import dataclass

from rich import box
from rich.table import Table

from bench.results import Setting
from bench.stats import Percentiles
from bench.targets import ReportTarget

DECISION_P50_MS = 0.5
DECISION_P99_MS = 1.0
FLAT = 1.2
"""The last tenth of the most requests against the mean of the fewest: a fifth more is within what a shared machine
varies."""


@dataclass(frozen=True)
class DecisionsPlan:
    """`decisions` for each policy and number of replicas, for a prompt of `prompt_tokens`; then `requests` over
    `load_replicas`, and the fewest requests over each number of replicas."""

    policies: tuple[str, ...]
    replicas: tuple[int, ...] = (2, 8, 32, 128, 256)
    requests: tuple[int, ...] = (1_000, 10_000, 100_000)
    decisions: int = 2_000
    prompt_tokens: int = 100_000
    load_replicas: int = 16
    policy: str = "baton"
    seed: int = 0


@dataclass(frozen=True)
class Decision:
    """CPU time of one decision: snapshot, placement, admission, prediction and rank; hashing is not in it."""

    policy: str
    replicas: int
    decision_ms: Percentiles


@dataclass(frozen=True)
class Load:
    """CPU time of the process for each request, on average, and at the beginning and the end of the run."""

    policy: str
    replicas: int
    requests: int
    request_ms: float
    first_tenth_ms: float
    last_tenth_ms: float


@dataclass(frozen=True)
class DecisionsReport:
    """The content of the JSON file. `by_requests` has one number of replicas, `by_replicas` one of requests."""

    complete: bool
    plan: DecisionsPlan
    setting: Setting
    decisions: tuple[Decision, ...] = ()
    by_requests: tuple[Load, ...] = ()
    by_replicas: tuple[Load, ...] = ()

    def of(self, policy: str, replicas: int) -> Percentiles | None:
        found = (d.decision_ms for d in self.decisions if (d.policy, d.replicas) == (policy, replicas))
        return next(found, None)

    @property
    def growth(self) -> float | None:
        """CPU for a request at the end of the longest run, by that of the shortest run."""
        if len(self.by_requests) < 2:
            return None
        return self.by_requests[-1].last_tenth_ms / self.by_requests[0].request_ms

    @property
    def growth_by_replicas(self) -> float | None:
        """How many times more CPU a request takes over the most replicas than over the fewest, by how many times more
        replicas there are."""
        if len(self.by_replicas) < 2:
            return None
        few, many = self.by_replicas[0], self.by_replicas[-1]
        return (many.request_ms / few.request_ms) / (many.replicas / few.replicas)


def targets(plan: DecisionsPlan) -> list[ReportTarget[DecisionsReport]]:
    most, policy = plan.replicas[-1], plan.policy

    def at(report: DecisionsReport, name: str) -> float | None:
        found = report.of(policy, most)
        return None if found is None else getattr(found, name)

    return [
        ReportTarget(f"decision p50, {most} replicas", lambda r: at(r, "p50"), DECISION_P50_MS, " ms"),
        ReportTarget(f"decision p99, {most} replicas", lambda r: at(r, "p99"), DECISION_P99_MS, " ms"),
        ReportTarget(
            f"CPU per request, end of {plan.requests[-1]:,} requests / {plan.requests[0]:,}", lambda r: r.growth, FLAT
        ),
        ReportTarget(
            f"CPU per request, growth from {plan.replicas[0]} to {most} replicas / linear",
            lambda r: r.growth_by_replicas,
            1.0,
        ),
    ]


def tables(report: DecisionsReport) -> list[Table]:
    decisions = Table(title="one decision, CPU ms (p50, p99)", box=box.SIMPLE_HEAD)
    decisions.add_column("policy")
    for replicas in report.plan.replicas:
        decisions.add_column(f"{replicas} replicas", justify="right")
    for policy in report.plan.policies:
        found = [report.of(policy, replicas) for replicas in report.plan.replicas]
        decisions.add_row(policy, *(f"{f.p50:.3f}, {f.p99:.3f}" if f else "-" for f in found))
    load = Table(title=f"the gateway's CPU per request, ms, policy {report.plan.policy}", box=box.SIMPLE_HEAD)
    for column in ("replicas", "requests", "mean", "first tenth", "last tenth"):
        load.add_column(column, justify="right")
    for one in (*report.by_requests, *report.by_replicas):
        figures = (one.request_ms, one.first_tenth_ms, one.last_tenth_ms)
        load.add_row(str(one.replicas), f"{one.requests:,}", *(f"{figure:.3f}" for figure in figures))
    return [decisions, load]
