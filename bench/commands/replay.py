"""Owns the command `replay`: recorded agent sessions over simulated GPUs."""

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


def replay(
    traces: Annotated[list[Path], typer.Argument(help="Files or folders of recorded traces (bench/trace_files.py).")],
    policies: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    shapes: Annotated[str, typer.Option(help="PREFILLxDECODE or aggregated-N, comma-separated.")] = "2x2,aggregated-4",
    seeds: Annotated[str, typer.Option(help="Comma-separated; each decides who arrives when.")] = "",
    load: Annotated[str, typer.Option(help="Loads to compare at, of the best other policy's goodput.")] = "0.25,1",
    rates: Annotated[str, typer.Option(help="Trajectories per second to compare at instead; no goodput then.")] = "",
    of_bound: Annotated[str, typer.Option(help="The same, as shares of the oracle's bound.")] = "",
    turns: Annotated[int | None, typer.Option(min=10, help="Turns of the measured cohort, about.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Prefill may fetch from decode (docs/adr/0017).")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Tune the published policies' constants first.")] = False,
    kv: Annotated[float, typer.Option(min=0.1, help="KV memory of each GPU, times what it has.")] = 1.0,
    model: Annotated[str, typer.Option(help="GPU and model (engine/roofline.py).")] = "qwen3-coder-30b-a3b-fp8-h100",
    shards: Annotated[int, typer.Option(min=1, help="Processes; each takes a core.")] = 2,
    json_file: JsonFile = None,
    resume: Annotated[Path | None, typer.Option(help="Take from this report (--json) what it has already.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short cohort, one seed.")] = False,
    check: Check = False,
) -> None:
    """Replay recorded agent sessions through what ships, in virtual time over simulated GPUs."""
    console = make_console()
    from bench.replay import REPLAYED
    from bench.replay_experiment import Experiment as ReplayExperiment
    from bench.replay_report import ReplayPlan, ReplayReport, goodput_table, run_tables, targets, tuning_table
    from bench.replay_tuning import TUNING_SEED
    from bench.traces import TraceError
    from engine.roofline import ROOFLINES
    from gateway.routing.policies import POLICIES

    draw = drawing(plot, "replay_plot")
    check_names(parse_names(policies), REPLAYED, "--policies")
    if model not in ROOFLINES:
        fail(f"--model is {model!r}; there are {', '.join(ROOFLINES)}")
    parsed = parse_shapes(shapes, "--shapes")
    if tune and TUNING_SEED in parse_reals(seeds, "--seeds"):
        fail(f"--seeds has {TUNING_SEED}, with which constants are tuned; give others")
    if len({shape.num_gpus for shape in parsed}) > 1:
        fail(f"--shapes is {shapes!r}; shapes are compared, so give all the same number of GPUs")
    plan = ReplayPlan(
        tuple(str(path) for path in traces),
        parse_names(policies) or tuple(POLICIES),
        parsed,
        tuple(int(seed) for seed in parse_reals(seeds, "--seeds")) or ((0,) if quick else (0, 1)),
        model,
        turns or (400 if quick else 2500),
        parse_reals(load, "--load"),
        parse_reals(rates, "--rates"),
        parse_reals(of_bound, "--of-bound"),
        shards,
        reverse,
        tune,
        kv,
    )

    def save(report: ReplayReport) -> None:
        if json_file is not None:
            write_json(report, json_file)

    earlier: ReplayReport | None = None
    if resume is not None:
        try:
            earlier = msgspec.json.decode(resume.read_bytes(), type=ReplayReport)
        except (OSError, msgspec.DecodeError) as error:
            fail(f"--resume {resume} is no report of a replay: {error}")
    try:
        experiment = ReplayExperiment(
            plan, gather_setting(), lambda words: console.print(escape(words), soft_wrap=True), save, earlier
        )
    except (TraceError, OSError) as error:
        fail(str(error))
    with attempt(console, kept="the runs that had not ended are left out") as outcome:
        experiment.run()
    report = experiment.report
    for trace in report.traces:
        console.print(
            f"{trace.path}: {trace.num_trajectories:,} trajectories, {trace.num_turns:,} turns "
            f"({trace.num_cut_turns} cut off), bound {trace.bound_per_gpu_s * 60:.3g} trajectories per minute and GPU",
            soft_wrap=True,
        )
    if report.tuned:
        console.print(tuning_table(report))
    if report.goodputs:
        console.print(goodput_table(report))
    for table in run_tables(report):
        console.print(table)
    for failure in report.failed:
        console.print(f"[red]failed:[/] {escape(str(failure.plan))}: {escape(failure.error)}", soft_wrap=True)
    if draw is not None and plot is not None:
        draw(report, plot)
    missed = num_missed(console, targets(plan), report) if check else 0
    end(report.complete, missed or report.failed, outcome)
