"""Owns the picture of a report: one HTML file that needs nothing else, with the medians of every cell as bars."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.results import Report
from bench.stats import Figures

PANEL_HEIGHT_PX = 320
COLOURS = ("#888888", "#c9772b", "#2f7fb8", "#2a9d4b", "#555555")


@dataclass(frozen=True)
class Panel:
    title: str
    figure: Callable[[Figures], float]


PANELS = (
    Panel("TTFT p50, ms (less is better)", lambda figures: figures.ttft_ms.p50),
    Panel("ITL p50, ms (less is better)", lambda figures: figures.itl_ms.p50),
    Panel("tokens per second (more is better)", lambda figures: figures.tokens_per_s),
    Panel(
        "CPU seconds outside the engines per 1,000 tokens (less is better)",
        lambda figures: figures.outside_engine_cpu_s_per_1000_tokens,
    ),
)


def draw(report: Report, path: Path) -> None:
    """Writes the HTML file. Raises OSError."""
    picture = make_subplots(rows=len(PANELS), cols=1, subplot_titles=[panel.title for panel in PANELS])
    for row, panel in enumerate(PANELS, start=1):
        for number, system in enumerate(report.plan.systems):
            shown = [
                (str(entry.cell), panel.figure(entry.median))
                for cell in report.plan.cells()
                for entry in report.cells
                if entry.cell == cell and entry.system == system and entry.median is not None
            ]
            picture.add_trace(
                go.Bar(
                    name=system,
                    legendgroup=system,
                    showlegend=row == 1,
                    marker_color=COLOURS[number % len(COLOURS)],
                    x=[cell for cell, _ in shown],
                    y=[value for _, value in shown],
                ),
                row=row,
                col=1,
            )
    setting = report.setting
    heading = f"{report.heading}, " if report.heading else ""
    picture.update_layout(
        title=f"Baton overhead, {heading}{setting.started_at}, {setting.cpu_model}, {setting.num_cores} cores, "
        f"medians of {report.plan.rounds} rounds{'' if report.complete else ' (interrupted)'}",
        barmode="group",
        height=PANEL_HEIGHT_PX * len(PANELS),
    )
    picture.write_html(path, include_plotlyjs=True)
