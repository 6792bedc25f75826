"""Owns the experiment `clients`: the same load from our generator and from others', in turns, against one server.

All wait for a core like any process: ours is not first in line here, for the others are not either.
"""

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import cpu
from bench.outside_clients import CLIENTS, OURS, Ask, ExportError, read_export
from bench.outside_report import ClientRun, ClientsPlan, ClientsReport, TurnFailure, cores_between, evaluate
from bench.results import Setting
from bench.systems import REPOSITORY, System
from gateway.runtime import processes
from gateway.runtime.environment import RUN_MARKER

SAMPLE_S = 0.5
_LOG = "client.log"
_LOG_TAIL_LINES = 20
GRACE_S = 90.0
"""What a client may take besides the load: to start, to make prompts, to wait for answers, to evaluate."""


class ClientFailed(RuntimeError):
    """A client that did not measure; `log_tail` is the end of what it wrote."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class ClientsExperiment:
    """`report` is what there is so far, at any time."""

    def __init__(
        self,
        plan: ClientsPlan,
        system: System | None,
        model: str,
        tokenizer: Path,
        programs: Mapping[str, Sequence[str]],
        setting: Setting,
        say: Callable[[str], None],
    ) -> None:
        """`system` is started and stopped; None leaves the server of the plan's `url` as it is. `tokenizer`: a folder.
        `programs`: how each client is started, by its name."""
        self._plan = plan
        self._system = system
        self._model = model
        self._tokenizer = tokenizer
        self._programs = programs
        self._setting = setting
        self._say = say
        self._runs: list[ClientRun] = []
        self._failures: list[TurnFailure] = []
        self._complete = False

    @property
    def report(self) -> ClientsReport:
        return evaluate(self._plan, self._setting, self._runs, self._failures, complete=self._complete)

    def run(self, save: Callable[[], None]) -> None:
        """Calls `save` after each turn; one that fails is noted. Raises StartFailed."""
        with self._served() as url:
            for turn, (number, name) in enumerate(self._plan.turns()):
                try:
                    found = self._turn(url, number, name, self._plan.seed + turn)
                except ClientFailed as error:
                    self._failures.append(TurnFailure(number, name, str(error), error.log_tail))
                    self._say(f"round {number + 1}/{self._plan.rounds}, {error}\n{error.log_tail}")
                    save()
                    continue
                self._runs.append(found)
                save()
                self._say(
                    f"round {number + 1}/{self._plan.rounds}, {name}: TTFT p50 {found.export.ttft_p50_ms:.1f} ms, "
                    f"{found.export.tokens_per_s:.1f} tokens/s, {found.export.num_requests} requests, "
                    f"{found.export.num_failed} failed, {found.cpu_s:.1f} CPU seconds"
                )
        self._complete = True
        save()

    @contextmanager
    def _served(self) -> Iterator[str]:
        if self._system is None:
            assert self._plan.url is not None
            yield self._plan.url
            return
        try:
            self._system.start()
            yield self._system.url
        finally:
            self._system.stop()

    def _turn(self, url: str, number: int, name: str, seed: int) -> ClientRun:
        client = CLIENTS[name]
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as made:
            folder = Path(made)
            ask = Ask(self._plan.workload, url, self._model, self._tokenizer, seed, folder)
            used_s, began_s = _children_cpu_s(), time.monotonic()
            samples = self._run([*self._programs[name], *client.command(ask)], name, folder)
            try:
                export = read_export(client, (folder / client.export).read_bytes())
            except (OSError, ExportError) as error:
                raise ClientFailed(f"{name}: {error}", _log_tail(folder)) from error
        return ClientRun(
            number,
            name,
            export,
            cpu_s=_children_cpu_s() - used_s,
            cores=export.cores if export.window is None else cores_between(samples, *export.window),
            took_s=time.monotonic() - began_s,
        )

    def _run(self, argv: list[str], name: str, folder: Path) -> list[tuple[float, float]]:
        """Until it has ended; returns at many times how many CPU seconds it had used by then, with all it started."""
        limit_s = self._plan.workload.warm_up_s + self._plan.workload.measured_s + GRACE_S
        deadline, samples = time.monotonic() + limit_s, list[tuple[float, float]]()
        with (folder / _LOG).open("wb") as log:
            process = subprocess.Popen(
                argv,
                env=_environment(CLIENTS[name].environment),
                cwd=REPOSITORY if name == OURS else folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        tree = TreeCpu(processes.process_of(process.pid))
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise ClientFailed(f"{name} did not end within {limit_s:g} s", _log_tail(folder))
                samples.append((time.time(), tree.used_s()))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SAMPLE_S)
        finally:
            # What it started carries our marker, wherever it hangs.
            processes.end_processes(lambda: processes.marked(processes.this_process()))
            process.wait()
        if process.returncode:
            raise ClientFailed(f"{name} ended with code {process.returncode}", _log_tail(folder))
        return samples


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's, with these changes, marked as ours."""
    changed = {**os.environ, **changes, RUN_MARKER: str(processes.this_process())}
    return {variable: value for variable, value in changed.items() if value is not None}


class TreeCpu:
    """The CPU time of a child process and of all below it, also of what has ended: as long as it was seen."""

    def __init__(self, root: processes.ProcessId) -> None:
        self._root = root
        self._used_s: dict[processes.ProcessId, float] = {}

    def used_s(self) -> float:
        """Until now, in seconds; never less than before."""
        living = cpu.read([self._root, *processes.descendants(self._root.pid)])
        self._used_s.update({id: one.cpu_s for id, one in living.items()})
        return sum(self._used_s.values())


def _children_cpu_s() -> float:
    """Of all that have ended and were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _log_tail(folder: Path) -> str:
    return "\n".join((folder / _LOG).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
