"""Owns the command `compare`: systems in turns under the same load, and the page that says what came of it."""

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bench.commands.options import (
    DEFAULT_SLO,
    ApiKey,
    Check,
    JsonFile,
    LoadDurationS,
    LoadSeed,
    MaxLatenessMs,
    MaxPauseS,
    Model,
    RequestTimeoutS,
    Slo,
    WarmUpS,
)
from bench.commands.terminal import (
    DEFAULT_CONFIGS,
    attempt,
    drawing,
    end,
    fail,
    heal,
    make_console,
    num_missed,
    parse_names,
    parse_reals,
    say_autogroups,
)
from bench.compare_plan import AFTER_IT, IS_WHAT, WAKE_S, ComparePlan, Contestant, SystemKind, parse_contestants, plan
from bench.load_plan import LoadPlan, slo_of
from bench.load_progress import LoadProgress
from bench.results import EngineKind, gather_setting, write_json
from bench.workloads import WORKLOADS
from gateway.settings import ConfigError, Settings, load

START_AND_STOP_S = 45.0
"""Of a system on a CPU, to say beforehand how long a run takes."""


def _explained(kind: SystemKind) -> str:
    how = f" ({AFTER_IT[kind]})" if kind in AFTER_IT else ""
    return f"{kind}: {IS_WHAT[kind]}{how}"


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="BASELINE OTHER...",
            help="The first is what the others are compared with. " + "; ".join(map(_explained, SystemKind)),
        ),
    ],
    workload: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}; or a recorded trace.")] = "agents",
    config: Annotated[Path, typer.Option(help="Model, engines, and the cores or GPUs that every system gets.")] = (
        DEFAULT_CONFIGS[EngineKind.VLLM]
    ),
    rates: Annotated[
        str | None, typer.Option(help="Trajectories that arrive per second, comma-separated; default: --shares.")
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="Rates as shares of what the baseline can do, which is measured. Default: 0.4,0.8,1.2."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Trajectories at a time in that measurement.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each system.")] = 2,
    duration_s: LoadDurationS = None,
    warm_up_s: WarmUpS = None,
    drain_s: Annotated[float | None, typer.Option(min=0.0, help="How much longer sessions may go on.")] = None,
    scale: Annotated[
        float | None, typer.Option(min=0.001, help="Multiplies all lengths; default: so that the context holds them.")
    ] = None,
    max_pause_s: MaxPauseS = 2.0,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Default: what configuration or server say.")] = None,
    slo: Slo = DEFAULT_SLO,
    request_timeout_s: RequestTimeoutS = 120.0,
    max_lateness_ms: MaxLatenessMs = 50.0,
    model: Model = None,
    api_key: ApiKey = None,
    seed: LoadSeed = 0,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report as one page here.")] = None,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two rates of fifteen seconds.")] = False,
    check: Check = False,
) -> None:
    """Start systems in turns, load each with the same sessions, and say which serves them better and by how much."""
    console = make_console()
    from bench.compare import CompareExperiment, CompareFailed
    from bench.compare_report import targets
    from bench.compare_systems import make
    from bench.compare_words import conclusions, table
    from bench.load_server import ServerError
    from bench.load_text import PLAIN_TOKENS
    from bench.load_trace import fitting_scale, prepare, sessions
    from bench.streams import raise_open_files
    from bench.traces import TraceError

    draw = drawing(html_file, "compare_page")
    try:
        contestants = parse_contestants(systems)
        slos = tuple(slo_of(name) for name in parse_names(slo))
        settings = load(config)
    except (ConfigError, ValueError) as error:
        fail(str(error))
    if settings.simulation is not None:
        fail(f"{config} simulates its engines; compare real ones, e.g. with {DEFAULT_CONFIGS[EngineKind.VLLM]}")
    duration_s = duration_s or (15.0 if quick else 25.0)
    load_plan = LoadPlan(
        workload=workload,
        rate_per_s=None,
        concurrency=None,
        duration_s=duration_s,
        warm_up_s=duration_s / 5 if warm_up_s is None else warm_up_s,
        drain_s=drain_s if drain_s is not None else 2.0 if quick else 5.0,
        seed=seed,
        salt=secrets.token_hex(4),
        slos=slos,
        max_pause_s=max_pause_s,
        request_timeout_s=request_timeout_s,
        max_lateness_ms=max_lateness_ms,
    )
    if load_plan.warm_up_s >= duration_s:
        fail(f"--warm-up-s is {load_plan.warm_up_s:g}, not less than --duration-s, {duration_s:g}: nothing is measured")
    try:
        context = max_model_len or _context(contestants, settings, model, api_key)
        whole = sessions(load_plan)
        prepared = prepare(load_plan, whole, scale or fitting_scale(whole, context), context)
    except (TraceError, ServerError, OSError) as error:
        fail(str(error))
    if prepared.note:
        console.print(f"[yellow]{escape(prepared.note)}[/]", soft_wrap=True)
    chosen = plan(
        contestants,
        str(config),
        parse_reals(rates, "--rates") if rates else (),
        parse_reals(shares or ("0.5,1" if quick else "0.4,0.8,1.2"), "--shares"),
        rounds,
        prepared.plan,
        calibration_s=10.0 if quick else 20.0,
        concurrency=concurrency,
    )
    pools = (settings.pools.prefill, settings.pools.decode)
    if any(pool.engine.extra_args.get("load_format") == "dummy" for pool in pools):
        chosen = replace(chosen, has_random_weights=True)
    if not all((*chosen.rates_per_s, *chosen.shares)):
        fail("--rates and --shares must be above 0")
    heal(console)
    raise_open_files(0)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder, LoadProgress(console) as progress:
        try:
            made = {one.name: make(one, settings, config, Path(folder)) for one in contestants}
        except (ConfigError, ValueError) as error:
            fail(str(error))

        setting = gather_setting()
        say_autogroups(console, setting)
        _say_what_comes(console, chosen)

        def say(words: str) -> None:
            console.print(escape(words), soft_wrap=True)

        experiment = CompareExperiment(
            chosen, made, prepared.trace, PLAIN_TOKENS, model, api_key, setting, say, progress
        )

        def save() -> None:
            if json_file is not None:
                write_json(experiment.report, json_file)

        with attempt(console, CompareFailed) as outcome:
            experiment.run(save)
        save()
    report = experiment.report
    for failure in report.start_failures:
        console.print(f"[bold red]{failure.system} does not start:[/] {escape(failure.log_tail)}", soft_wrap=True)
    console.print(table(report))
    for sentence in conclusions(report):
        console.print(f"- {escape(sentence)}", soft_wrap=True)
    if html_file is not None and draw is not None:
        draw(report, html_file)
        console.print(f"report: {escape(str(html_file))}", soft_wrap=True)
    missed = num_missed(console, targets(report.plan, is_quick=quick), report) if check else 0
    end(report.complete, missed or report.start_failures, outcome)


def _context(contestants: Sequence[Contestant], settings: Settings, model: str | None, api_key: str | None) -> int:
    """The tokens that all can hold. Raises ServerError."""
    found: list[int | None] = []
    for one in contestants:
        match one.kind:
            case SystemKind.SERVER:
                from bench.load_server import facts

                found.append(facts(one.argument, model, api_key).max_model_len)
            case SystemKind.CONFIG:
                found.append(_settings(Path(one.argument)).model.max_model_len)
            case _:
                found.append(settings.model.max_model_len)
    if None in found:
        fail("neither configurations nor servers tell how many tokens the model holds; give --max-model-len")
    return min(tokens for tokens in found if tokens is not None)


def _settings(config: Path) -> Settings:
    try:
        return load(config)
    except ConfigError as error:
        fail(str(error))


def _say_what_comes(console: Console, chosen: ComparePlan) -> None:
    load_s = (chosen.load.duration_s + chosen.load.drain_s) * len(chosen.rates_per_s or chosen.shares) + WAKE_S
    minutes = len(chosen.systems) * chosen.rounds * (load_s + START_AND_STOP_S) / 60
    console.print(
        f"{chosen.load.workload}, lengths x {chosen.load.scale:.3g}, on {len(chosen.systems)} systems in "
        f"{chosen.rounds} rounds: about {minutes:.0f} minutes where a system starts within {START_AND_STOP_S:g} s; "
        "Ctrl-C ends it, and what was measured is reported",
        soft_wrap=True,
    )
