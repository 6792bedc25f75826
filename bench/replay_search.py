"""Owns how the runs of a replay are chosen and spread over processes: the search for the goodput, then fixed loads."""

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import workers
from bench.oracle import Limits, capacity_per_s
from bench.replay import run
from bench.replay_plan import RunFigures, RunPlan, Shape
from bench.replay_tuning import TUNABLE, TUNING_LOAD, TUNING_SEED
from bench.trace_files import read
from bench.traces import Trace, cut_trace
from engine.roofline import ROOFLINES

FIRST_LOAD = 0.2
"""Of the oracle's bound, where the search begins."""
WIDEN = 1.6
PRECISION = 1.05
"""The goodput is known when a rate that keeps the service level and one that misses it are no further apart."""
LOWEST_LOAD = 0.005


@dataclass(frozen=True)
class Goodput:
    """The highest rate found at which enough turns keep the service level; 0 where none did. `plan.load` and
    `plan.rate_per_s` are its own."""

    plan: RunPlan
    num_runs: int
    cpu_s: float

    @property
    def rate_per_s(self) -> float:
        return self.plan.rate_per_s


@dataclass(frozen=True)
class Tuned:
    """A policy's constants for one trace and shape: those of `tried` with the highest share of turns in time at
    `plan.rate_per_s`. `plan.constants` names them; "" stands for the policy's own."""

    plan: RunPlan
    tried: tuple[tuple[str, float], ...]
    cpu_s: float


class Task(enum.Enum):
    """RUN a plan once; SEARCH for the goodput of its policy, or TUNE its constants, whatever its rate."""

    RUN = enum.auto()
    SEARCH = enum.auto()
    TUNE = enum.auto()


@dataclass(frozen=True)
class Job:
    plan: RunPlan
    task: Task


@dataclass(frozen=True)
class Failed:
    """What a run raised, or how its process ended."""

    plan: RunPlan
    error: str


Result = Goodput | Tuned | RunFigures | Failed


@functools.cache
def fitted(path: str, model: str) -> Trace:
    """A trace as the model's context can hold it. Raises TraceError, OSError."""
    return cut_trace(read(Path(path)), ROOFLINES[model].model.max_model_len)


def bound_per_s(plan: RunPlan) -> float:
    limits = Limits(plan.roofline, plan.max_num_batched_tokens, plan.max_pause_s)
    return capacity_per_s(limits, fitted(plan.trace, plan.model), plan.shape.num_gpus)


def at_load(plan: RunPlan, load: float) -> RunPlan:
    """`load` is of the oracle's bound."""
    return replace(plan, load=load, rate_per_s=load * bound_per_s(plan))


def search(plan: RunPlan, run: Callable[[RunPlan], RunFigures]) -> Iterator[Goodput | RunFigures]:
    """Its runs, and at last the goodput. Trajectories and their order are the same at every rate."""
    good, bad, load, num_runs, cpu_s = 0.0, 0.0, FIRST_LOAD, 0, 0.0
    while True:
        figures = run(replace(at_load(plan, load), drains=False))
        yield figures
        num_runs, cpu_s = num_runs + 1, cpu_s + figures.cpu_s
        if figures.keeps_slo:
            good = load
        else:
            bad = load
        if good and bad and bad / good <= PRECISION:
            break
        if not bad:
            if good >= 1.0:
                break
            load = min(good * WIDEN, 1.0)
        elif not good:
            load = bad / WIDEN
            if load < LOWEST_LOAD:
                break
        else:
            load = (good * bad) ** 0.5
    yield Goodput(at_load(plan, good), num_runs, cpu_s)


def tune(plan: RunPlan, run: Callable[[RunPlan], RunFigures]) -> Iterator[Tuned | RunFigures]:
    """Its runs, all of a seed of their own, and at last the best constants."""
    plan = replace(plan, seed=TUNING_SEED, constants="")
    found: Goodput | None = None
    for result in search(plan, run):
        if isinstance(result, Goodput):
            found = result
        else:
            yield result
    assert found is not None, "a search ends with what it has found"
    at = at_load(plan, TUNING_LOAD * (found.plan.load or LOWEST_LOAD))
    tried, cpu_s = dict[str, float](), found.cpu_s
    for constants in ("", *TUNABLE[plan.policy]):
        figures = run(replace(at, constants=constants, drains=False))
        yield figures
        tried[constants], cpu_s = figures.slo_share, cpu_s + figures.cpu_s
    yield Tuned(replace(at, constants=max(tried, key=tried.__getitem__)), tuple(tried.items()), cpu_s)


def work(job: Job) -> Iterator[Result]:
    """A job's results in this process. What a run raises is a result."""
    trace = fitted(job.plan.trace, job.plan.model)

    def replayed(plan: RunPlan) -> RunFigures:
        return run(plan, trace)

    try:
        match job.task:
            case Task.RUN:
                yield replayed(job.plan)
            case Task.SEARCH:
                yield from search(job.plan, replayed)
            case Task.TUNE:
                yield from tune(job.plan, replayed)
    except Exception as error:
        yield Failed(job.plan, repr(error))


def spread(jobs: Sequence[Job], num_shards: int, took: Callable[[Result], None]) -> None:
    """`bench.workers.spread`; what a process does not survive is a result too."""
    try:
        workers.spread(jobs, work, num_shards, took)
    except workers.WorkerDied as error:
        took(Failed(jobs[0].plan, str(error)))


def plans(
    traces: Sequence[str],
    policies: Sequence[str],
    shapes: Sequence[Shape],
    seeds: Sequence[int],
    model: str,
    turns: int,
) -> list[RunPlan]:
    """One for each combination, with a cohort that has about so many turns. Their rates are not set."""
    found: list[RunPlan] = []
    for path in traces:
        trace = fitted(path, model)
        mean_turns = trace.num_turns / len(trace.trajectories)
        num_trajectories = max(round(turns / mean_turns), 2)
        found += [
            RunPlan(path, policy, shape, 0.0, seed, model, num_trajectories)
            for seed in seeds
            for shape in shapes
            for policy in policies
        ]
    return found
