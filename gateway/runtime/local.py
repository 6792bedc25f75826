"""Owns one local run: its private run dir, its driver process, the events that come from it, and its end."""

import os
import resource
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from gateway.runtime import control, events, processes
from gateway.runtime.environment import RunPaths, environment, free_fallback_port, open_files_needed, variables
from gateway.settings import Settings

_LONGEST_BASE = 24
"""Socket paths add up to 78 characters to it (Ray's; the kernel takes 107) or 72 (HAProxy's; it takes 97)."""


class StartError(RuntimeError):
    """The run cannot start; the message says why and what to do."""


def base_dir() -> Path:
    """This user's folder of run dirs, /tmp/baton-<uid>; made private. Raises StartError if someone else has it."""
    name = f"baton-{os.getuid()}"
    folder = Path(tempfile.gettempdir())
    if len(str(folder / name)) > _LONGEST_BASE:
        folder = Path("/tmp")
    base = folder / name
    base.mkdir(mode=0o700, exist_ok=True)
    facts = base.lstat()
    if facts.st_uid != os.getuid() or not base.is_dir() or base.is_symlink():
        raise StartError(f"{base} belongs to someone else; remove it or set TMPDIR to a folder of your own")
    base.chmod(0o700)
    return base


def check_port(host: str, port: int) -> None:
    """Raises StartError if `baton serve` could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except PermissionError as error:
        raise StartError(f"port {port} needs root; pass --port with a number above 1023") from error
    except (OSError, OverflowError) as error:
        holder = _listener(port)
        if holder is not None:
            raise StartError(f"{host}:{port} is in use by {holder}; stop it or pass --port") from error
        raise StartError(f"cannot listen on {host}:{port}: {error}; check gateway.host and gateway.port") from error


def _listener(port: int) -> str | None:
    """`python (pid 123)`, or None if nothing seems to listen on the port."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port:
            if connection.pid is None:
                return "another user's process"
            with suppress(psutil.Error):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            return f"pid {connection.pid}"
    return None


class LocalRun:
    """A run from claim to removal. Use as: claim(), start(), read events with `poll`, and always stop()."""

    def __init__(self, settings: Settings, build: str, base: Path) -> None:
        self.settings = settings
        self.paths = RunPaths(base / str(settings.gateway.port))
        self.owner = processes.this_process()
        self._build = build
        self._failed_logs = base / f"failed-{settings.gateway.port}"
        self._claimed = False
        self._began_s = time.time()
        self._driver: subprocess.Popen[bytes] | None = None
        self._events_fd: int | None = None
        self._buffer = b""
        self._vital: dict[str, processes.ProcessId] = {}

    def claim(self) -> None:
        """Makes the run dir, which only one run per port can have. Raises StartError."""
        root = self.paths.root
        draft = RunPaths(Path(tempfile.mkdtemp(prefix="claim-", dir=root.parent)))
        state = processes.RunState(self.owner.pid, self.owner.started_ticks, processes.this_machine())
        draft.state.write_bytes(msgspec.json.encode(state))
        for folder in (draft.haproxy, draft.logs, draft.tmp, draft.ray):
            folder.mkdir(mode=0o700)
        draft.token.touch(mode=0o600)
        draft.token.write_text(secrets.token_hex(32))
        draft.settings.touch(mode=0o600)
        draft.settings.write_text(self.settings.model_dump_json())
        try:
            # Complete before it has its name: whoever finds a run dir finds its owner in it.
            draft.root.rename(root)
        except OSError as error:
            shutil.rmtree(draft.root, ignore_errors=True)
            raise StartError(
                f"another `baton serve` holds port {self.settings.gateway.port} ({root}); stop it or pass --port"
            ) from error
        self._claimed = True

    def start(self) -> None:
        """Starts the driver process. Its noise goes to a log file, its events come through `poll`."""
        processes.become_subreaper()
        table = variables(
            self.settings,
            self.paths,
            str(self.owner),
            fallback_port=free_fallback_port(self.settings.gateway.port),
            cores=os.cpu_count() or 1,
            open_files=_raised_open_files(open_files_needed(self.settings)),
        )
        (self.paths.logs / "ray").symlink_to(self.paths.ray / "session_latest" / "logs")
        read_fd, write_fd = os.pipe()
        with self.paths.driver_log.open("wb") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "gateway.runtime.driver", str(self.paths.root), self._build, str(write_fd)],
                env=environment(table, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write_fd],
                start_new_session=True,
            )
        os.close(write_fd)
        self._events_fd = read_fd

    def poll(self, timeout_s: float) -> list[events.Event]:
        """Events that arrived within `timeout_s`; returns as soon as there is one."""
        if self._events_fd is None:
            return []
        ready, _, _ = select.select([self._events_fd], [], [], timeout_s)
        if not ready:
            return []
        chunk = os.read(self._events_fd, 1 << 16)
        if not chunk:
            os.close(self._events_fd)
            self._events_fd = None
            return []
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        arrived = [events.decode(line) for line in lines]
        for event in arrived:
            if isinstance(event, events.RayStarted):
                below = {process.pid: process for process in processes.descendants(os.getpid())}
                self._vital = {name: below[pid] for name, pid in event.pids.items() if pid in below}
        return arrived

    def dead_part(self) -> str | None:
        """Names the part of the runtime that died, if one did."""
        if self._driver is not None and self._driver.poll() is not None:
            return f"the driver process ended with code {self._driver.returncode}"
        for name, process in self._vital.items():
            if not processes.is_alive(process):
                return f"Ray's {name} (pid {process.pid}) died"
        return None

    def stop(self, keep_logs: bool, is_forced: Callable[[], bool]) -> Path | None:
        """Ends every process of the run and removes its files. Returns where the logs were kept, if asked to."""
        if not self._claimed:
            return None
        if self._events_fd is not None:
            os.close(self._events_fd)
            self._events_fd = None
        if self._driver is not None:
            driver = self._driver
            if self.settings.tracing is not None:
                with suppress(control.OrderFailed):
                    control.send_spans(self.paths.control, control.SPANS_S)
            processes.end_processes(self._remaining, is_forced)
            with suppress(subprocess.TimeoutExpired):
                driver.wait(timeout=1)
            processes.remove_orphaned_semaphores(self._began_s)
        kept = self._keep_logs() if keep_logs else None
        shutil.rmtree(self.paths.root, ignore_errors=True)
        return kept

    def survivors(self) -> list[processes.ProcessId]:
        """Processes of the run that even SIGKILL did not end in time."""
        return self._remaining() if self._claimed else []

    def _remaining(self) -> list[processes.ProcessId]:
        found = {*processes.descendants(os.getpid()), *processes.marked(self.owner)}
        return sorted(found, key=lambda process: process.pid)

    def _keep_logs(self) -> Path:
        shutil.rmtree(self._failed_logs, ignore_errors=True)
        self._failed_logs.mkdir(mode=0o700)
        with suppress(OSError):
            shutil.copy(self.paths.driver_log, self._failed_logs)
        with suppress(OSError, shutil.Error):
            shutil.copytree(self.paths.logs / "ray", self._failed_logs / "ray", ignore=shutil.ignore_patterns("*.sock"))
        return self._failed_logs


def _raised_open_files(needed: int) -> int:
    """Raises this process's limit of open files, which its children inherit, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return needed
    target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if target > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return max(soft, target)
