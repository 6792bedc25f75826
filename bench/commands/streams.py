"""Owns the command `streams`: very many slow streams at once."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import DEFAULT_CONFIGS, attempt, end, fail, heal, make_console, num_missed
from bench.results import EngineKind, gather_setting, write_json
from bench.systems import make_system
from gateway.settings import ConfigError


def streams(
    streams: Annotated[int | None, typer.Option(min=1, help="Streams open at once.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(min=0.1, help="What all streams get together.")] = None,
    ramp_per_s: Annotated[float, typer.Option(min=0.1, help="Streams opened per second, at most.")] = 100.0,
    settle_s: Annotated[
        float | None, typer.Option(min=0.0, help="From the last stream opened to the start of the window.")
    ] = None,
    measure_s: Annotated[float | None, typer.Option(min=1.0, help="How long the window is.")] = None,
    config: Annotated[Path, typer.Option(help="One simulated engine.")] = DEFAULT_CONFIGS[EngineKind.SIMULATED],
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer streams and tokens.")] = False,
    check: Check = False,
) -> None:
    """Hold very many slow streams on one gateway replica over a simulated engine."""
    console = make_console()
    # These import aiohttp, and what the gateway's client needs; `--help` has no use for them.
    from bench.stream_report import TARGETS as STREAM_TARGETS
    from bench.stream_report import StreamsPlan, StreamsReport, table
    from bench.streams import (
        StreamsExperiment,
        config_file,
        haproxy_streams,
        make_prompts,
        raise_open_files,
        settings_for,
    )
    from engine.vocabulary import read_vocabulary

    plan = StreamsPlan(
        config=str(config),
        streams=streams or (1_000 if quick else 10_000),
        tokens_per_s=tokens_per_s or (500.0 if quick else 5_000.0),
        ramp_per_s=ramp_per_s,
        measure_s=measure_s or (10.0 if quick else 30.0),
        settle_s=settle_s if settle_s is not None else (5.0 if quick else 30.0),
    )
    try:
        settings = settings_for(plan)
        open_files = raise_open_files(plan.streams)
        vocabulary = read_vocabulary(settings.model.path).plain
    except (ConfigError, ValueError) as error:
        fail(str(error))
    heal(console)
    started = StreamsReport(False, plan, gather_setting(), haproxy_streams(settings, plan.streams, open_files))
    with config_file(settings) as file, attempt(console) as outcome:
        experiment = StreamsExperiment(
            plan,
            settings,
            make_system("baton", settings, file),
            vocabulary,
            make_prompts(vocabulary),
            started,
            console.print,
        )
        experiment.run()
    report = experiment.report
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    missed = num_missed(console, STREAM_TARGETS, report) if check else 0
    end(report.complete, missed, outcome)
