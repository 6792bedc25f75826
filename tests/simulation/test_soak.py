"""The soak in small: worlds full of faults in which nothing may be lost, and whether each of their checks can fail.

The whole experiment is `python -m bench soak`, a million requests. Here are 20,000, about a minute of one core: enough
for every kind of fault, several times over all seeds.
"""

import asyncio
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from bench.soak import run, simulate, world_plan
from bench.soak_report import SoakPlan, total
from bench.world import Counts, WorldPlan, WorldResult
from bench.world_faults import Kind
from engine.protocol import BlockChanges, FinishReason, KVHandoff, Phase
from engine.reports import Outbox
from engine.simulated_blocks import BlockPool
from engine.worker import Worker
from gateway import lifecycle, orchestrator
from gateway.cluster import Cluster
from gateway.membership import Membership
from gateway.orchestrator import Orchestrator
from gateway.routing.types import NO_DECODE, ClusterSnapshot

SEEDS = range(5)
PLAN = WorldPlan(4_000)
SMALL = WorldPlan(300, sessions=60)
LOUD = frozenset(
    {Kind.PREFILL_DIES_READING, Kind.PREFILL_DIES_HOLDING, Kind.DECODE_DIES_WAITING, Kind.DECODE_DIES_PULLING}
)
LOUD_TO_ASKS = frozenset({Kind.ASKED_DIES, Kind.ASKED_DIES_HOLDING, Kind.PREFILL_DIES_FETCHING})
"""The loss is known to be a death at once: nobody has to wait for the end of a lease."""
HARMLESS = frozenset({Kind.PREFILL_DIES_IDLE, Kind.DECODE_DIES_NEW, Kind.EVENTS_LOST, Kind.GATEWAY_DIES})
"""They hit no request, or take it with them."""


@cache
def world(seed: int) -> WorldResult:
    return simulate(world_plan(PLAN.requests, seed), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_single_fault_costs_a_client_anything(seed: int) -> None:
    result = world(seed)
    assert not result.problems
    assert result.counts.bad == 0
    assert result.counts.requests == result.counts.answered + result.counts.left >= PLAN.requests


def test_the_worlds_are_what_they_are_said_to_be() -> None:
    counts = total([world(seed).counts for seed in SEEDS])
    assert counts.deltas >= 32 * counts.sequences
    assert counts.touched >= 0.1 * counts.requests
    assert counts.further_turns >= 0.5 * counts.requests
    assert counts.faults.keys() == set(Kind)
    assert {kind for kind, num_hit in counts.hit_by.items() if num_hit} >= set(Kind) - HARMLESS
    assert counts.degraded > 0
    assert counts.turned_away > 0
    assert counts.unread > 0
    assert counts.asked > 0
    assert counts.fault_kinds.keys() >= {
        "decode_lost_before_token",
        "decode_lost_mid_stream",
        "prefill_lost",
        "ask_lost",
        "ask_pull_failed",
        "pull_failed",
    }


def test_the_same_seed_gives_the_same_log_and_another_one_does_not() -> None:
    one = simulate(SMALL, 1)
    code = "from tests.simulation.test_soak import SMALL, simulate; print(simulate(SMALL, 1).digest)"
    # A process of its own draws hashes of strings and addresses of its own.
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert again.stdout.strip() == one.digest
    assert simulate(SMALL, 2).digest != one.digest


@pytest.mark.parametrize("asks", [False, True])
def test_no_lease_has_to_end_where_every_loss_is_a_known_death(asks: bool) -> None:
    result = simulate(replace(SMALL, kinds=LOUD | LOUD_TO_ASKS, asks=asks), 3)
    assert (result.counts.bad, result.counts.leases_ended) == (0, 0)
    assert result.counts.met > 0
    assert (result.counts.asked > 0) == asks


def test_a_source_that_nobody_gives_back_waits_for_the_end_of_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Orchestrator._release

    async def not_through_prefill(
        self: Orchestrator, handoff: KVHandoff, pool: Phase, through: str | None = None
    ) -> None:
        if pool is Phase.DECODE:
            await release(self, handoff, pool, through)

    monkeypatch.setattr(Orchestrator, "_release", not_through_prefill)
    plan = replace(SMALL, kinds=frozenset({Kind.PREFILL_DIES_FETCHING}), asks=True, leaving_share=0.2)
    seen_red(plan, SEEDS, lambda counts: counts.leases_ended)


# -- each check can fail: the product is broken, and the world sees it


def nothing(*_: Any, **__: Any) -> None:
    pass


async def nothing_async(*_: Any, **__: Any) -> None:
    pass


def seen_red(plan: WorldPlan, seeds: Sequence[int], figure: Callable[[Counts], int]) -> WorldResult:
    """The first world of these seeds in which the figure is not 0."""
    for seed in seeds:
        result = simulate(plan, seed)
        if figure(result.counts):
            return result
    raise AssertionError(f"the worlds did not see it: {result.counts}")


def only(*kinds: Kind) -> WorldPlan:
    return replace(SMALL, kinds=frozenset(kinds))


def test_a_replay_that_is_not_compared_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "_new_tokens", lambda sequence, delta: delta.token_ids)
    result = seen_red(only(Kind.DECODE_DIES_WRITING), SEEDS, lambda counts: counts.wrong)
    assert any("was answered wrongly" in problem for problem in result.problems)


def test_a_loss_nobody_acts_on_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orchestrator, "_on_replica_lost", nothing)
    result = seen_red(only(Kind.DECODE_DIES_WRITING), SEEDS, lambda counts: counts.hung)
    assert any("is open after 300 s" in problem for problem in result.problems)


def test_a_loss_that_is_not_placed_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "MAX_PLACEMENTS", 1)
    seen_red(only(Kind.DECODE_DIES_WRITING), SEEDS, lambda counts: counts.failed)


def test_what_is_told_twice_is_duplicated(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Orchestrator._on_report

    def twice(self: Orchestrator, report: Any) -> None:
        told(self, report)
        if not self._batches.empty():
            self._batches.put_nowait(self._batches._queue[-1])  # type: ignore[attr-defined]

    monkeypatch.setattr(Orchestrator, "_on_report", twice)
    seen_red(only(), SEEDS, lambda counts: counts.duplicated)


def test_a_receipt_that_is_closed_twice_is_duplicated(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Orchestrator._finish

    def twice(self: Orchestrator, sequence: Any) -> None:
        finish(self, sequence)
        finish(self, sequence)

    monkeypatch.setattr(Orchestrator, "_finish", twice)
    seen_red(only(), SEEDS, lambda counts: counts.duplicated)


def test_a_client_that_leaves_in_vain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orchestrator, "abort", nothing)
    result = seen_red(only(), SEEDS, lambda counts: counts.hung)
    assert any("although its client has left" in problem for problem in result.problems)


def test_blocks_that_an_engine_does_not_give_back_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = BlockPool.give_back
    monkeypatch.setattr(BlockPool, "give_back", lambda self, blocks: give_back(self, blocks[1:]))
    result = seen_red(only(), SEEDS, lambda counts: counts.left_behind)
    assert any("still has EngineLoad" in problem for problem in result.problems)


def test_what_a_dead_gateway_leaves_at_the_workers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lets_go(self: Worker, gateway_id: str) -> None:
        if outbox := self._outboxes.pop(gateway_id, None):
            outbox.close()

    monkeypatch.setattr(Worker, "_let_go", lets_go)
    result = seen_red(only(Kind.GATEWAY_DIES), SEEDS, lambda counts: counts.left_behind)
    assert any("holds requests of gateway-" in problem for problem in result.problems)


def test_a_hand_off_that_is_not_given_back_waits_for_the_end_of_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orchestrator, "_release", nothing_async)
    seen_red(only(Kind.DECODE_DIES_PULLING), SEEDS, lambda counts: counts.leases_ended)


def test_tokens_that_stay_in_flight_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Orchestrator._leave_placement

    def forgets(self: Orchestrator, sequence: Any) -> None:
        if sequence.history.finish_reason is not FinishReason.ABORT:
            leave(self, sequence)

    monkeypatch.setattr(Orchestrator, "_leave_placement", forgets)
    result = seen_red(only(), SEEDS, lambda counts: counts.left_behind)
    assert any("counts InFlight" in problem for problem in result.problems)


def test_a_replica_that_nobody_lets_go_of_cannot_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "let_go_of_leavers", nothing)
    result = seen_red(only(Kind.DECODE_LEAVES), SEEDS, lambda counts: counts.left_behind)
    assert any("could not drain" in problem for problem in result.problems)


def test_a_replica_that_is_not_tried_again_leaves_the_pools_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.membership.REATTACH_PAUSE_S", (10_000.0,))
    result = seen_red(only(Kind.LINK_BREAKS), SEEDS, lambda counts: counts.left_behind)
    assert any("did not become whole again" in problem for problem in result.problems)


def test_cache_events_that_gateways_miss_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def misses_removals(self: Outbox, changes: BlockChanges) -> None:
        put(self, BlockChanges(changes.stored[1:], changes.removed, changes.cleared))

    put = Outbox.put_blocks
    monkeypatch.setattr(Outbox, "put_blocks", misses_removals)
    result = seen_red(only(), SEEDS, lambda counts: counts.wrong)
    assert any("knows other blocks" in problem for problem in result.problems)


def test_tasks_that_outlive_their_world_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "close", nothing_async)
    seen_red(only(), SEEDS, lambda counts: counts.left_behind)


def test_what_the_product_takes_for_its_own_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def raises(*_: Any) -> None:
        raise AttributeError("broken")

    monkeypatch.setattr(Orchestrator, "_abort_on", raises)
    result = seen_red(only(), SEEDS, lambda counts: counts.failed)
    assert any("a background task failed" in problem for problem in result.problems)


def test_a_refusal_without_need_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "snapshot", lambda self, hashes=(): ClusterSnapshot((), ()))
    seen_red(only(), SEEDS, lambda counts: counts.rejected)


def test_a_world_in_which_nothing_can_happen_any_more_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(self: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("bench.world.World._sweep", waits)
    monkeypatch.setattr("bench.world.World._later", nothing)
    monkeypatch.setattr("bench.world.Gateway.start", waits)
    result = simulate(only(), 0)
    assert result.counts.failed == 1
    assert "the world ended with" in result.problems[0]


def test_a_gateway_that_has_hung_and_blames_others_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Membership._look

    def blames(self: Membership) -> None:
        self._watch = asyncio.get_running_loop().call_later(0.0, nothing)
        look(self)

    monkeypatch.setattr(Membership, "_look", blames)
    result = seen_red(only(Kind.GATEWAY_HANGS), SEEDS, lambda counts: counts.wrong)
    assert any("has hung and lost replicas that were well" in problem for problem in result.problems)


def test_prefill_replicas_that_are_not_used_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Cluster.snapshot
    monkeypatch.setattr(Cluster, "snapshot", lambda self, hashes=(): replace(snapshot(self), prefill=()))
    result = seen_red(only(), SEEDS, lambda counts: counts.wrong)
    assert any("was served degraded" in problem for problem in result.problems)


def test_requests_that_a_pool_which_comes_back_does_not_take_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orchestrator, "_place_displaced", nothing)
    seen_red(only(Kind.DECODE_POOL_DIES), SEEDS, lambda counts: counts.failed)


def test_a_refusal_that_does_not_say_when_to_come_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.routing.policies.NO_DECODE", replace(NO_DECODE, retry_after_s=0))
    seen_red(only(Kind.DECODE_POOL_DIES), SEEDS, lambda counts: counts.rejected)


# -- the experiment around the worlds


def test_worlds_are_the_same_in_whichever_process_they_run() -> None:
    plan = SoakPlan(requests=250, seed=5, shards=2, world_requests=100)
    results: list[WorldResult] = []
    run(plan, results.append)
    assert {(result.seed, result.digest) for result in results} == {
        (seed, simulate(world_plan(requests, seed), seed).digest) for seed, requests in plan.worlds()
    }


def test_an_interrupt_ends_all_processes_and_keeps_the_worlds_that_have_ended() -> None:
    results: list[WorldResult] = []

    def took(result: WorldResult) -> None:
        results.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SoakPlan(requests=10_000, seed=5, shards=2, world_requests=100), took)
    assert len(results) == 1
    assert not multiprocessing.active_children()
