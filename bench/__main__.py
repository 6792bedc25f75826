"""Owns the command line of the benchmarks: `python -m bench COMMAND`"""

import importlib
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

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
from bench.systems import (
    SIMULATED_SYSTEM_NAMES,
    SYSTEM_NAMES,
    StartFailed,
    check_comparable,
    check_simulated,
    make_system,
)
from bench.targets import R, ReportTarget
from engine.protocol import Phase
from gateway.runtime import processes
from gateway.runtime.local import base_dir
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
DEFAULT_CONFIGS = {EngineKind.VLLM: Path("configs/local.yaml"), EngineKind.SIMULATED: Path("configs/simulated.yaml")}
FAULTS_CONFIG = Path("configs/faults.yaml")
AGENTS_CONFIG = Path("configs/local-2p2d.yaml")
INTERRUPTED = 130
WIDTH_WITHOUT_TERMINAL = 180

app = typer.Typer(
    help="Measures what Baton costs and gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
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
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the medians into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: fewer systems, cells and rounds.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Compare Baton with one bare vLLM server and with vllm-router over a prefill and a decode server."""
    console = _console()
    preset = PRESETS[engine, quick]
    config = config or DEFAULT_CONFIGS[engine]
    simulated = engine is EngineKind.SIMULATED
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
        (check_simulated if simulated else check_comparable)(settings)
        if settings.simulation is not None:
            plan = replace(plan, decode_step_ms=settings.simulation.decode_step_s * 1000)
        chosen = [make_system(name, settings, config) for name in plan.systems]
    except (ConfigError, ValueError) as error:
        _fail(str(error))
    draw = _drawing(plot_file, "plot")
    _heal(console)

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
    _interrupt_once()
    try:
        experiment.run()
        complete = True
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped[/]")
        complete = False
    save(complete)
    report = ledger.report(complete)
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
    _end(complete, missed or report.start_failures)


@app.command()
def streams(
    streams: Annotated[int | None, typer.Option(min=1, help="Streams open at once.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(min=0.1, help="What all streams get together.")] = None,
    ramp_per_s: Annotated[float, typer.Option(min=0.1, help="Streams opened per second, at most.")] = 100.0,
    settle_s: Annotated[
        float | None, typer.Option(min=0.0, help="From the last stream opened to the start of the window.")
    ] = None,
    measure_s: Annotated[float | None, typer.Option(min=1.0, help="How long the window is.")] = None,
    config: Annotated[Path, typer.Option(help="One simulated engine.")] = DEFAULT_CONFIGS[EngineKind.SIMULATED],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer streams and tokens.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Hold very many slow streams on one gateway replica over a simulated engine."""
    console = _console()
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
    from engine.vocabulary import plain_tokens

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
        vocabulary = plain_tokens(settings.model.path)
    except (ConfigError, ValueError) as error:
        _fail(str(error))
    _heal(console)
    _interrupt_once()
    started = StreamsReport(False, plan, gather_setting(), haproxy_streams(settings, plan.streams, open_files))
    start_failed = False
    with config_file(settings) as file:
        experiment = StreamsExperiment(
            plan,
            settings,
            make_system("baton", settings, file),
            vocabulary,
            make_prompts(vocabulary),
            started,
            console.print,
        )
        try:
            experiment.run()
        except StartFailed as error:
            start_failed = True
            _say_start_failed(console, error)
        except KeyboardInterrupt:
            console.print("[yellow]interrupted; everything that was started is stopped[/]")
    report = experiment.report
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    missed = _num_missed(console, STREAM_TARGETS, report) if check else 0
    _end(report.complete or start_failed, missed or start_failed)


@app.command()
def overload(
    engine: Annotated[
        EngineKind, typer.Option(help="simulated: in virtual time; vllm: `baton serve` over real engines.")
    ] = EngineKind.SIMULATED,
    factor: Annotated[
        float | None, typer.Option(min=1.0, help="Requests offered, of those answered at the best rate.")
    ] = None,
    overload_s: Annotated[float | None, typer.Option(min=1.0, help="How long the overload lasts.")] = None,
    deadline_s: Annotated[float | None, typer.Option(min=0.1, help="A first token later than this is late.")] = None,
    seed: Annotated[int, typer.Option(help="Decides who arrives when and asks for what.")] = 0,
    config: Annotated[Path, typer.Option(help="With --engine vllm: what is served.")] = DEFAULT_CONFIGS[
        EngineKind.VLLM
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter loads.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Ask for far more than there is capacity for, and see what is answered in time and how the rest is refused."""
    console = _console()
    from bench.overload_report import OverloadPlan, OverloadReport, table, targets

    if engine is EngineKind.SIMULATED:
        preset = OverloadPlan(engine, 2.0, 5.0, overload_s=600.0, capacity_s=120.0, normal_s=60.0)
        short = replace(preset, overload_s=60.0, capacity_s=30.0, normal_s=30.0)
    else:
        preset = OverloadPlan(engine, 3.0, 2.0, overload_s=60.0, capacity_s=20.0, config=str(config))
        short = replace(preset, overload_s=30.0, capacity_s=10.0)
    preset = short if quick else preset
    plan = replace(
        preset,
        deadline_s=deadline_s or preset.deadline_s,
        factor=factor or preset.factor,
        overload_s=overload_s or preset.overload_s,
        seed=seed,
    )
    report = OverloadReport(False, plan, gather_setting())
    _interrupt_once()
    start_failed = False
    try:
        if engine is EngineKind.SIMULATED:
            from bench.overload import SCENARIOS, Overload

            for scenario in SCENARIOS:
                console.print(escape(f"{scenario.name} ..."))
                report = replace(report, scenarios=(*report.scenarios, Overload(plan, scenario).run()))
        else:
            from bench.overload_live import LiveOverload

            try:
                settings = load(config)
                system = make_system("baton", settings, config)
            except (ConfigError, ValueError) as error:
                _fail(str(error))
            _heal(console)
            report = replace(report, live=LiveOverload(plan, settings.model_name, system, console.print).run())
        report = replace(report, complete=True)
    except StartFailed as error:
        start_failed = True
        _say_start_failed(console, error)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped[/]")
    if json_file is not None:
        write_json(report, json_file)
    if report.scenarios or report.live:
        console.print(table(report))
    for error in report.live.errors if report.live else ():
        console.print(f"[red]failed:[/] {escape(error)}", soft_wrap=True)
    missed = _num_missed(console, targets(engine), report) if check else 0
    _end(report.complete or start_failed, missed or start_failed)


@app.command()
def soak(
    requests: Annotated[int | None, typer.Option(min=1, help="Default: 1,000,000; with --quick 20,000.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that happens.")] = 0,
    shards: Annotated[int, typer.Option(min=1, help="Processes; each takes a core.")] = 2,
    world_requests: Annotated[int | None, typer.Option(min=1, help="Requests of each world, which has a seed.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was counted here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer requests.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Simulate very many requests among faults, in virtual time, and count those that are lost, hung or wrong."""
    console = _console()
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

    _interrupt_once()
    complete = False
    try:
        run(plan, took)
        complete = True
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; the worlds that had not ended are left out[/]")
    report = evaluate(plan, setting, results, time.monotonic() - began_s, complete=complete)
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    console.print(escape(report.claim), soft_wrap=True)
    missed = _num_missed(console, targets(plan), report) if check else 0
    _end(complete, missed or report.counts.bad)


@app.command()
def faults(
    cases: Annotated[
        str, typer.Option(help="Patterns of cases' names, comma-separated, e.g. 'decode-*-kill-*'; default: all.")
    ] = "",
    results: Annotated[Path, typer.Option(help="One JSON file per case; a case that has one is not run again.")] = Path(
        "fault-results"
    ),
    again: Annotated[bool, typer.Option("--again", help="Run cases that have a result as well.")] = False,
    config: Annotated[Path, typer.Option(help="Real engines in both pools.")] = FAULTS_CONFIG,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was seen here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: four cases.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Kill and stop real processes of a run with real engines while clients stream, and see what becomes of both."""
    console = _console()
    import asyncio

    from bench.fault_cases import QUICK as QUICK_CASES
    from bench.fault_cases import all_cases, chosen
    from bench.fault_report import FaultsReport, checks, table
    from bench.faults import Experiment as FaultsExperiment

    patterns = _names(cases) or (QUICK_CASES if quick else ())
    planned = chosen(all_cases(), patterns)
    if not planned:
        _fail(f"no case is called {cases!r}; names are like {all_cases()[0].name}")
    try:
        settings = load(config)
    except ConfigError as error:
        _fail(str(error))
    if settings.simulation is not None or not settings.pools.prefill.replicas:
        _fail(f"{config} must have real engines in both pools; use {FAULTS_CONFIG}")
    _heal(console)
    setting = gather_setting()
    experiment = FaultsExperiment(config, settings, results, planned, again, setting.git_commit, console.print)
    _interrupt_once()
    complete = False
    start_failed = False
    try:
        asyncio.run(experiment.run())
        complete = True
    except (StartFailed, TimeoutError, RuntimeError) as error:
        start_failed = True
        _say_start_failed(console, error)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped, and what is done is kept[/]")
    done = tuple(experiment.results[case.name] for case in planned if case.name in experiment.results)
    report = FaultsReport(
        complete, str(config), experiment.cold_start_s, tuple(case.name for case in planned), done, setting
    )
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(done))
    missed = 0
    if check:
        for line in checks(report, all_cases(), is_quick=quick or bool(cases)):
            console.print(line.line(), soft_wrap=True)
            missed += not line.is_met
    if start_failed:
        raise typer.Exit(1)
    _end(complete, missed)


@app.command()
def rolling(
    clients: Annotated[int | None, typer.Option(min=1, help="That stream at once; default: 4, with --quick 2.")] = None,
    seed: Annotated[int, typer.Option(help="Decides what clients ask for.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools, two or more of each.")] = FAULTS_CONFIG,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was seen here.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the ends of the logs here if something went wrong.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer clients, and fewer answers to compare.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Deploy new engine arguments while clients stream: every replica is replaced, and no request may fail."""
    console = _console()
    import asyncio

    from bench.rolling import RollingUpdate
    from bench.rolling_report import RollingPlan, num_replicas, table, targets

    try:
        settings = load(config)
    except ConfigError as error:
        _fail(str(error))
    if settings.simulation is not None or min(num_replicas(settings).values()) < 2:
        _fail(f"{config} must have two gateways and two real engines in each pool; use {FAULTS_CONFIG}")
    plan = RollingPlan(str(config), clients or (2 if quick else 4), 5.0 if quick else 15.0, seed)
    _heal(console)
    experiment = RollingUpdate(plan, config, settings, gather_setting(), console.print)
    _interrupt_once()
    start_failed = False
    try:
        asyncio.run(experiment.run(logs))
    except (StartFailed, TimeoutError, RuntimeError) as error:
        start_failed = True
        _say_start_failed(console, error)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped[/]")
    report = experiment.report
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    for trouble in report.troubles:
        console.print(f"[red]{escape(str(trouble))}[/]", soft_wrap=True)
    missed = _num_missed(console, targets(plan, num_replicas(settings)), report) if check else 0
    _end(report.complete or start_failed, missed or start_failed)


@app.command()
def decisions(
    policies: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw an HTML file here (needs the extra `bench`).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer decisions and requests.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Measure the gateway's own CPU: for one decision, and for each request as requests and replicas grow."""
    console = _console()
    from bench import decisions as experiment
    from bench.decisions_report import DecisionsPlan, DecisionsReport, tables, targets
    from gateway.routing.policies import POLICIES

    names = _names(policies) or tuple(POLICIES)
    if unknown := set(names) - set(POLICIES):
        _fail(f"no policy is called {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    plan = DecisionsPlan(names)
    if quick:
        plan = replace(plan, requests=(500, 2_000), replicas=(2, 256), decisions=300)
    draw = _drawing(plot, "decisions_plot")
    report = DecisionsReport(False, plan, gather_setting())
    _interrupt_once()
    try:
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
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; what is measured is kept[/]")
    if json_file is not None:
        write_json(report, json_file)
    if draw is not None and plot is not None:
        draw(report, plot)
    for table_ in tables(report):
        console.print(table_)
    missed = _num_missed(console, targets(plan), report) if check else 0
    _end(report.complete, missed)


@app.command()
def agents(
    policies: Annotated[
        str, typer.Option(help="Two, comma-separated: what is compared with, and what is measured.")
    ] = "least-tokens,baton",
    agents: Annotated[int, typer.Option(min=1, help="That run at once.")] = 20,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each policy; default: 4, with --quick 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides tasks, results of tools and pauses.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools, two or more of each.")] = AGENTS_CONFIG,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: one round of fewer turns.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Let tool-looping agents work at once on real engines, by one policy and by another in turns."""
    console = _console()
    from bench.agent_asks import TURNS
    from bench.agents import AgentsExperiment
    from bench.agents_report import TARGETS as AGENTS_TARGETS
    from bench.agents_report import AgentsPlan, ratio_lines, table
    from gateway.client import GatewayError
    from gateway.routing.policies import POLICIES
    from gateway.runtime.control import OrderFailed

    chosen = _names(policies)
    if len(chosen) != 2 or chosen[0] == chosen[1] or not set(chosen) <= set(POLICIES):
        _fail(f"--policies is {policies!r}; give two of {', '.join(POLICIES)}, with a comma between them")
    try:
        settings = load(config)
    except ConfigError as error:
        _fail(str(error))
    if settings.simulation is not None or min(settings.pools.prefill.replicas, settings.pools.decode.replicas) < 2:
        _fail(f"{config} must have two real engines in each pool; use {AGENTS_CONFIG}")
    turns = (3, 4) if quick else TURNS
    plan = AgentsPlan(str(config), (chosen[0], chosen[1]), agents, turns, rounds or (1 if quick else 4), seed)
    _heal(console)
    experiment = AgentsExperiment(plan, make_system("baton", settings, config), gather_setting(), console.print)

    def save() -> None:
        if json_file is not None:
            write_json(experiment.report, json_file)

    _interrupt_once()
    start_failed = False
    try:
        experiment.run(save)
    except (StartFailed, TimeoutError, RuntimeError, GatewayError, OrderFailed) as error:
        start_failed = True
        _say_start_failed(console, error)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything that was started is stopped[/]")
    save()
    report = experiment.report
    console.print(table(report), *ratio_lines(report), sep="\n")
    for error in report.errors:
        console.print(f"[red]failed:[/] {escape(error)}", soft_wrap=True)
    missed = _num_missed(console, AGENTS_TARGETS, report) if check else 0
    _end(report.complete or start_failed, missed or start_failed)


@app.command()
def reverse(
    rounds: Annotated[int | None, typer.Option(min=1, help="Trials of each; default: 5, with --quick 2.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the tokens, and in which order sources take their turns.")] = 0,
    config: Annotated[Path, typer.Option(help="Real engines in both pools; one of each is started.")] = DEFAULT_CONFIGS[
        EngineKind.VLLM
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every trial here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two cells only.")] = False,
) -> None:
    """Serve a session's second turn with KV from prefill's cache, from decode, or from nowhere, and compare."""
    console = _console()
    import asyncio

    from bench.reverse import ReverseExperiment
    from bench.reverse_report import FULL_CELLS, QUICK_CELLS, ReversePlan, make_report, table
    from engine.protocol import EngineGoneError

    try:
        settings = load(config)
    except ConfigError as error:
        _fail(str(error))
    if settings.simulation is not None or not settings.pools.prefill.replicas:
        _fail(f"{config} must have real engines in both pools; use {DEFAULT_CONFIGS[EngineKind.VLLM]}")
    plan = ReversePlan(str(config), QUICK_CELLS if quick else FULL_CELLS, rounds or (2 if quick else 5), seed)
    experiment = ReverseExperiment(plan, settings, console.print)
    _interrupt_once()
    complete = failed = False
    try:
        asyncio.run(experiment.run())
        complete = True
    except (TimeoutError, RuntimeError, EngineGoneError) as error:
        failed = True
        console.print(f"[bold red]failed:[/] {escape(repr(error))}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; the engines are stopped, and what is done is kept[/]")
    report = make_report(plan, gather_setting(), experiment.trials, complete)
    if json_file is not None:
        write_json(report, json_file)
    console.print(table(report))
    _end(complete or failed, failed or any(one.differing for one in report.medians))


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


def _emitters(settings: Settings, plan: Plan, prompts: "PromptMaker") -> dict[Cell, float]:
    """CPU seconds per token of the simulated engine alone, by cell."""
    from bench.emitter import measure
    from gateway.app import engine_spec

    config = engine_spec(settings, Phase.DECODE).simulated_config()
    return {
        cell: measure(config, prompts.make("emitter", 1, cell, cell.concurrency), cell.output_tokens)
        for cell in plan.cells()
    }


def _heal(console: Console) -> None:
    """Removes what crashed runs have left, and says so."""
    if healed := processes.heal(base_dir()):
        console.print(escape(str(healed)))


def _say_start_failed(console: Console, error: Exception) -> None:
    tail = error.log_tail if isinstance(error, StartFailed) else ""
    console.print(f"[bold red]does not start:[/] {escape(str(error))}\n{escape(tail)}", soft_wrap=True)


@app.command()
def replay(
    traces: Annotated[list[Path], typer.Argument(help="Files or folders of recorded traces (bench/trace_files.py).")],
    policies: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    shapes: Annotated[str, typer.Option(help="PREFILLxDECODE or aggregated-N, comma-separated.")] = "2x2,aggregated-4",
    seeds: Annotated[str, typer.Option(help="Comma-separated; each decides who arrives when.")] = "",
    load: Annotated[str, typer.Option(help="Loads to compare at, of the best other policy's goodput.")] = "0.25,1",
    rates: Annotated[str, typer.Option(help="Trajectories per second to compare at instead; no goodput then.")] = "",
    of_bound: Annotated[str, typer.Option(help="The same, as shares of the oracle's bound.")] = "",
    turns: Annotated[int | None, typer.Option(min=10, help="Turns of the measured cohort, about.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Prefill may fetch from decode (docs/adr/0017).")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Tune the published policies' constants first.")] = False,
    kv: Annotated[float, typer.Option(min=0.1, help="KV memory of each GPU, times what it has.")] = 1.0,
    model: Annotated[str, typer.Option(help="GPU and model (engine/roofline.py).")] = "qwen3-coder-30b-a3b-fp8-h100",
    shards: Annotated[int, typer.Option(min=1, help="Processes; each takes a core.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short cohort, one seed.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a target is missed.")] = False,
) -> None:
    """Replay recorded agent sessions through what ships, in virtual time over simulated GPUs."""
    console = _console()
    from bench.replay import REPLAYED
    from bench.replay_experiment import Experiment as ReplayExperiment
    from bench.replay_plan import Shape
    from bench.replay_report import ReplayPlan, ReplayReport, goodput_table, run_tables, targets, tuning_table
    from bench.replay_tuning import TUNING_SEED
    from bench.traces import TraceError
    from engine.roofline import ROOFLINES
    from gateway.routing.policies import POLICIES

    draw = _drawing(plot, "replay_plot")
    if unknown := [name for name in _names(policies) if name not in REPLAYED]:
        _fail(f"--policies names {', '.join(unknown)}; there are {', '.join(REPLAYED)}")
    if model not in ROOFLINES:
        _fail(f"--model is {model!r}; there are {', '.join(ROOFLINES)}")
    try:
        parsed = tuple(Shape.parse(name) for name in _names(shapes))
    except ValueError as error:
        _fail(f"--shapes: {error}")
    if tune and TUNING_SEED in _reals(seeds, "--seeds"):
        _fail(f"--seeds has {TUNING_SEED}, with which constants are tuned; give others")
    if len({shape.num_gpus for shape in parsed}) > 1:
        _fail(f"--shapes is {shapes!r}; shapes are compared, so give all the same number of GPUs")
    plan = ReplayPlan(
        tuple(str(path) for path in traces),
        _names(policies) or tuple(POLICIES),
        parsed,
        tuple(int(seed) for seed in _reals(seeds, "--seeds")) or ((0,) if quick else (0, 1)),
        model,
        turns or (400 if quick else 2500),
        _reals(load, "--load"),
        _reals(rates, "--rates"),
        _reals(of_bound, "--of-bound"),
        shards,
        reverse,
        tune,
        kv,
    )

    def save(report: ReplayReport) -> None:
        if json_file is not None:
            write_json(report, json_file)

    try:
        experiment = ReplayExperiment(
            plan, gather_setting(), lambda words: console.print(escape(words), soft_wrap=True), save
        )
    except (TraceError, OSError) as error:
        _fail(str(error))
    _interrupt_once()
    try:
        experiment.run()
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; the runs that had not ended are left out[/]")
    report = experiment.report
    for trace in report.traces:
        console.print(
            f"{trace.path}: {trace.num_trajectories:,} trajectories, {trace.num_turns:,} turns "
            f"({trace.num_cut_turns} cut off), bound {trace.bound_per_gpu_s * 60:.3g} trajectories per minute and GPU",
            soft_wrap=True,
        )
    if report.tuned:
        console.print(tuning_table(report))
    if report.goodputs:
        console.print(goodput_table(report))
    for table in run_tables(report):
        console.print(table)
    for failure in report.failed:
        console.print(f"[red]failed:[/] {escape(str(failure.plan))}: {escape(failure.error)}", soft_wrap=True)
    if draw is not None and plot is not None:
        draw(report, plot)
    missed = _num_missed(console, targets(plan), report) if check else 0
    _end(report.complete, missed or report.failed)


def _num_missed(console: Console, targets: Iterable[ReportTarget[R]], report: R) -> int:
    """How many targets a report misses, after a line for each."""
    missed = 0
    for target in targets:
        console.print(target.line(report), soft_wrap=True)
        missed += not target.is_met_by(report)
    return missed


def _end(is_whole: bool, failed: object) -> None:
    """The exit code of a command: INTERRUPTED before its end, 1 where something `failed`."""
    if not is_whole:
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def _interrupt_once() -> None:
    """From now on the first signal that asks for the end is a KeyboardInterrupt."""
    interrupt = _InterruptOnce()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


class _InterruptOnce:
    """Raises KeyboardInterrupt at the first signal and ignores later ones: stopping is bounded and must be whole."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            raise KeyboardInterrupt


def _drawing(plot_file: Path | None, module: str) -> Callable[[Any, Path], None] | None:
    """What draws a report of the experiment whose pictures this module of `bench` owns."""
    if plot_file is None:
        return None
    try:
        return importlib.import_module(f"bench.{module}").draw
    except ImportError as error:
        _fail(f"--plot needs {error.name}; install the extra `bench` (pip install '.[bench]') or leave --plot out")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = _names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        _fail(f"{option} is {text!r}; give positive numbers with commas between them, e.g. 1,8,32")
    return tuple(int(part) for part in parts)


def _reals(text: str, option: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in _names(text))
    except ValueError:
        numbers = (-1.0,)
    if not all(0 <= number < float("inf") for number in numbers):
        _fail(f"{option} is {text!r}; give numbers with commas between them, e.g. 0.25,1")
    return numbers


def _fail(message: str) -> NoReturn:
    typer.secho(f"bench: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
