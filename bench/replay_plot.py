"""Owns the picture of a replay: one HTML file that needs nothing else, with goodput and times as bars."""

from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.plot import COLOURS, PANEL_HEIGHT_PX
from bench.replay_plan import RunFigures
from bench.replay_report import ReplayReport, mean

FIGURES: tuple[tuple[str, Callable[[RunFigures], float]], ...] = (
    ("TTFT, mean, s", lambda run: run.ttft_mean_s),
    ("TTFT p99, s", lambda run: run.ttft_s.p99),
    ("session completion p99, s", lambda run: run.session_s.p99),
    ("session completion without pauses p50, s", lambda run: run.busy_s.p50),
)


def draw(report: ReplayReport, path: Path) -> None:
    """Writes the HTML file. Raises OSError."""
    plan = report.plan
    titles = ["goodput, trajectories per minute (more is better)", *(f"{name} (less is better)" for name, _ in FIGURES)]
    picture = make_subplots(rows=len(titles), cols=1, subplot_titles=titles)
    for number, policy in enumerate(plan.policies):
        bars: list[list[tuple[str, float]]] = [[] for _ in titles]
        for trace in plan.traces:
            for shape in plan.shapes:
                name = f"{Path(trace).name} {shape}"
                goodput = report.mean_goodput_per_s(trace, policy, shape)
                bars[0] += [] if goodput is None else [(name, goodput * 60)]
                for load in sorted({run.plan.load for run in report.runs if run.plan.load is not None}):
                    if cell := report.cell(trace, load, policy, shape):
                        for row, (_, figure) in enumerate(FIGURES, start=1):
                            bars[row].append((f"{name} load {load:.3g}", mean([figure(run) for run in cell])))
        for row, shown in enumerate(bars, start=1):
            picture.add_trace(
                go.Bar(
                    name=policy,
                    legendgroup=policy,
                    showlegend=row == 1,
                    marker_color=COLOURS[number % len(COLOURS)],
                    x=[name for name, _ in shown],
                    y=[value for _, value in shown],
                ),
                row=row,
                col=1,
            )
    picture.update_layout(
        title=f"Baton replay, {plan.model}, {report.setting.started_at}, mean of {len(plan.seeds)} seeds"
        f"{'' if report.complete else ' (interrupted)'}",
        barmode="group",
        height=PANEL_HEIGHT_PX * len(titles),
    )
    picture.write_html(path, include_plotlyjs=True)
