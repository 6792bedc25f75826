"""Owns the experiment `scaling`: each day of traffic with pools that are sized, and with pools of a fixed size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from bench.day import DayFigures, DayPlan
from bench.day_replay import run_day
from bench.day_report import DayFailed, ScalingPlan, ScalingReport, day_line
from bench.replay_plan import RunPlan, Shape
from bench.replay_search import fitted
from bench.results import Setting
from bench.workers import WorkerDied, spread
from gateway.scaling.sizing import SizingConfig


def day(plan: DayPlan) -> DayFigures:
    """In this process. Raises what the run raises."""
    return run_day(plan, fitted(plan.run.trace, plan.run.model))


def work(plan: DayPlan) -> Iterator[DayFigures | DayFailed]:
    """What a run raises is a result."""
    try:
        yield day(plan)
    except Exception as error:
        yield DayFailed(f"{plan.name} seed {plan.run.seed}", repr(error))


def plans(plan: ScalingPlan) -> Iterator[DayPlan]:
    """The sized pools begin with the fewest that they may have: the day begins with its lowest rate."""
    for _, traffic in plan.traffics:
        for seed in plan.seeds:
            run = RunPlan(plan.trace, plan.policy, Shape(0, 1), traffic.first_per_s, seed, plan.model, 0, drains=False)
            for most in plan.most:
                yield DayPlan(replace(run, shape=Shape(min(most.prefill, 1), 1)), traffic, True, most)
            for shape in plan.static:
                yield DayPlan(replace(run, shape=shape), traffic, False, shape)


def _load(plan: DayPlan) -> DayPlan:
    """What decides a run's figures: pools of a fixed size are the same whatever would size them."""
    return plan if plan.scaled else replace(plan, sizing=SizingConfig())


class Experiment:
    """`report` is what there is so far, at any time."""

    def __init__(
        self,
        plan: ScalingPlan,
        setting: Setting,
        say: Callable[[str], None],
        save: Callable[[ScalingReport], None],
        earlier: Sequence[DayFigures] = (),
    ):
        """`say` is given a line as things go on, `save` the report whenever it has grown. Of `earlier` runs those are
        taken that are asked for. Raises TraceError, OSError."""
        fitted(plan.trace, plan.model)
        self._say = say
        self._save = save
        wanted = [_load(one) for one in plans(plan)]
        known = tuple(one for one in earlier if _load(one.plan) in wanted)
        self.report = ScalingReport(False, plan, setting, known)

    def run(self) -> None:
        """Raises KeyboardInterrupt; no process is left then."""
        plan = self.report.plan
        try:
            known = [_load(one.plan) for one in self.report.days]
            spread([one for one in plans(plan) if _load(one) not in known], work, plan.shards, self._take)
        except WorkerDied as error:
            self._take(DayFailed("a run", str(error)))
        self.report = replace(self.report, complete=True)
        self._save(self.report)

    def _take(self, result: DayFigures | DayFailed) -> None:
        report = self.report
        match result:
            case DayFigures():
                self._say(day_line(result))
                self.report = replace(report, days=(*report.days, result))
            case DayFailed():
                self._say(f"{result.name} failed: {result.error}")
                self.report = replace(report, failed=(*report.failed, result))
        self._save(self.report)
