"""Owns the arithmetic of the benchmark: percentiles, figures of a cell, medians over rounds, targets. Pure."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from bench.cpu import RoleSeconds

D = TypeVar("D")


@dataclass(frozen=True, order=True)
class Cell:
    """One load: requests in flight, and the exact length of every prompt and answer."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int

    def __str__(self) -> str:
        return f"c={self.concurrency}, {self.prompt_tokens} -> {self.output_tokens} tokens"


@dataclass(frozen=True)
class Chunk:
    """Tokens that arrived together; `at_s` is on the same clock as the exchange's other times."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True)
class Exchange:
    """One request and its answer as the client saw it. `error` says why it failed, if it did."""

    sent_s: float
    ended_s: float
    chunks: tuple[Chunk, ...]
    token_ids: tuple[int, ...]
    error: str | None = None
    num_events: int = 0
    """Server-sent events that carried tokens; those that were read together count one each."""
    receipt_id: str | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the answer came in more than one piece; one that did not has no gaps."""
        return len(self.chunks) > 1


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """What one system showed in one cell. Failed requests count in none of them; the units are in the names."""

    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    tokens_per_s: float
    window_s: float
    cpu_s_per_1000_tokens: RoleSeconds
    outside_engine_cpu_s_per_1000_tokens: float
    client_cpu_s_per_1000_tokens: float
    other_cores: float
    """CPU that neither the system nor the client used, per second: above a few hundredths, something else ran."""
    client_waited: float
    """Share of the window in which the client could not run for want of a processor: latencies hold it as well."""
    tokens_per_event: float
    """1 from a front end that keeps up; one that falls behind its engines puts what has gathered into one event."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks (Hyndman and Fan 1996, type 7). Raises ValueError if empty."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    return float(np.percentile(values, percent))


def percentiles(values: Sequence[float]) -> Percentiles:
    """Raises ValueError if there is no value."""
    return Percentiles(*(percentile(values, percent) for percent in (50, 90, 99)))


def quantiles(values: Sequence[float], steps: int) -> tuple[float, ...]:
    """From the least to the most in so many equal steps of rank, as `percentile`. Raises ValueError if empty."""
    if not values:
        raise ValueError("quantiles need at least one value")
    return tuple(np.percentile(values, np.linspace(0, 100, steps + 1)).tolist())


def inter_token_gaps_s(chunks: Sequence[Chunk], after_s: float = -math.inf, until_s: float = math.inf) -> list[float]:
    """One gap per token after the first chunk that arrived in that time: n tokens that arrive together share the gap
    before them evenly.

    What lay between the tokens of the first chunk cannot be seen: TTFT holds it.
    """
    gaps: list[float] = []
    for before, chunk in itertools.pairwise(chunks):
        if after_s < chunk.at_s <= until_s:
            gaps += [(chunk.at_s - before.at_s) / chunk.num_tokens] * chunk.num_tokens
    return gaps


def in_turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Round, from 0, and name of each turn: every round has all, and who goes first changes, so that no drift favours
    one."""
    orders = [(number, names[:: -1 if number % 2 else 1]) for number in range(rounds)]
    return [(number, name) for number, order in orders for name in order]


def time_per_output_token_s(chunks: Sequence[Chunk]) -> float:
    """From the first chunk to the last, per token after the first chunk. Raises ValueError for a single chunk."""
    if len(chunks) < 2:
        raise ValueError("a time per token needs a second chunk")
    return (chunks[-1].at_s - chunks[0].at_s) / sum(chunk.num_tokens for chunk in chunks[1:])


def figures(
    exchanges: Sequence[Exchange],
    window_s: float,
    cpu_s: RoleSeconds,
    client_cpu_s: float,
    machine_cpu_s: float,
    client_waited_s: float,
) -> Figures | None:
    """The figures of a cell; None when no request succeeded, or when every answer came in one piece.

    `window_s` lasts from the first request sent to the last answer complete, `cpu_s` is what the system used in it,
    `machine_cpu_s` what everything on the machine used, `client_waited_s` how long the client waited for a processor.
    """
    good = [exchange for exchange in exchanges if exchange.error is None]
    streamed = [exchange.chunks for exchange in good if exchange.is_streamed]
    if not streamed:
        return None
    num_tokens = sum(len(exchange.token_ids) for exchange in good)
    return Figures(
        ttft_ms=percentiles([(exchange.chunks[0].at_s - exchange.sent_s) * 1000 for exchange in good]),
        itl_ms=percentiles([gap_s * 1000 for chunks in streamed for gap_s in inter_token_gaps_s(chunks)]),
        tpot_ms=percentiles([time_per_output_token_s(chunks) * 1000 for chunks in streamed]),
        e2e_ms=percentiles([(exchange.ended_s - exchange.sent_s) * 1000 for exchange in good]),
        tokens_per_s=num_tokens / window_s,
        window_s=window_s,
        cpu_s_per_1000_tokens=cpu_s.times(1000 / num_tokens),
        outside_engine_cpu_s_per_1000_tokens=cpu_s.outside_engine_s * 1000 / num_tokens,
        client_cpu_s_per_1000_tokens=client_cpu_s * 1000 / num_tokens,
        other_cores=(machine_cpu_s - cpu_s.engine_s - cpu_s.outside_engine_s - client_cpu_s) / window_s,
        client_waited=client_waited_s / window_s,
        tokens_per_event=num_tokens / sum(exchange.num_events for exchange in good),
    )


def median_stages(stages_ms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each stage's median over those that went through it, in the order in which stages are first met."""
    names = dict.fromkeys(name for stages in stages_ms for name in stages)
    return {name: statistics.median(s[name] for s in stages_ms if name in s) for name in names}


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over the rounds, on its own. Raises ValueError if there is no round."""
    return medians(rounds)


def medians(values: Sequence[D]) -> D:
    """Of records of numbers, or of records of those: each number's median on its own. Raises ValueError if empty."""
    if not values:
        raise ValueError("a median needs at least one round")
    return _median(values)


def _median(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, float):
        return statistics.median(values)
    return type(first)(
        **{field.name: _median([getattr(value, field.name) for value in values]) for field in fields(first)}
    )


class Metric(StrEnum):
    """The figures that targets are about; the value is how a report names them."""

    TTFT = "TTFT p50"
    ITL = "ITL p50"
    THROUGHPUT = "tokens/s"
    OUTSIDE_ENGINE_CPU = "CPU outside engines per 1,000 tokens"
    EVENTS = "events/s"
    EVENT_CPU = "CPU outside engines per 1,000 events"

    def of(self, figures: Figures) -> float:
        match self:
            case Metric.TTFT:
                return figures.ttft_ms.p50
            case Metric.ITL:
                return figures.itl_ms.p50
            case Metric.THROUGHPUT:
                return figures.tokens_per_s
            case Metric.OUTSIDE_ENGINE_CPU:
                return figures.outside_engine_cpu_s_per_1000_tokens
            case Metric.EVENTS:
                return figures.tokens_per_s / figures.tokens_per_event
            case Metric.EVENT_CPU:
                return figures.outside_engine_cpu_s_per_1000_tokens * figures.tokens_per_event

    @property
    def more_is_better(self) -> bool:
        return self in (Metric.THROUGHPUT, Metric.EVENTS)


@dataclass(frozen=True)
class Target:
    """What `system` must reach: its figure divided by the baseline's, in every cell that was measured for both.

    `limit` bounds the ratio from below for a metric of which more is better, from above for the others.
    `prompt_tokens` None means prompts of any length.
    """

    metric: Metric
    concurrency: int
    system: str
    baseline: str
    limit: float
    prompt_tokens: int | None = None

    def covers(self, cell: Cell) -> bool:
        return cell.concurrency == self.concurrency and self.prompt_tokens in (None, cell.prompt_tokens)

    def is_met_by(self, ratio: float) -> bool:
        return ratio >= self.limit if self.metric.more_is_better else ratio <= self.limit

    def __str__(self) -> str:
        prompt = "" if self.prompt_tokens is None else f", {self.prompt_tokens}-token prompts"
        bound = "at least" if self.metric.more_is_better else "at most"
        return (
            f"{self.system} / {self.baseline}, {self.metric.value} at c={self.concurrency}{prompt}: "
            f"{bound} {self.limit:g}"
        )


TARGETS = (
    Target(Metric.TTFT, 1, "baton", "bare", 1.5, prompt_tokens=250),
    Target(Metric.ITL, 1, "baton", "bare", 1.1, prompt_tokens=250),
    Target(Metric.THROUGHPUT, 8, "baton", "bare", 1.0, prompt_tokens=250),
    Target(Metric.TTFT, 1, "baton", "router-equal", 0.9),
    Target(Metric.THROUGHPUT, 32, "baton", "router-equal", 1.3),
    Target(Metric.TTFT, 1, "baton", "router-stock", 0.25),
    Target(Metric.OUTSIDE_ENGINE_CPU, 8, "baton", "router-equal", 1.0),
    Target(Metric.OUTSIDE_ENGINE_CPU, 32, "baton", "router-equal", 1.0),
)


SIMULATED_TARGETS = tuple(
    Target(metric, concurrency, "baton", "bare", limit)
    for metric, limit in ((Metric.EVENTS, 0.7), (Metric.EVENT_CPU, 1.5))
    for concurrency in (64, 256)
)
"""Of front ends over simulated engines: what Baton adds to vLLM's own, by events and not by tokens, for one that falls
behind puts several tokens into one. The router passes on what its servers wrote, so it is no baseline here."""


@dataclass(frozen=True)
class Measured:
    """One system in one cell over all rounds: `median` is None when no round gave figures."""

    median: Figures | None
    num_failed: int


@dataclass(frozen=True)
class Verdict:
    """A target and its worst cell. `ratio` and `cell` are None where nothing was measured."""

    target: Target
    ratio: float | None
    cell: Cell | None
    num_failed: int

    @property
    def is_met(self) -> bool:
        """Failed requests spoil a target: the slow ones may be those that failed."""
        return self.ratio is not None and self.num_failed == 0 and self.target.is_met_by(self.ratio)


def judge(target: Target, measured: Mapping[tuple[str, Cell], Measured]) -> Verdict:
    """The verdict on one target: the cell with the worst ratio decides."""
    ratios: list[tuple[float, Cell]] = []
    num_failed = 0
    for (system, cell), ours in measured.items():
        theirs = measured.get((target.baseline, cell))
        if system != target.system or not target.covers(cell) or theirs is None:
            continue
        num_failed += ours.num_failed + theirs.num_failed
        if ours.median is not None and theirs.median is not None:
            ratios.append((_ratio(target.metric.of(ours.median), target.metric.of(theirs.median)), cell))
    if not ratios:
        return Verdict(target, None, None, num_failed)
    ratio, cell = min(ratios) if target.metric.more_is_better else max(ratios)
    return Verdict(target, ratio, cell, num_failed)


def _ratio(ours: float, theirs: float) -> float:
    """CPU time is counted in ticks, so a short cell may show none; 0 / 0 is no difference."""
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs
