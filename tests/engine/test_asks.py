"""Two turns of a session over real engines: the second one's prefill fetches from decode what decode wrote."""

import pytest
from vllm.sampling_params import SamplingParams

from tests.engine.local_cluster import BLOCK, local_cluster

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4 * BLOCK, ignore_eos=True, detokenize=False)


async def test_a_second_turn_is_fetched_from_decode_and_answered_as_without():
    prompt = [17 + index % 900 for index in range(10 * BLOCK + 5)]
    new = list(range(40, 60))
    async with local_cluster(1, 1, reverse=True, max_model_len=2048, kv_cache_memory_bytes=1 << 26) as cluster:
        first = await cluster.ask(prompt, GREEDY)
        known = len(prompt) + len(first.token_ids) - 1
        decode = cluster.orchestrator.cluster.get("decode-0")
        await cluster.until(lambda: len(decode.blocks) >= known // BLOCK, "decode's blocks to be told")
        second_prompt = [*prompt, *first.token_ids, *new]
        second = await cluster.ask(second_prompt, GREEDY)
        outcome, placement = second.receipt.outcome, second.receipt.placement
        assert (placement.ask, outcome.faults) == ("decode-0", ())
        # Prefill has the prompt's full blocks, decode the answer's too.
        assert outcome.kv_blocks_asked == known // BLOCK - len(prompt) // BLOCK
        assert outcome.prefill_computed_tokens == len(second_prompt) - known // BLOCK * BLOCK
        # The same prompt once more, without a cache: no engine has another answer.
        salted = await cluster.ask(second_prompt, GREEDY, cache_salt="nobody's")
        assert salted.receipt.outcome.reused_tokens == 0
        assert salted.token_ids == second.token_ids
        await cluster.quiet()
