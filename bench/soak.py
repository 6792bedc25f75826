"""Owns the experiment `soak`: very many requests in simulated worlds full of faults, spread over processes."""

import asyncio
import logging
import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.process import ProcessLoop
from bench.soak_report import SoakPlan
from bench.workers import started
from bench.world import Counts, World, WorldPlan, WorldResult

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

QUICK_REQUESTS = 20_000
FULL_WORLD_REQUESTS = 5_000
LIMIT_FIXED_S = 7200.0
LIMIT_S_PER_REQUEST = 5.0
"""Virtual time that a world may take; one that goes on for longer hangs."""
POLL_S = 1.0


def simulate(plan: WorldPlan, seed: int) -> WorldResult:
    """One world from its beginning to its end, in this process. What it raises is a problem of its result: also that
    nothing is left that could ever happen."""
    logger = logging.getLogger("baton")
    before = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False

    async def main() -> WorldResult:
        async with asyncio.timeout(LIMIT_FIXED_S + LIMIT_S_PER_REQUEST * plan.requests):
            return await World(plan, seed).run()

    try:
        with asyncio.Runner(loop_factory=ProcessLoop) as runner:
            return runner.run(main())
    except Exception as error:
        return WorldResult(seed, Counts(failed=1), "", (f"seed {seed}: the world ended with {error!r}",))
    finally:
        logger.level, logger.propagate = before


def run(plan: SoakPlan, took: Callable[[WorldResult], None]) -> None:
    """Simulates all worlds and hands each one's result over as it ends. What a shard's process does not survive is
    the result of a world with a problem. Raises KeyboardInterrupt when it is interrupted; no process is left then."""
    context = multiprocessing.get_context("spawn")
    results: Queue[WorldResult] = context.Queue()
    worlds = plan.worlds()
    shards = [worlds[index :: plan.shards] for index in range(plan.shards)]
    processes = [context.Process(target=_work, args=(shard, results), daemon=True) for shard in shards if shard]
    left = {seed for seed, _ in worlds}
    with started(processes):
        while left:
            try:
                result = results.get(timeout=POLL_S)
            except queue.Empty:
                if any(process.is_alive() for process in processes) or not results.empty():
                    continue
                words = f"seeds {sorted(left)[:5]}: their process ended with {[p.exitcode for p in processes]}"
                took(WorldResult(min(left), Counts(failed=1), "", (words,)))
                return
            left.discard(result.seed)
            took(result)


def world_plan(requests: int, seed: int) -> WorldPlan:
    """In every second world decode is asked for what it has cached."""
    return WorldPlan(requests, asks=seed % 2 == 1)


def _work(worlds: Sequence[tuple[int, int]], results: "Queue[WorldResult]") -> None:
    for seed, requests in worlds:
        results.put(simulate(world_plan(requests, seed), seed))


class Progress:
    """What is said of a run while it goes on, in lines no closer than `every_s` to each other."""

    def __init__(self, plan: SoakPlan, say: Callable[[str], None], every_s: float = 10.0):
        self._plan = plan
        self._say = say
        self._every_s = every_s
        self._began_s = self._said_s = time.monotonic()
        self._num_requests = self._num_bad = 0

    def __call__(self, result: WorldResult) -> None:
        self._num_requests += result.counts.requests
        self._num_bad += result.counts.bad
        for problem in result.problems:
            self._say(problem)
        now_s = time.monotonic()
        if now_s - self._said_s >= self._every_s or result.counts.bad:
            self._said_s = now_s
            rate = self._num_requests / (now_s - self._began_s)
            left_s = (self._plan.requests - self._num_requests) / rate if rate else 0.0
            self._say(
                f"{self._num_requests:,} of {self._plan.requests:,} requests, {rate:,.0f} per second, "
                f"{self._num_bad} bad; {left_s / 60:.0f} min left"
            )
