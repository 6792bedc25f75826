"""Owns what a comparison says in words and in the terminal's table: sentences that follow from its figures. Pure."""

from collections.abc import Callable, Iterator

from rich import box
from rich.table import Table

from bench.compare_plan import SystemKind
from bench.compare_report import CompareReport, CompareRun, Difference, SystemFigures, difference, goodput_difference
from bench.load_plan import Slo
from bench.stats import Percentiles

AGGREGATED_KINDS = (SystemKind.AGGREGATED, SystemKind.BARE)


def conclusions(report: CompareReport) -> Iterator[str]:
    """The answer first: one sentence for each system and service level, then where it turns, then what it costs."""
    for system in report.plan.systems[1:]:
        if not any(figures.system == system for figures in report.figures):
            continue
        for slo in report.plan.load.slos:
            if (sentence := _goodput(report, system, slo)) is not None:
                yield sentence
        yield from _latencies(report, system)
    yield from _reservations(report)


def _goodput(report: CompareReport, system: str, slo: Slo) -> str | None:
    ours, theirs = (_best(report, name, slo) for name in (system, report.baseline))
    if ours is None or theirs is None:
        return None
    limits = f"{slo.name} (TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms)"
    if not ours[0] and not theirs[0]:
        return f"{limits}: neither {system} nor {report.baseline} keeps it for a single turn, under any rate."
    found = goodput_difference(report, system, report.baseline, report.plan.rates_per_s, slo)
    best = (
        f"by {limits}: at best {system} keeps {ours[0]:.3g} turns/s within it (at {ours[1]:g} trajectories/s), "
        f"{report.baseline} {theirs[0]:.3g} (at {theirs[1]:g})"
    )
    if found is None:
        return f"Not to be compared {best}."
    counts = "" if found.counts is None else f", {found.counts[0]} turns against {found.counts[1]}"
    words = f"{_verdict(report, system, found)} ({_times(found)}{counts}) {best}."
    return words + _turning(report, system, slo)


def _best(report: CompareReport, system: str, slo: Slo) -> tuple[float, float] | None:
    """The highest goodput by the medians, and its rate."""
    index = report.plan.load.slos.index(slo)
    found = [(f.goodput_per_s[index], f.rate_per_s) for f in report.figures if f.system == system]
    return max(found, key=lambda one: one[0], default=None)


def _verdict(report: CompareReport, system: str, found: Difference) -> str:
    kind, to = (report.plan.contestant(name) for name in (system, report.baseline))
    is_question = kind.is_split and to.kind in AGGREGATED_KINDS
    if len(found.ratios) < 2:
        return f"{system} against {report.baseline} in one round, which may be chance"
    if not found.is_clear:
        words = f"No difference between {system} and {report.baseline} beyond chance"
        return f"{words}: these runs do not tell whether splitting pays" if is_question else words
    if found.ratio > 1:
        return "Splitting pays here" if is_question else f"{system} is ahead of {report.baseline} in every round"
    return "Splitting does not pay here" if is_question else f"{system} is behind {report.baseline} in every round"


def _turning(report: CompareReport, system: str, slo: Slo) -> str:
    """At which rates it is ahead and at which behind, if there are both; else empty."""
    sides: dict[str, list[str]] = {"ahead": [], "behind": []}
    for rate in report.plan.rates_per_s:
        found = goodput_difference(report, system, report.baseline, [rate], slo)
        if found is not None and found.is_clear:
            sides["ahead" if found.ratio > 1 else "behind"].append(f"{rate:g}")
    if not all(sides.values()):
        return ""
    ahead, behind = (", ".join(sides[side]) for side in ("ahead", "behind"))
    return f" It is ahead at {ahead} trajectories/s and behind at {behind}."


_LATENCIES: tuple[tuple[str, Callable[[CompareRun], float | None]], ...] = (
    ("TTFT p50", lambda run: _of(run, "ttft_ms", "p50")),
    ("TTFT p99", lambda run: _of(run, "ttft_ms", "p99")),
    ("ITL p50", lambda run: _of(run, "itl_ms", "p50")),
    ("ITL p99", lambda run: _of(run, "itl_ms", "p99")),
    ("end to end p50", lambda run: _of(run, "e2e_ms", "p50")),
    ("tokens/s", lambda run: run.load.figures.tokens_per_s if run.load.figures else None),
)


def _of(run: CompareRun, name: str, percentile: str) -> float | None:
    found: Percentiles | None = getattr(run.load.figures, name, None)
    return None if found is None else getattr(found, percentile)


def _latencies(report: CompareReport, system: str) -> Iterator[str]:
    for rate in report.plan.rates_per_s:
        every = [(name, difference(report, system, report.baseline, rate, figure)) for name, figure in _LATENCIES]
        found = [(name, one) for name, one in every if one is not None]
        # One round has no spread to be clear of; its figures are told, and `_reservations` says so.
        told = [f"{name} {_times(one)}" for name, one in found if one.is_clear or report.plan.rounds == 1]
        even = [name for name, one in found if not one.is_clear and report.plan.rounds > 1]
        words = [", ".join(told)] if told else []
        words += [f"no clear difference in {', '.join(even)}"] if even else []
        if words:
            yield f"{system} against {report.baseline} at {rate:g} trajectories/s: {'; '.join(words)}."


def _times(found: Difference) -> str:
    return f"{found.ratio:.2f} times"


def _reservations(report: CompareReport) -> Iterator[str]:
    """What a reader must know before believing the rest."""
    for failure in report.start_failures:
        yield f"{failure.system} did not start and is missing: {failure.error}"
    invalid = [run for run in report.runs if not run.is_valid]
    for run in invalid:
        yield (
            f"Left out: {run.system} at {run.rate_per_s:g} trajectories/s in round {run.round + 1}: "
            f"{'; '.join(run.load.why_invalid)}."
        )
    if report.plan.rounds < 2:
        yield "One round only: how much rounds differ is not known, so any difference may be chance."
    if report.runs and (rates := report.plan.rates_per_s):
        loosest = max(range(len(report.plan.load.slos)), key=lambda index: report.plan.load.slos[index].ttft_ms)
        growing = [
            system
            for system in report.plan.systems
            if (last := report.of(system, rates[-1])) is not None and last.kept_share[loosest] > _NEARLY_ALL
        ]
        if growing:
            yield (
                f"At the highest rate {', '.join(growing)} still kept the loosest service level for more than "
                f"{_NEARLY_ALL:.0%} of the turns: the limit is beyond it; ask more with --rates or --shares."
            )


_NEARLY_ALL = 0.95


def table(report: CompareReport) -> Table:
    """A row for each rate and system: medians over the rounds."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    found.title, found.title_justify = report.heading or None, "left"
    for name in COLUMNS:
        found.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for rate in report.plan.rates_per_s:
        for system in report.plan.systems:
            if (figures := report.of(system, rate)) is not None:
                found.add_row(*row(figures))
        found.add_section()
    return found


COLUMNS = (
    "trajectories/s",
    "system",
    "TTFT ms\np50/p99",
    "ITL ms\np50/p99",
    "TPOT ms\np50/p99",
    "end to end ms\np50/p99",
    "tokens/s",
    "turns/s\nasked",
    "goodput\nturns/s",
    "cached",
    "KV moved\nMiB",
    "cores",
    "refused/\nfailed",
)


def row(figures: SystemFigures) -> tuple[str, ...]:
    latencies = (figures.ttft_ms, figures.itl_ms, figures.tpot_ms, figures.e2e_ms)
    return (
        f"{figures.rate_per_s:g}",
        figures.system,
        *("-" if one is None else f"{one.p50:.0f}/{one.p99:.0f}" for one in latencies),
        f"{figures.tokens_per_s:.0f}",
        f"{figures.offered_per_s:.3g}",
        ", ".join(f"{goodput:.3g}" for goodput in figures.goodput_per_s),
        "-" if figures.cached_share is None else f"{figures.cached_share:.0%}",
        "-" if figures.kv_moved_mib is None else f"{figures.kv_moved_mib:.0f}",
        f"{sum(figures.cores.values()):.2f}" if figures.cores else "-",
        f"{figures.num_refused}/{figures.num_failed}",
    )
