"""Healing: which processes and run dirs of this user a crash left behind, and that they are really ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.runtime import processes
from gateway.runtime.environment import RUN_MARKER
from gateway.runtime.processes import HealPlan, ProcessFacts, ProcessId, RunDirFacts, RunState, plan_heal

ME = 1000
HERE = "boot-1/4026531836"
DEAD = ProcessId(10, 500)
LIVE = ProcessId(20, 600)
LAUNCHER = ProcessFacts(LIVE, ME, None, "baton serve configs/local.yaml")
DEAD_DIR = RunDirFacts(Path("/tmp/baton-1000/8000"), RunState(DEAD.pid, DEAD.started_ticks, HERE))
LIVE_DIR = RunDirFacts(Path("/tmp/baton-1000/9000"), RunState(LIVE.pid, LIVE.started_ticks, HERE))


def process(pid: int, *, owner: ProcessId | None = None, command: str = "python", uid: int = ME) -> ProcessFacts:
    return ProcessFacts(ProcessId(pid, 700 + pid), uid, owner, command)


def healed_pids(*facts: ProcessFacts, run_dirs: tuple[RunDirFacts, ...] = (DEAD_DIR, LIVE_DIR)) -> list[int]:
    plan = plan_heal([LAUNCHER, *facts], run_dirs, ME, HERE)
    return [id.pid for id in plan.processes]


def test_processes_of_a_dead_owner_are_healed_and_those_of_a_live_one_are_not() -> None:
    assert healed_pids(process(31, owner=DEAD), process(32, owner=LIVE), process(33)) == [31]


def test_an_owner_whose_number_was_given_to_another_process_is_dead() -> None:
    reused = ProcessId(LIVE.pid, LIVE.started_ticks - 1)
    assert healed_pids(process(31, owner=reused)) == [31]


def test_a_zombie_owner_is_dead() -> None:
    zombie = ProcessFacts(DEAD, ME, None, "baton serve", zombie=True)
    assert healed_pids(zombie, process(31, owner=DEAD)) == [31]


def test_a_process_without_a_marker_is_known_by_the_run_dir_in_its_command() -> None:
    lost = process(31, command="haproxy -f /tmp/baton-1000/8000/h/haproxy.cfg")
    of_live_run = process(32, command="haproxy -f /tmp/baton-1000/9000/h/haproxy.cfg")
    of_longer_name = process(33, command="haproxy -f /tmp/baton-1000/80001/h/haproxy.cfg")
    assert healed_pids(lost, of_live_run, of_longer_name) == [31]


def test_a_live_marker_outweighs_a_dead_run_dir_in_the_command() -> None:
    assert healed_pids(process(31, owner=LIVE, command="tail -f /tmp/baton-1000/8000/logs/driver.log")) == []


def test_other_users_processes_are_never_touched() -> None:
    assert healed_pids(process(31, owner=DEAD, uid=ME + 1)) == []


def test_run_dirs_of_dead_owners_go_and_those_of_live_ones_stay() -> None:
    assert plan_heal([LAUNCHER], [DEAD_DIR, LIVE_DIR], ME, HERE).run_dirs == [DEAD_DIR.path]


@pytest.mark.parametrize(
    ("machine", "stale"),
    [
        ("boot-0/4026531836", True),
        ("boot-1/4026531999", False),
        (HERE, True),
    ],
    ids=["an earlier boot", "another container of this boot", "here"],
)
def test_a_run_dir_is_judged_by_the_machine_its_process_numbers_belong_to(machine: str, stale: bool) -> None:
    facts = RunDirFacts(Path("/tmp/baton-1000/8000"), RunState(DEAD.pid, DEAD.started_ticks, machine))
    assert plan_heal([LAUNCHER], [facts], ME, HERE).run_dirs == ([facts.path] if stale else [])


def test_a_run_dir_without_a_state_file_is_stale() -> None:
    broken = RunDirFacts(Path("/tmp/baton-1000/8000"), None)
    assert plan_heal([LAUNCHER], [broken], ME, HERE).run_dirs == [broken.path]


def test_nothing_to_heal_is_an_empty_plan_and_something_is_told_in_one_line() -> None:
    assert not plan_heal([LAUNCHER], [LIVE_DIR], ME, HERE)
    told = str(HealPlan([DEAD], [DEAD_DIR.path]))
    assert told == "healed a crashed run: stopped 1 process, removed /tmp/baton-1000/8000"


@pytest.mark.parametrize("text", ["", "12", "12:", ":5", "a:b", "-1:5"])
def test_a_marker_that_is_not_ours_names_no_owner(text: str) -> None:
    assert ProcessId.parse(text) is None


# Real processes


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []
    yield children
    for child in children:
        child.kill()
        child.wait()


def spawn(children: list[subprocess.Popen[bytes]], owner: ProcessId, code: str = "") -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", f"import signal\n{code}\nprint('up', flush=True)\nsignal.pause()"],
        env={RUN_MARKER: str(owner)},
        stdout=subprocess.PIPE,
    )
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


def make_run_dir(base: Path, port: int, owner: ProcessId) -> Path:
    folder = base / str(port)
    folder.mkdir()
    state = RunState(owner.pid, owner.started_ticks, processes.this_machine())
    (folder / "run.json").write_bytes(msgspec.json.encode(state))
    return folder


def test_heal_ends_a_dead_owners_processes_and_files_and_spares_a_live_ones(
    spawned: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    dead = ProcessId(os.getpid(), processes.this_process().started_ticks - 1)
    polite = spawn(spawned, dead)
    stubborn = spawn(spawned, dead, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    ours = spawn(spawned, processes.this_process())
    dead_dir = make_run_dir(tmp_path, 8000, dead)
    live_dir = make_run_dir(tmp_path, 9000, processes.this_process())

    plan = processes.heal(tmp_path)

    # Whatever else a crash has left on this machine is healed as well.
    healed = {id.pid for id in plan.processes}
    assert healed >= {polite.pid, stubborn.pid}
    assert ours.pid not in healed
    assert plan.run_dirs == [dead_dir]
    assert polite.wait(timeout=5) == -signal.SIGTERM
    assert stubborn.wait(timeout=5) == -signal.SIGKILL
    assert ours.poll() is None
    assert not dead_dir.exists()
    assert live_dir.exists()


def test_shared_memory_and_semaphores_of_ended_processes_go_with_them(
    spawned: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    owner = ProcessId(os.getpid(), 1)
    names = tmp_path / "names"
    make = f"""
import multiprocessing
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
memory = shared_memory.SharedMemory(create=True, size=4096)
lock = multiprocessing.get_context("spawn").Lock()
open({str(names)!r}, "w").write(memory.name + " sem." + lock._semlock.name.removeprefix("/"))
"""
    child = spawn(spawned, owner, make)
    files = [Path("/dev/shm") / name for name in names.read_text().split()]
    assert [file.exists() for file in files] == [True, True]
    processes.end_processes(lambda: [id for id in processes.marked(owner)])
    assert child.wait(timeout=5) == -signal.SIGTERM
    assert [file.exists() for file in files] == [False, False]


def test_semaphores_that_nobody_has_any_more_are_removed_if_they_are_of_this_time(
    spawned: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    owner = ProcessId(os.getpid(), 1)

    def semaphore_of(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        names = tmp_path / name
        make = f"""
import multiprocessing
from multiprocessing import resource_tracker
resource_tracker.register = lambda *_: None
lock = multiprocessing.get_context("spawn").Lock()
open({str(names)!r}, "w").write("sem." + lock._semlock.name.removeprefix("/"))
"""
        return spawn(spawned, owner, make), Path("/dev/shm") / names.read_text()

    (killed, orphan), (_, held) = semaphore_of("killed"), semaphore_of("living")
    since_s = orphan.stat().st_ctime
    killed.kill()
    killed.wait()
    processes.remove_orphaned_semaphores(since_s + 3600)
    assert (orphan.exists(), held.exists()) == (True, True)
    processes.remove_orphaned_semaphores(since_s)
    assert (orphan.exists(), held.exists()) == (False, True)
    held.unlink()
