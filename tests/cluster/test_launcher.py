"""Runs of `baton serve` with a trivial application: however they end, they leave nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.ports import free_ports
from gateway.runtime import processes
from gateway.runtime.local import base_dir

READY_S = 120.0
STOP_S = 30.0
MAIN = (
    "import sys; from gateway import launcher, settings; "
    "sys.exit(launcher.serve(settings.load(sys.argv[1], {'gateway.port': int(sys.argv[2])}), build=sys.argv[3]))"
)
CONFIG = """
model: {path: trivial/model, served_name: trivial}
pools: {decode: {device: cpu}}
"""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


class Run:
    """One `baton serve` as a user's shell would start it: a process group of its own, output in a pipe."""

    def __init__(self, config: Path, port: int, build: str) -> None:
        self.port = port
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(config), str(port), f"tests.cluster.trivial_app:{build}"],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.id = next(facts.id for facts in processes.gather_processes() if facts.id.pid == self.process.pid)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    @property
    def run_dir(self) -> Path:
        return base_dir() / str(self.port)

    def wait_for(self, text: str, timeout_s: float = READY_S) -> None:
        wait_until(
            lambda: text in self.output or self.process.poll() is not None, f"{text!r} in {self.output}", timeout_s
        )
        assert text in self.output, self.output

    def signal_group(self, number: signal.Signals) -> None:
        """What a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def exit_code(self, timeout_s: float = STOP_S) -> int:
        code = self.process.wait(timeout=timeout_s)
        self._reader.join(timeout=5)
        return code

    def pids(self) -> list[int]:
        return [process.pid for process in processes.marked(self.id)]

    def assert_nothing_left(self) -> None:
        assert self.pids() == []
        assert not self.run_dir.exists()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))


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
        runs.append(Run(config, port, build))
        return runs[-1]

    yield start_run
    for run in runs:
        run.process.kill()
        run.process.wait()
    processes.heal(base_dir())
    for run in runs:
        shutil.rmtree(base_dir() / f"failed-{run.port}", ignore_errors=True)
        for process in processes.marked(run.id):
            os.kill(process.pid, signal.SIGKILL)


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
