"""Owns what `bench load` leaves behind: figures from the turns that were asked, targets, the JSON file, the table."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich import box
from rich.markup import escape
from rich.table import Table

from bench.client import Recording, read_answer
from bench.load_metrics import PoolSample
from bench.load_plan import SLO_SHARE, LoadPlan, ServerFacts, Slo
from bench.results import EngineKind, Setting
from bench.stats import Percentiles, inter_token_gaps_s, percentiles, quantiles, time_per_output_token_s
from bench.targets import ReportTarget

ERRORS_KEPT = 5
ROWS_KEPT = 20_000
QUANTILES = 200
REFUSALS = (429, 503)


class End(StrEnum):
    """What became of a turn, or of a session."""

    ANSWERED = "answered"
    REFUSED = "refused"
    FAILED = "failed"
    CUT_OFF = "cut off"
    """Only a session's: the run was over before it."""


@dataclass(frozen=True, slots=True)
class AskedTurn:
    """One request and what came of it. Times are in seconds from the run's start; `due_s` is when it should have been
    sent. `gaps_s` lie between its tokens. `num_window_tokens` came within the measured window."""

    session: str
    parent: str | None
    number: int
    due_s: float
    sent_s: float
    first_s: float | None
    ended_s: float
    end: End
    status: int
    error: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_window_tokens: int
    num_cached_tokens: int | None
    is_short: bool
    tpot_s: float | None
    gaps_s: "array[float]"

    def keeps_ttft(self, slo: Slo) -> bool:
        return (
            self.end is End.ANSWERED and self.first_s is not None and (self.first_s - self.due_s) * 1000 <= slo.ttft_ms
        )

    def keeps_tpot(self, slo: Slo) -> bool:
        return self.end is End.ANSWERED and (self.tpot_s is None or self.tpot_s * 1000 <= slo.tpot_ms)


@dataclass(frozen=True, slots=True)
class AskedSession:
    """A session with all turns that it could ask. `trajectory_ended_s` is set for a root whose sub-agents have all
    ended well too."""

    name: str
    parent: str | None
    began_s: float
    ended_s: float
    end: End
    trajectory_ended_s: float | None = None


def read_turn(
    recording: Recording,
    prompt: Sequence[int],
    max_tokens: int,
    began_s: float,
    due_s: float,
    window: tuple[float, float],
    of: tuple[str, str | None, int],
) -> tuple[AskedTurn, tuple[int, ...]]:
    """What came of a request of the session, parent and turn `of`, and the tokens of its answer, if the server tells
    them. `began_s` is the run's start on the recording's clock; `due_s` and `window` count from it.

    Failed are answers that break off, that were given to another prompt than was sent, or that have another number of
    tokens than was asked for without the model's having ended them.
    """
    answer = read_answer(recording)
    num_tokens = sum(chunk.num_tokens for chunk in answer.chunks)
    if not answer.token_ids and answer.usage is not None:
        num_tokens = answer.usage.completion_tokens
    is_short = num_tokens < max_tokens
    error = answer.error or ""
    if not error:
        if not answer.is_complete:
            error = f"the stream ended after {num_tokens} tokens without [DONE]"
        elif answer.prompt and answer.prompt != prompt:
            error = "the server read another prompt than was sent"
        elif num_tokens > max_tokens or not num_tokens or (is_short and answer.finish_reason != "stop"):
            error = f"the answer has {num_tokens} tokens; {max_tokens} were asked for"
    end = End.ANSWERED if not error else End.REFUSED if recording.status in REFUSALS else End.FAILED
    chunks = () if error else answer.chunks
    from_s, to_s = window
    turn = AskedTurn(
        *of,
        due_s=due_s,
        sent_s=recording.sent_s - began_s,
        first_s=chunks[0].at_s - began_s if chunks else None,
        ended_s=recording.ended_s - began_s,
        end=end,
        status=recording.status,
        error=error,
        num_prompt_tokens=len(prompt),
        num_output_tokens=0 if error else num_tokens,
        num_window_tokens=sum(chunk.num_tokens for chunk in chunks if from_s <= chunk.at_s - began_s < to_s),
        num_cached_tokens=answer.usage.cached_tokens if answer.usage is not None and not error else None,
        is_short=not error and is_short,
        tpot_s=time_per_output_token_s(chunks) if len(chunks) > 1 else None,
        gaps_s=array("d", inter_token_gaps_s(chunks)),
    )
    return turn, answer.token_ids


@dataclass(frozen=True)
class SloFigures:
    """Of the measured turns those that kept a service level; one that was refused or failed has missed it.
    `goodput_per_s` counts the turns that kept both limits. `is_met`: 99% kept each limit, as MLPerf asks for."""

    slo: Slo
    goodput_per_s: float
    kept_share: float
    ttft_kept_share: float
    tpot_kept_share: float
    is_met: bool


@dataclass(frozen=True)
class ProcessUse:
    """One process of the server over the whole run, and its memory at the end."""

    role: str
    title: str
    cpu_s: float
    memory_mib: float


@dataclass(frozen=True)
class Use:
    """What the run used. `generator_waited` is the share of the time in which the generator had to wait for a core.
    `processes` are the server's if it is on this machine. KV is None where the server does not tell it."""

    ran_s: float
    generator_cpu_s: float
    generator_waited: float
    processes: tuple[ProcessUse, ...] = ()
    kv_moved_bytes: float | None = None
    kv_asked_bytes: float | None = None


@dataclass(frozen=True)
class LoadFigures:
    """Of the turns that were due in the measured window; percentiles of those that were answered. Latencies count from
    when a turn was due, so they hold the generator's own lateness. `first_gap_ms` lies between the first two tokens:
    where prefill writes the first, the hand-off is in it, else in the TTFT. None: nothing to take it from.

    `tokens_per_s` are those that came in the window. Sessions and trajectories are those that began in it and ended
    well, from the first turn's due time on with all pauses; `num_sessions_cut_off` and `num_sessions_given_up` (after a
    refusal or failure) are missing in them.
    """

    window_s: float
    num_turns: int
    num_answered: int
    num_refused: int
    num_failed: int
    num_short: int
    offered_per_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    cached_share: float | None
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    first_gap_ms: Percentiles | None
    tpot_ms: Percentiles | None
    e2e_ms: Percentiles | None
    session_s: Percentiles | None
    trajectory_s: Percentiles | None
    num_sessions: int
    num_sessions_cut_off: int
    num_sessions_given_up: int
    num_trajectories: int
    lateness_ms: Percentiles
    lateness_max_ms: float
    slos: tuple[SloFigures, ...]


@dataclass(frozen=True)
class TurnRow:
    """A turn in the JSON file."""

    session: str
    parent: str | None
    number: int
    due_s: float
    ttft_ms: float | None
    e2e_ms: float
    tpot_ms: float | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    end: End


@dataclass(frozen=True)
class LoadReport:
    """The content of the JSON file. `complete` is false when the run was interrupted; `num_unanswered` requests were in
    flight then. A report with anything in `why_invalid` says nothing about the server. `turns` are the first
    `ROWS_KEPT`, in the order in which they ended."""

    complete: bool
    why_invalid: tuple[str, ...]
    plan: LoadPlan
    setting: Setting
    server: ServerFacts
    num_unanswered: int
    errors: tuple[str, ...]
    figures: LoadFigures | None
    use: Use
    turns: tuple[TurnRow, ...]
    num_turns_left_out: int
    itl_quantiles_ms: tuple[float, ...] = ()
    """Of the measured turns, from 0% to 100% in steps of `100 / QUANTILES`."""
    pools: tuple[PoolSample, ...] = ()

    @property
    def heading(self) -> str:
        """What must not be overlooked."""
        if self.server.engine is EngineKind.SIMULATED:
            return "SIMULATED engine: no figure is a figure of a model"
        return "" if self.server.engine is not None else "engine: the server does not tell whether it is a real one"


def evaluate(
    plan: LoadPlan,
    setting: Setting,
    server: ServerFacts,
    turns: Sequence[AskedTurn],
    sessions: Sequence[AskedSession],
    num_unanswered: int,
    use: Use,
    pools: Sequence[PoolSample],
    complete: bool,
) -> LoadReport:
    to_s = min(plan.duration_s, use.ran_s)
    measured = [turn for turn in turns if plan.warm_up_s <= turn.due_s < to_s]
    figures = _figures(plan, measured, turns, sessions, to_s - plan.warm_up_s) if measured else None
    why_invalid: list[str] = []
    if figures is None:
        why_invalid.append("no turn was measured")
    elif figures.lateness_ms.p99 > plan.max_lateness_ms:
        why_invalid.append(
            f"the generator fell behind: lateness p99 is {figures.lateness_ms.p99:.1f} ms, the bound "
            f"{plan.max_lateness_ms:g} ms (--max-lateness-ms)"
        )
    errors = Counter(turn.error for turn in turns if turn.end is not End.ANSWERED)
    return LoadReport(
        complete=complete,
        why_invalid=tuple(why_invalid),
        plan=plan,
        setting=setting,
        server=server,
        num_unanswered=num_unanswered,
        errors=tuple(f"{count} x {text}" for text, count in errors.most_common(ERRORS_KEPT)),
        figures=figures,
        use=use,
        turns=tuple(_row(turn) for turn in turns[:ROWS_KEPT]),
        num_turns_left_out=max(len(turns) - ROWS_KEPT, 0),
        itl_quantiles_ms=_itl_quantiles_ms(measured),
        pools=tuple(pools),
    )


def _itl_quantiles_ms(measured: Sequence[AskedTurn]) -> tuple[float, ...]:
    gaps_s = [gap_s for turn in measured if turn.end is End.ANSWERED for gap_s in turn.gaps_s]
    return tuple(round(gap_s * 1000, 3) for gap_s in quantiles(gaps_s, QUANTILES)) if gaps_s else ()


def _figures(
    plan: LoadPlan,
    measured: Sequence[AskedTurn],
    turns: Sequence[AskedTurn],
    sessions: Sequence[AskedSession],
    window_s: float,
) -> LoadFigures:
    answered = [turn for turn in measured if turn.end is End.ANSWERED]
    began = [one for one in sessions if plan.warm_up_s <= one.began_s]
    whole = [one for one in began if one.end is End.ANSWERED]
    trajectories = [one.trajectory_ended_s - one.began_s for one in whole if one.trajectory_ended_s is not None]
    told = [turn for turn in answered if turn.num_cached_tokens is not None]
    lateness_ms = [max(turn.sent_s - turn.due_s, 0.0) * 1000 for turn in measured]
    return LoadFigures(
        window_s=window_s,
        num_turns=len(measured),
        num_answered=len(answered),
        num_refused=sum(turn.end is End.REFUSED for turn in measured),
        num_failed=sum(turn.end is End.FAILED for turn in measured),
        num_short=sum(turn.is_short for turn in answered),
        offered_per_s=len(measured) / window_s,
        tokens_per_s=sum(turn.num_window_tokens for turn in turns) / window_s,
        prompt_tokens_per_s=sum(turn.num_prompt_tokens for turn in answered) / window_s,
        cached_share=_share(
            sum(turn.num_cached_tokens or 0 for turn in told), sum(turn.num_prompt_tokens for turn in told)
        ),
        ttft_ms=_percentiles([(turn.first_s - turn.due_s) * 1000 for turn in answered if turn.first_s is not None]),
        itl_ms=_percentiles([gap_s * 1000 for turn in answered for gap_s in turn.gaps_s]),
        first_gap_ms=_percentiles([turn.gaps_s[0] * 1000 for turn in answered if turn.gaps_s]),
        tpot_ms=_percentiles([turn.tpot_s * 1000 for turn in answered if turn.tpot_s is not None]),
        e2e_ms=_percentiles([(turn.ended_s - turn.due_s) * 1000 for turn in answered]),
        session_s=_percentiles([one.ended_s - one.began_s for one in whole]),
        trajectory_s=_percentiles(trajectories),
        num_sessions=len(whole),
        num_sessions_cut_off=sum(one.end is End.CUT_OFF for one in began),
        num_sessions_given_up=sum(one.end in (End.REFUSED, End.FAILED) for one in began),
        num_trajectories=len(trajectories),
        lateness_ms=percentiles(lateness_ms),
        lateness_max_ms=max(lateness_ms),
        slos=tuple(_slo_figures(slo, measured, window_s) for slo in plan.slos),
    )


def _slo_figures(slo: Slo, measured: Sequence[AskedTurn], window_s: float) -> SloFigures:
    num_ttft, num_tpot = (
        sum(map(keeps, measured)) for keeps in (lambda turn: turn.keeps_ttft(slo), lambda turn: turn.keeps_tpot(slo))
    )
    num_kept = sum(turn.keeps_ttft(slo) and turn.keeps_tpot(slo) for turn in measured)
    ttft_share, tpot_share = num_ttft / len(measured), num_tpot / len(measured)
    is_met = min(ttft_share, tpot_share) >= SLO_SHARE
    return SloFigures(slo, num_kept / window_s, num_kept / len(measured), ttft_share, tpot_share, is_met)


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    return percentiles(values) if values else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _row(turn: AskedTurn) -> TurnRow:
    return TurnRow(
        turn.session,
        turn.parent,
        turn.number,
        round(turn.due_s, 4),
        None if turn.first_s is None else round((turn.first_s - turn.due_s) * 1000, 3),
        round((turn.ended_s - turn.due_s) * 1000, 3),
        None if turn.tpot_s is None else round(turn.tpot_s * 1000, 3),
        turn.num_prompt_tokens,
        turn.num_output_tokens,
        turn.num_cached_tokens,
        turn.end,
    )


LoadTarget = ReportTarget[LoadReport]


def _of(figure: Callable[[LoadFigures], float]) -> Callable[[LoadReport], float | None]:
    return lambda report: None if report.figures is None else figure(report.figures)


GENERATOR_PER_S = 2_000
GENERATOR_LATENESS_MS = 10
_FAILED = LoadTarget("requests that failed, refusals apart", _of(lambda figures: figures.num_failed), 0)
GENERATOR_TARGETS = (
    LoadTarget(
        "generator: requests per second on one core",
        _of(lambda figures: figures.num_answered / figures.window_s),
        GENERATOR_PER_S,
        is_floor=True,
    ),
    LoadTarget("generator: lateness p99", _of(lambda figures: figures.lateness_ms.p99), GENERATOR_LATENESS_MS, " ms"),
    _FAILED,
)


def targets(plan: LoadPlan) -> tuple[LoadTarget, ...]:
    """Of any run."""
    lateness = _of(lambda figures: figures.lateness_ms.p99)
    return (LoadTarget("generator: lateness p99", lateness, plan.max_lateness_ms, " ms"), _FAILED)


def table(report: LoadReport) -> Table:
    """One figure per row."""
    plan, server, figures, use = report.plan, report.server, report.figures, report.use
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_header=False)
    words = [
        report.heading,
        "" if report.complete else "INTERRUPTED run",
        *(f"INVALID: {w}" for w in report.why_invalid),
    ]
    shown.title = "\n".join(escape(word) for word in words if word) or None
    shown.title_justify = "left"
    pools = ", ".join(f"{number} {name}" for name, number in (server.pools or {}).items())
    parts = (server.model, f"{server.kind.value} {server.version}".strip(), pools, server.policy)
    scale = "" if plan.scale == 1 else f", lengths x {plan.scale:.3g}"
    rows: list[tuple[str, str]] = [
        ("server", "; ".join(part for part in parts if part)),
        ("workload", f"{plan.workload}{scale}; {plan.how}"),
    ]
    if plan.num_cut_turns:
        rows.append(
            (
                "cut off",
                f"{plan.num_cut_turns:,} of {plan.num_cut_turns + plan.num_turns:,} turns, which the context of "
                f"{plan.max_model_len or math.inf:,} tokens does not hold, or not those before them",
            )
        )
    if figures is not None:
        rows += [
            (
                "turns: measured, answered, refused, failed, ended early by the model",
                f"{figures.num_turns:,}, {figures.num_answered:,}, {figures.num_refused:,}, {figures.num_failed:,}, "
                f"{figures.num_short:,}",
            ),
            ("turns/s asked, over", f"{figures.offered_per_s:.4g}, {figures.window_s:.1f} s"),
            ("TTFT ms: p50, p90, p99", _shown(figures.ttft_ms)),
            ("ITL ms: p50, p90, p99", _shown(figures.itl_ms)),
            ("between the first two tokens, ms: p50, p90, p99", _shown(figures.first_gap_ms)),
            ("TPOT ms: p50, p90, p99", _shown(figures.tpot_ms)),
            ("end to end ms: p50, p90, p99", _shown(figures.e2e_ms)),
            (f"session s, of {figures.num_sessions:,} whole: p50, p90, p99", _shown(figures.session_s)),
            (f"trajectory s, of {figures.num_trajectories:,} whole: p50, p90, p99", _shown(figures.trajectory_s)),
            (
                "sessions cut off by the end, given up after a refusal or failure",
                f"{figures.num_sessions_cut_off:,}, {figures.num_sessions_given_up:,}",
            ),
            ("tokens/s: output, prompts", f"{figures.tokens_per_s:,.1f}, {figures.prompt_tokens_per_s:,.0f}"),
            (
                "prompt tokens from a cache",
                "not told" if figures.cached_share is None else f"{figures.cached_share:.1%}",
            ),
            *(
                (
                    f"goodput at {one.slo.name} (TTFT {one.slo.ttft_ms:g} ms, TPOT {one.slo.tpot_ms:g} ms)",
                    f"{one.goodput_per_s:.4g}/s, {one.kept_share:.1%} of turns; p99 "
                    f"{'within' if one.is_met else 'beyond'} the limits",
                )
                for one in figures.slos
            ),
            (
                "generator: lateness ms p50, p90, p99, max; cores; waited",
                f"{_shown(figures.lateness_ms)}, {figures.lateness_max_ms:.2f}; "
                f"{use.generator_cpu_s / use.ran_s:.2f}; {use.generator_waited:.1%}",
            ),
        ]
    if use.kv_moved_bytes is not None:
        asked_mib = (use.kv_asked_bytes or 0.0) / 2**20
        rows.append(("KV moved MiB: to decode, to prefill", f"{use.kv_moved_bytes / 2**20:,.1f}, {asked_mib:,.1f}"))
    rows += _process_rows(use)
    if report.num_unanswered:
        rows.append(("in flight when it ended", f"{report.num_unanswered:,}"))
    for row in rows:
        shown.add_row(*row)
    return shown


def _shown(of: Percentiles | None) -> str:
    return "-" if of is None else f"{of.p50:.4g}, {of.p90:.4g}, {of.p99:.4g}"


def _process_rows(use: Use) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for role in dict.fromkeys(process.role for process in use.processes):
        of_role = [process for process in use.processes if process.role == role]
        cores, memory_mib = sum(p.cpu_s for p in of_role) / use.ran_s, sum(p.memory_mib for p in of_role)
        rows.append((f"{role}: cores, memory MiB, processes", f"{cores:.2f}, {memory_mib:,.0f}, {len(of_role)}"))
    return rows
