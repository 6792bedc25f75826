"""Engines that hand over in both directions: prefill fetches from decode what a session has cached there."""

import time

import msgspec
import pytest

from engine.ports import free_ports
from engine.protocol import KVHandoff, Phase, PrefillFacts
from tests.engine.contract import Answer, Bench, EngineContract, ReverseContract
from tests.engine.local_cluster import BLOCK
from tests.engine.test_vllm_contract import running_pair

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
MOVED = "-moved"
"""A salt under which prefill has cached nothing of the session."""


@pytest.fixture(scope="module")
async def pair():
    async with running_pair(reverse=True) as engines:
        yield engines


async def first_turn(bench: Bench, num_prompt_tokens: int, num_answer_tokens: int, seed: int) -> list[int]:
    """The tokens of a session after a turn that prefill has read and decode has written."""
    prompt = bench.pair.prompt(num_prompt_tokens, seed)
    handoff = (await bench.run_prefill(prompt)).handoff
    answer = await bench.run_decode(prompt, num_answer_tokens, handoff)
    return [*prompt, *answer.token_ids]


async def asked_for(bench: Bench, known: list[int]) -> KVHandoff:
    """Decode's hand-off of what it has computed of them: of the last one nothing."""
    answer = await bench.decode.finished(await bench.submit(bench.decode, Phase.PREFILL, known[:-1], 1))
    assert answer.facts.num_computed_tokens <= BLOCK
    return answer.handoff


async def read(bench: Bench, prompt: list[int], handoff: KVHandoff, salt: str = MOVED) -> Answer:
    request_id = await bench.submit(bench.prefill, Phase.PREFILL, prompt, 1, handoff=handoff, salt=salt)
    return await bench.prefill.finished(request_id)


def nobodys(handoff: KVHandoff) -> KVHandoff:
    """The hand-off of an engine that does not answer."""
    nobody = {"remote_engine_id": "nobody", "remote_port": free_ports("127.0.0.1")[0]}
    params = msgspec.msgpack.decode(handoff.params) | nobody
    return msgspec.structs.replace(handoff, params=msgspec.msgpack.encode(params))


class TestReverse(ReverseContract, EngineContract):
    @pytest.mark.parametrize(("num_prompt_tokens", "num_answer_tokens"), [(300, 40), (2 * BLOCK, 2), (BLOCK + 1, 32)])
    async def test_a_second_turn_is_answered_as_by_one_engine(
        self, bench: Bench, num_prompt_tokens: int, num_answer_tokens: int
    ):
        known = await first_turn(bench, num_prompt_tokens, num_answer_tokens, seed=200)
        prompt = [*known, *bench.pair.prompt(50, seed=201)]
        second = await read(bench, prompt, await asked_for(bench, known))
        assert second.facts == PrefillFacts(len(prompt), 51, 0, len(known) - 1)
        answer = await bench.run_decode(prompt, 12, second.handoff)
        alone = await bench.run_decode(prompt, 12, salt="-alone")
        assert alone.facts.num_computed_tokens == len(prompt)
        assert answer.token_ids == alone.token_ids
        assert second.token_ids == alone.token_ids[:1]

    async def test_only_what_prefill_has_not_cached_is_fetched(self, bench: Bench):
        known = await first_turn(bench, 3 * BLOCK, BLOCK, seed=202)
        prompt = [*known, *bench.pair.prompt(50, seed=203)]
        before = bench.prefill.load
        second = await read(bench, prompt, await asked_for(bench, known), salt="")
        assert second.facts == PrefillFacts(len(prompt), 51, 3 * BLOCK, BLOCK - 1)
        after = await bench.prefill.load_where(
            lambda load: load.kv_transfers_total > before.kv_transfers_total, "the transfer to be counted"
        )
        assert after.kv_bytes_received_total - before.kv_bytes_received_total == bench.pair.prefill.info.kv_block_bytes
        await bench.release(second.handoff)

    async def test_what_prefill_has_cached_as_well_is_not_fetched_but_given_back(self, bench: Bench):
        known = await first_turn(bench, 3 * BLOCK, 4, seed=204)
        prompt = [*known, *bench.pair.prompt(50, seed=205)]
        await bench.release((await bench.run_prefill(prompt)).handoff)
        second = await read(bench, prompt, await asked_for(bench, known), salt="")
        assert second.facts.num_external_cached_tokens == 0
        await bench.release(second.handoff)

    async def test_a_handoff_that_prefill_does_not_want_is_given_back(self, bench: Bench):
        handoff = await asked_for(bench, await first_turn(bench, 3 * BLOCK, 4, seed=206))
        await bench.decode.load_where(lambda load: load.num_kv_blocks_used > 0, "the blocks to be kept")
        await bench.prefill.engine.release("given-back", handoff)
        await bench.decode.idle()

    async def test_an_abort_gives_back_what_was_to_be_fetched(self, bench: Bench):
        known = await first_turn(bench, 3 * BLOCK, 4, seed=207)
        handoff = await asked_for(bench, known)
        request_id = await bench.submit(bench.prefill, Phase.PREFILL, known, 1, handoff=handoff, salt=MOVED)
        await bench.prefill.engine.abort([request_id])
        await bench.serves(bench.prefill)
        await self._give_back_if_it_finished(bench, request_id)

    async def test_a_prompt_whose_handoff_cannot_be_fetched_is_read(self, bench: Bench):
        known = await first_turn(bench, 3 * BLOCK, 4, seed=208)
        handoff = await asked_for(bench, known)
        late = msgspec.structs.replace(handoff, expires_s=time.time() - 1)
        for number, lost in enumerate((late, nobodys(handoff))):
            second = await read(bench, known, lost, salt=f"-lost-{number}")
            assert second.facts == PrefillFacts(len(known), len(known), 0, 0)
            await bench.release(second.handoff)
        await bench.prefill.engine.release("unfetched", handoff)
