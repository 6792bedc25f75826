"""Owns the page of a comparison: one HTML file that needs nothing else, with words, figures and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from bench.compare_plan import IS_WHAT
from bench.compare_report import CompareReport, CompareRun
from bench.compare_words import COLUMNS, conclusions, row
from bench.load_report import End, TurnRow
from bench.plot import COLOURS
from bench.results import write_whole

TEMPLATE = "compare_page.html"
PANEL_HEIGHT_PX = 300
SESSION_HEIGHT_PX = 22
SESSIONS_SHOWN = 12
"""Of each system in the waterfall."""
QUANTILES_SHOWN = 100
Point = tuple[float, float]


def draw(report: CompareReport, path: Path) -> None:
    """Writes the HTML file. Raises OSError."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pictures = [
        (title, note, picture.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
        for title, note, make in PICTURES
        if (picture := make(report)) is not None
    ]
    page = environment.get_template(TEMPLATE).render(
        report=report,
        contestants=[(one.name, IS_WHAT[one.kind], one.argument) for one in report.plan.contestants],
        conclusions=list(conclusions(report)),
        columns=COLUMNS,
        rows=[row(figures) for figures in report.figures],
        pictures=pictures,
        plotly=get_plotlyjs(),
    )
    write_whole(page.encode(), path)


def colour(report: CompareReport, system: str) -> str:
    return COLOURS[report.plan.systems.index(system) % len(COLOURS)]


# -- goodput against rate


def goodput(report: CompareReport) -> go.Figure:
    slos = report.plan.load.slos
    picture = _panels([f"{slo.name}: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms" for slo in slos], columns=2)
    for index, slo in enumerate(slos):
        place = _place(index, columns=2)
        for system in report.plan.systems:
            own = [figures for figures in report.figures if figures.system == system]
            line = [(figures.rate_per_s, figures.goodput_per_s[index]) for figures in own]
            _line(picture, report, system, line, place, mode="lines+markers", is_named=index == 0)
            runs = [run for run in report.runs if run.is_valid and run.system == system]
            each = [(run.rate_per_s, run.goodput_per_s(slo)) for run in runs]
            _line(picture, report, system, each, place, mode="markers", opacity=0.4)
    picture.update_xaxes(title="trajectories per second", rangemode="tozero")
    picture.update_yaxes(title="turns per second within the limits", rangemode="tozero")
    return picture


# -- distributions


def measured_rows(run: CompareRun) -> list[TurnRow]:
    """Answered turns that were due in the measured window."""
    plan = run.load.plan
    return [
        turn for turn in run.load.turns if turn.end is End.ANSWERED and plan.warm_up_s <= turn.due_s < plan.duration_s
    ]


def distribution(values: Sequence[float]) -> list[Point]:
    """Values with the percentage of them that is as small, thinned out."""
    ordered = sorted(values)
    steps = min(len(ordered), QUANTILES_SHOWN)
    places = [round(step * (len(ordered) - 1) / max(steps - 1, 1)) for step in range(steps)]
    return [(ordered[place], 100 * (place + 1) / len(ordered)) for place in places]


def gap_distribution(runs: Sequence[CompareRun]) -> list[Point]:
    """Of the times between two tokens: the median over the rounds of each quantile."""
    each = [run.load.itl_quantiles_ms for run in runs if run.load.itl_quantiles_ms]
    steps = len(each[0]) - 1 if each else 0
    return [(median(one[step] for one in each), 100 * step / steps) for step in range(steps + 1)] if each else []


DISTRIBUTIONS: tuple[tuple[str, Callable[[list[CompareRun]], list[Point]]], ...] = (
    (
        "TTFT, ms",
        lambda runs: distribution(
            [turn.ttft_ms for run in runs for turn in measured_rows(run) if turn.ttft_ms is not None]
        ),
    ),
    ("ITL, ms", gap_distribution),
    ("end to end, ms", lambda runs: distribution([turn.e2e_ms for run in runs for turn in measured_rows(run)])),
)


def distributions(report: CompareReport) -> go.Figure:
    columns = len(DISTRIBUTIONS)
    titles = [f"{name}, {rate:g} trajectories/s" for rate in report.plan.rates_per_s for name, _ in DISTRIBUTIONS]
    picture = _panels(titles, columns)
    for number, rate in enumerate(report.plan.rates_per_s):
        for column, (_, points) in enumerate(DISTRIBUTIONS):
            index = number * columns + column
            for system in report.plan.systems:
                found = points(report.valid_runs(system, rate))
                _line(picture, report, system, found, _place(index, columns), is_named=index == 0)
    picture.update_xaxes(type="log")
    picture.update_yaxes(title="% as fast or faster", range=[0, 101])
    return picture


# -- pools over time


def pool_timelines(report: CompareReport) -> go.Figure | None:
    """Under the highest rate, in the first round that is valid."""
    told = [run for run in _at_highest_rate(report) if run.load.pools]
    if not told:
        return None
    picture = _panels([run.system for run in told], columns=2)
    for index, run in enumerate(told):
        row, column = _place(index, columns=2)
        pools = dict.fromkeys(sample.pool for sample in run.load.pools)
        for number, pool in enumerate(pools):
            samples = [sample for sample in run.load.pools if sample.pool == pool]
            for state, dash in (("running", "solid"), ("waiting", "dot")):
                held = [one.num_running if state == "running" else one.num_waiting for one in samples]
                picture.add_trace(
                    go.Scatter(
                        mode="lines",
                        x=[sample.at_s for sample in samples],
                        y=held,
                        name=f"{run.system}, {pool}: {state}",
                        customdata=[sample.kv_use for sample in samples],
                        hovertemplate="%{x:.0f} s: %{y} requests, KV %{customdata:.0%} used",
                        line={"color": COLOURS[number + 1], "dash": dash, "shape": "hv"},
                    ),
                    row=row,
                    col=column,
                )
    picture.update_xaxes(title="seconds")
    picture.update_yaxes(title="requests in the engines", rangemode="tozero")
    return picture


# -- what it used


def used(report: CompareReport) -> go.Figure:
    titles = ["KV cache moved between engines, MiB", "cores: all processes of the server"]
    picture = _panels(titles, columns=2)
    for system in report.plan.systems:
        own = [figures for figures in report.figures if figures.system == system]
        x = [f"{figures.rate_per_s:g}/s" for figures in own]
        for column, y in enumerate(
            ([figures.kv_moved_mib for figures in own], [sum(figures.cores.values()) or None for figures in own]), 1
        ):
            bar = go.Bar(
                x=x, y=y, name=system, legendgroup=system, showlegend=column == 1, marker_color=colour(report, system)
            )
            picture.add_trace(bar, row=1, col=column)
    picture.update_layout(barmode="group")
    return picture


# -- sessions


def waterfall(report: CompareReport) -> go.Figure | None:
    """The sessions that began first, under the highest rate: the same in every system."""
    runs = _at_highest_rate(report)
    names = list(dict.fromkeys(name for run in runs for name in first_sessions(run)))[:SESSIONS_SHOWN]
    if not names:
        return None
    labels = {name: name.rpartition("-")[2] for name in names}
    picture = make_subplots(
        rows=len(runs), cols=1, subplot_titles=[run.system for run in runs], shared_xaxes=True, vertical_spacing=0.04
    )
    for number, run in enumerate(runs, 1):
        turns = [turn for turn in run.load.turns if turn.session in labels and turn.ttft_ms is not None]
        for part, colour_of_part, opacity in (("to the first token", COLOURS[1], 0.9), ("answer", COLOURS[3], 0.9)):
            spans = [span(turn, is_answer=part == "answer") for turn in turns]
            picture.add_trace(
                go.Bar(
                    orientation="h",
                    y=[labels[turn.session] for turn in turns],
                    base=[begins for begins, _ in spans],
                    x=[lasts for _, lasts in spans],
                    name=part,
                    legendgroup=part,
                    showlegend=number == 1,
                    marker={"color": colour_of_part, "opacity": opacity},
                    customdata=[
                        (turn.number, turn.prompt_tokens, turn.cached_tokens or 0, turn.output_tokens) for turn in turns
                    ],
                    hovertemplate="turn %{customdata[0]}: %{customdata[1]} prompt tokens, %{customdata[2]} "
                    "from a cache, %{customdata[3]} written; %{x:.2f} s",
                ),
                row=number,
                col=1,
            )
        picture.update_yaxes(
            type="category", categoryorder="array", categoryarray=[labels[name] for name in reversed(names)], row=number
        )
    picture.update_layout(
        template="plotly_white", barmode="overlay", height=60 + len(runs) * (60 + SESSION_HEIGHT_PX * len(names))
    )
    picture.update_xaxes(title="seconds", row=len(runs))
    return picture


def first_sessions(run: CompareRun) -> list[str]:
    """By when their first turn was due; sub-agents are sessions of their own."""
    began: dict[str, float] = {}
    for turn in run.load.turns:
        began[turn.session] = min(began.get(turn.session, turn.due_s), turn.due_s)
    return sorted(began, key=lambda name: began[name])[:SESSIONS_SHOWN]


def span(turn: TurnRow, *, is_answer: bool) -> Point:
    """When a part of an answered turn began, and how long it took, in seconds."""
    ttft_s, e2e_s = (turn.ttft_ms or 0.0) / 1000, turn.e2e_ms / 1000
    return (turn.due_s + ttft_s, e2e_s - ttft_s) if is_answer else (turn.due_s, ttft_s)


# -- what pictures share


def _at_highest_rate(report: CompareReport) -> list[CompareRun]:
    """The first valid run of each system."""
    highest = max(report.plan.rates_per_s, default=0.0)
    found = [report.valid_runs(system, highest) for system in report.plan.systems]
    return [runs[0] for runs in found if runs]


def _panels(titles: Sequence[str], columns: int) -> go.Figure:
    rows = -(-len(titles) // columns)
    picture = make_subplots(rows=max(rows, 1), cols=columns, subplot_titles=list(titles))
    picture.update_layout(height=PANEL_HEIGHT_PX * max(rows, 1) + 60, template="plotly_white")
    return picture


def _place(index: int, columns: int) -> tuple[int, int]:
    """Row and column, from 1."""
    return index // columns + 1, index % columns + 1


def _line(
    picture: go.Figure,
    report: CompareReport,
    system: str,
    points: Sequence[Point],
    place: tuple[int, int],
    mode: str = "lines",
    is_named: bool = False,
    **style: Any,
) -> None:
    picture.add_trace(
        go.Scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode=mode,
            name=system,
            legendgroup=system,
            showlegend=is_named,
            marker={"color": colour(report, system)},
            line={"color": colour(report, system)},
            **style,
        ),
        row=place[0],
        col=place[1],
    )


PICTURES: tuple[tuple[str, str, Callable[[CompareReport], go.Figure | None]], ...] = (
    (
        "Goodput against rate",
        "Turns per second that kept both limits; refused and failed ones have missed them. Lines are medians over the "
        "rounds, points are rounds.",
        goodput,
    ),
    (
        "How latencies are distributed",
        "Answered turns of all rounds, from when each was due. Further left is better; the upper end is what the "
        "unluckiest feel.",
        distributions,
    ),
    (
        "Pools over time",
        "What the engines say of themselves, once a second, under the highest rate: running (line) and waiting (dots).",
        pool_timelines,
    ),
    ("What it took", "Medians over the rounds. KV that was moved is told by Baton and by vLLM with NIXL only.", used),
    (
        "Sessions",
        "The sessions that came first under the highest rate, a row each, the same in every system: waiting for the "
        "first token, then the answer; between turns tools run.",
        waterfall,
    ),
)
