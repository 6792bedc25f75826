"""Owns the experiment `replay`: if asked for, constants are tuned; every policy's goodput; all at the same loads."""

from collections.abc import Callable
from dataclasses import replace

from bench.replay_plan import RunFigures, RunPlan
from bench.replay_report import ReplayPlan, ReplayReport, TraceFigures, run_line
from bench.replay_search import Failed, Goodput, Job, Result, Task, Tuned, bound_per_s, fitted, plans, spread
from bench.replay_tuning import TUNABLE, TUNING_SEED
from bench.results import Setting


class Experiment:
    """`report` is what there is so far, at any time."""

    def __init__(
        self,
        plan: ReplayPlan,
        setting: Setting,
        say: Callable[[str], None],
        save: Callable[[ReplayReport], None],
        earlier: ReplayReport | None = None,
    ):
        """`say` is given a line as things go on, `save` the report whenever it has grown. What `earlier` found for the
        same plans is taken from it."""
        self._plan = plan
        self._say = say
        self._save = save
        runs = plans(plan.traces, plan.policies, plan.shapes, plan.seeds, plan.model, plan.turns)
        self._runs = [replace(one, reverse=plan.reverse, kv_factor=plan.kv_factor) for one in runs]
        self.report = ReplayReport(False, plan, setting, tuple(self._trace(path) for path in plan.traces))
        if earlier is not None:
            asked = {_bare(one) for one in self._runs}
            tuning = {replace(one, seed=TUNING_SEED) for one in asked}
            self.report = replace(
                self.report,
                tuned=tuple(one for one in earlier.tuned if plan.tunes and _bare(one.plan) in tuning),
                goodputs=tuple(one for one in earlier.goodputs if plan.searches and _bare(one.plan) in asked),
                runs=tuple(one for one in earlier.runs if _bare(one.plan) in asked),
            )

    def run(self) -> None:
        """Raises KeyboardInterrupt."""
        plan = self._plan
        if plan.tunes:
            known = {_bare(one.plan) for one in self.report.tuned}
            tunable = [one for one in self._runs if one.policy in TUNABLE and one.seed == plan.seeds[0]]
            tunable = [one for one in tunable if _bare(replace(one, seed=TUNING_SEED)) not in known]
            spread([Job(one, Task.TUNE) for one in tunable], plan.shards, self._take)
            self._runs = [replace(one, constants=self.report.constants(one)) for one in self._runs]
        if plan.searches:
            constants = {_bare(one): one.constants for one in self._runs}
            kept = [one for one in self.report.goodputs if constants[_bare(one.plan)] == one.plan.constants]
            self.report = replace(self.report, goodputs=tuple(kept))
            known = {_bare(one.plan) for one in kept}
            new = [one for one in self._runs if _bare(one) not in known]
            spread([Job(one, Task.SEARCH) for one in new], plan.shards, self._take)
        done = [run.plan for run in self.report.runs]
        at_loads = [at for one in self._runs for at in self._at_fixed_loads(one)]
        spread([Job(at, Task.RUN) for at in at_loads if at not in done], plan.shards, self._take)
        self.report = replace(self.report, complete=True)
        self._save(self.report)

    def _trace(self, path: str) -> TraceFigures:
        trace = fitted(path, self._plan.model)
        plan = next(one for one in self._runs if one.trace == path)
        bound_per_gpu_s = bound_per_s(plan) / plan.shape.num_gpus
        return TraceFigures(path, len(trace.trajectories), trace.num_turns, trace.num_cut_turns, bound_per_gpu_s)

    def _at_fixed_loads(self, plan: RunPlan) -> list[RunPlan]:
        if not self._plan.searches:
            bound = self.report.bound_per_s(plan.trace)
            loads = (*self._plan.shares_of_bound, *(rate / bound for rate in self._plan.rates_per_s))
            return [replace(plan, rate_per_s=load * bound, load=load) for load in loads]
        # Without any other policy, ours is what its own loads are measured by.
        saturation = self.report.best_goodput_per_s(plan.trace, ours=False)
        saturation = saturation or self.report.best_goodput_per_s(plan.trace, ours=True)
        if not saturation:
            return []
        return [replace(plan, rate_per_s=load * saturation, load=load) for load in self._plan.loads]

    def _take(self, result: Result) -> None:
        report = self.report
        match result:
            case RunFigures():
                self._say(run_line(result))
                if result.plan.drains:
                    self.report = replace(report, runs=(*report.runs, result))
            case Tuned():
                plan = result.plan
                self._say(f"{plan.shape} {plan.policy} is tuned: {plan.constants or 'its own constants'}")
                self.report = replace(report, tuned=(*report.tuned, result))
            case Goodput():
                plan = result.plan
                self._say(f"{plan.shape} {plan.policy} seed {plan.seed}: goodput {plan.rate_per_s * 60:.3g}/min")
                self.report = replace(report, goodputs=(*report.goodputs, result))
            case Failed():
                self._say(f"{result.plan.shape} {result.plan.policy} seed {result.plan.seed} failed: {result.error}")
                self.report = replace(report, failed=(*report.failed, result))
        self._save(self.report)


def _bare(plan: RunPlan) -> RunPlan:
    """What is asked of a policy, whatever its constants and the rate."""
    return replace(plan, rate_per_s=0.0, load=None, constants="", drains=True)
