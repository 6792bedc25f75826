"""Engines of two ranks hand KV blocks to engines of one, and the other way round. Real vLLM, real NIXL."""

from dataclasses import replace

import pytest
from vllm.sampling_params import SamplingParams

from engine.protocol import Phase
from engine.vllm_engine import VllmEngine
from tests.engine.local_cluster import BLOCK, LocalCluster, engine_config
from tests.engine.test_split_equals_single import prompt

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

MAX_TOKENS = 12
LENGTHS = [33, 255, 1025]


def greedy(*, read_by_decode: bool) -> SamplingParams:
    """Who asks for the logprobs of a prompt has it read by the engine that answers."""
    return SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, prompt_logprobs=0 if read_by_decode else None
    )


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(1, 2), (2, 1)])
async def test_other_numbers_of_ranks_hand_over(prefill_ranks: int, decode_ranks: int) -> None:
    ranks = {Phase.PREFILL: prefill_ranks, Phase.DECODE: decode_ranks}
    engines: dict[str, VllmEngine] = {}
    cluster: LocalCluster | None = None
    try:
        for core, (phase, number) in enumerate(ranks.items()):
            config = engine_config(phase.value, phase, core, tensor_parallel_size=number, kv_cache_memory_bytes=1 << 28)
            engines[phase.value] = await VllmEngine.start(replace(config, cpu_cores=(0, 1) if number > 1 else (core,)))
        cluster = LocalCluster(engines, {phase.value: phase for phase in ranks})
        await cluster.start()
        for length in LENGTHS:
            tokens = prompt(length)
            handed_over = await cluster.ask(tokens, greedy(read_by_decode=False))
            alone = await cluster.ask(tokens, greedy(read_by_decode=True), cache_salt="of its own")
            assert handed_over.token_ids == alone.token_ids
            for answer, num_blocks in ((handed_over, -(-length // BLOCK)), (alone, 0)):
                assert answer.receipt is not None
                assert answer.receipt.outcome.kv_blocks_moved == num_blocks
                assert answer.receipt.outcome.faults == ()
        await cluster.quiet()
    finally:
        if cluster is not None:
            await cluster.close()
        else:
            for engine in engines.values():
                await engine.shutdown()
