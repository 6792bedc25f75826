"""The simulated engine passes the Engine contract; and what only a simulation can show, on virtual time."""

import asyncio
import dataclasses
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.blocks import block_hashes
from engine.latency import LatencyModel
from engine.protocol import (
    EngineGoneError,
    EngineRequest,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
)
from engine.simulated import (
    LONGEST_SILENCE_S,
    SimulatedEngine,
    SimulatedEngineConfig,
    SimulatedFabric,
    TokenRule,
    expected_answer,
)
from engine.simulated_blocks import Block, BlockPool
from tests.engine.contract import Answer, Collector, EngineContract, ReverseContract
from tests.unit.simulated_config import BLOCK as B
from tests.unit.simulated_config import CONFIG, LATENCY
from tests.unit.virtual_time import simulate

SLOW_IS_FINE = [HealthCheck.too_slow]


def random_prompt(n_tokens: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(32_000) for _ in range(n_tokens)]


class SimulatedPair:
    """Two engines on the loop's real clock, quick."""

    sampling = b""

    def __init__(self) -> None:
        quick = dataclasses.replace(CONFIG, latency=LatencyModel(1e-6, 1e-5, 1e-4, 1e-6, 1e-4, 1e-6))
        fabric = SimulatedFabric()
        self.prefill = SimulatedEngine("prefill-0", quick, fabric)
        self.decode = SimulatedEngine("decode-0", quick, fabric)

    def prompt(self, n_tokens: int, seed: int) -> list[int]:
        return random_prompt(n_tokens, seed)


@pytest_asyncio.fixture(scope="module")
async def pair() -> AsyncIterator[SimulatedPair]:
    pair = SimulatedPair()
    yield pair
    await pair.prefill.shutdown()
    await pair.decode.shutdown()


class TestContract(ReverseContract, EngineContract):
    pass


# -- virtual time


def now_s() -> float:
    return asyncio.get_running_loop().time()


class Pair:
    """A prefill and a decode engine of one fabric, read all the time."""

    def __init__(self, config: SimulatedEngineConfig = CONFIG, decode_config: SimulatedEngineConfig | None = None):
        self.fabric = SimulatedFabric()
        self.prefill_engine = SimulatedEngine("prefill-0", config, self.fabric)
        self.decode_engine = SimulatedEngine("decode-0", decode_config or config, self.fabric)
        self.prefill = Collector(self.prefill_engine)
        self.decode = Collector(self.decode_engine)
        self._numbers = itertools.count()

    async def __aenter__(self) -> "Pair":
        return self

    async def __aexit__(self, *_: object) -> None:
        for side in (self.prefill, self.decode):
            await side.close()
            await side.engine.shutdown()

    async def submit(self, side: Collector, phase: Phase, prompt: Sequence[int], max_tokens: int, **more: Any) -> str:
        request_id = f"{phase}-{next(self._numbers)}"
        await side.engine.submit(EngineRequest(request_id, phase, list(prompt), max_tokens, **more))
        return request_id

    async def run_prefill(self, prompt: Sequence[int], **more: Any) -> Answer:
        return await self.prefill.finished(await self.submit(self.prefill, Phase.PREFILL, prompt, 1, **more))

    async def run_decode(self, prompt: Sequence[int], max_tokens: int = 6, **more: Any) -> Answer:
        return await self.decode.finished(await self.submit(self.decode, Phase.DECODE, prompt, max_tokens, **more))


def test_info_says_that_the_engine_is_simulated() -> None:
    async def main() -> None:
        async with Pair() as pair:
            info = pair.decode_engine.info
            assert info.kind == "simulated"
            assert (info.block_size_tokens, info.num_kv_blocks, info.pids) == (B, 64, [])
            assert info.max_num_seqs == CONFIG.max_num_seqs

    simulate(main)


# -- time


def test_a_prompt_and_each_token_take_what_the_latency_model_says() -> None:
    async def main() -> None:
        async with Pair() as pair:
            await pair.run_decode(random_prompt(30, 1), max_tokens=5)
            assert now_s() == pytest.approx(0.01 + 30 * 0.001 + 4 * (0.02 + 0.002))

    simulate(main)


def test_a_long_prompt_is_prefilled_in_chunks_beside_running_decodes() -> None:
    async def main() -> None:
        async with Pair() as pair:
            writing = await pair.submit(pair.decode, Phase.DECODE, random_prompt(4, 1), 40)
            await pair.decode.started(writing)
            reading = await pair.submit(pair.decode, Phase.DECODE, random_prompt(150, 2), 1)
            begin = len(pair.decode.answers[writing].token_ids)
            await pair.decode.finished(reading)
            # 150 tokens beside one decode fit into three steps of 64, after the step under way.
            assert len(pair.decode.answers[writing].token_ids) - begin == 4
            await pair.decode.finished(writing)

    simulate(main)


def test_a_handoff_takes_its_time_and_does_not_hold_up_other_requests() -> None:
    async def main() -> None:
        async with Pair() as pair:
            handoff = (await pair.run_prefill(random_prompt(3 * B, 1))).handoff
            start_s = now_s()
            pulling = await pair.submit(pair.decode, Phase.DECODE, random_prompt(3 * B, 1), 1, handoff=handoff)
            other = await pair.submit(pair.decode, Phase.DECODE, random_prompt(1, 2), 1)
            await pair.decode.finished(other)
            assert now_s() - start_s == pytest.approx(0.022)
            await pair.decode.finished(pulling)
            assert now_s() - start_s == pytest.approx(0.05 + 3 * 0.004 + 0.022)

    simulate(main)


# -- tokens


def test_tokens_are_a_function_of_context_and_seed_and_lie_in_the_vocabulary() -> None:
    async def main() -> None:
        config = dataclasses.replace(CONFIG, token_rule=TokenRule(vocabulary=range(500, 1000)))
        other_seed = dataclasses.replace(config, seed=2)
        prompt = random_prompt(21, 1)
        async with Pair(config) as one, Pair(config) as same, Pair(other_seed) as other:
            answer = (await one.run_decode(prompt, 50)).token_ids
            assert answer == (await same.run_decode(prompt, 50)).token_ids
            assert answer == expected_answer(config, prompt, 50)
            assert answer[7:] == (await same.run_decode(prompt + answer[:7], 43)).token_ids
            assert set(answer) <= set(range(500, 1000))
            assert len(set(answer)) > 25
            assert answer != (await other.run_decode(prompt, 50)).token_ids
            changed_first = [prompt[0] + 1, *prompt[1:]]
            assert answer[0] != (await one.run_decode(changed_first, 1)).token_ids[0]

    simulate(main)


def test_a_stop_token_ends_an_answer_but_not_a_prefill() -> None:
    async def main() -> None:
        prompt = random_prompt(10, 1)
        answer = expected_answer(CONFIG, prompt, 8)
        assert answer[4] not in answer[:4]
        stops = dataclasses.replace(CONFIG, token_rule=TokenRule(stop_token_ids=frozenset({answer[4]})))
        async with Pair(stops) as pair:
            stopped = await pair.run_decode(prompt, 8)
            assert stopped.token_ids == answer[:5]
            assert stopped.finish_reasons == [FinishReason.STOP]
            assert stopped.deltas[-1].stop_reason == answer[4]
            prefilled = await pair.run_prefill(prompt + answer[:4])
            assert prefilled.token_ids == [answer[4]]
            assert prefilled.finish_reasons == [FinishReason.LENGTH]
            assert prefilled.deltas[-1].stop_reason is None
            assert prefilled.handoff.num_tokens == 14

    simulate(main)


@pytest.mark.parametrize("n_tokens", [2 * B, 2 * B + 3])
def test_the_handoff_of_another_prompt_shows_in_the_answer(n_tokens: int) -> None:
    async def main() -> None:
        async with Pair() as pair:
            theirs, mine = random_prompt(n_tokens, 1), random_prompt(n_tokens, 2)
            handoff = (await pair.run_prefill(theirs)).handoff
            answer = (await pair.run_decode(mine, handoff=handoff)).token_ids
            assert answer != expected_answer(CONFIG, mine, 6)
            # All they have read is the other prompt; only the last token is computed from the request.
            assert answer == expected_answer(CONFIG, [*theirs[:-1], mine[-1]], 6)

    simulate(main)


# -- prefix cache


def test_a_block_is_found_only_after_the_same_beginning() -> None:
    async def main() -> None:
        async with Pair() as pair:
            first, second, other = (random_prompt(B, seed) for seed in (1, 2, 3))
            await pair.run_prefill([*first, *second, 7])
            assert (await pair.run_prefill([*first, *second, 8])).facts.num_local_cached_tokens == 2 * B
            assert (await pair.run_prefill([*first, *other, 8])).facts.num_local_cached_tokens == B
            assert (await pair.run_prefill([*other, *second, 8])).facts.num_local_cached_tokens == 0

    simulate(main)


def test_a_prompt_of_cached_blocks_only_still_computes_its_last_block() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(3 * B, 1)
            first = await pair.run_prefill(prompt)
            second = await pair.run_prefill(prompt)
            assert second.facts == PrefillFacts(3 * B, B, 2 * B, 0)
            assert second.token_ids == first.token_ids

    simulate(main)


def test_the_answer_is_cached_for_the_next_turn() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(B + 2, 1)
            answer = (await pair.run_decode(prompt, 2 * B)).token_ids
            # The last token of an answer is written but never read: its KV does not exist.
            turn = [*prompt, *answer, 5, 6, 7]
            assert (await pair.run_decode(turn)).facts.num_local_cached_tokens == (len(prompt) + 2 * B - 1) // B * B

    simulate(main)


def test_salts_separate_caches_but_not_answers() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(3 * B + 1, 1)
            answers = [await pair.run_decode(prompt, cache_salt=salt) for salt in ("a", "b", None, "a", "b", None)]
            assert [a.facts.num_local_cached_tokens for a in answers] == [0, 0, 0, 3 * B, 3 * B, 3 * B]
            assert len({tuple(a.token_ids) for a in answers}) == 1

    simulate(main)


@pytest.mark.parametrize(
    ("use_again", "asked", "num_cached_blocks"),
    [(False, "old", 1), (False, "recent", 4), (True, "old", 4), (True, "recent", 1)],
)
def test_unreferenced_blocks_are_evicted_least_recently_used_first_and_from_the_end(
    use_again: bool, asked: str, num_cached_blocks: int
) -> None:
    async def main() -> None:
        # Ten blocks: two prompts leave four cached ones each and two blank ones. A third prompt needs five.
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80)) as pair:
            prompts = {name: random_prompt(4 * B + 1, seed) for seed, name in enumerate(["old", "recent", "new"])}
            for name in ("old", "recent", *(["old"] if use_again else []), "new"):
                await pair.run_decode(prompts[name], max_tokens=1)
            assert (await pair.run_decode(prompts[asked], 1)).facts.num_local_cached_tokens == num_cached_blocks * B

    simulate(main)


def test_referenced_blocks_are_never_evicted() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80)) as pair:
            pinned = random_prompt(4 * B + 1, 1)
            handoff = (await pair.run_prefill(pinned)).handoff
            for seed in (2, 3, 4):
                await pair.prefill_engine.release("r", (await pair.run_prefill(random_prompt(4 * B + 1, seed))).handoff)
            await pair.prefill.load_where(lambda load: load.num_kv_blocks_used == 5, "only the first to be kept")
            assert (await pair.run_decode(pinned, handoff=handoff)).token_ids == expected_answer(CONFIG, pinned, 6)

    simulate(main)


# -- load


def test_a_step_takes_what_the_latency_model_says_and_prompts_give_the_prefill_rate() -> None:
    async def main() -> None:
        async with Pair() as pair:
            await pair.run_decode(random_prompt(30, 1), max_tokens=2)
            load = await pair.decode.idle()
            assert load.step_duration_s == pytest.approx(0.022)
            assert load.prefill_tokens_per_s == pytest.approx(30 / (0.01 + 30 * 0.001))

    simulate(main)


def test_fetching_a_handoff_is_waiting_and_not_reading() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(20, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            request_id = await pair.submit(pair.decode, Phase.DECODE, prompt, 5, handoff=handoff)
            load = await pair.decode.load_where(lambda load: load.num_waiting_requests == 1, "the pull to begin")
            assert (load.num_queued_tokens, load.num_running_tokens) == (20, 0)
            await pair.decode.finished(request_id)
            assert (await pair.decode.idle()).prefill_tokens_per_s == 0.0

    simulate(main)


# -- what is told of cached blocks


def test_blocks_are_told_with_the_step_that_filled_them() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(B - 1, 1)
            request_id = await pair.submit(pair.decode, Phase.DECODE, prompt, 2 * B + 2)
            for num_tokens, num_blocks in ((1, 0), (2, 1), (B + 1, 1), (B + 2, 2)):
                await pair.decode.started(request_id, num_tokens)
                await asyncio.sleep(0.001)
                assert len(pair.decode.mirror) == num_blocks
            await pair.decode.finished(request_id)

    simulate(main)


def test_lost_changes_are_counted_and_the_blocks_before_them_forgotten() -> None:
    async def main() -> None:
        async with Pair() as pair:
            old, new = random_prompt(3 * B, 1), random_prompt(2 * B, 2)
            await pair.run_decode(old, 1)
            await pair.decode.holds(block_hashes(old, B))
            pair.decode_engine.lose_block_changes()
            await pair.decode.blocks_where(lambda mirror: not len(mirror), "the blocks to be forgotten")
            await pair.run_decode(new, 1)
            await pair.decode.holds(block_hashes(new, B))
            assert set(pair.decode.mirror) == set(block_hashes(new, B))
            assert (await pair.decode.idle()).kv_event_gaps_total == 1
            assert (await pair.run_decode([*old, 1], 1)).facts.num_local_cached_tokens == 3 * B

    simulate(main)


def test_evicted_blocks_that_were_forgotten_before_are_not_told_of() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80)) as pair:
            for seed in range(3):
                await pair.run_decode(random_prompt(9 * B, seed), 1)
                if seed == 0:
                    pair.decode_engine.lose_block_changes()
            await pair.decode.idle()
            await pair.decode.blocks_where(
                lambda mirror: set(mirror) == pair.decode_engine.cached_blocks, "the mirror to be right again"
            )

    simulate(main)


def test_an_engine_whose_changes_nobody_reads_merges_them() -> None:
    async def main() -> None:
        engine = SimulatedEngine(
            "alone", dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80), SimulatedFabric()
        )
        steps = Collector(engine)
        steps._tasks.pop().cancel()
        for number, seed in enumerate([0, 1, 2, 3, 2]):
            if number == 3:
                engine.lose_block_changes()
            request = EngineRequest(f"r{number}", Phase.DECODE, random_prompt(9 * B + 1, seed), 1)
            await engine.submit(request)
            await steps.finished(request.request_id)
        changes = await anext(engine.block_changes())
        assert set(changes.stored) == engine.cached_blocks
        assert (changes.removed, changes.cleared) == ([], True)
        await steps.close()
        await engine.shutdown()

    simulate(main)


def test_the_changes_end_when_the_engine_dies() -> None:
    async def main() -> None:
        engine = SimulatedEngine("alone", CONFIG, SimulatedFabric())
        ended = asyncio.create_task(_read_to_the_end(engine.block_changes()))
        await asyncio.sleep(1.0)
        engine.die()
        await ended
        await engine.shutdown()

    simulate(main)


async def _read_to_the_end(changes: AsyncIterator[Any]) -> None:
    async for _ in changes:
        pass


# -- scarce blocks


def test_a_prompt_waits_in_line_until_its_blocks_are_free() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80)) as pair:
            handoff = (await pair.run_prefill(random_prompt(6 * B, 1))).handoff
            large = await pair.submit(pair.prefill, Phase.PREFILL, random_prompt(5 * B, 2), 1)
            small = await pair.submit(pair.prefill, Phase.PREFILL, random_prompt(1, 3), 1)
            load = await pair.prefill.load_where(lambda load: load.num_waiting_requests == 2, "both to wait")
            assert load.num_running_requests == 0, "the small one overtook the large one"
            await pair.decode_engine.release("r", handoff)
            await pair.prefill.finished(large)
            await pair.prefill.finished(small)

    simulate(main)


def test_an_engine_whose_requests_cannot_run_tells_of_itself_all_the_same() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=10, max_model_len=80)) as pair:
            await pair.run_prefill(random_prompt(6 * B, 1))
            waiting = await pair.submit(pair.prefill, Phase.PREFILL, random_prompt(5 * B, 2), 1)
            await pair.prefill.load_where(lambda load: load.num_waiting_requests == 1, "it to wait")
            for _ in range(20):
                before_s = now_s()
                await pair.prefill.next_step()
                assert now_s() - before_s <= LONGEST_SILENCE_S + 1e-6
            assert not pair.prefill.answers.get(waiting)
            await pair.prefill.finished(waiting)
            num_told = len(pair.prefill.steps)
            await asyncio.sleep(CONFIG.lease_s / 2)
            assert len(pair.prefill.steps) == num_told, "an idle engine has nothing to tell"

    simulate(main)


def test_when_blocks_run_out_the_youngest_is_preempted_and_still_answers_right() -> None:
    async def main() -> None:
        config = dataclasses.replace(CONFIG, num_kv_blocks=12, max_model_len=96)
        prompts = [random_prompt(B + i, i) for i in range(4)]
        async with Pair(config) as pair:
            ids = [await pair.submit(pair.decode, Phase.DECODE, prompt, 40) for prompt in prompts]
            answers = [await pair.decode.finished(request_id) for request_id in ids]
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.token_ids == expected_answer(config, prompt, 40)
                assert answer.facts.num_prompt_tokens == len(prompt)
            assert any(step.load.num_waiting_requests for step in pair.decode.steps), "nothing was preempted"
            assert max(step.load.num_kv_blocks_used for step in pair.decode.steps) <= 12
            await pair.decode.idle()

    simulate(main)


def test_a_preempted_sequence_goes_before_those_that_have_not_run() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, num_kv_blocks=12, max_model_len=96)) as pair:
            oldest = await pair.submit(pair.decode, Phase.DECODE, random_prompt(40, 1), 40)
            preempted = await pair.submit(pair.decode, Phase.DECODE, random_prompt(40, 2), 40)
            waiting = await pair.submit(pair.decode, Phase.DECODE, random_prompt(70, 3), 2)
            await pair.decode.finished(waiting)
            ends = [delta.request_id for step in pair.decode.steps for delta in step.deltas if delta.finish_reason]
            assert ends == [oldest, preempted, waiting]

    simulate(main)


def test_no_more_sequences_run_than_the_configuration_allows() -> None:
    async def main() -> None:
        async with Pair(dataclasses.replace(CONFIG, max_num_seqs=2)) as pair:
            ids = [await pair.submit(pair.decode, Phase.DECODE, random_prompt(5, i), 10) for i in range(5)]
            for request_id in ids:
                await pair.decode.finished(request_id)
            assert max(step.load.num_running_requests for step in pair.decode.steps) == 2

    simulate(main)


# -- hand-offs that go wrong


def test_an_unfetched_handoff_is_freed_and_counted_when_its_lease_ends() -> None:
    async def main() -> None:
        async with Pair() as pair:
            await pair.run_prefill(random_prompt(20, 1))
            start_s = now_s()
            load = await pair.prefill.load_where(lambda load: not load.num_kv_blocks_used, "the lease to end")
            assert load.kv_leases_expired_total == 1
            assert now_s() - start_s == pytest.approx(CONFIG.lease_s)

    simulate(main)


def test_a_lease_holds_while_a_living_engine_waits_to_fetch_and_runs_again_from_its_death() -> None:
    async def main() -> None:
        short = dataclasses.replace(CONFIG, lease_s=5.0)
        slow = dataclasses.replace(short, lease_s=1.0, latency=dataclasses.replace(LATENCY, handoff_fixed_s=20.0))
        async with Pair(short, decode_config=slow) as pair:
            prompt = random_prompt(20, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            facts = (await pair.run_decode(prompt, handoff=handoff)).facts
            assert facts.num_external_cached_tokens == 19
            assert pair.prefill.load.kv_leases_expired_total == 0

            handoff = (await pair.run_prefill(prompt)).handoff
            await pair.submit(pair.decode, Phase.DECODE, random_prompt(20, 2), 1, handoff=handoff)
            await asyncio.sleep(10.0)
            pair.decode_engine.die()
            died_s = now_s()
            load = await pair.prefill.load_where(lambda load: not load.num_kv_blocks_used, "the lease to end")
            assert load.kv_leases_expired_total == 1
            assert now_s() - died_s == pytest.approx(short.lease_s)

    simulate(main)


def test_a_lease_that_ends_while_its_engine_is_busy_is_over() -> None:
    async def main() -> None:
        slow = dataclasses.replace(CONFIG, latency=dataclasses.replace(LATENCY, prefill_fixed_s=10.0), lease_s=1.0)
        async with Pair(slow, decode_config=CONFIG) as pair:
            prompt = random_prompt(20, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            await pair.submit(pair.prefill, Phase.PREFILL, random_prompt(20, 2), 1)
            await asyncio.sleep(2.0)
            assert (await pair.run_decode(prompt, handoff=handoff)).facts.num_computed_tokens == 20
            assert pair.decode.load.kv_transfer_failures_total == 1
            await pair.prefill.load_where(lambda load: load.kv_leases_expired_total == 2, "both leases to end")

    simulate(main)


async def consumed(pair: Pair, prompt: list[int], handoff: KVHandoff) -> None:
    await pair.run_decode(prompt, 1, handoff=handoff, cache_salt="another tenant")


async def released(pair: Pair, prompt: list[int], handoff: KVHandoff) -> None:
    await pair.decode_engine.release("r", handoff)


async def expired(pair: Pair, prompt: list[int], handoff: KVHandoff) -> None:
    await asyncio.sleep(CONFIG.lease_s)


async def dead(pair: Pair, prompt: list[int], handoff: KVHandoff) -> None:
    pair.prefill_engine.die()


async def restarted(pair: Pair, prompt: list[int], handoff: KVHandoff) -> None:
    """A new engine of the same replica that keeps another hand-off of the same request id."""
    pair.prefill_engine.die()
    again = Collector(SimulatedEngine("prefill-0", CONFIG, pair.fabric))
    request = EngineRequest(handoff.source_request_id, Phase.PREFILL, random_prompt(len(prompt), 9), 1)
    await again.engine.submit(request)
    await again.finished(handoff.source_request_id)
    await again.close()
    pair.prefill = Collector(again.engine)


@pytest.mark.parametrize("spoil", [consumed, released, expired, dead, restarted])
def test_a_stale_handoff_is_counted_and_the_prompt_is_computed_locally(spoil: Callable[..., Any]) -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(2 * B + 5, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            await spoil(pair, prompt, handoff)
            failures = pair.decode.load.kv_transfer_failures_total if pair.decode.steps else 0
            answer = await pair.run_decode(prompt, handoff=handoff)
            assert answer.token_ids == expected_answer(CONFIG, prompt, 6)
            assert answer.facts == PrefillFacts(len(prompt), len(prompt), 0, 0)
            assert (await pair.decode.idle()).kv_transfer_failures_total == failures + 1

    simulate(main)


def test_a_source_that_dies_during_the_pull_is_counted_and_the_rest_is_computed_locally() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(2 * B + 5, 1)
            await pair.run_decode(prompt[: B + 1], 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            request_id = await pair.submit(pair.decode, Phase.DECODE, prompt, 6, handoff=handoff)
            await asyncio.sleep(0.01)
            pair.prefill_engine.die()
            answer = await pair.decode.finished(request_id)
            assert answer.token_ids == expected_answer(CONFIG, prompt, 6)
            assert answer.facts == PrefillFacts(len(prompt), B + 5, B, 0)
            load = await pair.decode.idle()
            assert (load.kv_transfer_failures_total, load.kv_transfers_total, load.kv_bytes_received_total) == (1, 0, 0)

    simulate(main)


def test_two_pulls_of_one_handoff_give_one_transfer_and_two_right_answers() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(2 * B + 5, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            ids = [await pair.submit(pair.decode, Phase.DECODE, prompt, 6, handoff=handoff) for _ in range(2)]
            for request_id in ids:
                answer = await pair.decode.finished(request_id)
                assert answer.token_ids == expected_answer(CONFIG, prompt, 6)
            load = await pair.decode.idle()
            assert (load.kv_transfers_total, load.kv_transfer_failures_total) == (1, 1)
            await pair.prefill.idle()

    simulate(main)


def test_an_abort_during_the_pull_frees_both_sides() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(2 * B + 5, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            request_id = await pair.submit(pair.decode, Phase.DECODE, prompt, 6, handoff=handoff)
            await pair.decode.load_where(lambda load: load.num_kv_blocks_used == 3, "the pull to begin")
            aborted_s = now_s()
            await pair.decode_engine.abort([request_id])
            await pair.decode_engine.abort([request_id])
            await pair.decode.idle()
            await pair.prefill.idle()
            assert now_s() == aborted_s, "the blocks were free only when the pull would have ended"
            assert pair.prefill.load.kv_leases_expired_total == 0

    simulate(main)


def test_a_handoff_that_covers_a_part_of_the_prompt_leaves_the_rest_to_compute() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(3 * B + 2, 1)
            handoff = (await pair.run_prefill(prompt[: B + 3])).handoff
            answer = await pair.run_decode(prompt, handoff=handoff)
            assert answer.facts == PrefillFacts(len(prompt), 2 * B - 1, 0, B + 3)
            assert answer.token_ids == expected_answer(CONFIG, prompt, 6)

    simulate(main)


def test_requests_that_only_the_simulation_refuses() -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(10, 1)
            handoff = (await pair.run_prefill(prompt)).handoff
            live = await pair.submit(pair.decode, Phase.DECODE, prompt, 5)
            for engine, request in (
                (pair.decode_engine, EngineRequest(live, Phase.DECODE, prompt, 5)),
                (pair.prefill_engine, EngineRequest(handoff.source_request_id, Phase.PREFILL, prompt, 1)),
                (pair.decode_engine, EngineRequest("x", Phase.DECODE, prompt[:-1], 5, handoff=handoff)),
                (pair.decode_engine, EngineRequest("x", Phase.DECODE, [-1], 5)),
            ):
                with pytest.raises(InvalidEngineRequestError):
                    await engine.submit(request)
            await pair.decode.finished(live)
            assert (await pair.run_decode(prompt, handoff=handoff)).facts.num_external_cached_tokens > 0

    simulate(main)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_blocks", 31), ("block_size_tokens", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", 0)],
)
def test_a_configuration_that_cannot_serve_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_fabric_refuses_a_second_engine_of_a_replica_and_another_block_size() -> None:
    async def main() -> None:
        async with Pair() as pair:
            with pytest.raises(ValueError, match="alive already"):
                SimulatedEngine("prefill-0", CONFIG, pair.fabric)
            with pytest.raises(ValueError, match="block_size_tokens"):
                SimulatedEngine("prefill-1", dataclasses.replace(CONFIG, block_size_tokens=16), pair.fabric)

    simulate(main)


# -- death, and readers that do not read


def test_death_ends_the_steps_and_refuses_further_calls() -> None:
    async def main() -> None:
        async with Pair() as pair:
            request_id = await pair.submit(pair.decode, Phase.DECODE, random_prompt(10, 1), 100)
            await pair.decode.started(request_id)
            handoff = (await pair.run_prefill(random_prompt(10, 1))).handoff
            pair.decode_engine.die()
            with pytest.raises(AssertionError) as caught:
                await pair.decode.finished(request_id)
            assert isinstance(caught.value.__cause__, EngineGoneError)
            with pytest.raises(EngineGoneError, match="decode-0 died"):
                await anext(pair.decode_engine.steps())
            with pytest.raises(EngineGoneError):
                await pair.submit(pair.decode, Phase.DECODE, random_prompt(10, 1), 1)
            with pytest.raises(EngineGoneError):
                await pair.decode_engine.release("r", handoff)
            await pair.decode_engine.abort([request_id])

    simulate(main)


@pytest.mark.parametrize("hangs_while", ["it computes", "it rests"])
def test_an_engine_that_hangs_tells_nothing_until_it_goes_on(hangs_while: str) -> None:
    async def main() -> None:
        async with Pair() as pair:
            prompt = random_prompt(20, 1)
            request_id = ""
            if hangs_while == "it computes":
                request_id = await pair.submit(pair.decode, Phase.DECODE, prompt, 6)
                await pair.decode.started(request_id, 2)
            pair.decode_engine.hang()
            num_told = len(pair.decode.steps)
            aborted = await pair.submit(pair.decode, Phase.DECODE, prompt, 6)
            await pair.decode_engine.abort([aborted])
            await asyncio.sleep(100.0)
            request_id = request_id or await pair.submit(pair.decode, Phase.DECODE, prompt, 6)
            await asyncio.sleep(100.0)
            assert len(pair.decode.steps) == num_told
            pair.decode_engine.go_on()
            answer = await pair.decode.finished(request_id)
            assert answer.token_ids == expected_answer(CONFIG, prompt, 6)
            await pair.decode.idle()

    simulate(main)


def test_an_engine_that_hangs_can_die() -> None:
    async def main() -> None:
        async with Pair() as pair:
            request_id = await pair.submit(pair.decode, Phase.DECODE, random_prompt(20, 1), 6)
            pair.decode_engine.hang()
            pair.decode_engine.die()
            with pytest.raises(AssertionError, match="the engine failed"):
                await pair.decode.finished(request_id)

    simulate(main)


def test_a_reader_that_waits_is_told_of_the_end() -> None:
    async def main() -> None:
        engine = SimulatedEngine("alone", CONFIG, SimulatedFabric())
        reader = asyncio.ensure_future(anext(engine.steps()))
        await asyncio.sleep(1.0)
        await engine.shutdown()
        with pytest.raises(EngineGoneError, match="shut down"):
            await reader

    simulate(main)


def test_an_unread_engine_merges_its_steps_into_one() -> None:
    async def main() -> None:
        engine = SimulatedEngine("alone", CONFIG, SimulatedFabric())
        prompts = {f"r{i}": random_prompt(10 + i, i) for i in range(3)}
        for request_id, prompt in prompts.items():
            await engine.submit(EngineRequest(request_id, Phase.DECODE, prompt, 30))
        await asyncio.sleep(10.0)
        steps = engine.steps()
        step = await anext(steps)
        assert [delta.request_id for delta in step.deltas] == list(prompts)
        for delta in step.deltas:
            assert delta.token_ids == expected_answer(CONFIG, prompts[delta.request_id], 30)
            assert delta.finish_reason is FinishReason.LENGTH
            assert delta.prefill is not None
        assert (step.load.num_running_requests, step.load.num_kv_blocks_used) == (0, 0)
        await engine.shutdown()
        with pytest.raises(EngineGoneError, match="shut down"):
            await anext(steps)

    simulate(main)


# -- whatever happens, no block is lost


class BlockPoolMachine(RuleBasedStateMachine):
    """Takes and gives back the blocks of prompts that share beginnings; `held` is what the test itself has taken."""

    NUM_BLOCKS = 7
    prompts = Bundle("prompts")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.held: list[Block] = []

    @rule(target=prompts, family=st.integers(0, 2), num_full=st.integers(0, 5), num_more=st.integers(0, 3))
    def take(self, family: int, num_full: int, num_more: int) -> Any:
        hashes = [bytes([family, index]) for index in range(num_full)]
        hits = self.pool.match(hashes)
        assert [block.block_hash for block in hits] == hashes[: len(hits)]
        num_new = num_full + num_more - len(hits)
        distinct = {id(block) for block in self.held} | {id(block) for block in hits}
        blocks = self.pool.take(hits, num_new)
        assert (blocks is None) == (len(distinct) + num_new > self.NUM_BLOCKS)
        if blocks is None:
            return multiple()
        assert blocks[: len(hits)] == hits
        assert not {id(block) for block in blocks[len(hits) :]} & distinct
        for block, block_hash in zip(blocks, hashes, strict=False):
            self.pool.cache(block, block_hash)
        self.held += blocks
        return blocks

    @rule(blocks=consumes(prompts))
    def give_back(self, blocks: list[Block]) -> None:
        self.pool.give_back(blocks)
        for block in blocks:
            self.held.remove(block)

    @invariant()
    def used_blocks_are_the_held_ones(self) -> None:
        assert self.pool.num_used == len({id(block) for block in self.held})
        assert 0 <= self.pool.num_used <= self.NUM_BLOCKS
        assert all(block.references == self.held.count(block) for block in self.held)

    @invariant()
    def held_cached_blocks_can_be_found(self) -> None:
        for block in self.held:
            if block.block_hash is not None:
                assert self.pool.match([block.block_hash]) == [block]

    @invariant()
    def no_more_blocks_exist_than_the_pool_has(self) -> None:
        found = [hit for f, i in itertools.product(range(3), range(5)) for hit in self.pool.match([bytes([f, i])])]
        assert len({id(block) for block in [*found, *self.held]}) <= self.NUM_BLOCKS

    def teardown(self) -> None:
        while self.held:
            self.pool.give_back([self.held.pop()])
        assert self.pool.num_used == 0


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=SLOW_IS_FINE
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of a generated load and what becomes of it."""

    fate: str
    start_s: float
    patience_s: float
    family: int
    n_tokens: int
    max_tokens: int
    salt: str | None


jobs = st.builds(
    Job,
    fate=st.sampled_from(["local", "split", "release", "forget", "abort local", "abort prefill", "abort split"]),
    start_s=st.floats(0, 0.5),
    patience_s=st.floats(0, 0.4),
    family=st.integers(0, 2),
    n_tokens=st.integers(1, 60),
    max_tokens=st.integers(1, 30),
    salt=st.sampled_from([None, "a"]),
)
SCARCE = dataclasses.replace(
    CONFIG, num_kv_blocks=12, max_model_len=96, max_num_seqs=4, max_num_batched_tokens=16, lease_s=1.0
)


async def do(job: Job, pair: Pair) -> None:
    prompt = random_prompt(job.n_tokens, job.family)
    expected = expected_answer(SCARCE, prompt, job.max_tokens)
    await asyncio.sleep(job.start_s)
    handoff = None
    if job.fate not in ("local", "abort local"):
        request_id = await pair.submit(pair.prefill, Phase.PREFILL, prompt, 1, cache_salt=job.salt)
        if job.fate == "abort prefill":
            await asyncio.sleep(job.patience_s)
            await pair.prefill_engine.abort([request_id])
            return
        prefilled = await pair.prefill.finished(request_id)
        assert prefilled.token_ids == expected[:1]
        handoff = prefilled.handoff
    if job.fate == "release":
        assert handoff is not None
        await pair.decode_engine.release("r", handoff)
    elif job.fate != "forget":
        request_id = await pair.submit(
            pair.decode, Phase.DECODE, prompt, job.max_tokens, handoff=handoff, cache_salt=job.salt
        )
        if job.fate.startswith("abort"):
            await asyncio.sleep(job.patience_s)
            await pair.decode_engine.abort([request_id])
            answer = pair.decode.answers.get(request_id, Answer())
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            answer = await pair.decode.finished(request_id)
            assert answer.token_ids == expected
            assert answer.finish_reasons == [FinishReason.LENGTH]


@given(load=st.lists(jobs, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_IS_FINE)
def test_no_load_loses_a_block_or_a_token(load: list[Job]) -> None:
    async def main() -> None:
        async with Pair(SCARCE) as pair:
            async with asyncio.TaskGroup() as group:
                for job in load:
                    group.create_task(do(job, pair))
            for side in (pair.prefill, pair.decode):
                if side.steps:
                    await side.idle()
                assert all(0 <= step.load.num_kv_blocks_used <= SCARCE.num_kv_blocks for step in side.steps)
                assert side.most_blocks <= SCARCE.num_kv_blocks
            for side, engine in ((pair.prefill, pair.prefill_engine), (pair.decode, pair.decode_engine)):
                # A step that an abort has emptied tells of what it has evicted when it ends.
                await asyncio.sleep(1.0)
                assert set(side.mirror) == engine.cached_blocks
                assert side.mirror.num_overflows == 0
            forgotten = sum(job.fate == "forget" for job in load)
            expirable = forgotten + sum(job.fate == "abort prefill" for job in load)
            if pair.prefill.steps:
                assert forgotten <= pair.prefill.load.kv_leases_expired_total <= expirable

    simulate(main)


# -- pace and clock of engines that only keep a gateway busy


def paced(interval_s: float, **changes: Any) -> SimulatedEngineConfig:
    latency = dataclasses.replace(LATENCY, decode_step_s=0.001, decode_s_per_request=0.0, decode_interval_s=interval_s)
    return dataclasses.replace(CONFIG, latency=latency, **changes)


async def times_of_tokens(config: SimulatedEngineConfig, starts_s: Sequence[float], num_tokens: int) -> dict[str, list]:
    """When each token of each request came, and which it was; request n starts at `starts_s[n]`."""
    engine = SimulatedEngine("decode-0", config, SimulatedFabric())
    came: dict[str, list[tuple[float, int]]] = {str(n): [] for n in range(len(starts_s))}

    async def start(number: int, start_s: float) -> None:
        await asyncio.sleep(start_s)
        await engine.submit(EngineRequest(str(number), Phase.DECODE, [number, 1, 2], num_tokens))

    starting = [asyncio.create_task(start(n, start_s)) for n, start_s in enumerate(starts_s)]
    num_open = len(starts_s)
    async for step in engine.steps():
        for delta in step.deltas:
            came[delta.request_id] += [(now_s(), token) for token in delta.token_ids]
            num_open -= delta.finish_reason is not None
        if not num_open:
            break
    await asyncio.gather(*starting)
    await engine.shutdown()
    return came


def tokens_of(config: SimulatedEngineConfig, starts_s: Sequence[float], num_tokens: int) -> dict[str, list]:
    came: dict[str, list[tuple[float, int]]] = {}

    async def scenario() -> None:
        came.update(await times_of_tokens(config, starts_s, num_tokens))

    simulate(scenario)
    return came


def test_a_sequence_rests_between_two_tokens_and_others_do_not_wait_for_it() -> None:
    came = tokens_of(paced(2.0), [0.0, 0.5, 1.3], num_tokens=5)
    for number, start_s in enumerate((0.0, 0.5, 1.3)):
        times = [at_s for at_s, _ in came[str(number)]]
        assert times[0] == pytest.approx(start_s, abs=0.1)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert gaps == pytest.approx([2.0] * 4, abs=0.02)


def test_the_pace_does_not_slip_when_steps_are_crowded() -> None:
    came = tokens_of(paced(0.5, max_num_seqs=8), [0.0] * 8, num_tokens=20)
    for tokens in came.values():
        assert tokens[-1][0] - tokens[0][0] == pytest.approx(19 * 0.5, abs=0.05)


def test_a_resting_sequence_can_be_aborted_and_its_blocks_come_back() -> None:
    async def scenario() -> None:
        engine = SimulatedEngine("decode-0", paced(5.0), SimulatedFabric())
        await engine.submit(EngineRequest("a", Phase.DECODE, [1, 2, 3], 50))
        steps = engine.steps()
        while not (await anext(steps)).deltas:
            pass
        await engine.abort(["a"])
        while (await anext(steps)).load.num_kv_blocks_used:
            pass
        await engine.shutdown()

    simulate(scenario)


def test_tokens_can_tell_when_they_were_written() -> None:
    rule = TokenRule(vocabulary=range(1000), clock_tick_s=0.01)
    came = tokens_of(paced(0.3, token_rule=rule), [0.2], num_tokens=6)
    for at_s, token in came["0"]:
        assert token == pytest.approx(at_s / 0.01 % 1000, abs=1.5)


def test_an_engine_that_hangs_takes_requests_and_tells_nothing_until_it_goes_on() -> None:
    async def main() -> None:
        engine = SimulatedEngine("decode-0", CONFIG, SimulatedFabric())
        collector = Collector(engine)
        prompt = random_prompt(3 * B, seed=1)
        engine.hang()
        await engine.submit(EngineRequest("r", Phase.DECODE, prompt, max_tokens=4))
        await asyncio.sleep(1000)
        assert not collector.answers
        assert engine.load.num_waiting_requests == 1
        engine.go_on()
        assert (await collector.finished("r")).token_ids == expected_answer(CONFIG, prompt, 4)
        assert engine.load.num_kv_blocks_used == 0
        await collector.close()
        await engine.shutdown()

    simulate(main)
