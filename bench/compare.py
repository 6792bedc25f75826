"""Owns the experiment `compare`: systems that take turns under the same loads.

Each is started for its turn and stopped after it, so that nothing of another one runs while it is measured.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench import load_server
from bench.compare_plan import ComparePlan
from bench.compare_report import CompareReport, CompareRun, evaluate
from bench.load import LoadExperiment, Progress
from bench.load_plan import LoadPlan, ServerFacts
from bench.load_report import LoadReport
from bench.results import EngineKind, Setting, StartFailure
from bench.systems import LocalSystem, StartFailed, System
from bench.traces import Trace


class CompareFailed(RuntimeError):
    """Nothing can be compared; the message says why and what to do."""


@dataclass
class CompareExperiment:
    """`report` is what there is so far, at any time. `heard` is told of the progress of each load."""

    plan: ComparePlan
    systems: Mapping[str, System]
    trace: Trace
    vocabulary: Sequence[int]
    model: str | None
    api_key: str | None
    setting: Setting
    say: Callable[[str], None]
    heard: Callable[[LoadPlan, Progress], None]
    _runs: list[CompareRun] = field(default_factory=list[CompareRun])
    _failures: list[StartFailure] = field(default_factory=list[StartFailure])
    _complete: bool = False
    _began_s: float = field(default_factory=time.monotonic)

    @property
    def report(self) -> CompareReport:
        took_s = time.monotonic() - self._began_s
        return evaluate(self.plan, self.setting, self._runs, self._failures, took_s, complete=self._complete)

    def run(self, save: Callable[[], None]) -> None:
        """Calls `save` after each load. A system that does not start is left out from then on. Raises CompareFailed."""
        for number, name in self.plan.turns():
            if any(failure.system == name for failure in self._failures):
                continue
            system = self.systems[name]
            try:
                began_s = time.monotonic()
                system.start()
                if isinstance(system, LocalSystem):
                    self._say(number, name, f"started in {time.monotonic() - began_s:.0f} s")
                self._turn(number, name, system, save)
            except StartFailed as error:
                self._failures.append(StartFailure(name, number, str(error), error.log_tail))
                self._say(number, name, f"does not start and is left out: {error}")
                if len(self._failures) > len(self.systems) - 2:
                    raise CompareFailed("fewer than two systems start; nothing can be compared") from error
            finally:
                system.stop()
        self._complete = True

    def _turn(self, number: int, name: str, system: System, save: Callable[[], None]) -> None:
        try:
            server = load_server.facts(system.url, self.model, self.api_key)
        except load_server.ServerError as error:
            raise CompareFailed(f"{name}: {error}") from error
        if isinstance(system, LocalSystem):
            # vLLM does not tell; all that are started here are real.
            server = replace(server, engine=EngineKind.VLLM)
        if {server.engine, *(run.load.server.engine for run in self._runs)} >= set(EngineKind):
            raise CompareFailed(
                f"{name} has {server.engine} engines and another system has not; they cannot be compared"
            )
        self._load(self.plan.wake_of(number), server, system)
        if not self.plan.rates_per_s:
            self._find_rates(server, system)
        for rate in self.plan.rates_per_s:
            load = self._load(self.plan.load_of(number, rate), server, system)
            run = CompareRun(number, name, rate, load)
            self._runs.append(run)
            save()
            self._say(number, name, f"{rate:g} trajectories/s: {_shown(run)}")

    def _find_rates(self, server: ServerFacts, system: System) -> None:
        found = self._load(self.plan.calibration, server, system).figures
        if found is None or found.e2e_ms is None:
            raise CompareFailed(
                f"{server.url} answered nothing in {self.plan.calibration.duration_s:g} s, so no rates can be chosen; "
                "give --rates"
            )
        turns_per_s = found.num_answered / found.window_s
        self.plan = self.plan.with_rates(self.trace, turns_per_s, found.e2e_ms.p50 / 1000)
        shares = ", ".join(f"{share:.0%}" for share in self.plan.shares)
        rates = ", ".join(f"{rate:g}" for rate in self.plan.rates_per_s)
        self.say(
            f"{self.plan.systems[0]} answers {turns_per_s:.3g} turns/s at most, of {self.plan.calibration.concurrency} "
            f"trajectories at a time; {shares} of that are asked by {rates} trajectories/s"
        )

    def _load(self, plan: LoadPlan, server: ServerFacts, system: System) -> LoadReport:
        """Raises KeyboardInterrupt after Ctrl-C."""
        report = LoadExperiment(
            plan,
            self.trace,
            self.vocabulary,
            server,
            self.api_key,
            self.setting,
            lambda reached: self.heard(plan, reached),
            system.pages,
            system.processes(),
        ).run()
        if not report.complete:
            raise KeyboardInterrupt
        return report

    def _say(self, number: int, name: str, what: str) -> None:
        self.say(f"round {number + 1}/{self.plan.rounds}, {name}: {what}")


def _shown(run: CompareRun) -> str:
    figures = run.load.figures
    if figures is None or figures.ttft_ms is None:
        return "; ".join(run.load.why_invalid) or "nothing was answered"
    goodput = ", ".join(f"{one.goodput_per_s:.3g}" for one in figures.slos)
    words = (
        f"{figures.num_answered} turns answered, TTFT p50 {figures.ttft_ms.p50:.0f} ms, "
        f"{figures.tokens_per_s:.0f} tokens/s, goodput {goodput} turns/s"
    )
    if figures.num_refused or figures.num_failed:
        words += f", {figures.num_refused} refused, {figures.num_failed} failed"
    return "; ".join((words, *run.load.why_invalid))
