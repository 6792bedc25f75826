"""Owns the experiment `scaling`: each day of traffic with pools that are sized, and with pools of a fixed size."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

from bench.day import DayFigures, DayPlan
from bench.day_replay import run_day
from bench.day_report import DayFailed, ScalingPlan, ScalingReport, day_line
from bench.replay_plan import RunPlan, Shape
from bench.replay_search import fitted
from bench.results import Setting


def day(plan: DayPlan) -> DayFigures:
    """In this process. Raises what the run raises."""
    return run_day(plan, fitted(plan.run.trace, plan.run.model))


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
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(plan.shards, mp_context=context)
        # Workers are born here, deaf to Ctrl-C, which reaches them too: this process ends them (`bench.workers`).
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            jobs = {pool.submit(day, one): one for one in plans(plan)}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        try:
            for job in as_completed(jobs):
                try:
                    figures = job.result()
                except Exception as error:
                    failed = DayFailed(f"{jobs[job].name} seed {jobs[job].run.seed}", repr(error))
                    self._say(f"{failed.name} failed: {failed.error}")
                    self.report = replace(self.report, failed=(*self.report.failed, failed))
                else:
                    self._say(day_line(figures))
                    self.report = replace(self.report, days=(*self.report.days, figures))
                self._save(self.report)
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
        self.report = replace(self.report, complete=True)
        self._save(self.report)
