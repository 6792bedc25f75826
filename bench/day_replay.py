"""Owns one run of a day of traffic: a replay whose load rises and falls, over pools that are sized as it goes on.

The pure function that sizes them is the one that ships (`gateway.scaling.sizing`), and so is what it is told
(`Orchestrator.demand`). What Ray Serve and the cluster do, a replica's start and its drain, is played here. Beside
pools of a fixed size the shadow planner runs, as it ships, and its proposals are scored.
"""

import asyncio
import gc
import time
from collections import Counter
from dataclasses import dataclass, replace

from bench.day import DayFigures, DayPlan, Moment, day_figures
from bench.replay import START_TIMEOUT_S, Replay, undisturbed
from bench.traces import Trace, cut_trace
from engine.protocol import Phase
from gateway.planning import ShadowPlanner
from gateway.scaling.planner import PlannerConfig
from gateway.scaling.sizing import Bounds, Memory, PoolSizes, size_pools

COLLECT_EVERY_S = 3600.0
MANY = 64
"""Replicas that may be proposed beside pools of a fixed size."""


def run_day(plan: DayPlan, trace: Trace) -> DayFigures:
    """Takes no time of its own but computing. Raises RuntimeError when nothing is left that could ever happen."""
    began_s = time.process_time()
    with undisturbed() as runner:
        day = runner.run(_day(plan, cut_trace(trace, plan.run.roofline.model.max_model_len)))
    cpu_s = time.process_time() - began_s
    gpu_s = day.gpu_used_s(Phase.PREFILL), day.gpu_used_s(Phase.DECODE)
    changes = day.num_started, day.num_left
    return day_figures(plan, day.measured_turns(), day.begin_s, gpu_s, changes, day.moments, day.scored, cpu_s)


async def _day(plan: DayPlan, trace: Trace) -> "Day":
    day = Day(plan, trace)
    await day.run()
    return day


@dataclass(eq=False)
class _Machine:
    """A GPU that was asked for. `ready_s` is when its replica serves; None in `left_s` while it is here."""

    phase: Phase
    asked_s: float
    ready_s: float
    replica_id: str | None = None
    leaves: bool = False
    left_s: float | None = None


class Day(Replay):
    def __init__(self, plan: DayPlan, trace: Trace):
        super().__init__(plan.run, trace)
        self._day = plan
        self.begin_s = self._loop.time()
        self.moments: list[Moment] = []
        self.num_started = 0
        self.num_left = 0
        self.scored: Counter[str] = Counter()
        self._memory = Memory()
        has_prefill = plan.most.prefill > 0
        self._bounds = Bounds(PoolSizes(int(has_prefill), 1), PoolSizes(plan.most.prefill, max(plan.most.decode, 1)))
        free = replace(self._bounds, most=PoolSizes(MANY if has_prefill else 0, MANY))
        self._planner = ShadowPlanner(self._orchestrator, free, plan.sizing, PlannerConfig())
        self._machines = [
            _Machine(worker.phase, self.begin_s, self.begin_s, worker.replica_id) for worker in self._workers.values()
        ]

    def gpu_used_s(self, phase: Phase) -> float:
        """Within the day."""
        end_s = self.begin_s + self._day.traffic.day_s
        mine = (machine for machine in self._machines if machine.phase is phase)
        return sum(max(min(m.left_s or end_s, end_s) - m.asked_s, 0.0) for m in mine)

    async def run(self) -> None:
        shape, traffic = self._plan.shape, self._day.traffic
        reader = asyncio.create_task(self._read())
        await self._orchestrator.start({Phase.PREFILL: shape.prefill, Phase.DECODE: shape.decode}, START_TIMEOUT_S)
        self.begin_s = self._loop.time()
        for machine in self._machines:
            machine.asked_s = machine.ready_s = self.begin_s
        self._window = (self.begin_s, self.begin_s + traffic.day_s)
        background = [asyncio.create_task(self._collect_garbage()), asyncio.create_task(self._watch())]
        self._start_residents(self._drawn("residents"), self.begin_s)
        drawn = self._drawn("day")
        for at_s in traffic.arrivals(self._plan.seed):
            _, trajectory = next(drawn)
            await asyncio.sleep(self.begin_s + at_s - self._loop.time())
            for task in [task for task in self._tasks if task.done()]:
                task.result()
                self._tasks.discard(task)
            self._spawn(self._trajectory(trajectory, is_cohort=False))
        await asyncio.sleep(self._window[1] - self._loop.time())
        await self._ended(self._measured)
        for task in [*self._tasks, *background, reader]:
            task.cancel()
        await asyncio.gather(*self._tasks, *background, reader, return_exceptions=True)
        await self._orchestrator.close()
        for worker in self._workers.values():
            await worker.shutdown()

    async def _collect_garbage(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_EVERY_S)
            gc.collect()

    # -- the pools

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._day.tick_s)
            now_s = self._loop.time()
            reason = ""
            if self._day.scaled:
                demand = self._orchestrator.demand
                serving = PoolSizes(*(sum(m.replica_id is not None for m in self._here(phase)) for phase in Phase))
                sizing = size_pools(demand, self._bounds, serving, self._memory, now_s, self._day.sizing)
                self._memory, reason = sizing.memory, sizing.reason
                self._bring_to(Phase.PREFILL, sizing.sizes.prefill, now_s)
                self._bring_to(Phase.DECODE, sizing.sizes.decode, now_s)
            else:
                self.scored.update(f"{one.proposal.action} {one.verdict}" for one in self._planner.look(now_s))
            self._start_and_end(now_s)
            here = {phase: self._here(phase) for phase in Phase}
            ready = {phase: sum(m.replica_id is not None for m in here[phase]) for phase in Phase}
            self.moments.append(
                Moment(
                    now_s - self.begin_s,
                    len(here[Phase.PREFILL]),
                    len(here[Phase.DECODE]),
                    ready[Phase.PREFILL],
                    ready[Phase.DECODE],
                    reason,
                )
            )

    def _here(self, phase: Phase) -> list[_Machine]:
        return [m for m in self._machines if m.phase is phase and not m.leaves and m.left_s is None]

    def _bring_to(self, phase: Phase, wanted: int, now_s: float) -> None:
        here = self._here(phase)
        for _ in range(wanted - len(here)):
            self.num_started += 1
            self._machines.append(_Machine(phase, now_s, now_s + self._day.start_up_s))
        # Those that are starting go first, as with Serve, then the newest.
        for machine in sorted(here, key=lambda m: m.asked_s, reverse=True)[: max(len(here) - wanted, 0)]:
            machine.leaves = True
            self.num_left += 1
            if machine.replica_id is None:
                machine.left_s = now_s
            else:
                self._transport.leave(machine.replica_id)

    def _start_and_end(self, now_s: float) -> None:
        for machine in self._machines:
            if machine.left_s is not None:
                continue
            if machine.replica_id is None and machine.ready_s <= now_s:
                worker = self._new_worker(machine.phase)
                machine.replica_id = worker.replica_id
                self._transport.add(worker)
            elif machine.leaves and machine.replica_id and not self._orchestrator.cluster.get(machine.replica_id):
                # Drained: its last request has ended, and the gateway has let go of it.
                machine.left_s = now_s
                self._transport.remove(machine.replica_id)
                self._spawn(self._workers.pop(machine.replica_id).shutdown())
