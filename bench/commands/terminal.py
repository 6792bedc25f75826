"""Owns what all commands do alike: what they say, how they read options, how they end."""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from bench.interrupts import INTERRUPTED, interrupt_once
from bench.replay_plan import Shape
from bench.results import EngineKind, Setting
from bench.systems import StartFailed
from bench.targets import R, ReportTarget
from gateway.runtime import processes
from gateway.runtime.local import base_dir

DEFAULT_CONFIGS = {EngineKind.VLLM: Path("configs/local.yaml"), EngineKind.SIMULATED: Path("configs/simulated.yaml")}
FAULTS_CONFIG = Path("configs/faults.yaml")
WIDTH_WITHOUT_TERMINAL = 180


def make_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


def heal(console: Console) -> None:
    """Removes what crashed runs have left, and says so."""
    if healed := processes.heal(base_dir()):
        console.print(escape(str(healed)))


def say_autogroups(console: Console, setting: Setting) -> None:
    """Warns of a kernel that lets one process wait for another because of the session that it was started in."""
    if setting.has_autogroups:
        console.print(
            "[yellow]this Linux shares cores out between sessions, then between the processes of each, so that engines "
            "may keep a client waiting; as root, `sysctl kernel.sched_autogroup_enabled=0` lets all have their turn[/]",
            soft_wrap=True,
        )


STOPPED = "everything that was started is stopped"


@dataclass
class Outcome:
    """What became of an experiment that ran in `attempt`: whether it ran to its end, and whether an error ended it."""

    is_whole: bool = False
    has_failed: bool = False


@contextmanager
def attempt(console: Console, *failures: type[Exception], kept: str = STOPPED) -> Iterator[Outcome]:
    """Within it an experiment runs. Ctrl-C, a system that does not start and `failures` end it and are said, and what
    was measured until then is left to be reported. Every other error is raised."""
    outcome = Outcome()
    interrupt_once()
    try:
        yield outcome
        outcome.is_whole = True
    except StartFailed as error:
        outcome.has_failed = True
        console.print(f"[bold red]does not start:[/] {escape(str(error))}\n{escape(error.log_tail)}", soft_wrap=True)
    except failures as error:
        outcome.has_failed = True
        console.print(f"[bold red]failed:[/] {escape(str(error) or repr(error))}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted; {kept}[/]")


def num_missed(console: Console, targets: Iterable[ReportTarget[R]], report: R) -> int:
    """How many targets a report misses, after a line for each."""
    missed = 0
    for target in targets:
        console.print(target.line(report), soft_wrap=True)
        missed += not target.is_met_by(report)
    return missed


def end(is_whole: bool, failed: object, outcome: Outcome | None = None) -> None:
    """The exit code of a command: 1 where an error ended the experiment, INTERRUPTED before its end, 1 where something
    `failed`."""
    if outcome is not None and outcome.has_failed:
        raise typer.Exit(1)
    if not is_whole:
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def drawing(plot_file: Path | None, module: str) -> Callable[[Any, Path], None] | None:
    """What draws a report of the experiment whose pictures this module of `bench` owns."""
    if plot_file is None:
        return None
    try:
        return importlib.import_module(f"bench.{module}").draw
    except ImportError as error:
        fail(f"drawing needs {error.name}; install the extra `bench` (pip install '.[bench]') or ask for no picture")


def parse_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    parts = parse_names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        fail(f"{option} is {text!r}; give positive numbers with commas between them, e.g. 1,8,32")
    return tuple(int(part) for part in parts)


def parse_reals(text: str, option: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in parse_names(text))
    except ValueError:
        numbers = (-1.0,)
    if not all(0 <= number < float("inf") for number in numbers):
        fail(f"{option} is {text!r}; give numbers with commas between them, e.g. 0.25,1")
    return numbers


def parse_shapes(text: str, option: str) -> tuple[Shape, ...]:
    try:
        return tuple(Shape.parse(name) for name in parse_names(text))
    except ValueError as error:
        fail(f"{option}: {error}")


def check_names(names: Iterable[str], known: Collection[str], option: str) -> None:
    if unknown := [name for name in names if name not in known]:
        fail(f"{option} names {', '.join(unknown)}; there are {', '.join(known)}")


def fail(message: str) -> NoReturn:
    typer.secho(f"bench: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(2)
