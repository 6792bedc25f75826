"""Owns the experiment `scaling`: each day of traffic with pools that are sized, and with pools of a fixed size."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.day import DayFigures, DayPlan
from bench.day_replay import run_day
from bench.day_report import DayFailed, ScalingPlan, ScalingReport, day_line
from bench.replay_plan import RunPlan, Shape
from bench.replay_search import fitted
from bench.results import Setting
from bench.workers import WorkerDied, spread


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


class Experiment:
    """`report` is what there is so far, at any time."""

    def __init__(
        self, plan: ScalingPlan, setting: Setting, say: Callable[[str], None], save: Callable[[ScalingReport], None]
    ):
        """`say` is given a line as things go on, `save` the report whenever it has grown. Raises TraceError,
        OSError."""
        fitted(plan.trace, plan.model)
        self._say = say
        self._save = save
        self.report = ScalingReport(False, plan, setting)

    def run(self) -> None:
        """Raises KeyboardInterrupt; no process is left then."""
        plan = self.report.plan
        try:
            spread(list(plans(plan)), work, plan.shards, self._take)
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
