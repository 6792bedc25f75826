"""Owns the picture of `bench decisions`: one HTML file that needs nothing else."""

from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.decisions_report import DecisionsReport


def draw(report: DecisionsReport, path: Path) -> None:
    """Writes the HTML file. Raises OSError."""
    titles = ("decision p50, CPU ms, by replicas", "CPU ms per request, by requests", "CPU ms per request, by replicas")
    picture = make_subplots(rows=3, cols=1, subplot_titles=titles)
    for policy in report.plan.policies:
        found = [d for d in report.decisions if d.policy == policy]
        line = go.Scatter(name=policy, x=[d.replicas for d in found], y=[d.decision_ms.p50 for d in found])
        picture.add_trace(line, row=1, col=1)
    for row, loads, name in ((2, report.by_requests, "requests"), (3, report.by_replicas, "replicas")):
        x = [getattr(load, name) for load in loads]
        for label, y in (
            ("mean", [load.request_ms for load in loads]),
            ("last tenth", [load.last_tenth_ms for load in loads]),
        ):
            picture.add_trace(go.Scatter(name=f"{label}, by {name}", x=x, y=y), row=row, col=1)
    for row in (1, 2, 3):
        picture.update_xaxes(type="log", row=row, col=1)
        picture.update_yaxes(rangemode="tozero", row=row, col=1)
    picture.update_layout(title=f"Baton decisions, {report.setting.started_at}, {report.setting.cpu_model}", height=960)
    picture.write_html(path, include_plotlyjs=True)
