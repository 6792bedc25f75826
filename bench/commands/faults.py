"""Owns the command `faults`: real processes killed and stopped."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import FAULTS_CONFIG, STOPPED, attempt, end, fail, heal, make_console, parse_names
from bench.results import gather_setting, write_json
from gateway.settings import ConfigError, load


def faults(
    cases: Annotated[
        str, typer.Option(help="Patterns of cases' names, comma-separated, e.g. 'decode-*-kill-*'; default: all.")
    ] = "",
    results: Annotated[Path, typer.Option(help="One JSON file per case; a case that has one is not run again.")] = Path(
        "fault-results"
    ),
    again: Annotated[bool, typer.Option("--again", help="Run cases that have a result as well.")] = False,
    config: Annotated[Path, typer.Option(help="Real engines in both pools.")] = FAULTS_CONFIG,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: four cases.")] = False,
    check: Check = False,
) -> None:
    """Kill and stop real processes of a run with real engines while clients stream, and see what becomes of both."""
    console = make_console()
    import asyncio

    from bench.fault_cases import QUICK as QUICK_CASES
    from bench.fault_cases import all_cases, chosen
    from bench.fault_report import FaultsReport, checks, table
    from bench.faults import Experiment as FaultsExperiment

    patterns = parse_names(cases) or (QUICK_CASES if quick else ())
    planned = chosen(all_cases(), patterns)
    if not planned:
        fail(f"no case is called {cases!r}; names are like {all_cases()[0].name}")
    try:
        settings = load(config)
    except ConfigError as error:
        fail(str(error))
    if settings.simulation is not None or not settings.pools.prefill.replicas:
        fail(f"{config} must have real engines in both pools; use {FAULTS_CONFIG}")
    heal(console)
    setting = gather_setting()
    experiment = FaultsExperiment(config, settings, results, planned, again, setting.git_commit, console.print)
    with attempt(console, TimeoutError, RuntimeError, kept=f"{STOPPED}, and what is done is kept") as outcome:
        asyncio.run(experiment.run())
    done = tuple(experiment.results[case.name] for case in planned if case.name in experiment.results)
    report = FaultsReport(
        outcome.is_whole, str(config), experiment.cold_start_s, tuple(case.name for case in planned), done, setting
    )
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(done))
    missed = 0
    if check:
        for line in checks(report, all_cases(), is_quick=quick or bool(cases)):
            console.print(line.line(), soft_wrap=True)
            missed += not line.is_met
    end(outcome.is_whole, missed, outcome)
