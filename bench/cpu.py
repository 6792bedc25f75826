"""Owns CPU time by role: which part of a system a process is, and what each part used between two readings."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from gateway.runtime.processes import ProcessId

_REPOSITORY = f"{Path(__file__).resolve().parents[1]}/"
TITLE_CHARACTERS = 80
_HIGHEST_PRIORITY = -20
_AUTOGROUP = Path("/proc/self/autogroup")
_AUTOGROUPS_ENABLED = Path("/proc/sys/kernel/sched_autogroup_enabled")


class Role(StrEnum):
    ENGINE = "engine"
    """vLLM's EngineCore and its workers, and what stands in for them: what every system has to pay for."""
    SERVER = "server"
    """What stands directly before an engine or speaks HTTP: API servers, Baton's gateway and worker replicas."""
    ROUTER = "router"
    """What passes requests on: vllm-router, HAProxy and Serve's proxy that minds it."""
    RAY = "ray"
    """What keeps Baton running: raylet, GCS, agents, Serve's controller, `baton serve` and its driver."""


_ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
_ENGINE_WORDS = ("bench.mock_engine",)
_ROUTER_TITLES = ("vllm::router", "haproxy", "ray::ProxyActor", "ray::HAProxyManager")
_SERVER_TITLES = ("ray::ServeReplica:",)
_RAY_WORDS = ("ray::", "raylet", "gcs_server", "/ray/", "gateway.runtime.driver", "gateway.cli")


@dataclass(frozen=True)
class RoleSeconds:
    """CPU seconds by role."""

    engine_s: float = 0.0
    server_s: float = 0.0
    router_s: float = 0.0
    ray_s: float = 0.0

    @property
    def outside_engine_s(self) -> float:
        return self.server_s + self.router_s + self.ray_s

    def moved_to_engine(self, seconds: float) -> "RoleSeconds":
        """With so much of the servers' time counted as the engines': of an engine that runs in a server's process."""
        moved_s = min(seconds, self.server_s)
        return RoleSeconds(self.engine_s + moved_s, self.server_s - moved_s, self.router_s, self.ray_s)

    def times(self, factor: float) -> "RoleSeconds":
        return RoleSeconds(*(value * factor for value in (self.engine_s, self.server_s, self.router_s, self.ray_s)))


@dataclass(frozen=True)
class ProcessCpu:
    """CPU seconds of one process: since its start in a reading, between two readings in what `spent` returns."""

    role: Role
    title: str
    cpu_s: float


def role_of(title: str) -> Role:
    """The role of a process with this title (its command line, or what it set in its place)."""
    if title.startswith(_ENGINE_TITLES) or any(word in title for word in _ENGINE_WORDS):
        return Role.ENGINE
    if title.startswith(_ROUTER_TITLES) or "/haproxy" in title.partition(" ")[0]:
        return Role.ROUTER
    if title.startswith(_SERVER_TITLES):
        return Role.SERVER
    if any(word in title for word in _RAY_WORDS):
        return Role.RAY
    return Role.SERVER


def read(processes: Iterable[ProcessId]) -> dict[ProcessId, ProcessCpu]:
    """CPU time of each process since it started; one that ended meanwhile is left out."""
    found: dict[ProcessId, ProcessCpu] = {}
    for id in processes:
        try:
            process = psutil.Process(id.pid)
            title = " ".join(process.cmdline()).strip() or process.name()
            times = process.cpu_times()
        except psutil.Error:
            continue
        # A report that is passed on should not tell where this machine keeps its files.
        shown = title.replace(_REPOSITORY, "")[:TITLE_CHARACTERS]
        found[id] = ProcessCpu(role_of(title), shown, times.user + times.system)
    return found


@contextmanager
def first_in_line() -> Iterator[None]:
    """In this context the calling process gets a processor as soon as it asks for one, where it may ask for that (root
    may); otherwise nothing changes.

    A client that shares cores with what it measures is else kept waiting for up to a second: Linux groups processes by
    session (autogroup), and the small group of a client that sleeps most of the time gets a small share of a core.
    """
    priority, group_priority = os.getpriority(os.PRIO_PROCESS, 0), _group_priority()
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _HIGHEST_PRIORITY)
    except PermissionError:
        yield
        return
    try:
        if group_priority is not None:
            _AUTOGROUP.write_text(str(_HIGHEST_PRIORITY))
        yield
    finally:
        # What the client starts between two loads must be as everything else is.
        os.setpriority(os.PRIO_PROCESS, 0, priority)
        if group_priority is not None:
            _AUTOGROUP.write_text(group_priority)


def _group_priority() -> str | None:
    """The priority of this process's group, or None where it has no group: Linux makes one per session, and a
    process of the first session, as in many containers, is in none."""
    shown = _AUTOGROUP.read_text().split() if _AUTOGROUP.exists() else []
    return shown[-1] if shown else None


def has_autogroups() -> bool:
    """Whether Linux shares cores out between sessions first and then between the processes of each (autogroup): engines
    that were started in one session can then keep a client of another one waiting, however little that needs."""
    return _AUTOGROUPS_ENABLED.exists() and _AUTOGROUPS_ENABLED.read_text().strip() == "1"


def waited_s() -> float:
    """How long this process's main thread has been ready to run without a processor since it started, in seconds."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def machine_busy_s() -> float:
    """CPU seconds that all cores together have spent busy or robbed by the hypervisor since boot."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def spent(before: Mapping[ProcessId, ProcessCpu], after: Mapping[ProcessId, ProcessCpu]) -> list[ProcessCpu]:
    """What each process used between two readings, most first. One that started in between counts from its start;
    one that ended in between is lost."""
    used = [
        ProcessCpu(now.role, now.title, now.cpu_s - (before[id].cpu_s if id in before else 0.0))
        for id, now in after.items()
    ]
    return sorted(used, key=lambda process: -process.cpu_s)


def by_role(used: Iterable[ProcessCpu]) -> RoleSeconds:
    totals = dict.fromkeys(Role, 0.0)
    for process in used:
        totals[process.role] += process.cpu_s
    return RoleSeconds(totals[Role.ENGINE], totals[Role.SERVER], totals[Role.ROUTER], totals[Role.RAY])
