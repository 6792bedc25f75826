"""Owns the command line of the benchmarks: `python -m bench overhead`."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from bench.results import (
    Ledger,
    Plan,
    Report,
    cpu_table,
    gather_setting,
    latency_table,
    measured,
    verdict_line,
    write_json,
)
from bench.stats import TARGETS, judge
from bench.systems import SYSTEM_NAMES, check_comparable, make_system
from gateway.runtime import processes
from gateway.runtime.local import base_dir
from gateway.settings import ConfigError, load

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
DEFAULT_CONFIG = Path("configs/local.yaml")
INTERRUPTED = 130
WIDTH_WITHOUT_TERMINAL = 180

app = typer.Typer(
    help="Measures what Baton costs and gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def bench() -> None:
    """Keeps `overhead` a subcommand while it is the only one."""


@app.command()
def overhead(
    systems: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(SYSTEM_NAMES)}.")] = "",
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
    config: Annotated[Path, typer.Option(help="One prefill and one decode engine on CPUs.")] = DEFAULT_CONFIG,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the medians into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: fewer systems, cells and rounds.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Compare Baton with one bare vLLM server and with vllm-router over a prefill and a decode server."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    preset = QUICK if quick else FULL
    plan = replace(
        preset,
        config=str(config),
        systems=_names(systems) or preset.systems,
        concurrency=_numbers(concurrency, "--concurrency") or preset.concurrency,
        prompt_tokens=_numbers(prompt_tokens, "--prompt-tokens") or preset.prompt_tokens,
        output_tokens=_numbers(output_tokens, "--output-tokens") or preset.output_tokens,
        rounds=rounds or preset.rounds,
        requests=requests,
        cell_seconds=cell_seconds or preset.cell_seconds,
        seed=seed,
    )
    try:
        settings = load(config)
        check_comparable(settings)
        chosen = [make_system(name, settings, config) for name in plan.systems]
    except (ConfigError, ValueError) as error:
        _fail(str(error))
    draw = _drawing(plot_file)
    healed = processes.heal(base_dir())
    if healed:
        console.print(escape(str(healed)))

    # These import vLLM's dependencies, which take seconds.
    from bench.overhead import Experiment, PromptMaker

    ledger = Ledger(plan, gather_setting())

    def save(complete: bool = False) -> None:
        if json_file is not None:
            write_json(ledger.report(complete), json_file)

    prompts = PromptMaker(settings.model.path, settings.model.trust_remote_code, seed)
    experiment = Experiment(ledger, chosen, settings.model_name, prompts, console, save)
    interrupt = _InterruptOnce()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        experiment.run()
        complete = True
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped[/]")
        complete = False
    save(complete)
    report = ledger.report(complete)
    console.print(latency_table(report), cpu_table(report), sep="\n\n")
    if draw is not None and plot_file is not None:
        draw(report, plot_file)
    missed = 0
    if check:
        figures = measured(report)
        for verdict in (judge(target, figures) for target in TARGETS):
            console.print(verdict_line(verdict, needs_figure=not quick), soft_wrap=True)
            missed += not verdict.is_met and not (quick and verdict.ratio is None)
    if not complete:
        raise typer.Exit(INTERRUPTED)
    if missed or report.start_failures:
        raise typer.Exit(1)


class _InterruptOnce:
    """Raises KeyboardInterrupt at the first signal and ignores later ones: stopping is bounded and must be whole."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            raise KeyboardInterrupt


def _drawing(plot_file: Path | None) -> Callable[[Report, Path], None] | None:
    if plot_file is None:
        return None
    try:
        from bench.plot import draw
    except ImportError as error:
        _fail(f"--plot needs {error.name}; install the extra `bench` (pip install '.[bench]') or leave --plot out")
    return draw


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = _names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        _fail(f"{option} is {text!r}; give positive numbers with commas between them, e.g. 1,8,32")
    return tuple(int(part) for part in parts)


def _fail(message: str) -> NoReturn:
    typer.secho(f"bench: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
