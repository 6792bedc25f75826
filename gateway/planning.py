"""Owns the shadow run of the planner in a gateway: it looks every few seconds; proposals are logged and counted."""

import asyncio
import dataclasses
import logging
from collections import deque
from typing import Any

from engine.protocol import Phase
from gateway import metrics
from gateway.cluster import Replica
from gateway.orchestrator import Orchestrator
from gateway.routing.costs import Costs
from gateway.scaling.planner import Observation, PlannerConfig, PlannerMemory, ReplicaHealth, Scored, plan
from gateway.scaling.sizing import Bounds, Memory, PoolSizes, SizingConfig, size_pools

LOOKS_EVERY_S = 10.0
SCORED_KEPT = 20

log = logging.getLogger("baton.planner")


class ShadowPlanner:
    """Changes nothing. With several gateways each plans by what it sees of the pools, and by its own part of the
    demand."""

    def __init__(self, orchestrator: Orchestrator, bounds: Bounds, sizing: SizingConfig, planner: PlannerConfig):
        self._orchestrator = orchestrator
        self._bounds = bounds
        self._sizing = sizing
        self._planner = planner
        self._sizes = Memory()
        self._memory = PlannerMemory()
        self._scored: deque[Scored] = deque(maxlen=SCORED_KEPT)

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOKS_EVERY_S)
            try:
                self.look(loop.time())
            except Exception:
                log.exception("the shadow planner failed; it goes on with its next look")

    def look(self, now_s: float) -> tuple[Scored, ...]:
        """Once, at this time of the event loop. Returns the proposals whose time is over."""
        cluster, demand = self._orchestrator.cluster, self._orchestrator.demand
        serving = PoolSizes(*(sum(replica.ready for replica in cluster.pool(phase)) for phase in Phase))
        sizing = size_pools(demand, self._bounds, serving, self._sizes, now_s, self._sizing)
        self._sizes = sizing.memory
        kept = min(demand.num_ttft_kept, demand.num_tpot_kept)
        made = plan(
            Observation(
                now_s,
                tuple(_health(r, cluster.costs) for phase in Phase for r in cluster.pool(phase)),
                sizing.sizes,
                sizing.needed,
                kept / demand.num_ended if demand.num_ended >= self._sizing.min_ended else None,
            ),
            self._memory,
            self._planner,
        )
        self._memory = made.memory
        for proposal in made.proposals:
            log.info("proposed, not done: %s %s: %s", proposal.action, proposal.subject, proposal.reason)
            metrics.PROPOSALS.labels(proposal.action).inc()
        for scored in made.scored:
            proposal = scored.proposal
            log.info("%s %s was %s: %s", proposal.action, proposal.subject, scored.verdict, scored.happened)
            metrics.PROPOSALS_SCORED.labels(proposal.action, scored.verdict).inc()
            self._scored.append(scored)
        return made.scored

    def as_json(self) -> dict[str, Any]:
        """What is open, and what the last ones have come to."""
        return {
            "open": [dataclasses.asdict(one.proposal) for one in self._memory.open],
            "scored": [dataclasses.asdict(one) for one in self._scored],
        }


def _health(replica: Replica, costs: Costs) -> ReplicaHealth:
    load = replica.load
    slowness: float | None = None
    if replica.phase is Phase.DECODE and load.num_running_requests and load.step_prefill_tokens == 0:
        expected_s = costs.decode.step.seconds(load.num_running_requests, load.num_running_tokens)
        slowness = load.step_duration_s / expected_s if expected_s > 0 and load.step_duration_s > 0 else None
    return ReplicaHealth(replica.replica_id, replica.phase, replica.ready, slowness, load.kv_transfer_failures_total)
