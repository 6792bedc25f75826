"""Owns which processes belong to which run: reads /proc, decides what a crash left behind, and ends processes."""

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.runtime.environment import RUN_MARKER, RunPaths

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
_TERMINATE_S = 4.0
_TRACKER_S = 1.0
_KILL_S = 5.0


@dataclass(frozen=True)
class ProcessId:
    """A process, safe against reuse of its number: pid and start time in clock ticks since boot."""

    pid: int
    started_ticks: int

    def __str__(self) -> str:
        return f"{self.pid}:{self.started_ticks}"

    @classmethod
    def parse(cls, text: str) -> "ProcessId | None":
        pid, separator, started = text.partition(":")
        if separator and pid.isdecimal() and started.isdecimal():
            return cls(int(pid), int(started))
        return None


@dataclass(frozen=True)
class ProcessFacts:
    """What healing needs to know of one process. `owner` comes from its run marker, if it still shows one."""

    id: ProcessId
    uid: int
    owner: ProcessId | None
    command: str
    zombie: bool = False


class RunState(msgspec.Struct, frozen=True):
    """The state file of a run dir. `machine` tells boots and containers apart, whose process numbers differ."""

    owner_pid: int
    owner_started_ticks: int
    machine: str

    @property
    def owner(self) -> ProcessId:
        return ProcessId(self.owner_pid, self.owner_started_ticks)


@dataclass(frozen=True)
class RunDirFacts:
    """One run dir; `state` is None while it has none (a start that died before it wrote one)."""

    path: Path
    state: RunState | None


@dataclass(frozen=True)
class HealPlan:
    """What a crash left behind."""

    processes: list[ProcessId]
    run_dirs: list[Path]

    def __bool__(self) -> bool:
        return bool(self.processes or self.run_dirs)

    def __str__(self) -> str:
        count = len(self.processes)
        return f"healed a crashed run: stopped {count} process{'' if count == 1 else 'es'}, removed " + (
            ", ".join(str(path) for path in self.run_dirs) or "no files"
        )


# Deciding


def plan_heal(
    processes: Collection[ProcessFacts], run_dirs: Collection[RunDirFacts], uid: int, machine: str
) -> HealPlan:
    """Chooses this user's processes and run dirs whose owner is dead; a live run's are never chosen.

    A process belongs to the owner its marker names; one whose marker is lost belongs to the run dir that its command
    line names. A run dir of another container (same boot, other process numbers) counts as alive: we cannot tell.
    """
    alive = {facts.id for facts in processes if not facts.zombie}
    stale_dirs = [facts.path for facts in run_dirs if _is_stale(facts, alive, machine)]

    def is_left_over(facts: ProcessFacts) -> bool:
        if facts.uid != uid or facts.zombie:
            return False
        if facts.owner is not None:
            return facts.owner not in alive
        return any(f"{path}/" in facts.command for path in stale_dirs)

    return HealPlan(
        processes=sorted((facts.id for facts in processes if is_left_over(facts)), key=lambda id: id.pid),
        run_dirs=sorted(stale_dirs),
    )


def _is_stale(facts: RunDirFacts, alive: Collection[ProcessId], machine: str) -> bool:
    if facts.state is None:
        return True
    boot, _, container = facts.state.machine.partition("/")
    our_boot, _, our_container = machine.partition("/")
    if boot != our_boot:
        return True
    return container == our_container and facts.state.owner not in alive


def is_resource_tracker(command: str) -> bool:
    """Python's resource trackers remove shared memory once those who made it are gone, so they must go last."""
    return "multiprocessing.resource_tracker" in command


# Gathering


def process_of(pid: int) -> ProcessId:
    """Who has this number now, also a zombie. Raises OSError if there is none."""
    return ProcessId(pid, _stat(pid)[1])


def this_process() -> ProcessId:
    return process_of(os.getpid())


def this_machine() -> str:
    """Boot and process-number namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def is_alive(process: ProcessId) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        state, ticks = _stat(process.pid)
    except OSError:
        return False
    return ticks == process.started_ticks and state != "Z"


def gather_processes() -> list[ProcessFacts]:
    """Facts of every process; one that ends meanwhile or may not be read is left out."""
    found: list[ProcessFacts] = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        pid = int(entry)
        with suppress(OSError):
            state, ticks = _stat(pid)
            found.append(
                ProcessFacts(
                    id=ProcessId(pid, ticks),
                    uid=os.stat(f"/proc/{pid}").st_uid,
                    owner=_owner(pid),
                    command=Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                    zombie=state == "Z",
                )
            )
    return found


def gather_run_dirs(base: Path) -> list[RunDirFacts]:
    """The run dirs below `base` (their names are port numbers)."""
    with suppress(FileNotFoundError):
        return [
            RunDirFacts(path, _read_state(RunPaths(path).state))
            for path in sorted(base.iterdir())
            if path.name.isdecimal() and path.is_dir()
        ]
    return []


def descendants(root: int) -> list[ProcessId]:
    """Every living process below `root`."""
    children: dict[int, list[ProcessId]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                fields = _stat_fields(int(entry))
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(ProcessId(int(entry), int(fields[19])))
    found: list[ProcessId] = []
    pending = [root]
    while pending:
        for child in children.get(pending.pop(), ()):
            found.append(child)
            pending.append(child.pid)
    return found


def marked(owner: ProcessId) -> list[ProcessId]:
    """Every living process of `owner`'s run, wherever it hangs in the process tree."""
    return [facts.id for facts in gather_processes() if facts.owner == owner and not facts.zombie]


def _owner(pid: int) -> ProcessId | None:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    prefix = f"{RUN_MARKER}=".encode()
    for entry in environ.split(b"\0"):
        if entry.startswith(prefix):
            return ProcessId.parse(entry[len(prefix) :].decode(errors="replace"))
    return None


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on; the second, the name, may hold blanks and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _stat(pid: int) -> tuple[str, int]:
    fields = _stat_fields(pid)
    return fields[0], int(fields[19])


def _read_state(path: Path) -> RunState | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None


# Acting


def become_subreaper() -> None:
    """Orphans below this process are handed to it, not to init, so that it can end them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def heal(base: Path) -> HealPlan:
    """Ends what crashed runs of this user left behind below `base`, and says what that was."""
    plan = plan_heal(gather_processes(), gather_run_dirs(base), os.getuid(), this_machine())
    if plan.processes:
        end_processes(lambda: [process for process in plan.processes if is_alive(process)])
    for path in plan.run_dirs:
        shutil.rmtree(path, ignore_errors=True)
    return plan


def end_processes(find: Callable[[], Iterable[ProcessId]], is_forced: Callable[[], bool] = lambda: False) -> int:
    """Ends every process `find` returns, until it returns none: SIGTERM, a few seconds, then SIGKILL.

    `is_forced` cuts the patience short. Returns how many had to be killed. Shared memory that only the ended
    processes had mapped is removed.
    """
    first = list(find())
    shared_memory = _shared_memory_of(first)
    patient = [process for process in first if not is_resource_tracker(_command(process.pid))]
    for process in patient:
        _signal(process, signal.SIGTERM)
    _wait(lambda: not any(is_alive(process) for process in patient), _TERMINATE_S, is_forced)

    killed = 0
    for process in find():
        if not is_resource_tracker(_command(process.pid)):
            shared_memory |= _shared_memory_of([process])
            _signal(process, signal.SIGKILL)
            killed += 1
    _wait(lambda: not list(find()), _TRACKER_S, is_forced)

    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        rest = list(find())
        if not rest:
            break
        for process in rest:
            _signal(process, signal.SIGKILL)
        time.sleep(_POLL_S)
    _remove_shared_memory(shared_memory)
    return killed


def _wait(done: Callable[[], bool], timeout_s: float, is_forced: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not is_forced():
        if done():
            return
        time.sleep(_POLL_S)


def _signal(process: ProcessId, number: signal.Signals) -> None:
    if is_alive(process):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


_SHARED_MEMORY = "/dev/shm"
_SEMAPHORE = "sem.mp-"
"""How the names of Python's multiprocessing semaphores begin."""


def remove_orphaned_semaphores(since_s: float) -> None:
    """Removes this user's semaphores that were made since then, by the wall clock, and that no living process has:
    engines that are killed together with their resource trackers leave them behind."""
    with suppress(OSError):
        ours = {
            entry.inode(): entry.path
            for entry in os.scandir(_SHARED_MEMORY)
            if entry.name.startswith(_SEMAPHORE)
            and (facts := entry.stat(follow_symlinks=False)).st_uid == os.getuid()
            and facts.st_ctime >= since_s
        }
        if ours:
            for inode in ours.keys() - _shared_memory_of(facts.id for facts in gather_processes()):
                os.unlink(ours[inode])


def _shared_memory_of(processes: Iterable[ProcessId]) -> set[int]:
    """Inodes of /dev/shm that the processes have mapped. Names would not do: a semaphore's creator maps it under a
    temporary name that is gone."""
    found: set[int] = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{_SHARED_MEMORY}/"):
                    found.add(int(fields[4]))
    return found


def _remove_shared_memory(inodes: Collection[int]) -> None:
    """Removes the files with these inodes, unless a living process has mapped them."""
    with suppress(OSError):
        files = {entry.inode(): entry.path for entry in os.scandir(_SHARED_MEMORY) if entry.inode() in inodes}
        if files:
            for inode in files.keys() - _shared_memory_of(facts.id for facts in gather_processes()):
                os.unlink(files[inode])
