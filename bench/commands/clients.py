"""Owns the command `clients`: our load generator beside others', under the same load."""

import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import (
    DEFAULT_CONFIGS,
    attempt,
    check_names,
    end,
    fail,
    heal,
    make_console,
    num_missed,
    parse_names,
    say_autogroups,
)
from bench.interrupts import end_at_once
from bench.packages import InstallFailed, executable
from bench.results import EngineKind, gather_setting, write_json
from bench.systems import make_system
from gateway.settings import ConfigError, load

SEEDS = 2**31


def clients(
    names: Annotated[str | None, typer.Option("--clients", help="Default: bench load,aiperf,guidellm.")] = None,
    url: Annotated[str | None, typer.Option(help="A server that runs, without /v1. Default: one is started.")] = None,
    config: Annotated[
        Path, typer.Option(help="What is started; the clients read the tokenizer of its model.")
    ] = DEFAULT_CONFIGS[EngineKind.VLLM],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 250,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    measured_s: Annotated[float | None, typer.Option(min=1.0, help="Seconds of each turn. Default: 30.")] = None,
    warm_up_s: Annotated[float, typer.Option(min=1.0, help="Before them, not measured.")] = 5.0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each client. Default: 4, with --quick 1.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides the prompts. Default: a new one, so that no cache has them.")
    ] = None,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: one round of fifteen seconds.")] = False,
    check: Check = False,
) -> None:
    """Put the same load on one server by our generator and by others, and compare what they say of it."""
    console = make_console()
    from bench.load_server import ServerError, facts
    from bench.outside import ClientsExperiment
    from bench.outside_clients import CLIENTS, PACKAGES, Workload
    from bench.outside_report import TARGETS, ClientsPlan, conclusions, table

    chosen = tuple(CLIENTS) if names is None else parse_names(names)
    check_names(chosen, CLIENTS, "--clients")
    try:
        settings = load(config)
        served = None if url is None else facts(url, None, None)
    except (ConfigError, ServerError) as error:
        fail(str(error))
    own_kind = EngineKind.VLLM if settings.simulation is None else EngineKind.SIMULATED
    plan = ClientsPlan(
        config=str(config),
        url=url,
        engine=own_kind if served is None else served.engine,
        clients=chosen,
        workload=Workload(
            prompt_tokens, output_tokens, concurrency, warm_up_s, measured_s or (15.0 if quick else 30.0)
        ),
        rounds=rounds or (1 if quick else 4),
        seed=secrets.randbelow(SEEDS) if seed is None else seed,
    )
    end_at_once()
    packages = [PACKAGES[name] for name in chosen if name in PACKAGES]
    try:
        programs = {package.name: [str(executable(package))] for package in packages}
    except InstallFailed as error:
        fail(f"{error}\n{error.log_tail}")
    setting = gather_setting()
    setting = replace(setting, versions=setting.versions | {package.name: package.version for package in packages})
    say_autogroups(console, setting)
    heal(console)
    experiment = ClientsExperiment(
        plan,
        make_system("baton", settings, config) if served is None else None,
        settings.model_name if served is None else served.model,
        Path(settings.model.path),
        {name: programs.get(name, [sys.executable, "-m", "bench"]) for name in chosen},
        setting,
        lambda text: console.print(escape(text), soft_wrap=True),
    )

    def save() -> None:
        if json_file is not None:
            write_json(experiment.report, json_file)

    with attempt(console) as outcome:
        experiment.run(save)
    save()
    report = experiment.report
    console.print(table(report))
    for line in conclusions(report):
        console.print(escape(line), soft_wrap=True)
    missed = num_missed(console, TARGETS, report) if check else 0
    end(report.complete, missed or report.failures, outcome)
