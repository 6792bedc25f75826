"""Owns the command `reverse`: KV that goes back from decode to prefill."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import JsonFile
from bench.commands.terminal import DEFAULT_CONFIGS, attempt, end, fail, make_console
from bench.results import EngineKind, gather_setting, write_json
from gateway.settings import ConfigError, load


def reverse(
    rounds: Annotated[int | None, typer.Option(min=1, help="Trials of each; default: 5, with --quick 2.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the tokens, and in which order sources take their turns.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools; one of each is started.")] = DEFAULT_CONFIGS[
        EngineKind.VLLM
    ],
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two cells only.")] = False,
) -> None:
    """Serve a session's second turn with KV from prefill's cache, from decode, or from nowhere, and compare."""
    console = make_console()
    import asyncio

    from bench.reverse import ReverseExperiment
    from bench.reverse_report import FULL_CELLS, QUICK_CELLS, ReversePlan, make_report, table
    from engine.protocol import EngineGoneError

    try:
        settings = load(config)
    except ConfigError as error:
        fail(str(error))
    if settings.simulation is not None or not settings.pools.prefill.replicas:
        fail(f"{config} must have real engines in both pools; use {DEFAULT_CONFIGS[EngineKind.VLLM]}")
    plan = ReversePlan(str(config), QUICK_CELLS if quick else FULL_CELLS, rounds or (2 if quick else 5), seed)
    experiment = ReverseExperiment(plan, settings, console.print)
    kept = "the engines are stopped, and what is done is kept"
    with attempt(console, TimeoutError, RuntimeError, EngineGoneError, kept=kept) as outcome:
        asyncio.run(experiment.run())
    report = make_report(plan, gather_setting(), experiment.trials, outcome.is_whole)
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    end(outcome.is_whole, any(one.differing for one in report.medians), outcome)
