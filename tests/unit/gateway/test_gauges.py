"""What a gateway tells of this moment: the pools as it sees them, and what waits in it."""

from prometheus_client.samples import Sample

from engine.protocol import EngineLoad, Phase, WorkerReport
from gateway import gauges
from gateway.routing.types import Hints, Priority
from tests.unit.gateway.rig import OTHER_PROMPT, PROMPT, Gateway, Rig
from tests.unit.virtual_time import simulate

DEADLINE_S = 30.0


def expected(prefill: int, decode: int, tenants: tuple[str, ...] = ()) -> gauges.Expected:
    return gauges.Expected({Phase.PREFILL: prefill, Phase.DECODE: decode}, 2, DEADLINE_S, tenants)


def told(gateway: Gateway, wanted: gauges.Expected) -> dict[tuple[str, ...], float]:
    """The values by name and labels."""
    samples: list[Sample] = [s for family in gauges.families(gateway.orchestrator, wanted) for s in family.samples]
    values = {(s.name, *s.labels.values()): s.value for s in samples}
    assert len(values) == len(samples), "a series comes twice"
    return values


def test_a_pools_replicas_are_those_that_are_wanted_and_those_that_are_ready() -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=2) as rig:
            values = told(rig, expected(2, 2))
            assert values["baton_pool_replicas", "prefill", "wanted"] == 2
            assert values["baton_pool_replicas", "prefill", "ready"] == 1
            assert values["baton_pool_replicas", "decode", "ready"] == 2
            assert values["baton_gateways_wanted",] == 2
            assert values["baton_ttft_deadline_seconds",] == DEADLINE_S

    simulate(main)


def test_a_pool_that_nobody_wants_has_no_series() -> None:
    async def main() -> None:
        async with Rig(prefill=0, decode=1) as rig:
            assert not [key for key in told(rig, expected(0, 1)) if "prefill" in key]

    simulate(main)


def test_the_kv_cache_of_a_pool_is_the_sum_and_its_fullest_engine_is_told_apart() -> None:
    async def main() -> None:
        async with Rig(prefill=0, decode=2) as rig:
            num_blocks = rig.engines["decode-0"].info.num_kv_blocks
            for replica_id, num_used in (("decode-0", 3), ("decode-1", num_blocks // 2)):
                load = EngineLoad(num_running_requests=1, num_waiting_requests=2, num_kv_blocks_used=num_used)
                rig.cluster.fold(WorkerReport(replica_id, Phase.DECODE, 0, [], load))
            values = told(rig, expected(0, 2))
            assert values["baton_pool_kv_blocks", "decode", "total"] == 2 * num_blocks
            assert values["baton_pool_kv_blocks", "decode", "used"] == 3 + num_blocks // 2
            assert values["baton_pool_fullest_kv_use_ratio", "decode"] == (num_blocks // 2) / num_blocks
            assert values["baton_pool_requests", "decode", "running"] == 2
            assert values["baton_pool_requests", "decode", "waiting"] == 4

    simulate(main)


def test_the_oldest_wait_is_of_what_has_no_token_yet_by_class_and_tenant() -> None:
    async def main() -> None:
        async with Rig() as rig:
            clock = rig.cluster._clock
            for name, ago_s, hints, prompt in (
                ("old", 5.0, Hints(Priority.LOW, tenant="alice"), PROMPT),
                ("young", 1.0, Hints(Priority.LOW, tenant="bob"), OTHER_PROMPT),
            ):
                rig.add(prompt, 6, group=rig.orchestrator.new_group(name, 1, clock() - ago_s, hints))
            values = told(rig, expected(1, 1, ("alice", "bob", "carol")))
            assert values["baton_waiting_requests", "low"] == 2
            assert values["baton_oldest_wait_seconds", "low"] == 5.0
            assert values["baton_oldest_wait_seconds", "high"] == 0.0
            assert values["baton_tenant_oldest_wait_seconds", "alice"] == 5.0
            assert values["baton_tenant_oldest_wait_seconds", "bob"] == 1.0
            assert values["baton_tenant_oldest_wait_seconds", "carol"] == 0.0
            assert values["baton_gateway_sequences",] == 2
            await rig.writing("r0")
            await rig.writing("r1")
            values = told(rig, expected(1, 1, ("alice",)))
            assert values["baton_oldest_wait_seconds", "low"] == 0.0, "both write"
            assert values["baton_tenant_oldest_wait_seconds", "alice"] == 0.0
            assert values["baton_gateway_sequences",] == 2
            for request_id in ("r0", "r1"):
                await rig.finished(request_id)

    simulate(main)


def test_all_choices_of_a_prompt_wait_as_one() -> None:
    async def main() -> None:
        async with Rig() as rig:
            group = rig.orchestrator.new_group("two", 2)
            ids = [rig.add(PROMPT, 6, group=group) for _ in range(2)]
            values = told(rig, expected(1, 1))
            assert values["baton_waiting_requests", "normal"] == 1
            assert values["baton_tenant_oldest_wait_seconds", "none"] == 0.0
            assert values["baton_gateway_sequences",] == 2
            for request_id in ids:
                await rig.finished(request_id)

    simulate(main)


def test_two_gateways_tell_the_same_of_the_pools_and_each_its_own_of_what_waits() -> None:
    async def main() -> None:
        async with Rig() as rig:
            other = await rig.another_gateway("other")
            request_id = rig.add(PROMPT, 6)
            here, there = told(rig, expected(1, 1)), told(other, expected(1, 1))
            assert (here["baton_gateway_sequences",], there["baton_gateway_sequences",]) == (1, 0)
            assert (here["baton_waiting_requests", "normal"], there["baton_waiting_requests", "normal"]) == (1, 0)
            await rig.finished(request_id)
            await rig.loads_are_told()
            here, there = told(rig, expected(1, 1)), told(other, expected(1, 1))
            assert here["baton_pool_kv_blocks", "decode", "total"] > 0
            assert here == there

    simulate(main)
