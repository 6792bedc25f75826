"""Owns the command `soak`: very many simulated requests among faults."""

from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import attempt, end, make_console, num_missed
from bench.results import gather_setting, write_json


def soak(
    requests: Annotated[int | None, typer.Option(min=1, help="Default: 1,000,000; with --quick 20,000.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that happens.")] = 0,
    shards: Annotated[int, typer.Option(min=1, help="Processes; each takes a core.")] = 2,
    world_requests: Annotated[int | None, typer.Option(min=1, help="Requests of each world, which has a seed.")] = None,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer requests.")] = False,
    check: Check = False,
) -> None:
    """Simulate very many requests among faults, in virtual time, and count those that are lost, hung or wrong."""
    console = make_console()
    import time

    from bench.soak import FULL_WORLD_REQUESTS, QUICK_REQUESTS, Progress, run
    from bench.soak_report import FULL_REQUESTS, SoakPlan, evaluate, table, targets
    from bench.world import WorldResult

    plan = SoakPlan(
        requests or (QUICK_REQUESTS if quick else FULL_REQUESTS), seed, shards, world_requests or FULL_WORLD_REQUESTS
    )
    setting, began_s = gather_setting(), time.monotonic()
    results: list[WorldResult] = []
    progress = Progress(plan, lambda words: console.print(escape(words), soft_wrap=True))

    def took(result: WorldResult) -> None:
        results.append(result)
        progress(result)
        if json_file is not None:
            so_far = evaluate(plan, setting, results, time.monotonic() - began_s, complete=False)
            write_json(so_far, json_file)

    with attempt(console, kept="the worlds that had not ended are left out") as outcome:
        run(plan, took)
    report = evaluate(plan, setting, results, time.monotonic() - began_s, complete=outcome.is_whole)
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    console.print(escape(report.claim), soft_wrap=True)
    missed = num_missed(console, targets(plan), report) if check else 0
    end(outcome.is_whole, missed or report.counts.bad, outcome)
