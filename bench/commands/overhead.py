"""Owns the command `overhead`: Baton beside other systems, over real or simulated engines."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import (
    DEFAULT_CONFIGS,
    attempt,
    drawing,
    end,
    fail,
    heal,
    make_console,
    parse_names,
    parse_numbers,
)
from bench.results import (
    EmitterCost,
    EngineKind,
    Ledger,
    Plan,
    cpu_table,
    gather_setting,
    latency_table,
    measured,
    stage_table,
    verdict_line,
    write_json,
)
from bench.stats import SIMULATED_TARGETS, TARGETS, Cell, judge
from bench.systems import SIMULATED_SYSTEM_NAMES, SYSTEM_NAMES, check_comparable, check_simulated, make_system
from engine.protocol import Phase
from gateway.settings import ConfigError, Settings, load

if TYPE_CHECKING:
    from bench.overhead import PromptMaker

FULL = Plan(
    config="",
    systems=("bare", "router-stock", "router-equal", "baton"),
    concurrency=(1, 8, 32),
    prompt_tokens=(250, 2000),
    output_tokens=(64, 256),
    rounds=3,
    requests=None,
    cell_seconds=30.0,
)
QUICK = Plan(
    config="",
    systems=("bare", "baton", "router-equal"),
    concurrency=(1, 8),
    prompt_tokens=(250,),
    output_tokens=(64,),
    rounds=1,
    requests=None,
    cell_seconds=30.0,
)
SIMULATED_FULL = replace(
    FULL,
    systems=SIMULATED_SYSTEM_NAMES,
    concurrency=(64, 256),
    prompt_tokens=(250,),
    output_tokens=(256,),
    engine=EngineKind.SIMULATED,
)
PRESETS = {
    (EngineKind.VLLM, False): FULL,
    (EngineKind.VLLM, True): QUICK,
    (EngineKind.SIMULATED, False): SIMULATED_FULL,
    (EngineKind.SIMULATED, True): replace(SIMULATED_FULL, rounds=1, cell_seconds=10.0),
}


def overhead(
    systems: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, of: {', '.join(SYSTEM_NAMES)}; over simulated engines: "
            f"{', '.join(SIMULATED_SYSTEM_NAMES)}."
        ),
    ] = "",
    engine: Annotated[
        EngineKind, typer.Option(help="simulated: engines that emit faster than any front end can take.")
    ] = EngineKind.VLLM,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, comma-separated.")] = "",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths, comma-separated.")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each system.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests per cell; default: 16, or 3 x concurrency if that is more.")
    ] = None,
    cell_seconds: Annotated[
        float | None, typer.Option(min=1.0, help="No request of a cell is sent later than this.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the tokens of all prompts.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            help="One prefill and one decode engine on CPUs, or one simulated engine; default: "
            f"{', '.join(str(path) for path in DEFAULT_CONFIGS.values())}."
        ),
    ] = None,
    json_file: JsonFile = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the medians into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: fewer systems, cells and rounds.")] = False,
    check: Check = False,
) -> None:
    """Compare Baton with one bare vLLM server and with vllm-router over a prefill and a decode server."""
    console = make_console()
    preset = PRESETS[engine, quick]
    config = config or DEFAULT_CONFIGS[engine]
    simulated = engine is EngineKind.SIMULATED
    plan = replace(
        preset,
        config=str(config),
        systems=parse_names(systems) or preset.systems,
        concurrency=parse_numbers(concurrency, "--concurrency") or preset.concurrency,
        prompt_tokens=parse_numbers(prompt_tokens, "--prompt-tokens") or preset.prompt_tokens,
        output_tokens=parse_numbers(output_tokens, "--output-tokens") or preset.output_tokens,
        rounds=rounds or preset.rounds,
        requests=requests,
        cell_seconds=cell_seconds or preset.cell_seconds,
        seed=seed,
    )
    try:
        settings = load(config)
        (check_simulated if simulated else check_comparable)(settings)
        if settings.simulation is not None:
            plan = replace(plan, decode_step_ms=settings.simulation.decode_step_s * 1000)
        chosen = [make_system(name, settings, config) for name in plan.systems]
    except (ConfigError, ValueError) as error:
        fail(str(error))
    draw = drawing(plot_file, "plot")
    heal(console)

    # These import vLLM's dependencies, which take seconds.
    from bench.overhead import Experiment, PromptMaker

    ledger = Ledger(plan, gather_setting())

    def save(complete: bool = False) -> None:
        if json_file is not None:
            write_json(ledger.report(complete), json_file)

    prompts = PromptMaker(settings.model.path, settings.model.trust_remote_code, seed)
    emitters = _emitters(settings, plan, prompts) if simulated else {}
    ledger.emitters = tuple(EmitterCost(cell, cpu_s * 1000) for cell, cpu_s in emitters.items())
    experiment = Experiment(ledger, chosen, settings.model_name, prompts, console, save, emitters)
    with attempt(console) as outcome:
        experiment.run()
    save(outcome.is_whole)
    report = ledger.report(outcome.is_whole)
    console.print(latency_table(report), cpu_table(report), sep="\n\n")
    if (stages := stage_table(report)) is not None:
        console.print(stages)
    if draw is not None and plot_file is not None:
        draw(report, plot_file)
    missed = 0
    if check:
        figures = measured(report)
        for verdict in (judge(target, figures) for target in (SIMULATED_TARGETS if simulated else TARGETS)):
            console.print(verdict_line(verdict, needs_figure=not quick), soft_wrap=True)
            missed += not verdict.is_met and not (quick and verdict.ratio is None)
    end(outcome.is_whole, missed or report.start_failures, outcome)


def _emitters(settings: Settings, plan: Plan, prompts: "PromptMaker") -> dict[Cell, float]:
    """CPU seconds per token of the simulated engine alone, by cell."""
    from bench.emitter import measure
    from gateway.app import engine_spec

    config = engine_spec(settings, Phase.DECODE).simulated_config()
    return {
        cell: measure(config, prompts.make("emitter", 1, cell, cell.concurrency), cell.output_tokens)
        for cell in plan.cells()
    }
