"""Owns the command `load`: recorded or synthetic sessions against any OpenAI-compatible server."""

import os
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

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
from bench.commands.terminal import DEFAULT_CONFIGS, end, fail, make_console, num_missed, parse_names
from bench.interrupts import INTERRUPTED, interrupt_once
from bench.load_plan import LoadPlan, ServerFacts, ServerKind, slo_of
from bench.load_progress import LoadProgress
from bench.results import EngineKind, gather_setting, write_json
from bench.workloads import FIXED, WORKLOADS

if TYPE_CHECKING:
    from bench.load_report import LoadReport
    from bench.traces import Trace

DEFAULT_URL = "http://127.0.0.1:8000"
GENERATOR_CHECK_PER_S = 2_100.0
GENERATOR_CHECK_LENGTHS = (32, 4)
"""Of prompt and answer, in tokens."""


def load(
    workload: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(WORKLOADS)}; {FIXED}; or a recorded trace, a file or folder (bench/trace_files.py)."
        ),
    ] = "",
    url: Annotated[str, typer.Option(help="The server, without /v1.")] = DEFAULT_URL,
    model: Model = None,
    api_key: ApiKey = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Trajectories that arrive per second.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="A closed loop instead: so many trajectories at a time.")
    ] = None,
    duration_s: LoadDurationS = None,
    warm_up_s: WarmUpS = None,
    drain_s: Annotated[float, typer.Option(min=0.0, help="How much longer sessions under way may go on.")] = 30.0,
    scale: Annotated[float, typer.Option(min=0.001, help="Multiplies all lengths, to fit a small context.")] = 1.0,
    max_pause_s: MaxPauseS = 30.0,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Where the server does not tell its context.")
    ] = None,
    slo: Slo = DEFAULT_SLO,
    request_timeout_s: RequestTimeoutS = 300.0,
    max_lateness_ms: MaxLatenessMs = 10.0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id: prompts of all its plain tokens.")
    ] = None,
    as_text: Annotated[
        bool, typer.Option("--text", help=f"Send words of --tokenizer in place of token ids; with {FIXED} only.")
    ] = False,
    seed: LoadSeed = 0,
    salt: Annotated[str | None, typer.Option(help="Decides the text; default: new, so that no cache has it.")] = None,
    first_in_line: Annotated[
        bool, typer.Option(help="As root, get a core before all others; not when beside clients that do not.")
    ] = True,
    generator_check: Annotated[
        bool, typer.Option("--generator-check", help="Measure the generator alone, against a mock server.")
    ] = False,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ten seconds, short pauses.")] = False,
    check: Check = False,
) -> None:
    """Load a server with sessions of agents, chats or single requests that do not wait for it."""
    console = make_console()
    from bench.load_report import GENERATOR_TARGETS, targets

    if concurrency is not None and rate is not None:
        fail("--rate and --concurrency exclude each other: an open or a closed loop")
    try:
        slos = tuple(slo_of(name) for name in parse_names(slo))
    except ValueError as error:
        fail(f"--slo: {error}")
    duration_s = duration_s or (10.0 if quick else 60.0)
    plan = LoadPlan(
        workload=workload,
        rate_per_s=None if concurrency is not None else rate or 1.0,
        concurrency=concurrency,
        duration_s=duration_s,
        warm_up_s=duration_s / 5 if warm_up_s is None else warm_up_s,
        drain_s=min(drain_s, 10.0) if quick else drain_s,
        seed=seed,
        salt=salt or secrets.token_hex(4),
        slos=slos,
        max_pause_s=min(max_pause_s, 2.0) if quick else max_pause_s,
        request_timeout_s=request_timeout_s,
        max_lateness_ms=max_lateness_ms,
        max_model_len=max_model_len,
        vocabulary=tokenizer or "",
        as_text=as_text,
        first_in_line=first_in_line,
    )
    if as_text and not (tokenizer and workload.startswith(FIXED.partition(":")[0])):
        # A prompt with an answer in it need not be read as it was written.
        fail(f"--text needs --tokenizer, and a workload of one turn, {FIXED}")
    if plan.warm_up_s >= plan.duration_s:
        fail(f"--warm-up-s is {plan.warm_up_s:g}, not less than --duration-s, {plan.duration_s:g}: nothing is measured")
    interrupt_once()
    try:
        if generator_check:
            report = _check_generator(console, plan)
        else:
            report = _load(console, plan, url.rstrip("/").removesuffix("/v1"), model, api_key, scale)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted before anything was measured[/]")
        raise typer.Exit(INTERRUPTED) from None
    if json_file is not None:
        write_json(report, json_file)
    from bench.load_report import table

    console.print(table(report))
    for error in report.errors:
        console.print(f"[red]failed:[/] {escape(error)}", soft_wrap=True)
    chosen = GENERATOR_TARGETS if generator_check else targets(plan)
    missed = num_missed(console, chosen, report) if check else 0
    end(report.complete, missed or report.why_invalid)


def _load(
    console: Console, plan: LoadPlan, url: str, model: str | None, api_key: str | None, scale: float
) -> "LoadReport":
    from bench.load_server import ServerError, facts
    from bench.load_trace import prepare, sessions
    from bench.traces import TraceError

    try:
        whole = sessions(plan)
        server = facts(url, model, api_key)
        prepared = prepare(plan, whole, scale, plan.max_model_len or server.max_model_len)
    except (TraceError, ServerError, OSError) as error:
        fail(str(error))
    if prepared.note:
        console.print(f"[yellow]{escape(prepared.note)}[/]", soft_wrap=True)
    return _run(console, prepared.plan, prepared.trace, server, api_key)


def _run(console: Console, plan: LoadPlan, trace: "Trace", server: ServerFacts, api_key: str | None) -> "LoadReport":
    from bench.load import LoadExperiment
    from bench.load_text import PLAIN_TOKENS
    from bench.streams import raise_open_files
    from bench.words import read_words
    from engine.vocabulary import read_vocabulary

    words = None
    try:
        if plan.as_text:
            words = read_words(plan.vocabulary)
            vocabulary = words.token_ids
        else:
            vocabulary = read_vocabulary(plan.vocabulary).plain if plan.vocabulary else PLAIN_TOKENS
    except ValueError as error:
        fail(f"--tokenizer: {error}")
    raise_open_files(0)
    if server.engine is EngineKind.SIMULATED:
        console.print("[yellow]the engine is simulated: no figure is a figure of a model[/]")
    console.print(f"{plan.workload}, {plan.how}, {plan.duration_s:g} s at {server.url}", soft_wrap=True)
    with LoadProgress(console) as progress:
        report = LoadExperiment(
            plan,
            trace,
            vocabulary,
            server,
            api_key,
            gather_setting(),
            lambda reached: progress(plan, reached),
            write=words and words.text,
        ).run()
    if not report.complete:
        console.print("[yellow]interrupted; what was measured until then is reported[/]")
    return report


def _check_generator(console: Console, plan: LoadPlan) -> "LoadReport":
    """Generator and mock server each on a core of their own, where there are two."""
    import psutil

    from bench.systems import StartFailed, mock_system
    from bench.workloads import fixed
    from gateway.settings import load as load_settings

    config = DEFAULT_CONFIGS[EngineKind.SIMULATED]
    settings = load_settings(config)
    system = mock_system(settings, config)
    plan = replace(plan, workload="generator-check", rate_per_s=GENERATOR_CHECK_PER_S, concurrency=None)
    cores = sorted(os.sched_getaffinity(0))
    try:
        system.start()
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[:1])
            for id in system.processes():
                psutil.Process(id.pid).cpu_affinity(cores[1:])
        server = ServerFacts(system.url, settings.model_name, ServerKind.OTHER, EngineKind.SIMULATED)
        return _run(console, plan, fixed(*GENERATOR_CHECK_LENGTHS), server, None)
    except StartFailed as error:
        fail(f"{error}\n{error.log_tail}")
    finally:
        os.sched_setaffinity(0, cores)
        system.stop()
