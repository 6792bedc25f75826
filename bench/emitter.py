"""Owns what a simulated engine itself costs: CPU that a system with one inside spends on no work of its own."""

import asyncio
import time

from engine.protocol import EngineRequest, Phase
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric


async def emitter_cpu_s_per_token(config: SimulatedEngineConfig, prompts: list[list[int]], output_tokens: int) -> float:
    """CPU seconds of this process per token, for one answer to each prompt, all at once, with nobody but a reader."""
    engine = SimulatedEngine("emitter", config, SimulatedFabric())
    try:
        for number, prompt in enumerate(prompts):
            await engine.submit(EngineRequest(str(number), Phase.DECODE, prompt, output_tokens))
        num_open, num_tokens, before_s = len(prompts), 0, time.process_time()
        async for step in engine.steps():
            num_tokens += sum(len(delta.token_ids) for delta in step.deltas)
            num_open -= sum(delta.finish_reason is not None for delta in step.deltas)
            if not num_open:
                break
        return (time.process_time() - before_s) / num_tokens
    finally:
        await engine.shutdown()


def measure(config: SimulatedEngineConfig, prompts: list[list[int]], output_tokens: int) -> float:
    """`emitter_cpu_s_per_token`, on a loop of its own."""
    return asyncio.run(emitter_cpu_s_per_token(config, prompts, output_tokens))
