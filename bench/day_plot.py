"""Owns the picture of days: one HTML file that needs nothing else, with the pools and the turns in time by the hour."""

from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.day_report import ScalingReport
from bench.plot import COLOURS, PANEL_HEIGHT_PX


def draw(report: ScalingReport, path: Path) -> None:
    """Writes the HTML file. Raises OSError."""
    plan = report.plan
    days = [(name, traffic, seed) for name, traffic in plan.traffics for seed in plan.seeds]
    titles = [
        title
        for name, _, seed in days
        for title in (f"{name}, seed {seed}: replicas", f"{name}, seed {seed}: turns in time, by the hour")
    ]
    picture = make_subplots(rows=len(titles), cols=1, subplot_titles=titles)
    for number, (_, traffic, seed) in enumerate(days):
        for day in report.of(traffic, seed):
            hours = [moment.at_s / 3600 for moment in day.moments]
            if day.plan.scaled:
                for line, sizes in enumerate(
                    ([m.prefill for m in day.moments], [m.prefill + m.decode for m in day.moments])
                ):
                    name = f"{('prefill', 'prefill and decode')[line]}, at most {day.plan.most}"
                    colour = COLOURS[(line + 1) % len(COLOURS)]
                    trace = go.Scatter(x=hours, y=sizes, name=name, line={"shape": "hv", "color": colour})
                    picture.add_trace(trace, row=2 * number + 1, col=1)
            width_h = traffic.day_s / 3600 / len(day.hourly_share)
            middles = [(index + 0.5) * width_h for index in range(len(day.hourly_share))]
            shares = go.Scatter(x=middles, y=list(day.hourly_share), name=day.plan.name, mode="lines")
            picture.add_trace(shares, row=2 * number + 2, col=1)
    picture.update_layout(
        title=f"Baton, a day of simulated GPUs, {plan.model}, {report.setting.started_at}"
        f"{'' if report.complete else ' (interrupted)'}",
        height=PANEL_HEIGHT_PX * len(titles),
    )
    picture.write_html(path, include_plotlyjs=True)
