"""Ctrl-C ends a benchmark with a line, an exit code and no process left, whatever it is doing just then."""

import _thread
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from bench.commands.app import app
from bench.interrupts import INTERRUPTED
from bench.workers import started
from engine.simulated import SimulatedEngine
from tests.unit.bench.traces import write_sessions

WITHIN_S = 120.0
REPLAY = ("--policies", "round-robin", "--shapes", "1x1", "--seeds", "0", "--of-bound", "0.2")
INTERRUPTED_WHILE_IMPORTING = """
import runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "bench.commands.app":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["bench", "--help"]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def _signals_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WITHIN_S:g} s: {what}"
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_before_a_command_is_imported_there_is_one_line_and_nothing_else() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IMPORTING], capture_output=True, text=True, timeout=WITHIN_S
    )
    assert ended.returncode == INTERRUPTED
    assert (ended.stdout, ended.stderr) == ("", "bench: interrupted before anything was measured\n")


@pytest.mark.usefixtures("_signals_are_restored")
def test_in_the_middle_of_a_simulated_step_nothing_is_said_of_the_task_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    advance = SimulatedEngine._run

    async def interrupted(engine: SimulatedEngine) -> None:
        signal.raise_signal(signal.SIGINT)
        await advance(engine)

    monkeypatch.setattr(SimulatedEngine, "_run", interrupted)
    folder = write_sessions(tmp_path / "sessions", 4)
    result = CliRunner().invoke(app, ["replay", str(folder), *REPLAY, "--turns", "12", "--shards", "1"])
    gc.collect()
    assert result.exit_code == INTERRUPTED
    assert result.output.splitlines()[0] == "interrupted; the runs that had not ended are left out"
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_workers_end_with_the_command_also_those_that_are_just_starting(tmp_path: Path) -> None:
    folder = write_sessions(tmp_path / "sessions", 4)
    command = [sys.executable, "-m", "bench", "replay", str(folder), *REPLAY, "--turns", "1000000", "--shards", "2"]
    # A session of its own, all of which is interrupted, as a terminal does.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as run:
        try:
            # Python's resource tracker, and both workers.
            wait_for(lambda: len(psutil.Process(run.pid).children()) == 3 or run.poll() is not None, "two workers")
            children = psutil.Process(run.pid).children()
            os.killpg(run.pid, signal.SIGINT)
            output = run.communicate(timeout=WITHIN_S)[0].decode()
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == INTERRUPTED, output
    assert output.splitlines()[0] == "interrupted; the runs that had not ended are left out"
    assert "Traceback" not in output
    wait_for(lambda: all(has_ended(child) for child in children), f"the end of {children}")


def _interrupt_itself(went_on: Any) -> None:
    signal.raise_signal(signal.SIGINT)
    went_on.set()


def test_a_worker_is_not_interrupted_but_ended() -> None:
    context = multiprocessing.get_context("spawn")
    went_on = context.Event()
    worker = context.Process(target=_interrupt_itself, args=(went_on,))
    with started([worker]):
        assert went_on.wait(WITHIN_S)
    assert not worker.is_alive()


class _HalfBegun:
    """A process in the middle of whose start Ctrl-C comes, taken by another thread than this one."""

    pid = None
    has_begun = False

    def start(self) -> None:
        _thread.interrupt_main()
        time.monotonic()
        self.has_begun = True


@pytest.mark.usefixtures("_signals_are_restored")
def test_a_worker_is_begun_whole_also_if_another_thread_takes_the_interruption() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker: Any = _HalfBegun()
    with pytest.raises(KeyboardInterrupt), started([worker]):
        pass
    assert worker.has_begun
