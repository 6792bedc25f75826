"""Owns the command `overload`: far more requests than there is capacity for."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import DEFAULT_CONFIGS, attempt, end, fail, heal, make_console, num_missed
from bench.results import EngineKind, gather_setting, write_json
from bench.systems import make_system
from gateway.settings import ConfigError, load


def overload(
    engine: Annotated[
        EngineKind, typer.Option(help="simulated: in virtual time; vllm: `baton serve` over real engines.")
    ] = EngineKind.SIMULATED,
    factor: Annotated[
        float | None, typer.Option(min=1.0, help="Requests offered, of those answered at the best rate.")
    ] = None,
    overload_s: Annotated[float | None, typer.Option(min=1.0, help="How long the overload lasts.")] = None,
    deadline_s: Annotated[float | None, typer.Option(min=0.1, help="A first token later than this is late.")] = None,
    seed: Annotated[int, typer.Option(help="Decides who arrives when and asks for what.")] = 0,
    config: Annotated[Path, typer.Option(help="With --engine vllm: what is served.")] = DEFAULT_CONFIGS[
        EngineKind.VLLM
    ],
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter loads.")] = False,
    check: Check = False,
) -> None:
    """Ask for far more than there is capacity for, and see what is answered in time and how the rest is refused."""
    console = make_console()
    from bench.overload_report import OverloadPlan, OverloadReport, table, targets

    if engine is EngineKind.SIMULATED:
        preset = OverloadPlan(engine, 2.0, 5.0, overload_s=600.0, capacity_s=120.0, normal_s=60.0)
        short = replace(preset, overload_s=60.0, capacity_s=30.0, normal_s=30.0)
    else:
        preset = OverloadPlan(engine, 3.0, 2.0, overload_s=60.0, capacity_s=20.0, config=str(config))
        short = replace(preset, overload_s=30.0, capacity_s=10.0)
    preset = short if quick else preset
    plan = replace(
        preset,
        deadline_s=deadline_s or preset.deadline_s,
        factor=factor or preset.factor,
        overload_s=overload_s or preset.overload_s,
        seed=seed,
    )
    report = OverloadReport(False, plan, gather_setting())
    with attempt(console) as outcome:
        if engine is EngineKind.SIMULATED:
            from bench.overload import SCENARIOS, Overload

            for scenario in SCENARIOS:
                console.print(escape(f"{scenario.name} ..."))
                report = replace(report, scenarios=(*report.scenarios, Overload(plan, scenario).run()))
        else:
            from bench.overload_live import LiveOverload

            try:
                settings = load(config)
                system = make_system("baton", settings, config)
            except (ConfigError, ValueError) as error:
                fail(str(error))
            heal(console)
            report = replace(report, live=LiveOverload(plan, settings.model_name, system, console.print).run())
        report = replace(report, complete=True)
    if json_file is not None:
        write_json(report, json_file)
    if report.scenarios or report.live:
        console.print(table(report))
    for error in report.live.errors if report.live else ():
        console.print(f"[red]failed:[/] {escape(error)}", soft_wrap=True)
    missed = num_missed(console, targets(engine), report) if check else 0
    end(report.complete, missed, outcome)
