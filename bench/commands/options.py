"""Owns the options that several commands have alike; each command says its own defaults."""

from pathlib import Path
from typing import Annotated

import typer

from bench.load_plan import DEFAULT_SLOS, SLOS
from gateway.client import API_KEY_VARIABLE

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")]
Check = Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")]

Model = Annotated[str | None, typer.Option(help="Default: the one that is served.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar=API_KEY_VARIABLE, help="Better given in the environment.", show_envvar=True)
]
LoadDurationS = Annotated[float | None, typer.Option(min=1.0, help="How long trajectories arrive.")]
WarmUpS = Annotated[float | None, typer.Option(min=0.0, help="Of it, not measured; default: a fifth.")]
MaxPauseS = Annotated[float, typer.Option(min=0.0, help="Longer pauses are cut to this.")]
Slo = Annotated[str, typer.Option(help=f"Comma-separated, TTFT/TPOT in ms as in 2000/100, or of: {', '.join(SLOS)}.")]
DEFAULT_SLO = ",".join(DEFAULT_SLOS)
RequestTimeoutS = Annotated[float, typer.Option(min=1.0, help="A request that takes longer has failed.")]
MaxLatenessMs = Annotated[
    float, typer.Option(min=0.1, help="A run whose generator's lateness p99 is above is invalid.")
]
LoadSeed = Annotated[int, typer.Option(min=0, help="Decides who arrives when, and all lengths.")]
