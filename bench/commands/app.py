"""Owns which commands `python -m bench` has, and their order."""

import typer

from bench.commands.agents import agents
from bench.commands.clients import clients
from bench.commands.compare import compare
from bench.commands.decisions import decisions
from bench.commands.faults import faults
from bench.commands.interference import interference
from bench.commands.load import load
from bench.commands.overhead import overhead
from bench.commands.overload import overload
from bench.commands.replay import replay
from bench.commands.reverse import reverse
from bench.commands.rolling import rolling
from bench.commands.scaling import scaling
from bench.commands.soak import soak
from bench.commands.streams import streams

app = typer.Typer(
    help="Measures what Baton costs and gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    load,
    compare,
    clients,
    overhead,
    streams,
    overload,
    soak,
    faults,
    rolling,
    decisions,
    agents,
    reverse,
    replay,
    scaling,
    interference,
):
    app.command()(command)
