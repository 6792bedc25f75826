"""Owns the command `scaling`: a day of traffic over simulated GPUs, with pools that are sized as it goes on."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import (
    attempt,
    check_names,
    drawing,
    end,
    fail,
    make_console,
    num_missed,
    parse_names,
    parse_reals,
    parse_shapes,
)
from bench.results import gather_setting, write_json


def scaling(
    trace: Annotated[Path, typer.Argument(help="A file or folder of recorded traces (bench/trace_files.py).")],
    per_minute: Annotated[float, typer.Option(min=0.001, help="Trajectories a minute, the mean of the day.")] = 0.8,
    traffic: Annotated[str, typer.Option(help="diurnal, bursty: the same with bursts; comma-separated.")] = "bursty",
    hours: Annotated[float, typer.Option(min=0.5, help="How long the day is: with less, load changes faster.")] = 24.0,
    static: Annotated[str, typer.Option(help="Fixed pools to compare with: PREFILLxDECODE or aggregated-N.")] = (
        "1x6,1x7,1x8,aggregated-7,aggregated-8"
    ),
    most: Annotated[str, typer.Option(help="The most replicas of sized pools, in the same form.")] = "6x10",
    seeds: Annotated[str, typer.Option(help="Comma-separated; each decides who arrives when.")] = "",
    policy: Annotated[str, typer.Option(help="What places requests.")] = "baton",
    model: Annotated[str, typer.Option(help="GPU and model (engine/roofline.py).")] = "qwen3-coder-30b-a3b-fp8-h100",
    shards: Annotated[int, typer.Option(min=1, help="Processes; each takes a core.")] = 2,
    json_file: JsonFile = None,
    resume: Annotated[
        list[Path] | None, typer.Option(help="Take from this report (--json) the runs that it has; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A day of two hours, and one fixed size.")] = False,
    check: Check = False,
) -> None:
    """Replay a day of traffic: GPU-hours of pools that follow it, against pools of a fixed size."""
    console = make_console()
    from bench.day import DayFigures, Traffic
    from bench.day_experiment import Experiment
    from bench.day_report import ScalingPlan, ScalingReport, day_tables, targets
    from bench.replay import REPLAYED
    from bench.traces import TraceError
    from engine.roofline import ROOFLINES

    draw = drawing(plot, "day_plot")
    check_names([policy], REPLAYED, "--policy")
    if model not in ROOFLINES:
        fail(f"--model is {model!r}; there are {', '.join(ROOFLINES)}")
    day_s = (2.0 if quick else hours) * 3600
    bursty = Traffic(per_minute / 60, day_s)
    known = {"diurnal": Traffic(per_minute / 60, day_s, num_bursts=0), "bursty": bursty}
    check_names(parse_names(traffic), known, "--traffic")
    fixed, limits = parse_shapes(static, "--static"), parse_shapes(most, "--most")
    plan = ScalingPlan(
        str(trace),
        policy,
        model,
        tuple((name, known[name]) for name in parse_names(traffic)),
        tuple(int(seed) for seed in parse_reals(seeds, "--seeds")) or (0,),
        fixed[:1] if quick else fixed,
        limits,
        shards,
    )

    earlier: list[DayFigures] = []
    for file in resume or ():
        try:
            earlier += msgspec.json.decode(file.read_bytes(), type=ScalingReport).days
        except (OSError, msgspec.DecodeError) as error:
            fail(f"--resume {file} is no report of this benchmark: {error}")

    def save(report: ScalingReport) -> None:
        if json_file is not None:
            write_json(report, json_file)

    try:
        experiment = Experiment(
            plan, gather_setting(), lambda words: console.print(escape(words), soft_wrap=True), save, earlier
        )
    except (TraceError, OSError) as error:
        fail(str(error))
    with attempt(console, kept="the runs that had not ended are left out") as outcome:
        experiment.run()
    report = experiment.report
    for table in day_tables(report):
        console.print(table)
    if draw is not None and plot is not None:
        draw(report, plot)
    missed = num_missed(console, targets(), report) if check else 0
    end(report.complete, missed or report.failed, outcome)
