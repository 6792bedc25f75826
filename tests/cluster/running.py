"""Owns a run of `baton serve` with an application of the tests' own, and its end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.ports import free_ports
from gateway.runtime import processes
from gateway.runtime.local import base_dir

READY_S = 120.0
STOP_S = 30.0
MAIN = (
    "import sys; from gateway import launcher, settings; "
    "sys.exit(launcher.serve(settings.load(sys.argv[1], {'gateway.port': int(sys.argv[2])}), build=sys.argv[3]))"
)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


class Run:
    """One `baton serve` as a user's shell would start it: a process group of its own, output in a pipe."""

    def __init__(self, config: Path, port: int, application: str) -> None:
        """`application` is where the builder of the application is, as module:function."""
        self.port = port
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(config), str(port), application],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.id = processes.process_of(self.process.pid)
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

    def sweep(self) -> None:
        """Ends what is left of the run, however it ended."""
        self.process.kill()
        self.process.wait()
        processes.heal(base_dir())
        shutil.rmtree(base_dir() / f"failed-{self.port}", ignore_errors=True)
        for process in processes.marked(self.id):
            os.kill(process.pid, signal.SIGKILL)


@contextmanager
def running(config: Path, application: str) -> Iterator[Run]:
    """A run that is ready; it must end well and leave nothing behind."""
    run = Run(config, free_ports("127.0.0.1")[0], application)
    try:
        run.wait_for("Ctrl-C stops it")
        yield run
        run.process.terminate()
        assert run.exit_code() == 0
        run.assert_nothing_left()
    finally:
        run.sweep()
