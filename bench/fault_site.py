"""Owns a real run that faults strike: its processes, what its gateways say, its start, its end, its logs."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
import psutil

from bench.fault_cases import Victim
from bench.fault_view import (
    GatewayView,
    Part,
    ProcessView,
    ReceiptView,
    Size,
    Views,
    not_empty,
    not_tidy,
    not_whole,
    parts,
)
from bench.serve_control import ServeControl
from bench.systems import REPOSITORY, Command, LocalSystem, Recipe
from engine.ports import free_ports
from gateway.runtime.environment import LOOPBACK, RunPaths
from gateway.runtime.local import base_dir
from gateway.settings import Settings

STATUS_TIMEOUT_S = 2.0
POLL_S = 0.03
LOOK_UP_S, LOOK_UP_SOON_S = 5.0, 0.3
LOG_TAIL_BYTES = 200_000
TIDY_TIMEOUT_S, TIDY_POLL_S = 20.0, 0.3
COLD_START_TIMEOUT_S = 300.0


class Site:
    """One `baton serve` with real engines. Gateways are asked directly, each at its own port: HAProxy may be what was
    struck, and would not say whom it asks."""

    def __init__(self, config: Path, settings: Settings) -> None:
        pools = settings.pools
        self.size = Size(settings.gateway.replicas, pools.prefill.replicas, pools.decode.replicas)
        self._settings = settings
        self._system = LocalSystem("baton", lambda _folder: _recipe(config.resolve()), settings.runtime.start_timeout_s)
        self._http = httpx.AsyncClient(timeout=STATUS_TIMEOUT_S, trust_env=False)
        self._ports: dict[int, int] = {}
        self._gateway_pids: list[int] = []
        self._looked_up_s = 0.0
        self._usual_others = 0
        self._control: ServeControl | None = None

    @property
    def url(self) -> str:
        """The front door."""
        return self._system.url

    async def start(self) -> None:
        """Returns when every gateway is ready with every engine. Raises StartFailed, TimeoutError."""
        await asyncio.to_thread(self._system.start)
        async with asyncio.timeout(self._settings.runtime.start_timeout_s):
            while self.not_whole_of(await self.views()):  # noqa: ASYNC110  gateways tell nobody when they are ready
                await asyncio.sleep(POLL_S)
        found = parts(self.processes())
        self._usual_others = list(found.values()).count(Part.OTHER)

    async def stop(self) -> None:
        """Ends everything; a process that was stopped is continued first, or SIGTERM would not reach it."""
        self.let_go_of_serve()
        for process in self._system.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        await asyncio.to_thread(self._system.stop)
        self._ports.clear()

    async def close(self) -> None:
        await self.stop()
        await self._http.aclose()

    # -- processes

    def processes(self) -> list[ProcessView]:
        """Those of the run; the hold on its Serve is not of it."""
        found: list[ProcessView] = []
        control_pid = self._control.pid if self._control else None
        for id in self._system.processes():
            if id.pid == control_pid:
                continue
            with suppress(psutil.Error):
                process = psutil.Process(id.pid)
                title = " ".join(process.cmdline()).strip() or process.name()
                found.append(ProcessView(id.pid, process.ppid(), title))
        return found

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more, `baton serve` included."""
        return not self._system.processes()

    def pids_of(self, part: Victim) -> list[int]:
        """The newest first."""
        pids = [pid for pid, found in parts(self.processes()).items() if found.value == part.value]
        return sorted(pids, key=_created_s, reverse=True)

    def core_of(self, pids: Iterable[int]) -> int | None:
        """The EngineCore process among an engine's processes."""
        for pid in pids:
            with suppress(psutil.Error):
                if " ".join(psutil.Process(pid).cmdline()).startswith("VLLM::"):
                    return pid
        return None

    # -- what gateways say

    async def views(self) -> Views:
        """Of every gateway that answers; one that hangs is left out after a moment."""
        found = await asyncio.gather(*(self._view(pid) for pid in self._gateways()))
        views = [view for view in found if view is not None]
        if len(views) < self.size.gateways:
            self._looked_up_s = min(self._looked_up_s, time.monotonic() - LOOK_UP_S + LOOK_UP_SOON_S)
        return views

    def _gateways(self) -> list[int]:
        """Looked up now and then, sooner if one is missing: reading the table of all processes takes its time."""
        now_s = time.monotonic()
        if now_s - self._looked_up_s > LOOK_UP_S:
            self._gateway_pids, self._looked_up_s = self.pids_of(Victim.GATEWAY), now_s
        return self._gateway_pids

    async def view_of(self, pid: int) -> GatewayView | None:
        """Of one gateway's process; None if it does not answer."""
        return await self._view(pid)

    async def gateway_pid(self, gateway: str) -> int | None:
        """The process of the gateway with this id."""
        for pid in self._gateways():
            if (view := await self._view(pid)) is not None and view.gateway == gateway:
                return pid
        return None

    async def _view(self, pid: int) -> GatewayView | None:
        for port in [self._ports[pid]] if pid in self._ports else _listening(pid):
            with suppress(httpx.HTTPError, msgspec.DecodeError):
                response = await self._http.get(f"http://{LOOPBACK}:{port}/baton/status")
                view = msgspec.json.decode(response.content, type=GatewayView)
                self._ports[pid] = port
                return view
        return None

    async def receipt(self, receipt_id: str) -> ReceiptView | None:
        """From any gateway that answers; None if none has it."""
        for pid in self._gateways():
            if (port := self._ports.get(pid)) is not None:
                with suppress(httpx.HTTPError, msgspec.DecodeError):
                    response = await self._http.get(f"http://{LOOPBACK}:{port}/baton/receipts/{receipt_id}")
                    if response.status_code == httpx.codes.OK:
                        return msgspec.json.decode(response.content, type=ReceiptView)
        return None

    async def front_door_opens(self) -> bool:
        with suppress(httpx.HTTPError):
            # A connection that is kept would keep an HAProxy that was replaced.
            response = await self._http.get(f"{self.url}/baton/status", headers={"connection": "close"})
            return response.status_code == httpx.codes.OK
        return False

    # -- conditions

    def not_whole_of(self, views: Views, without: Collection[str] = ()) -> str:
        return not_whole(views, self.size, without)

    async def until_empty(self, timeout_s: float, but: Iterable[str] = ()) -> tuple[float | None, str]:
        """How long it takes until no engine but those holds anything, and else what does."""
        but, began_s, wrong = set(but), time.monotonic(), "no gateway answers"
        while True:
            views = await self.views()
            took_s = time.monotonic() - began_s
            if views and not (wrong := not_empty(views, but)):
                return round(took_s, 3), ""
            if took_s > timeout_s:
                return None, wrong
            await asyncio.sleep(POLL_S)

    async def not_well(self) -> str:
        """Why the run is not as it was when it was new: whole, empty, reachable, and no process too many."""
        views = await self.views()
        if why := self.not_whole_of(views) or not_empty(views):
            return "baton serve has ended" if self.has_ended else why
        if not await self.front_door_opens():
            return "HAProxy does not answer"
        return not_tidy(self.processes(), self.size, self._usual_others)

    async def left_over(self) -> str:
        """What there is too much or too little of when everything has had its time to end; empty if nothing."""

        def now() -> str:
            return not_tidy(self.processes(), self.size, self._usual_others)

        await wait_for(lambda: not now(), TIDY_TIMEOUT_S, TIDY_POLL_S)
        return now()

    # -- Serve

    async def scale(self, deployment: str, num_replicas: int) -> None:
        control = await self._serve_control()
        await asyncio.to_thread(control.scale, deployment, num_replicas)

    async def replicas(self, deployment: str) -> dict[str, int]:
        """The processes of the replicas that Serve runs now, by replica id."""
        control = await self._serve_control()
        return await asyncio.to_thread(control.pids, deployment)

    async def update(self, change: Callable[[Settings], Settings]) -> None:
        """Deploys the application anew with changed settings. Returns when Serve has been told."""
        control, paths = await self._serve_control(), self._paths()
        settings = change(Settings.model_validate_json(paths.settings.read_text()))
        file = paths.root / "changed-settings.json"
        file.write_text(settings.model_dump_json())
        await asyncio.to_thread(control.update, file)

    async def update_failure(self) -> str:
        """Why Serve has given up an update; empty if it has not."""
        control = await self._serve_control()
        return await asyncio.to_thread(control.failure)

    async def _serve_control(self) -> ServeControl:
        if self._control is None:
            pids = [process.pid for process in self.processes()]
            self._control = await asyncio.to_thread(ServeControl, pids)
        return self._control

    def let_go_of_serve(self) -> None:
        """Ends the process that talks to Serve, which is one too many in a tidy run."""
        if self._control is not None:
            self._control.close()
            self._control = None

    # -- files

    def _paths(self) -> RunPaths:
        return RunPaths(base_dir() / self.url.rpartition(":")[2])

    def keep_logs(self, folder: Path) -> None:
        """The ends of the run's log files."""
        logs = self._paths().logs
        shutil.rmtree(folder, ignore_errors=True)
        for file in sorted(logs.rglob("*")) + sorted((logs / "ray").resolve().rglob("*")):
            with suppress(OSError):
                if file.is_file() and file.suffix in (".log", ".err", ".out") and file.stat().st_size:
                    folder.mkdir(parents=True, exist_ok=True)
                    with file.open("rb") as data:
                        data.seek(max(file.stat().st_size - LOG_TAIL_BYTES, 0))
                        (folder / file.name).write_bytes(data.read())


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def wait_for(condition: Callable[[], object], timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Whether it held within the time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(poll_s)
    return True


async def measure_cold_start_s(config: Path) -> float:
    """Raises RuntimeError when the engine does not start."""
    argv = [sys.executable, "-m", "bench.cold_start", str(config)]
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(COLD_START_TIMEOUT_S):
            output, errors = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    lines = output.decode(errors="replace").split()
    if process.returncode or not lines:
        raise RuntimeError(f"an engine alone does not start:\n{errors.decode(errors='replace')[-2000:]}")
    return float(lines[-1])


def _recipe(config: Path) -> Recipe:
    (port,) = free_ports(LOOPBACK)
    argv = [sys.executable, "-m", "bench.fault_app", str(config), str(port)]
    url = f"http://{LOOPBACK}:{port}"
    # Until `baton serve` says that it is ready, the loss of a replica is the failure of its start.
    command = Command("baton-serve", argv, dict(os.environ), f"{url}/v1/models", "Ctrl-C stops it")
    return Recipe(url, ((command,),))


def _listening(pid: int) -> list[int]:
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections(kind="tcp")
        return sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN and c.laddr})
    return []


def _created_s(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
