"""Owns the command `rolling`: new engine arguments deployed under load."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import FAULTS_CONFIG, attempt, end, fail, heal, make_console, num_missed
from bench.results import gather_setting, write_json
from gateway.settings import ConfigError, load


def rolling(
    clients: Annotated[int | None, typer.Option(min=1, help="That stream at once; default: 4, with --quick 2.")] = None,
    seed: Annotated[int, typer.Option(help="Decides what clients ask for.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools, two or more of each.")] = FAULTS_CONFIG,
    other_format: Annotated[
        bool,
        typer.Option("--other-format", help="The new engines exchange no KV with the old ones (handoff.kv_format)."),
    ] = False,
    json_file: JsonFile = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the ends of the logs here if something went wrong.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer clients, and fewer answers to compare.")] = False,
    check: Check = False,
) -> None:
    """Deploy new engine arguments while clients stream: every replica is replaced, and no request may fail."""
    console = make_console()
    import asyncio

    from bench.rolling import RollingUpdate
    from bench.rolling_report import RollingPlan, num_replicas, table, targets

    try:
        settings = load(config)
    except ConfigError as error:
        fail(str(error))
    if settings.simulation is not None or min(num_replicas(settings).values()) < 2:
        fail(f"{config} must have two gateways and two real engines in each pool; use {FAULTS_CONFIG}")
    plan = RollingPlan(str(config), clients or (2 if quick else 4), 5.0 if quick else 15.0, seed, other_format)
    heal(console)
    experiment = RollingUpdate(plan, config, settings, gather_setting(), console.print)
    with attempt(console, TimeoutError, RuntimeError) as outcome:
        asyncio.run(experiment.run(logs))
    report = experiment.report
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    for trouble in report.troubles:
        console.print(f"[red]{escape(str(trouble))}[/]", soft_wrap=True)
    missed = num_missed(console, targets(plan, num_replicas(settings)), report) if check else 0
    end(report.complete, missed, outcome)
