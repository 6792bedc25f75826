"""Runs of `baton serve` with a trivial application: however they end, they leave nothing behind."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.ports import free_ports
from gateway.runtime import processes
from tests.cluster.running import READY_S, STOP_S, Run

CONFIG = """
model: {path: trivial/model, served_name: trivial}
pools: {decode: {device: cpu}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def port() -> int:
    return free_ports("127.0.0.1")[0]


@pytest.fixture
def start(config: Path, port: int) -> Iterator[Callable[[str], Run]]:
    runs: list[Run] = []

    def start_run(build: str = "build") -> Run:
        runs.append(Run(config, port, f"tests.cluster.trivial_app:{build}"))
        return runs[-1]

    yield start_run
    for run in runs:
        run.sweep()


def test_a_run_shows_an_answer_listens_on_loopback_only_and_ctrl_c_leaves_nothing(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_GATEWAY__REPLICAS", "1")
    run = start()
    run.wait_for("Ctrl-C stops it")
    url = f"http://127.0.0.1:{run.port}"
    for expected in ("forty-two", "receipt request-1: decode decode-1", f"{url}/v1", f"curl -N {url}", "decode: ready"):
        assert expected in run.output
    assert "Traceback" not in run.output
    assert "INFO" not in run.output

    assert run.run_dir.stat().st_mode & 0o777 == 0o700
    pids = run.pids()
    listening = [
        connection
        for connection in psutil.net_connections()
        if connection.pid in pids
        and (connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM)
        and connection.laddr
    ]
    assert any(connection.laddr.port == run.port for connection in listening)
    exposed = [connection for connection in listening if connection.laddr.ip not in ("127.0.0.1", "::ffff:127.0.0.1")]
    assert exposed == []

    seen = httpx.get(f"{url}/environment").json()
    assert seen["BATON_RUN"] == str(run.id)
    assert "BATON_GATEWAY__REPLICAS" not in seen

    run.signal_group(signal.SIGINT)
    assert run.exit_code() == 0
    assert "nothing is left running" in run.output
    run.assert_nothing_left()


def test_sigterm_leaves_nothing_and_a_second_signal_hurries(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_for("Ctrl-C stops it")
    assert any("IGN" in process.command for process in processes.gather_processes() if process.owner == run.id)
    run.process.terminate()
    run.wait_for("stopping", STOP_S)
    run.process.terminate()
    assert run.exit_code() == 0
    run.assert_nothing_left()


def test_a_signal_while_it_starts_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_for("ray: running")
    run.signal_group(signal.SIGINT)
    assert run.exit_code() == 128 + signal.SIGINT
    run.assert_nothing_left()


def test_a_failed_constructor_is_one_readable_error_and_leaves_only_logs(start: Callable[..., Run]) -> None:
    run = start("build_broken")
    assert run.exit_code(READY_S) == 1
    assert "baton serve failed: decode: RuntimeError: the model cannot be read; check model.path" in run.output
    assert "Traceback" not in run.output
    logs = Path(run.output.rpartition("logs: ")[2].strip())
    assert (logs / "driver.log").is_file()
    assert any(logs.glob("ray/**/*.log"))
    run.assert_nothing_left()


def test_a_configuration_the_application_refuses_fails_before_ray_starts(start: Callable[..., Run]) -> None:
    run = start("build_raises")
    assert run.exit_code(READY_S) == 1
    assert "baton serve failed: ValueError: there is no such model" in run.output
    assert "ray: running" not in run.output
    run.assert_nothing_left()


def test_a_port_in_use_is_named_with_its_holder_before_anything_starts(start: Callable[..., Run], port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen(1)
        run = start()
        assert run.exit_code(READY_S) == 1
    name = psutil.Process().name()
    assert f"127.0.0.1:{port} is in use by {name} (pid {os.getpid()}); stop it or pass --port" in run.output
    assert "ray:" not in run.output
    run.assert_nothing_left()


def test_a_port_that_is_taken_while_ray_starts_is_named_with_its_holder(start: Callable[..., Run], port: int) -> None:
    run = start("build_loses_port")
    assert run.exit_code(READY_S) == 1
    assert "ray: running" in run.output
    assert f"baton serve failed: 127.0.0.1:{port} is in use by python" in run.output
    assert "; stop it or pass --port; it came while Baton started" in run.output
    assert "HAProxy" not in run.output
    run.assert_nothing_left()


def test_two_runs_cannot_claim_one_port(start: Callable[..., Run]) -> None:
    first = start()
    first.wait_for("ray: starting")
    second = start()
    assert second.exit_code(READY_S) == 1
    assert f"another `baton serve` holds port {first.port}" in second.output
    assert first.process.poll() is None
    assert first.run_dir.exists()


def test_what_a_killed_launcher_left_is_healed_by_the_next_start(start: Callable[..., Run]) -> None:
    killed = start()
    killed.wait_for("Ctrl-C stops it")
    killed.process.kill()
    killed.process.wait()
    assert killed.pids() != []
    assert killed.run_dir.exists()

    run = start()
    run.wait_for("Ctrl-C stops it")
    assert "healed a crashed run" in run.output
    assert killed.pids() == []
    assert httpx.get(f"http://127.0.0.1:{run.port}/v1/models").status_code == 200
    run.process.terminate()
    assert run.exit_code() == 0
    run.assert_nothing_left()


def test_the_run_ends_with_an_error_when_ray_dies(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_for("Ctrl-C stops it")
    raylet = next(pid for pid in run.pids() if psutil.Process(pid).name() == "raylet")
    os.kill(raylet, signal.SIGKILL)
    assert run.exit_code() == 1
    assert "baton serve failed: " in run.output
    assert "raylet" in run.output
    run.assert_nothing_left()
