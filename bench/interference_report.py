"""Owns what `bench interference` leaves behind: its plan, what each system showed under each storm, targets, the table.

Interference is what running streams suffer from prompts that are read beside them. Pure.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table

from bench.results import Setting
from bench.stats import Exchange, in_turns, inter_token_gaps_s, percentile
from bench.targets import ReportTarget

SPLIT = "split"
MOST_ITL_RATIO = 1 / 3
"""Of the 99th percentile of the time between two tokens, split over the best aggregated."""


@dataclass(frozen=True)
class InterferencePlan:
    """In each of `rounds` every system has its turn: `streams` answers are written at any time, and beside them prompts
    of `storm_tokens` arrive as a Poisson process of each of `rates_per_s` in turn, for `window_s`. Aggregated systems
    are two replicas on a core each, one system for each of `chunks`: prompt tokens that a step reads at most."""

    config: str
    chunks: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    streams: int
    prompt_tokens: int
    answer_tokens: int
    storm_tokens: int
    storm_answer_tokens: int
    window_s: float
    rounds: int
    seed: int

    @property
    def systems(self) -> tuple[str, ...]:
        return (SPLIT, *(aggregated(chunk) for chunk in self.chunks))

    def turns(self) -> list[tuple[int, str]]:
        """Round and system of each, in the order of the run."""
        return in_turns(self.systems, self.rounds)

    def arrivals(self, round: int, rate_per_s: float) -> list[float]:
        """Seconds into the window, the same for every system."""
        draw, at_s, found = random.Random(f"{self.seed}/{round}/{rate_per_s}"), 0.0, list[float]()
        while rate_per_s > 0 and (at_s := at_s + draw.expovariate(rate_per_s)) < self.window_s:
            found.append(at_s)
        return found


def aggregated(chunk: int) -> str:
    return f"aggregated-{chunk}"


@dataclass(frozen=True)
class Storm:
    """One system under one rate in one round. `itl_ms` are percentiles 50 and 99 and the most of the times between two
    tokens of a stream, the second of which came in the window; `stream_tokens_per_s` came in it. Of `num_prompts` that
    arrived so many were answered whole within the window; their TTFT is of all that were answered at all."""

    round: int
    system: str
    rate_per_s: float
    itl_p50_ms: float
    itl_p99_ms: float
    itl_max_ms: float
    stream_tokens_per_s: float
    num_prompts: int
    num_in_window: int
    prompt_ttft_p50_ms: float | None
    prompt_ttft_max_ms: float | None
    num_failed: int
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of one system and rate. `share_in_window`: of the storm's prompts."""

    system: str
    rate_per_s: float
    itl_p50_ms: float
    itl_p99_ms: float
    itl_max_ms: float
    stream_tokens_per_s: float
    share_in_window: float | None
    prompt_ttft_p50_ms: float | None
    num_failed: int


@dataclass(frozen=True)
class InterferenceReport:
    """The content of the JSON file. `complete` is false when the run was interrupted."""

    complete: bool
    plan: InterferencePlan
    setting: Setting
    storms: tuple[Storm, ...] = ()
    figures: tuple[Figures, ...] = ()

    def of(self, system: str, rate_per_s: float) -> Figures | None:
        return next((f for f in self.figures if (f.system, f.rate_per_s) == (system, rate_per_s)), None)

    def best_aggregated(self, rate_per_s: float) -> Figures | None:
        """That with the lowest 99th percentile."""
        found = [f for f in self.figures if f.system != SPLIT and f.rate_per_s == rate_per_s]
        return min(found, key=lambda f: f.itl_p99_ms, default=None)

    def itl_ratio(self, rate_per_s: float) -> float | None:
        split, best = self.of(SPLIT, rate_per_s), self.best_aggregated(rate_per_s)
        return split.itl_p99_ms / best.itl_p99_ms if split and best else None

    def worst_itl_ratio(self) -> float | None:
        """Under any storm."""
        ratios = [self.itl_ratio(rate) for rate in self.plan.rates_per_s if rate > 0]
        return max((ratio for ratio in ratios if ratio is not None), default=None)


def storm(
    round: int,
    system: str,
    rate_per_s: float,
    window: tuple[float, float],
    streams: Sequence[Exchange],
    prompts: Sequence[Exchange],
) -> Storm:
    """`window`: when it began and ended, on the clock of the exchanges. Raises ValueError without a gap to measure."""
    begin_s, end_s = window
    written = [stream for stream in streams if stream.error is None]
    gaps_ms = [gap_s * 1000 for stream in written for gap_s in inter_token_gaps_s(stream.chunks, begin_s, end_s)]
    if not gaps_ms:
        raise ValueError(f"{system}: no stream wrote two tokens in the window; the first error: {_first(streams)}")
    num_tokens = sum(c.num_tokens for stream in written for c in stream.chunks if begin_s < c.at_s <= end_s)
    read = [prompt for prompt in prompts if prompt.error is None]
    ttft_ms = [(prompt.chunks[0].at_s - prompt.sent_s) * 1000 for prompt in read]
    failed = [one for one in (*streams, *prompts) if one.error is not None]
    return Storm(
        round,
        system,
        rate_per_s,
        percentile(gaps_ms, 50),
        percentile(gaps_ms, 99),
        max(gaps_ms),
        num_tokens / (end_s - begin_s),
        len(prompts),
        sum(prompt.ended_s <= end_s for prompt in read),
        median(ttft_ms) if ttft_ms else None,
        max(ttft_ms, default=None),
        len(failed),
        tuple(sorted({str(one.error) for one in failed})[:3]),
    )


def _first(exchanges: Iterable[Exchange]) -> str:
    return next((one.error for one in exchanges if one.error is not None), "none")


def evaluate(
    plan: InterferencePlan, setting: Setting, storms: Sequence[Storm], *, complete: bool
) -> InterferenceReport:
    cells = [(system, rate) for system in plan.systems for rate in plan.rates_per_s]
    by_cell = {cell: [one for one in storms if (one.system, one.rate_per_s) == cell] for cell in cells}
    figures = tuple(_figures(own) for own in by_cell.values() if own)
    return InterferenceReport(complete, plan, setting, tuple(storms), figures)


def _figures(storms: Sequence[Storm]) -> Figures:
    ttfts_ms = [one.prompt_ttft_p50_ms for one in storms if one.prompt_ttft_p50_ms is not None]
    num_prompts = sum(one.num_prompts for one in storms)
    return Figures(
        storms[0].system,
        storms[0].rate_per_s,
        median(one.itl_p50_ms for one in storms),
        median(one.itl_p99_ms for one in storms),
        max(one.itl_max_ms for one in storms),
        median(one.stream_tokens_per_s for one in storms),
        sum(one.num_in_window for one in storms) / num_prompts if num_prompts else None,
        median(ttfts_ms) if ttfts_ms else None,
        sum(one.num_failed for one in storms),
    )


TARGETS = (
    ReportTarget[InterferenceReport](
        "99th percentile of the time between two tokens under a storm, split over the best aggregated, the worst rate",
        InterferenceReport.worst_itl_ratio,
        MOST_ITL_RATIO,
    ),
)


def table(report: InterferenceReport) -> Table:
    found = Table(box=box.SIMPLE_HEAD)
    for column in ("prompts/s", "system", "ITL ms\np50/p99/most", "streams\ntokens/s", "prompts\nin window",
                   "their TTFT\np50 ms", "failed"):  # fmt: skip
        found.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    for rate in report.plan.rates_per_s:
        for system in report.plan.systems:
            if (f := report.of(system, rate)) is not None:
                found.add_row(
                    f"{rate:g}",
                    system,
                    f"{f.itl_p50_ms:.1f}/{f.itl_p99_ms:.1f}/{f.itl_max_ms:.0f}",
                    f"{f.stream_tokens_per_s:.0f}",
                    "" if f.share_in_window is None else f"{f.share_in_window:.0%}",
                    "" if f.prompt_ttft_p50_ms is None else f"{f.prompt_ttft_p50_ms:.0f}",
                    f"{f.num_failed}",
                )
        found.add_section()
    return found


def conclusions(report: InterferenceReport) -> Iterator[str]:
    """In words, from the figures: one line for each rate."""
    for rate in report.plan.rates_per_s:
        split, best, ratio = report.of(SPLIT, rate), report.best_aggregated(rate), report.itl_ratio(rate)
        if split is None or best is None or ratio is None:
            continue
        what = f"{1 / ratio:.1f} times lower" if ratio < 1 else f"{ratio:.1f} times higher"
        line = (
            f"{rate:g} prompts/s: split, the 99th percentile between two tokens is {what} than with {best.system} "
            f"({split.itl_p99_ms:.0f} against {best.itl_p99_ms:.0f} ms), streams write "
            f"{split.stream_tokens_per_s / best.stream_tokens_per_s:.2f} of the tokens"
        )
        if split.prompt_ttft_p50_ms is not None and best.prompt_ttft_p50_ms is not None:
            line += f", and prompts wait {split.prompt_ttft_p50_ms / best.prompt_ttft_p50_ms:.2f} of the time"
        yield line
