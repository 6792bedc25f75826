"""Owns what came of faults: the judgement of a case, the results of all, what they show against issue 4. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from rich import box
from rich.markup import escape
from rich.table import Table

from bench.fault_asks import Answer, End, begins, difference
from bench.fault_cases import ENGINES, SIGNALS, Blow, Case, Moment, Row, Victim, expected_kinds, rows

KV_BACK_S = 5.0
DETECTION_S = 5.0
COLD_STARTS = 1.5
"""The pool is whole again within DETECTION_S and so many measured cold starts of an engine."""

_TYPED_REFUSALS = (429, 503)


@dataclass(frozen=True)
class Struck:
    """A process that was struck. `in_flight`: what it had, by the count of the gateways."""

    part: str
    pid: int
    replica: str | None
    in_flight: int


@dataclass(frozen=True)
class AnswerReport:
    """What a client saw, and what its receipt says. `expected`: it is what the table of faults lets it see."""

    name: str
    end: str
    expected: bool
    difference: str
    status: int | None
    error: str
    retry_after: str | None
    num_tokens: int
    sent_s: float
    first_token_s: float | None
    ended_s: float | None
    receipt_id: str | None
    receipt_status: str | None
    fault_kinds: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """What was seen of a case besides its answers. Times are in seconds.

    `state`: what was observed of the target when the blow fell. `kv_back_s`: from the end of the last answer to no KV
    block used and nothing in flight on every engine that was not struck; `kv_all_back_s`: from the moment the run was
    whole to the same on all of them. `whole_s` counts from the blow, or from when a stopped process was continued.
    """

    state: str
    struck: tuple[Struck, ...]
    kv_back_s: float | None
    kv_wrong: str
    kv_all_back_s: float | None
    kv_all_wrong: str
    whole_s: float | None
    not_whole: str
    left_over: str
    leases_expired: int = 0


@dataclass(frozen=True)
class CaseResult:
    """One JSON file of the results folder. `state_hit` says by the target's receipt whether the blow met it where it
    was meant to; None where a receipt cannot tell. `never_struck`: the moment did not come about."""

    name: str
    victim: str | None
    blow: str
    moment: str
    kind: str
    rows: tuple[str, ...]
    seed: str
    started_at: str
    git_commit: str
    took_s: float
    state_hit: bool | None
    whole_limit_s: float | None
    observed: Observed
    answers: tuple[AnswerReport, ...]
    problems: tuple[str, ...]
    never_struck: bool = False

    @property
    def is_good(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class ReceiptFacts:
    """What a receipt says of a request that has ended."""

    status: str = ""
    fault_kinds: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def whole_limit_s(case: Case, cold_start_s: float) -> float | None:
    """Within what time the run must be whole again; None where issue 4 sets none: engines that start at once on the
    same cores are no measure of one."""
    if case.is_signal and case.victim in ENGINES and not case.is_whole_pool:
        return DETECTION_S + COLD_STARTS * cold_start_s
    return None


def judge_answers(
    case: Case,
    answers: Sequence[Answer],
    references: Mapping[str, Answer],
    receipts: Mapping[str, ReceiptFacts],
    struck: Sequence[Struck],
) -> list[AnswerReport]:
    """What came of each answer. Those of a gateway that was struck may break, as many as it had; those of HAProxy all.

    An answer whose gateway lives has a receipt there: it may not break.
    """
    spare = sum(process.in_flight for process in struck) + 1 if case.victim is Victim.GATEWAY else 0
    reports: list[AnswerReport] = []
    for answer in answers:
        end = answer.end or End.HUNG
        receipt = receipts.get(answer.name)
        reference = references.get(answer.name)
        wrong = ""
        if end is End.COMPLETE:
            expected = True
            wrong = difference(answer, reference) if reference else "there is no undisturbed answer to compare with"
        else:
            expected = _may_fail(case, answer, end, receipt)
            if expected and case.victim is Victim.GATEWAY and end is not End.LEFT:
                spare -= 1
                expected = spare >= 0
            if reference and not begins(answer, reference):
                wrong = "what came before the end is not how the undisturbed answer begins"
        reports.append(
            AnswerReport(
                name=answer.name,
                end=end.value,
                expected=expected and not wrong,
                difference=wrong,
                status=answer.status,
                error=answer.error[:500],
                retry_after=answer.retry_after,
                num_tokens=answer.num_tokens,
                sent_s=round(answer.sent_s, 3),
                first_token_s=_rounded(answer.first_token_s),
                ended_s=_rounded(answer.ended_s),
                receipt_id=answer.receipt_id,
                receipt_status=receipt.status if receipt else None,
                fault_kinds=receipt.fault_kinds if receipt else (),
                faults=receipt.faults if receipt else (),
            )
        )
    return reports


def _may_fail(case: Case, answer: Answer, end: End, receipt: ReceiptFacts | None) -> bool:
    """Whether the table of faults lets a client see this end, by the answer alone."""
    if end is End.LEFT:
        return True
    refused = end is End.REFUSED and answer.status in _TYPED_REFUSALS and answer.retry_after is not None
    if case.blow is Blow.FLOOD:
        return refused
    if case.victim in (Victim.DECODE_CORE, Victim.DECODE_ACTOR) and case.is_whole_pool:
        return refused and answer.name.startswith("late")
    if case.victim is Victim.HAPROXY:
        return end in (End.BROKEN, End.REFUSED)
    if case.victim is Victim.GATEWAY:
        lives_elsewhere = receipt is not None and case.blow is not Blow.STOP
        return end in (End.BROKEN, End.REFUSED, End.ERROR) and not lives_elsewhere
    return False


def problems(reports: Iterable[AnswerReport], observed: Observed, limit_s: float | None) -> tuple[str, ...]:
    """What a case shows that issue 4 does not allow, in words."""
    found: list[str] = []
    for report in reports:
        if not report.expected:
            found.append(f"{report.name}: {report.end}: {report.difference or report.error or 'not expected'}"[:600])
    if observed.kv_back_s is None:
        found.append(f"KV: {observed.kv_wrong}, {KV_BACK_S:g} s after the last answer")
    if observed.whole_s is None:
        found.append(f"not whole: {observed.not_whole}")
    elif limit_s is not None and observed.whole_s > limit_s:
        found.append(f"whole only after {observed.whole_s:.1f} s; {limit_s:.1f} s are allowed")
    if observed.whole_s is not None and observed.kv_all_back_s is None:
        found.append(f"KV: {observed.kv_all_wrong}, {KV_BACK_S:g} s after the run was whole")
    if observed.left_over:
        found.append(f"left over: {observed.left_over}")
    return tuple(found)


def state_hit(case: Case, receipt: ReceiptFacts | None) -> bool | None:
    """Whether the target's receipt names a fault of the case's moment; None where none is to be named."""
    kinds = expected_kinds(case)
    if not kinds or receipt is None:
        return None
    return bool(kinds & set(receipt.fault_kinds))


# All cases


@dataclass(frozen=True)
class FaultsReport:
    """What `--json` holds."""

    complete: bool
    config: str
    cold_start_s: float | None
    planned: tuple[str, ...]
    results: tuple[CaseResult, ...]
    setting: object = field(default=None)


@dataclass(frozen=True)
class Check:
    """One line of `--check`."""

    what: str
    figure: str
    is_met: bool

    def line(self) -> str:
        return f"{'ok    ' if self.is_met else 'MISSED'} {self.what}: {self.figure}"


def checks(report: FaultsReport, cases: Sequence[Case], is_quick: bool) -> list[Check]:
    """Against issue 4. `cases` are all there are; a quick run need not have covered them."""
    results = report.results
    answers = [answer for result in results for answer in result.answers]
    failed = [answer for answer in answers if not answer.expected and not answer.difference]
    differing = [answer for answer in answers if answer.difference]
    complete = [answer for answer in answers if answer.end == End.COMPLETE]
    kv_back = [result.observed.kv_back_s for result in results]
    late = [s for s in kv_back if s is None]
    known = [s for s in kv_back if s is not None]
    limited = [result for result in results if result.whole_limit_s is not None]
    over = [r for r in limited if r.observed.whole_s is None or r.observed.whole_s > (r.whole_limit_s or 0)]
    worst = max(limited, key=lambda r: r.observed.whole_s or float("inf"), default=None)
    tidy = [result for result in results if not result.observed.left_over and result.observed.whole_s is not None]
    done = [case for case in cases if any(result.name == case.name for result in results)]
    found_rows = {row for case in done for row in rows(case)}
    struck = {(case.victim, case.blow) for case in done if case.is_signal}
    met = {(case.victim, case.moment) for case in done if case.is_signal}
    signal_pairs, moment_pairs = set(product(Victim, SIGNALS)), set(product(Victim, Moment))
    told = [result for result in results if result.state_hit is not None]
    hit = [result for result in told if result.state_hit]
    has_any = bool(results)
    worst_whole = "no engine was struck"
    if worst is not None:
        time = "never" if worst.observed.whole_s is None else f"{worst.observed.whole_s:.1f} s"
        worst_whole = (
            f"worst {time} of {worst.whole_limit_s or 0:.1f} s ({worst.name}), {len(over)} of {len(limited)} over"
        )
    return [
        Check("client-visible failures where the table says nothing", f"{len(failed)} of {len(answers)} answers, "
              "0 allowed", has_any and not failed),
        Check("answers that differ from an undisturbed run", f"{len(differing)} of {len(complete)} complete ones, "
              "0 allowed", has_any and not differing),
        Check(f"KV blocks at baseline within {KV_BACK_S:g} s of the last answer",
              f"{len(known)} of {len(kv_back)} cases, slowest {max(known, default=0.0):.1f} s", has_any and not late),
        Check(f"whole again within {DETECTION_S:g} s + {COLD_STARTS:g} x a cold engine start of "
              f"{report.cold_start_s or 0:.1f} s", worst_whole, has_any and not over),
        Check("nothing is left", f"{len(tidy)} of {len(results)} cases", has_any and len(tidy) == len(results)),
        Check("pairs of process and signal", f"{len(struck & signal_pairs)} of {len(signal_pairs)}",
              is_quick or struck >= signal_pairs),
        Check("pairs of process and moment", f"{len(met & moment_pairs)} of {len(moment_pairs)}",
              is_quick or met >= moment_pairs),
        Check("rows of the table", f"{len(found_rows)} of {len(Row)}", is_quick or found_rows == set(Row)),
        Check("blows that met the target where they were meant to, by its receipt", f"{len(hit)} of {len(told)}",
              has_any and len(hit) >= len(told) * (0.5 if is_quick else 0.9)),
    ]  # fmt: skip


def table(results: Sequence[CaseResult]) -> Table:
    shown = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("case", "state met", "answers", "faults named", "KV back s", "whole s", "result"):
        shown.add_column(heading, overflow="fold")
    for result in results:
        kinds = sorted({kind for answer in result.answers for kind in answer.fault_kinds})
        good = sum(answer.expected for answer in result.answers)
        met = {True: "yes", False: "no", None: "-"}[result.state_hit]
        shown.add_row(
            result.name,
            met,
            f"{good}/{len(result.answers)}",
            ", ".join(kinds),
            _shown(result.observed.kv_back_s),
            _shown(result.observed.whole_s),
            "[green]ok[/]" if result.is_good else f"[red]{escape('; '.join(result.problems)[:300])}[/]",
        )
    return shown


def _shown(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
