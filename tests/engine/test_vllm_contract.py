"""A pair of real vLLM engines keeps the contract of the Engine port, with real NIXL hand-offs."""

import random
from dataclasses import dataclass

import pytest
from vllm.sampling_params import SamplingParams

from engine.protocol import Phase
from engine.vllm_codec import SamplingPayload, encode_sampling
from engine.vllm_engine import VllmEngine
from tests.engine.contract import EngineContract
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


@pytest.fixture(scope="module")
async def pair():
    # A cache that a test can fill: twice the blocks of the longest request and more.
    changes = {"max_model_len": 2048, "kv_cache_memory_bytes": 160 * BLOCK * BYTES_PER_TOKEN}
    prefill = await VllmEngine.start(engine_config("prefill-0", Phase.PREFILL, core=0, **changes))
    try:
        decode = await VllmEngine.start(engine_config("decode-0", Phase.DECODE, core=1, **changes))
    except BaseException:
        await prefill.shutdown()
        raise
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)
    yield VllmPair(prefill, decode, encode_sampling(SamplingPayload(greedy)))
    await prefill.shutdown()
    await decode.shutdown()


class TestVllmEngine(EngineContract):
    pass
