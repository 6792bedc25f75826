"""Owns the command line: `baton serve | ask | status | policy | replay | key | doctor`."""

import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway import client, doctor, launcher, receipt_log
from gateway.agents.tenants import key_sha256, new_key
from gateway.routing.policies import POLICIES
from gateway.routing.replay import Replay
from gateway.routing.replay import replay as replay_all
from gateway.runtime import control
from gateway.runtime.environment import RunPaths
from gateway.runtime.local import base_dir
from gateway.settings import TENANT_NAME, ConfigError, Settings, load

DEFAULT_URL = "http://127.0.0.1:8000"
LOOPBACKS = ("localhost", "127.0.0.1", "::1")
NO_SHADOW = "none"
FOLLOW_S = 30.0
FOLLOW_POLL_S = 0.2

app = typer.Typer(
    name="baton",
    help="Baton serves one LLM from a prefill and a decode pool behind one OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, e.g. configs/local.yaml.")]
UrlOption = Annotated[str, typer.Option("--url", help="Where the gateway listens.", envvar="BATON_URL")]


@app.command()
def serve(
    config: ConfigArgument,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the HTTP API; overrides the config.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; overrides the config. 0.0.0.0: every network.")
    ] = None,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="Do not send one chat once it is ready.")] = False,
) -> None:
    """Start engines and gateway on this machine and serve until Ctrl-C."""
    settings = _load(config, {"gateway.port": port, "gateway.host": host})
    facts = doctor.gather(settings, look_around=False)
    failed = doctor.failures([*doctor.check_installation(facts), *doctor.check_configuration(facts, settings)])
    if failed:
        _fail("cannot serve:\n" + "\n".join(f"  {check}" for check in failed))
    raise typer.Exit(launcher.serve(settings, console=_console(), demo=not no_demo))


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    url: UrlOption = DEFAULT_URL,
    receipt: Annotated[bool, typer.Option("--receipt", help="Show where the answer was computed.")] = False,
    model: Annotated[str | None, typer.Option(help="Model name; default: the one that is served.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> None:
    """Ask the model and stream its answer to the terminal."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        _fail("the prompt is empty; give some text")
    console = _console()
    try:
        for piece in client.chat(url, text, model=model, max_tokens=max_tokens, system=system, api_key=_api_key()):
            if isinstance(piece, client.Finished):
                typer.echo()
                if receipt:
                    _print_receipt(console, url, piece.request_id)
            else:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
    except client.GatewayError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the gateway's JSON.")] = False,
) -> None:
    """Show pools, replicas, load and KV cache use."""
    try:
        report = client.status(url, api_key=_api_key())
    except client.GatewayError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console = _console()
    ready = "ready" if report.get("ready") else "not ready"
    console.print(escape(f"{report.get('model')} at {url}: {ready}, Baton {report.get('version')}"), soft_wrap=True)
    if simulated := client.simulated_replicas(report):
        console.print(f"[bold yellow]{launcher.SIMULATED}:[/] {escape(', '.join(sorted(simulated)))}", soft_wrap=True)
    if policies := report.get("policies"):
        shadow = policies["shadow_policy"] or NO_SHADOW
        console.print(escape(f"policy {policies['policy']}, shadow {shadow}"), soft_wrap=True)
    console.print(_status_table(report))


@app.command()
def policy(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help=f"What decides from now on: {', '.join(POLICIES)}.")
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(help=f"The policy that decides beside it; {NO_SHADOW}: none any more.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    ray_address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster that runs it; default: a local run.", envvar="BATON_RUNTIME__RAY_ADDRESS"),
    ] = None,
) -> None:
    """Show what decides placements, or switch it without a restart."""
    for wanted, names in ((name, list(POLICIES)), (shadow, [*POLICIES, NO_SHADOW])):
        if wanted is not None and wanted not in names:
            _fail(f"there is no policy {wanted!r}; there are {', '.join(names)}")
    try:
        told = client.policies(url, _api_key())
        if name is not None or shadow is not None:
            # Serve has a gateway out of sight for the moment in which it follows.
            num_gateways = len(told["gateways"])
            switched = _switch(name, shadow, url, ray_address)
            end_s = time.monotonic() + FOLLOW_S
            while not client.follow(
                told := client.policies(url, _api_key()), switched.policy, switched.shadow_policy, num_gateways
            ):
                if time.monotonic() > end_s:
                    _print_policies(told)
                    _fail(
                        f"gateways were told {switched.policy}, shadow {switched.shadow_policy or NO_SHADOW}, and not "
                        f"all of them do so after {FOLLOW_S:g} s; their logs say why"
                    )
                time.sleep(FOLLOW_POLL_S)
    except (client.GatewayError, control.OrderFailed) as error:
        _fail(str(error))
    _print_policies(told)


@app.command()
def replay(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RECEIPTS...", help="Files of receipts, or folders (routing.receipts_folder)."),
    ],
    policy: Annotated[
        str | None, typer.Option(help=f"What this policy would have done: {', '.join(POLICIES)}. Default: their own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decide recorded requests again: by their own policy, which must give the same, or by another."""
    if policy is not None and policy not in POLICIES:
        _fail(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
    files = receipt_log.files_in(paths)
    try:
        absent: Counter[str] = Counter()
        found = replay_all((receipt for file in files for receipt in receipt_log.read(file, absent)), policy)
        found.absent = absent
    except (OSError, receipt_log.UnreadableReceipt) as error:
        _fail(str(error))
    if not found.num_decisions and not found.unknown:
        _fail(f"no receipts in {', '.join(map(str, paths))}; is routing.receipts_folder set where they were served?")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        _print_replay(_console(), found, policy)
    if policy is None and found.num_same < found.num_decisions:
        raise typer.Exit(1)


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant that the key is for.")],
) -> None:
    """Make an API key for a tenant: print it, once, and what to put into the configuration."""
    if not re.fullmatch(TENANT_NAME, name):
        _fail(f"{name!r} cannot name a tenant: take letters and digits, and '.', '_' or '-' inside; 64 at most")
    made = new_key()
    typer.echo(
        f"The key of {name}. It is shown this once and kept nowhere; give it to who asks, e.g. as "
        f"{client.API_KEY_VARIABLE}:\n\n    {made}\n\n"
        "Its digest goes into the configuration. A tenant that exists gets one more line under api_key_sha256:\n\n"
        f"tenants:\n  - name: {name}\n    api_key_sha256:\n      - {key_sha256(made.encode()).hex()}"
    )


@app.command(name="doctor")
def doctor_command(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML configuration to check this machine against.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the configuration's JSON schema and stop.")] = False,
) -> None:
    """Check whether this machine can serve, and say what to do if it cannot."""
    if schema:
        typer.echo(json.dumps(Settings.model_json_schema(), indent=2))
        return
    settings = None if config is None else _load(config, {})
    facts = doctor.gather(settings)
    checks = doctor.check_installation(facts)
    if settings is not None:
        checks += doctor.check_configuration(facts, settings)
    checks += doctor.check_situation(facts)
    console = _console()
    colours = {doctor.Outcome.OK: "green", doctor.Outcome.WARN: "yellow", doctor.Outcome.FAIL: "bold red"}
    for check in checks:
        console.print(f"[{colours[check.outcome]}]{check.outcome:<4}[/] {escape(str(check))}", soft_wrap=True)
    if doctor.failures(checks):
        raise typer.Exit(1)


def main() -> None:
    app()


def _console() -> Console:
    return Console(highlight=False)


def _api_key() -> str | None:
    return os.environ.get(client.API_KEY_VARIABLE)


def _load(config: Path, overrides: dict[str, Any]) -> Settings:
    try:
        return load(config, {key: value for key, value in overrides.items() if value is not None})
    except ConfigError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.secho(f"baton: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


def _switch(name: str | None, shadow: str | None, url: str, ray_address: str | None) -> control.Switched:
    """Tells whoever runs the application. Raises OrderFailed."""
    order = control.Switch()
    if name is not None:
        order = msgspec.structs.replace(order, policy=name)
    if shadow is not None:
        order = msgspec.structs.replace(order, shadow_policy=None if shadow == NO_SHADOW else shadow)
    if ray_address is not None:
        # It imports Ray, which takes seconds.
        from gateway.app import APP_NAME
        from gateway.runtime import live_policies

        live_policies.connect(ray_address)
        return live_policies.switch(APP_NAME, order)
    address = urlsplit(url)
    paths = RunPaths(base_dir() / str(address.port or 80))
    if not paths.control.is_socket() or address.hostname not in (*LOOPBACKS, _host_of(paths)):
        _fail(f"no `baton serve` of yours on this machine listens at {url}; for a Ray cluster pass --ray-address")
    return control.order(paths.control, order)


def _host_of(paths: RunPaths) -> str:
    """The address that a local run was told to listen at."""
    return Settings.model_validate_json(paths.settings.read_text()).gateway.host


def _print_policies(told: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("gateway", "policy", "shadow", "since"):
        table.add_column(column, no_wrap=True)
    for gateway, one in told["gateways"].items():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["since_s"]))
        table.add_row(escape(gateway), one["policy"], one["shadow_policy"] or NO_SHADOW, since)
    for gateway in told["missing"]:
        table.add_row(escape(gateway), "[red]did not answer[/]", "", "")
    _console().print(table)


def _print_receipt(console: Console, url: str, request_id: str | None) -> None:
    if request_id is None:
        _fail(f"{url} gave no {client.REQUEST_ID_HEADER} header: it is not a Baton gateway")
    simulated = client.simulated_replicas(client.status(url, api_key=_api_key()))
    receipt = client.receipt(url, request_id, _api_key())
    console.print(escape(client.describe_receipt(receipt, simulated)), soft_wrap=True)


def _print_replay(console: Console, found: Replay, policy: str | None) -> None:
    whose = "their own policy" if policy is None else policy
    console.print(f"{found.num_same} of {found.num_decisions} decisions are the same by {whose}")
    for name, number in sorted(found.unknown.items()):
        console.print(f"[yellow]{number} were decided by {escape(name)}, which this version does not have[/]")
    if found.absent:
        names = ", ".join(f"{name} ({number})" for name, number in sorted(found.absent.items()))
        console.print(
            f"[yellow]an earlier version wrote receipts that say nothing of {escape(names)}: "
            "a policy that goes by these decides here by their defaults[/]",
            soft_wrap=True,
        )
    for difference in found.differences:
        console.print(f"  {escape(difference)}", soft_wrap=True)
    if policy is None:
        return
    console.print(f"elsewhere: prefill {found.num_other_prefill}, decode {found.num_other_decode}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("", "split", "prompt tokens to read", "prompt tokens cached"):
        table.add_column(column, justify="right" if column else "left")
    for name, work in (("recorded", found.recorded), (policy, found.replayed)):
        table.add_row(name, f"{work.num_split}", f"{work.read_tokens}", f"{work.reused_tokens}")
    console.print(table)


def _status_table(report: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    for column in ("pool", "replica", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("requests", "tokens", "run/wait", "KV blocks", "KV in"):
        table.add_column(column, justify="right", no_wrap=True)
    for pool, replicas in (report.get("pools") or {}).items():
        for replica in replicas:
            state = "attached" if replica.get("attached") else "[red]detached[/]"
            if "load" not in replica:
                table.add_row(pool, escape(str(replica.get("id"))), state, *["-"] * 5)
                continue
            info, load = replica.get("info") or {}, replica["load"] or {}
            blocks, used = info.get("num_kv_blocks") or 0, load.get("num_kv_blocks_used") or 0
            table.add_row(
                pool,
                escape(str(replica.get("id"))),
                state,
                str(replica.get("in_flight_requests", 0)),
                str(replica.get("in_flight_tokens", 0)),
                f"{load.get('num_running_requests', 0)}/{load.get('num_waiting_requests', 0)}",
                f"{used}/{blocks} ({100 * used / blocks:.0f}%)" if blocks else "-",
                client.human_bytes(load.get("kv_bytes_received_total") or 0),
            )
    return table


if __name__ == "__main__":
    main()
