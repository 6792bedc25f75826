"""A pair of real vLLM engines keeps the contract of the Engine port, with real NIXL hand-offs."""

import random
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from engine.protocol import InvalidEngineRequestError, Phase, PrefillFacts
from engine.vllm_codec import SamplingPayload, encode_sampling
from engine.vllm_engine import VllmEngine
from tests.engine.contract import Bench, Collector, EngineContract
from tests.engine.local_cluster import BLOCK, engine_config

BYTES_PER_TOKEN = 2 * 4 * 2 * 64 * 4
"""Of the shipped model's KV: K and V, layers, heads, head size, bytes of a float32."""
pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]


@dataclass
class VllmPair:
    prefill: VllmEngine
    decode: VllmEngine
    sampling: bytes

    def prompt(self, n_tokens: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(20, 1500) for _ in range(n_tokens)]


async def warm_up(pair: VllmPair) -> None:
    """A first hand-off, as gateways have one before they use a pair. Of engines that have not met, what decode releases
    is only heard when it next takes a step, or when the lease ends."""
    bench = Bench(pair, Collector(pair.prefill), Collector(pair.decode), "warm-up")
    prompt = pair.prompt(2, seed=0)
    await bench.run_decode(prompt, 1, (await bench.run_prefill(prompt)).handoff)
    await bench.prefill.close()
    await bench.decode.close()


@asynccontextmanager
async def running_pair(*, reverse: bool):
    # A cache that a test can fill: twice the blocks of the longest request and more.
    changes = {"max_model_len": 2048, "kv_cache_memory_bytes": 160 * BLOCK * BYTES_PER_TOKEN}
    configs = [
        replace(engine_config(f"{phase}-0", phase, core, **changes), reverse=reverse)
        for core, phase in enumerate(Phase)
    ]
    prefill = await VllmEngine.start(configs[0])
    try:
        decode = await VllmEngine.start(configs[1])
    except BaseException:
        await prefill.shutdown()
        raise
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)
    pair = VllmPair(prefill, decode, encode_sampling(SamplingPayload(greedy)))
    await warm_up(pair)
    yield pair
    await prefill.shutdown()
    await decode.shutdown()


@pytest.fixture(scope="module")
async def pair():
    async with running_pair(reverse=False) as engines:
        yield engines


class TestVllmEngine(EngineContract):
    async def test_a_hand_off_whose_lease_has_ended_is_not_fetched(self, bench: Bench):
        prompt = bench.pair.prompt(3 * BLOCK + 5, seed=91)
        await bench.run_decode(bench.pair.prompt(4, seed=7), max_tokens=1)
        expired = bench.decode.load.kv_leases_expired_total
        handoff = (await bench.run_prefill(prompt)).handoff
        late = msgspec.structs.replace(handoff, expires_s=time.time() - 1)
        answer = await bench.run_decode(prompt, 12, late)
        assert answer.facts == PrefillFacts(len(prompt), len(prompt), 0, 0)
        assert answer.token_ids == (await bench.run_decode(prompt, 12, salt="-local")).token_ids
        assert bench.decode.load.kv_leases_expired_total == expired + 1
        await bench.release(handoff)

    async def test_engines_hand_over_in_one_direction_unless_told(self, bench: Bench):
        prompt = bench.pair.prompt(20, seed=92)
        with pytest.raises(InvalidEngineRequestError, match=r"set handoff\.reverse"):
            await bench.submit(bench.decode, Phase.PREFILL, prompt, 1)
        handoff = (await bench.run_prefill(prompt)).handoff
        with pytest.raises(InvalidEngineRequestError, match=r"set handoff\.reverse"):
            await bench.submit(bench.prefill, Phase.PREFILL, prompt, 1, handoff=handoff)
        await bench.release(handoff)
