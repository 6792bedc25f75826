"""Owns the command `interference`: what long prompts do to running streams, split and aggregated."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import (
    DEFAULT_CONFIGS,
    attempt,
    end,
    fail,
    heal,
    make_console,
    num_missed,
    parse_numbers,
    parse_reals,
)
from bench.results import EngineKind, gather_setting, write_json
from bench.systems import check_comparable
from gateway.settings import ConfigError, load


def interference(
    rates: Annotated[
        str | None, typer.Option(help="Long prompts per second, comma-separated; 0: none. Default: 0,0.25,0.5,1.")
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(help="Prompt tokens a step of an aggregated engine reads at most. Default: 512,2048,8192."),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Answers that are written at any time.")] = 8,
    storm_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each long prompt.")] = 4000,
    window: Annotated[float | None, typer.Option(min=1.0, help="Seconds of each rate. Default: 20.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each system. Default: 2, with --quick 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides prompts and when they arrive.")] = 0,
    config: Annotated[Path, typer.Option(help="One prefill and one decode engine, on a core each.")] = DEFAULT_CONFIGS[
        EngineKind.VLLM
    ],
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: one round, one chunk size, two rates.")] = False,
    check: Check = False,
) -> None:
    """Write streams while long prompts arrive: the time between tokens, split and aggregated, on equal cores."""
    console = make_console()
    from bench.interference import InterferenceExperiment, make_systems
    from bench.interference_report import TARGETS, InterferencePlan, conclusions, table

    try:
        settings = load(config)
        check_comparable(settings)
    except (ConfigError, ValueError) as error:
        fail(str(error))
    plan = InterferencePlan(
        config=str(config),
        chunks=parse_numbers(chunks or ("2048" if quick else "512,2048,8192"), "--chunks"),
        rates_per_s=parse_reals(rates or ("0,0.5" if quick else "0,0.25,0.5,1"), "--rates"),
        streams=streams,
        prompt_tokens=100,
        answer_tokens=200,
        storm_tokens=storm_tokens,
        storm_answer_tokens=4,
        window_s=window or (8.0 if quick else 20.0),
        rounds=rounds or (1 if quick else 2),
        seed=seed,
    )
    heal(console)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        try:
            systems = make_systems(plan, settings, Path(folder))
        except (ConfigError, ValueError) as error:
            fail(str(error))
        experiment = InterferenceExperiment(plan, systems, settings, gather_setting(), console.print)

        def save() -> None:
            if json_file is not None:
                write_json(experiment.report, json_file)

        with attempt(console, ValueError) as outcome:
            experiment.run(save)
        save()
    report = experiment.report
    console.print(table(report))
    for line in conclusions(report):
        console.print(escape(line), soft_wrap=True)
    for one in report.storms:
        for error in one.errors:
            console.print(f"[red]{one.system}, {one.rate_per_s:g} prompts/s:[/] {escape(error)}", soft_wrap=True)
    missed = num_missed(console, TARGETS, report) if check else 0
    end(report.complete, missed, outcome)
