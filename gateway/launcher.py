"""Owns `baton serve`: starts a local run, shows its progress, lets it serve until a signal, and stops it whole."""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from gateway import client
from gateway.agents.tenants import key_sha256, new_key
from gateway.runtime import processes
from gateway.runtime.environment import LOOPBACK
from gateway.runtime.events import AppStatus, DriverFailed, Event, PoliciesSwitched, RayStarted
from gateway.runtime.local import LocalRun, StartError, base_dir, check_port
from gateway.settings import Settings, TenantSettings

BUILD = "gateway.app:build"
OWN_TENANT = "baton-serve"
"""As whom this run looks at its gateways and asks its demo, if there are tenants."""
SIMULATED = "simulated engines, no model: what they answer means nothing, and no figure is a figure of a model"
_POLL_S = 0.2
_STATUS_TIMEOUT_S = 5.0
_ECHO_S = 0.5
_PORT_TAKEN = "Address already in use"
"""In what HAProxy says when it cannot listen; the gateway's is the only port it has."""
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_ANY_ADDRESS = {"0.0.0.0": LOOPBACK, "::": "::1"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(r"^(See |Ray\b.*\blogs?\b|The deployment failed to start|Retrying)")


class _Stopped(BaseException):
    """A signal asked the launcher to stop; raised in the main thread, wherever it is."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into `_Stopped`; a later one only sets `forced`.

    One that comes right after the first is its echo: make, for one, passes on what the whole process group was sent.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.forced = False
        self._first_s = 0.0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            self.forced = self.forced or time.monotonic() - self._first_s > _ECHO_S
            return
        self.stopping = True
        self._first_s = time.monotonic()
        raise _Stopped(number)

    def install(self) -> None:
        """For good: a signal that comes while this process ends must not change its exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)


class _Sayer:
    """Prints, even if nobody reads it any more: stopping goes on. A closed pipe makes rich end the process."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str) -> None:
        with suppress(OSError, SystemExit):
            self._console.print(text)


def serve(settings: Settings, build: str = BUILD, console: Console | None = None, demo: bool = True) -> int:
    """Runs Baton on this machine until a signal, and returns the exit code.

    `build` names a function `Settings -> ray.serve.Application` as `module:function`; the run's own process imports it.
    0 after SIGINT or SIGTERM once it was ready (128 + the signal before that), 1 if it failed.
    """
    out = console or Console(highlight=False)
    signals = _Signals()
    run: LocalRun | None = None
    ready = False
    failure: str | None = None
    code = 0
    signals.install()
    try:
        _refuse_clusters(settings)
        settings, api_key = with_own_key(settings)
        base = base_dir()
        healed = processes.heal(base)
        if healed:
            out.print(escape(str(healed)))
        check_port(settings.gateway.host, settings.gateway.port)
        run = LocalRun(settings, build, base)
        run.claim()
        if settings.simulation is not None:
            out.print(f"[bold yellow]{SIMULATED}[/]")
        run.start()
        _wait_until_ready(run, out, api_key)
        ready = True
        _welcome(run, out, demo, api_key)
        _watch(run, out)
    except _Stopped as stop:
        code = 0 if ready else 128 + stop.number
    except (StartError, OSError) as error:
        failure = str(error)
        code = 1
    finally:
        signals.stopping = True
        if run is not None:
            say = _Sayer(out)
            began = time.monotonic()
            if failure is None:
                say("stopping; Ctrl-C again to force")
            kept = run.stop(keep_logs=failure is not None, is_forced=lambda: signals.forced)
            survivors = run.survivors()
            if survivors:
                say(f"[red]could not end processes {', '.join(str(process.pid) for process in survivors)}[/]")
            elif failure is None:
                say(f"stopped in {time.monotonic() - began:.1f} s; nothing is left running")
            if failure is not None and kept is not None:
                failure += f"\nlogs: {kept}"
    if failure is not None:
        Console(stderr=True, highlight=False).print(
            f"[bold red]baton serve failed:[/] {escape(failure)}", soft_wrap=True
        )
    return code


def base_url(settings: Settings) -> str:
    """Where a client on this machine reaches the gateway."""
    host = _ANY_ADDRESS.get(settings.gateway.host, settings.gateway.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.gateway.port}"


def root_cause(message: str) -> str:
    """The part of a Serve status message that a user can act on: the last exception of its traceback.

    A message without a traceback is returned as it is, less Serve's boilerplate.
    """
    lines = [line.rstrip() for line in _ANSI.sub("", message).strip().splitlines()]
    exceptions = [
        index
        for index, line in enumerate(lines)
        if re.match(r"^([A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt))\b", line)
    ]
    if exceptions:
        last = exceptions[-1]
        tail = [lines[last]]
        for line in lines[last + 1 :]:
            if not line or _NOISE.match(line):
                break
            tail.append(line)
        first = re.sub(r"^(?:[a-z_]\w*\.)+(?=[A-Z])", "", tail[0])
        return "\n".join([first, *tail[1:]])
    useful = [line for line in lines if line and not _NOISE.match(line)]
    return "\n".join(useful) or message


def failure_of(status: AppStatus) -> str:
    """One readable reason why the application is not healthy."""
    bad = [d for d in status.deployments if d.message and d.status not in ("HEALTHY", "UPDATING")]
    bad = bad or [d for d in status.deployments if d.message]
    if bad:
        return "\n".join(f"{d.name}: {root_cause(d.message)}" for d in bad)
    return root_cause(status.message) or f"Ray Serve says {status.status}"


def _refuse_clusters(settings: Settings) -> None:
    if settings.runtime.ray_address:
        raise StartError(
            "runtime.ray_address is set, but `baton serve` runs on this machine only; remove it, or deploy "
            "gateway.app:build on that cluster with `serve run`"
        )
    if settings.is_scaled:
        raise StartError(
            "a pool has max_replicas, and `baton serve` starts a fixed number of engines on this machine; remove it, "
            "or deploy on a cluster with configs/serve/gpu.yaml"
        )


def with_own_key(settings: Settings) -> tuple[Settings, str | None]:
    """The settings of a run that has a key of its own, and that key, if keys are asked for. It dies with the run: the
    configuration holds no key that could be used. Raises StartError."""
    if not settings.tenants:
        return settings, None
    if any(tenant.name == OWN_TENANT for tenant in settings.tenants):
        raise StartError(f"a tenant is called {OWN_TENANT!r}, as `baton serve` calls itself; give it another name")
    key = new_key()
    own = TenantSettings(name=OWN_TENANT, api_key_sha256=[key_sha256(key.encode()).hex()], operator=True)
    return settings.model_copy(update={"tenants": [*settings.tenants, own]}), key


class PoolWatch:
    """What the gateways lack of complete pools. Each speaks for itself, and HAProxy chooses which one answers."""

    def __init__(self, settings: Settings, api_key: str | None = None) -> None:
        self._url = base_url(settings)
        self._api_key = api_key
        self._num_gateways = settings.gateway.replicas
        self._expected = {"prefill": settings.pools.prefill.replicas, "decode": settings.pools.decode.replicas}
        self._missing: dict[str, str] = {}

    def look(self) -> str:
        """What is missing still, after one more gateway was asked; empty if nothing."""
        try:
            status = client.status(self._url, _STATUS_TIMEOUT_S, self._api_key)
        except client.GatewayError as error:
            return str(error)
        self._missing[str(status.get("gateway"))] = client.missing_replicas(status, self._expected)
        if missing := next(filter(None, self._missing.values()), ""):
            return missing
        if (num_heard := len(self._missing)) < self._num_gateways:
            return f"{num_heard} of {self._num_gateways} gateways have answered"
        return ""


def _wait_until_ready(run: LocalRun, console: Console, api_key: str | None) -> None:
    """Until Serve runs everything and each gateway can use it: one serves as soon as one engine can answer.

    Raises StartError.
    """
    began = time.monotonic()
    limit_s = run.settings.runtime.start_timeout_s
    pools = PoolWatch(run.settings, api_key)
    is_running = False
    with _progress(console) as show:
        while True:
            for event in run.poll(_POLL_S):
                show(event)
                if isinstance(event, DriverFailed):
                    raise StartError(_why_driver_failed(event.message, run.settings))
                if isinstance(event, AppStatus):
                    is_running = event.status == "RUNNING"
                    if event.status in _FAILED:
                        raise StartError(failure_of(event))
            missing = pools.look() if is_running else ""
            if is_running and not missing:
                return
            dead = run.dead_part()
            if dead is not None:
                raise StartError(f"{dead} while starting")
            if time.monotonic() - began > limit_s:
                raise StartError(
                    f"not ready after {limit_s:g} s{f': {missing}' if missing else ''}; "
                    "a slow machine needs a larger runtime.start_timeout_s"
                )
            show(None)


def _why_driver_failed(message: str, settings: Settings) -> str:
    cause = root_cause(message)
    if _PORT_TAKEN not in cause:
        return cause
    host, port = settings.gateway.host, settings.gateway.port
    try:
        check_port(host, port)
    except StartError as error:
        return f"{error}; it came while Baton started"
    return f"{host}:{port} was in use while Baton started and is free again; start again, or pass --port"


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Event | None], None]]:
    """Shows the deployments: a live table on a terminal, one line per change elsewhere."""
    began = time.monotonic()
    since: dict[str, tuple[str, float]] = {}
    rows: list[tuple[str, str]] = [("ray", "starting")]

    def update(event: Event | None) -> list[tuple[str, str]]:
        """Returns the rows that changed."""
        if isinstance(event, RayStarted):
            rows[:] = [("ray", "running")]
        elif isinstance(event, AppStatus):
            rows[:] = [("ray", "running")] + [
                (d.name, "ready" if d.status == "HEALTHY" else f"starting ({d.running} of {max(d.replicas, 1)} up)")
                for d in event.deployments
            ]
        changed = [(name, state) for name, state in rows if since.get(name, ("", 0.0))[0] != state]
        for name, state in changed:
            since[name] = (state, time.monotonic())
        return changed

    if not console.is_terminal:

        def print_changes(event: Event | None) -> None:
            for name, state in update(event):
                console.print(escape(f"[{time.monotonic() - began:5.1f} s] {name}: {state}"))

        yield print_changes
        return

    def table() -> Table:
        grid = Table.grid(padding=(0, 2))
        for name, state in rows:
            done = state in ("running", "ready")
            at = since.get(name, ("", began))[1] if done else time.monotonic()
            grid.add_row("[green]✓[/]" if done else "[yellow]·[/]", escape(name), state, f"{at - began:.0f} s")
        return grid

    with Live(table(), console=console, refresh_per_second=4) as live:

        def refresh(event: Event | None) -> None:
            update(event)
            live.update(table())

        yield refresh


def _welcome(run: LocalRun, console: Console, demo: bool, api_key: str | None) -> None:
    settings = run.settings
    url = base_url(settings)
    prompt = settings.runtime.demo_prompt
    if demo and prompt:
        console.print(f"\n[bold]>[/] {escape(prompt)}")
        try:
            receipt_id = None
            for piece in client.chat(url, prompt, model=settings.model_name, max_tokens=160, api_key=api_key):
                if isinstance(piece, client.Finished):
                    receipt_id = piece.request_id
                else:
                    console.print(escape(piece), end="", soft_wrap=True)
            console.print()
            if receipt_id is not None:
                status = client.status(url, api_key=api_key) if settings.simulation else {}
                receipt = client.receipt(url, receipt_id, api_key)
                described = client.describe_receipt(receipt, client.simulated_replicas(status))
                console.print(f"[dim]{escape(described)}[/]")
        except client.GatewayError as error:
            console.print(f"[yellow]the demo request failed:[/] {escape(str(error))}", soft_wrap=True)
    body = f'{{"model": "{settings.model_name}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(f"\nBaton serves [bold]{escape(settings.model_name)}[/] at [bold]{url}/v1[/]")
    if settings.simulation is not None:
        console.print(f"[bold yellow]{SIMULATED}[/]", soft_wrap=True)
    key = f' -H "authorization: Bearer ${client.API_KEY_VARIABLE}"' if settings.tenants else ""
    console.print(
        escape(f"try: curl -N {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"),
        soft_wrap=True,
    )
    console.print(f"logs: {run.paths.logs}", soft_wrap=True)
    console.print("Ctrl-C stops it.")
    sys.stdout.flush()


def _watch(run: LocalRun, console: Console) -> None:
    """Serves; prints changes of health. Raises StartError when the runtime dies."""
    last = "RUNNING"
    while True:
        for event in run.poll(_POLL_S):
            if isinstance(event, DriverFailed):
                raise StartError(f"the runtime failed: {root_cause(event.message)}")
            if isinstance(event, PoliciesSwitched):
                console.print(escape(f"policy {event.policy}, shadow {event.shadow_policy or 'none'}, as told"))
            if isinstance(event, AppStatus) and event.status != last:
                last = event.status
                if last == "RUNNING":
                    console.print("[green]healthy again[/]")
                else:
                    console.print(f"[yellow]{last.lower()}:[/] {escape(failure_of(event))}", soft_wrap=True)
        dead = run.dead_part()
        if dead is not None:
            raise StartError(f"{dead}; everything is stopped")


__all__ = ["BUILD", "base_url", "failure_of", "root_cause", "serve", "with_own_key"]
