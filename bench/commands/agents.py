"""Owns the command `agents`: tool-looping agents on real engines."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import attempt, end, fail, heal, make_console, num_missed, parse_names
from bench.results import gather_setting, write_json
from bench.systems import make_system
from gateway.settings import ConfigError, load

AGENTS_CONFIG = Path("configs/local-2p2d.yaml")


def agents(
    policies: Annotated[
        str, typer.Option(help="Two, comma-separated: what is compared with, and what is measured.")
    ] = "least-tokens,baton",
    agents: Annotated[int, typer.Option(min=1, help="That run at once.")] = 20,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each policy; default: 4, with --quick 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides tasks, results of tools and pauses.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools, two or more of each.")] = AGENTS_CONFIG,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: one round of fewer turns.")] = False,
    check: Check = False,
) -> None:
    """Let tool-looping agents work at once on real engines, by one policy and by another in turns."""
    console = make_console()
    from bench.agent_asks import TURNS
    from bench.agents import AgentsExperiment
    from bench.agents_report import TARGETS as AGENTS_TARGETS
    from bench.agents_report import AgentsPlan, ratio_lines, table
    from gateway.client import GatewayError
    from gateway.routing.policies import POLICIES
    from gateway.runtime.control import OrderFailed

    chosen = parse_names(policies)
    if len(chosen) != 2 or chosen[0] == chosen[1] or not set(chosen) <= set(POLICIES):
        fail(f"--policies is {policies!r}; give two of {', '.join(POLICIES)}, with a comma between them")
    try:
        settings = load(config)
    except ConfigError as error:
        fail(str(error))
    if settings.simulation is not None or min(settings.pools.prefill.replicas, settings.pools.decode.replicas) < 2:
        fail(f"{config} must have two real engines in each pool; use {AGENTS_CONFIG}")
    turns = (3, 4) if quick else TURNS
    plan = AgentsPlan(str(config), (chosen[0], chosen[1]), agents, turns, rounds or (1 if quick else 4), seed)
    heal(console)
    experiment = AgentsExperiment(plan, make_system("baton", settings, config), gather_setting(), console.print)

    def save() -> None:
        if json_file is not None:
            write_json(experiment.report, json_file)

    with attempt(console, TimeoutError, RuntimeError, GatewayError, OrderFailed) as outcome:
        experiment.run(save)
    save()
    report = experiment.report
    console.print(table(report), *ratio_lines(report), sep="\n")
    for error in report.errors:
        console.print(f"[red]failed:[/] {escape(error)}", soft_wrap=True)
    missed = num_missed(console, AGENTS_TARGETS, report) if check else 0
    end(report.complete, missed, outcome)
