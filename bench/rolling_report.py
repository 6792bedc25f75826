"""Owns what came of a rolling update: who has been replaced, the judgement of answers, the targets. Pure."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from bench.fault_asks import Answer, End, difference
from bench.fault_report import KV_BACK_S, ReceiptFacts
from bench.fault_view import Views, replicas_of
from bench.results import Setting
from bench.targets import ReportTarget
from gateway.settings import PoolSettings, Settings

DEPLOYMENTS = ("prefill", "decode", "gateway")
WHOLE_LIMIT_S = 900.0
"""Longer than any update takes on two cores: one that is stuck is to be told from one that is slow."""

GAP_LIMIT_S = 5.0
"""What a gateway lets a worker be silent for: a longer pause would have been a fault."""

TROUBLES_KEPT = 20
DEFAULT_MAX_NUM_SEQS = 64


@dataclass(frozen=True)
class RollingPlan:
    """`before_s`: how long clients stream before the update; what they see then is what the machine gives. With
    `other_format` the new engines hand no KV to the old ones, as if they were of another vLLM."""

    config: str
    clients: int
    before_s: float
    seed: int
    other_format: bool = False


def changed(settings: Settings, other_format: bool = False) -> Settings:
    """Engines of both pools that compute one request less at once: a setting that gateways see in every engine."""
    pools, handoff = settings.pools, settings.handoff
    return settings.model_copy(
        update={
            "pools": pools.model_copy(update={"prefill": _changed(pools.prefill), "decode": _changed(pools.decode)}),
            "handoff": handoff.model_copy(update={"kv_format": "updated"} if other_format else {}),
        }
    )


def _changed(pool: PoolSettings) -> PoolSettings:
    fewer = (pool.engine.max_num_seqs or DEFAULT_MAX_NUM_SEQS) - 1
    return pool.model_copy(update={"engine": pool.engine.model_copy(update={"max_num_seqs": fewer})})


def num_replicas(settings: Settings) -> dict[str, int]:
    """Of each deployment."""
    pools = settings.pools
    found = (pools.prefill.replicas, pools.decode.replicas, settings.gateway.replicas)
    return dict(zip(DEPLOYMENTS, found, strict=True))


def max_num_seqs(settings: Settings) -> dict[str, int]:
    """What each pool's engines are to say of themselves."""
    pools = settings.pools
    found = {"prefill": pools.prefill.engine.max_num_seqs, "decode": pools.decode.engine.max_num_seqs}
    return {name: seqs for name, seqs in found.items() if seqs is not None}


# The update


@dataclass(frozen=True)
class Replaced:
    """One deployment. `took_s`: from the update to the end of the last old replica with as many new ones ready; None
    where that was not seen."""

    deployment: str
    num_before: int
    num_replaced: int
    took_s: float | None


class Rollout:
    """What has been replaced so far. `before`: the replicas of each deployment, by their ids."""

    def __init__(self, before: Mapping[str, Collection[str]]) -> None:
        self._before = {deployment: frozenset(ids) for deployment, ids in before.items()}
        self._num_replaced = dict.fromkeys(before, 0)
        self._took_s: dict[str, float] = {}

    def take(self, now_s: float, living: Collection[str], ready: Mapping[str, Collection[str]]) -> list[str]:
        """`living`: the replicas of `before` whose processes run; `ready`: those that gateways can use now. Returns
        whose number of replaced replicas has grown."""
        grown: list[str] = []
        for deployment, before in self._before.items():
            number = min(len(before - set(living)), len(set(ready.get(deployment, ())) - before))
            if number > self._num_replaced[deployment]:
                self._num_replaced[deployment] = number
                grown.append(deployment)
                if number == len(before):
                    self._took_s[deployment] = now_s
        return grown

    def replaced(self) -> tuple[Replaced, ...]:
        return tuple(
            Replaced(name, len(before), self._num_replaced[name], self._took_s.get(name))
            for name, before in self._before.items()
        )


def ready_replicas(views: Views, wanted: Mapping[str, int]) -> dict[str, set[str]]:
    """By deployment: the gateways that answer, and the engines that each of them can use and that have the settings
    that are wanted (`max_num_seqs`)."""
    found = {"gateway": {view.gateway for view in views}}
    for phase, seqs in wanted.items():
        found[phase] = {
            id
            for id, seen in replicas_of(views, phase).items()
            if len(seen) == len(views)
            and all(one.ready and one.attached and one.info and one.info.max_num_seqs == seqs for one in seen)
        }
    return found


# The answers


@dataclass(frozen=True)
class Asked:
    """One request of the load. `receipt` is None where it could not be read: it dies with its gateway."""

    answer: Answer
    receipt: ReceiptFacts | None

    @property
    def kind(self) -> str:
        return self.answer.name.partition("-")[0]


@dataclass(frozen=True)
class Trouble:
    """An answer that is not as it should be, or that met a fault. Times count from the update."""

    name: str
    end: str
    problem: str
    num_tokens: int
    sent_s: float
    ended_s: float | None
    receipt_id: str | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Of the requests of a part of the load. `by_kind` counts requests; `longest_gap_s` is between two tokens of one
    answer, as its client saw them."""

    requests: int
    tokens: int
    by_kind: dict[str, int]
    longest_gap_s: float
    longest_first_token_s: float


@dataclass(frozen=True)
class Observed:
    """What was seen of the update besides answers. `began_s` by the clock of the load; `whole_s` from then on: every
    replica of before is gone, and every gateway can use every engine. `kv_back_s`: from the last answer to no KV block
    used and nothing in flight."""

    began_s: float
    replaced: tuple[Replaced, ...]
    whole_s: float | None
    not_whole: str
    kv_back_s: float | None
    kv_wrong: str
    left_over: str


@dataclass(frozen=True)
class RollingReport:
    """What `--json` holds."""

    complete: bool
    plan: RollingPlan
    setting: Setting
    replaced: tuple[Replaced, ...] = ()
    whole_s: float | None = None
    not_whole: str = ""
    kv_back_s: float | None = None
    kv_wrong: str = ""
    left_over: str = ""
    before: Figures | None = None
    during: Figures | None = None
    """Of the requests that ended after the update had begun."""
    failed: int = 0
    compared: int = 0
    differing: int = 0
    without_receipt: int = 0
    met_fault: int = 0
    fault_kinds: dict[str, int] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()

    @property
    def requests(self) -> int:
        return sum(part.requests for part in (self.before, self.during) if part)


def evaluate(
    plan: RollingPlan,
    setting: Setting,
    asked: Sequence[Asked],
    references: Mapping[str, Answer],
    seen: Observed,
    *,
    complete: bool,
) -> RollingReport:
    """`references`: the undisturbed answers by name."""
    kinds: Counter[str] = Counter()
    troubles: list[Trouble] = []
    failed = differing = compared = met_fault = 0
    for one in asked:
        answer, faults = one.answer, one.receipt.fault_kinds if one.receipt else ()
        kinds.update(faults)
        met_fault += bool(faults)
        problem = ""
        if answer.end is not End.COMPLETE:
            failed += 1
            problem = f"{answer.status} {answer.error}".strip()[:500]
        elif (reference := references.get(answer.name)) and reference.end is End.COMPLETE:
            problem = difference(answer, reference)
            compared += 1
            differing += bool(problem)
        if problem or faults:
            troubles.append(_trouble(one, problem, seen.began_s))
    troubles.sort(key=lambda trouble: not trouble.problem)
    ended = [(one, one.answer.ended_s is not None and one.answer.ended_s < seen.began_s) for one in asked]
    return RollingReport(
        complete=complete,
        plan=plan,
        setting=setting,
        replaced=seen.replaced,
        whole_s=seen.whole_s,
        not_whole=seen.not_whole,
        kv_back_s=seen.kv_back_s,
        kv_wrong=seen.kv_wrong,
        left_over=seen.left_over,
        before=_figures(one for one, is_before in ended if is_before),
        during=_figures(one for one, is_before in ended if not is_before),
        failed=failed,
        compared=compared,
        differing=differing,
        without_receipt=sum(one.receipt is None for one in asked),
        met_fault=met_fault,
        fault_kinds=dict(sorted(kinds.items())),
        troubles=tuple(troubles[:TROUBLES_KEPT]),
    )


def _trouble(one: Asked, problem: str, began_s: float) -> Trouble:
    answer = one.answer
    return Trouble(
        name=answer.name,
        end=(answer.end or End.HUNG).value,
        problem=problem,
        num_tokens=answer.num_tokens,
        sent_s=round(answer.sent_s - began_s, 3),
        ended_s=None if answer.ended_s is None else round(answer.ended_s - began_s, 3),
        receipt_id=answer.receipt_id,
        faults=one.receipt.faults if one.receipt else (),
    )


def _figures(part: Iterable[Asked]) -> Figures:
    asked = list(part)
    first = [a.first_token_s - a.sent_s for a in (one.answer for one in asked) if a.first_token_s is not None]
    return Figures(
        requests=len(asked),
        tokens=sum(one.answer.num_tokens for one in asked),
        by_kind=dict(sorted(Counter(one.kind for one in asked).items())),
        longest_gap_s=round(max((one.answer.longest_gap_s for one in asked), default=0.0), 3),
        longest_first_token_s=round(max(first, default=0.0), 3),
    )


# The targets


class RollingTarget(ReportTarget[RollingReport]):
    """An update that was not seen to its end meets no target."""

    def is_met_by(self, report: RollingReport) -> bool:
        return report.complete and super().is_met_by(report)


def targets(plan: RollingPlan, num_replicas: Mapping[str, int]) -> tuple[RollingTarget, ...]:
    """`num_replicas`: of each deployment."""
    return (
        RollingTarget("requests while replicas were replaced", lambda r: r.during.requests if r.during else None,
                      5 * plan.clients, is_floor=True),
        RollingTarget("failed requests", lambda r: r.failed if r.requests else None, 0),
        RollingTarget("answers that differ from an undisturbed run", lambda r: r.differing if r.compared else None, 0),
        RollingTarget("answers without an undisturbed one to compare with",
                      lambda r: r.requests - r.failed - r.compared if r.requests else None, 0),
        *(
            RollingTarget(f"{name} replicas replaced", _num_replaced(name), number, is_floor=True)
            for name, number in num_replicas.items()
        ),
        RollingTarget("whole again, and every old replica gone", lambda r: r.whole_s, WHOLE_LIMIT_S, " s"),
        RollingTarget("longest time between two tokens of an answer",
                      lambda r: r.during.longest_gap_s if r.during else None, GAP_LIMIT_S, " s"),
        RollingTarget("KV blocks back at zero after the last answer", lambda r: r.kv_back_s, KV_BACK_S, " s"),
        RollingTarget("kinds of processes missing or left over", _num_left_over, 0),
    )  # fmt: skip


def _num_replaced(deployment: str) -> Callable[[RollingReport], float | None]:
    def figure(report: RollingReport) -> float | None:
        return next((one.num_replaced for one in report.replaced if one.deployment == deployment), None)

    return figure


def _num_left_over(report: RollingReport) -> float | None:
    return None if report.whole_s is None else len(report.left_over.split(", ")) if report.left_over else 0


def table(report: RollingReport) -> Table:
    """Empty where no update came to its end."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_header=False)
    shown.add_column("")
    shown.add_column("", justify="right", overflow="fold")
    if report.during is None:
        return shown
    rows: list[tuple[str, str]] = []
    for name, part in (("before the update", report.before), ("from then on", report.during)):
        if part is not None:
            kinds = ", ".join(f"{number} {kind}" for kind, number in part.by_kind.items())
            rows += [
                (f"requests {name}", f"{part.requests:,} ({kinds})"),
                ("  their tokens", f"{part.tokens:,}"),
                ("  longest time between two tokens", f"{part.longest_gap_s:.2f} s"),
                ("  longest time to a first token", f"{part.longest_first_token_s:.2f} s"),
            ]
    rows += [
        ("failed", f"{report.failed:,}"),
        ("differ from an undisturbed run; compared", f"{report.differing:,}; {report.compared:,}"),
        ("met a fault, by their receipt", f"{report.met_fault:,}"),
        *((f"  {kind}", f"{number:,}") for kind, number in report.fault_kinds.items()),
        ("receipts that went with their gateway", f"{report.without_receipt:,}"),
        *(
            (f"{one.deployment} replicas replaced", f"{one.num_replaced} of {one.num_before}; {_shown(one.took_s)}")
            for one in report.replaced
        ),
        ("whole again", _shown(report.whole_s) or f"never: {report.not_whole}"),
        ("KV blocks back after the last answer", _shown(report.kv_back_s) or report.kv_wrong),
        ("missing or left over", report.left_over or "nothing"),
    ]
    for row in rows:
        shown.add_row(*row)
    return shown


def _shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"
