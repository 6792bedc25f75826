"""The arithmetic of the benchmark: percentiles, gaps, medians, and how targets are judged."""

import math
from dataclasses import replace

import pytest

from bench.cpu import RoleSeconds
from bench.stats import (
    Cell,
    Chunk,
    Exchange,
    Figures,
    Measured,
    Metric,
    Percentiles,
    Target,
    figures,
    inter_token_gaps_s,
    judge,
    median_figures,
    median_stages,
    percentile,
    time_per_output_token_s,
)

CELL = Cell(prompt_tokens=250, output_tokens=64, concurrency=1)


def some_figures(
    ttft_ms: float = 1.0, itl_ms: float = 1.0, tokens_per_s: float = 1.0, outside_engine: float = 1.0
) -> Figures:
    same = Percentiles(1.0, 1.0, 1.0)
    return Figures(
        ttft_ms=Percentiles(ttft_ms, 2 * ttft_ms, 3 * ttft_ms),
        itl_ms=Percentiles(itl_ms, itl_ms, itl_ms),
        tpot_ms=same,
        e2e_ms=same,
        tokens_per_s=tokens_per_s,
        window_s=1.0,
        cpu_s_per_1000_tokens=RoleSeconds(),
        outside_engine_cpu_s_per_1000_tokens=outside_engine,
        client_cpu_s_per_1000_tokens=0.0,
        other_cores=0.0,
        client_waited=0.0,
        tokens_per_event=1.0,
    )


def exchange(*arrivals: tuple[float, int], sent_s: float = 0.0, error: str | None = None) -> Exchange:
    chunks = tuple(Chunk(at_s, num_tokens) for at_s, num_tokens in arrivals)
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return Exchange(sent_s, chunks[-1].at_s, chunks, tuple(range(num_tokens)), error, num_events=len(chunks))


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)])
def test_percentiles_interpolate_between_the_closest_ranks(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_one_value_is_every_percentile_and_none_is_an_error() -> None:
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_tokens_that_arrive_together_share_the_gap_before_them() -> None:
    chunks = [Chunk(10.0, 3), Chunk(10.5, 1), Chunk(11.5, 4)]
    assert inter_token_gaps_s(chunks) == [0.5, 0.25, 0.25, 0.25, 0.25]


def test_time_per_output_token_counts_the_tokens_after_the_first_chunk() -> None:
    assert time_per_output_token_s([Chunk(10.0, 3), Chunk(10.5, 1), Chunk(11.5, 4)]) == pytest.approx(1.5 / 5)


def test_figures_are_those_of_the_requests_that_succeeded() -> None:
    good = exchange((1.1, 1), (1.2, 1), (1.4, 2), sent_s=1.0)
    failed = exchange((99.0, 1), (199.0, 1), sent_s=0.0, error="HTTP 500")
    cpu_s = RoleSeconds(4.0, 1.0, 0.5, 0.5)
    shown = figures([good, failed], window_s=2.0, cpu_s=cpu_s, client_cpu_s=0.2, machine_cpu_s=7.2, client_waited_s=0.5)
    assert shown is not None
    assert shown.ttft_ms.p50 == pytest.approx(100)
    assert shown.itl_ms.p50 == pytest.approx(100)
    assert shown.tpot_ms.p50 == pytest.approx(100)
    assert shown.e2e_ms.p50 == pytest.approx(400)
    assert shown.tokens_per_s == 2.0
    assert shown.cpu_s_per_1000_tokens == RoleSeconds(1000.0, 250.0, 125.0, 125.0)
    assert shown.outside_engine_cpu_s_per_1000_tokens == 500.0
    assert shown.client_cpu_s_per_1000_tokens == 50.0
    assert shown.other_cores == pytest.approx(0.5)
    assert shown.client_waited == 0.25
    assert shown.tokens_per_event == pytest.approx(4 / 3)


@pytest.mark.parametrize("useless", [exchange((1.0, 1), (2.0, 1), error="HTTP 500"), exchange((1.0, 2))])
def test_there_are_no_figures_when_all_requests_failed_or_nothing_was_streamed(useless: Exchange) -> None:
    nothing = {"window_s": 1.0, "client_cpu_s": 0.0, "machine_cpu_s": 0.0, "client_waited_s": 0.0}
    assert figures([useless], cpu_s=RoleSeconds(), **nothing) is None


def test_each_figure_has_its_own_median_over_the_rounds() -> None:
    rounds = [
        some_figures(ttft_ms=10.0, tokens_per_s=100.0),
        some_figures(ttft_ms=30.0, tokens_per_s=300.0),
        some_figures(ttft_ms=20.0, tokens_per_s=900.0),
    ]
    assert median_figures(rounds) == some_figures(ttft_ms=20.0, tokens_per_s=300.0)


@pytest.mark.parametrize(
    ("metric", "ours", "met"),
    [
        (Metric.TTFT, some_figures(ttft_ms=1.5), True),
        (Metric.TTFT, some_figures(ttft_ms=1.6), False),
        (Metric.ITL, some_figures(itl_ms=1.6), False),
        (Metric.THROUGHPUT, some_figures(tokens_per_s=1.5), True),
        (Metric.THROUGHPUT, some_figures(tokens_per_s=1.4), False),
        (Metric.OUTSIDE_ENGINE_CPU, some_figures(outside_engine=1.4), True),
        (Metric.OUTSIDE_ENGINE_CPU, some_figures(outside_engine=1.6), False),
    ],
)
def test_a_target_bounds_latency_and_cpu_from_above_and_throughput_from_below(
    metric: Metric, ours: Figures, met: bool
) -> None:
    target = Target(metric, 1, "baton", "bare", 1.5)
    results = {("baton", CELL): Measured(ours, 0), ("bare", CELL): Measured(some_figures(), 0)}
    assert judge(target, results).is_met is met


def test_putting_more_tokens_into_an_event_helps_no_target_that_goes_by_events() -> None:
    alone = some_figures(tokens_per_s=100.0, outside_engine=2.0)
    merged = replace(alone, tokens_per_s=400.0, outside_engine_cpu_s_per_1000_tokens=0.5, tokens_per_event=4.0)
    for metric in (Metric.EVENTS, Metric.EVENT_CPU):
        assert metric.of(merged) == metric.of(alone)


def test_the_worst_cell_decides_a_target() -> None:
    longer = Cell(prompt_tokens=2000, output_tokens=64, concurrency=1)
    results = {
        ("baton", CELL): Measured(some_figures(ttft_ms=1.0), 0),
        ("bare", CELL): Measured(some_figures(ttft_ms=1.0), 0),
        ("baton", longer): Measured(some_figures(ttft_ms=8.0), 0),
        ("bare", longer): Measured(some_figures(ttft_ms=2.0), 0),
    }
    verdict = judge(Target(Metric.TTFT, 1, "baton", "bare", 1.5), results)
    assert (verdict.ratio, verdict.cell, verdict.is_met) == (4.0, longer, False)
    assert judge(Target(Metric.TTFT, 1, "baton", "bare", 1.5, prompt_tokens=250), results).is_met


def test_a_target_looks_at_its_own_concurrency_only() -> None:
    crowded = Cell(prompt_tokens=250, output_tokens=64, concurrency=8)
    results = {
        ("baton", crowded): Measured(some_figures(), 0),
        ("bare", crowded): Measured(some_figures(), 0),
    }
    verdict = judge(Target(Metric.TTFT, 1, "baton", "bare", 1.5), results)
    assert verdict.ratio is None
    assert not verdict.is_met


def test_a_target_without_its_baseline_is_not_measured() -> None:
    verdict = judge(Target(Metric.TTFT, 1, "baton", "bare", 1.5), {("baton", CELL): Measured(some_figures(), 0)})
    assert verdict.ratio is None


@pytest.mark.parametrize("system", ["baton", "bare"])
def test_failed_requests_on_either_side_spoil_a_target(system: str) -> None:
    results = {(name, CELL): Measured(some_figures(), int(name == system)) for name in ("baton", "bare")}
    verdict = judge(Target(Metric.TTFT, 1, "baton", "bare", 1.5), results)
    assert verdict.ratio == 1.0
    assert not verdict.is_met


def test_cpu_time_too_short_for_the_clock_gives_a_ratio_all_the_same() -> None:
    target = Target(Metric.OUTSIDE_ENGINE_CPU, 1, "baton", "bare", 1.0)
    none, some = Measured(some_figures(outside_engine=0.0), 0), Measured(some_figures(outside_engine=0.1), 0)
    assert judge(target, {("baton", CELL): none, ("bare", CELL): none}).ratio == 1.0
    assert judge(target, {("baton", CELL): some, ("bare", CELL): none}).ratio == math.inf


def test_a_stage_has_the_median_of_those_that_went_through_it() -> None:
    stages = [{"ttft": 1.0, "prefill": 9.0}, {"ttft": 3.0}, {"ttft": 2.0, "decode": 5.0}]
    assert median_stages(stages) == {"ttft": 2.0, "prefill": 9.0, "decode": 5.0}
    assert median_stages([]) == {}
