"""Owns the command `decisions`: the gateway's own CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Check, JsonFile
from bench.commands.terminal import attempt, drawing, end, fail, make_console, num_missed, parse_names
from bench.results import gather_setting, write_json


def decisions(
    policies: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw an HTML file here (needs the extra `bench`).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer decisions and requests.")] = False,
    check: Check = False,
) -> None:
    """Measure the gateway's own CPU: for one decision, and for each request as requests and replicas grow."""
    console = make_console()
    from bench import decisions as experiment
    from bench.decisions_report import DecisionsPlan, DecisionsReport, tables, targets
    from gateway.routing.policies import POLICIES

    names = parse_names(policies) or tuple(POLICIES)
    if unknown := set(names) - set(POLICIES):
        fail(f"no policy is called {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    plan = DecisionsPlan(names)
    if quick:
        plan = replace(plan, requests=(500, 2_000), replicas=(2, 256), decisions=300)
    draw = drawing(plot, "decisions_plot")
    report = DecisionsReport(False, plan, gather_setting())
    with attempt(console, kept="what is measured is kept") as outcome:
        for policy in plan.policies:
            for replicas in plan.replicas:
                console.print(f"decisions of {policy}, {replicas} replicas ...")
                decided = experiment.decide(plan, replicas, policy, plan.seed)
                report = replace(report, decisions=(*report.decisions, decided))
        for requests in plan.requests:
            console.print(f"{requests:,} requests, {plan.load_replicas} replicas ...")
            load_ = experiment.load(plan, plan.load_replicas, requests, plan.policy, plan.seed)
            report = replace(report, by_requests=(*report.by_requests, load_))
        for replicas in plan.replicas:
            console.print(f"{plan.requests[0]:,} requests, {replicas} replicas ...")
            load_ = experiment.load(plan, replicas, plan.requests[0], plan.policy, plan.seed)
            report = replace(report, by_replicas=(*report.by_replicas, load_))
        report = replace(report, complete=True)
    if json_file is not None:
        write_json(report, json_file)
    if draw is not None and plot is not None:
        draw(report, plot)
    for table_ in tables(report):
        console.print(table_)
    missed = num_missed(console, targets(plan), report) if check else 0
    end(report.complete, missed, outcome)
