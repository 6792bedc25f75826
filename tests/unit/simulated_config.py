"""Owns the simulated engine that unit tests start with: small, and with times that are easy to add up."""

from engine.latency import LatencyModel
from engine.simulated import SimulatedEngineConfig

BLOCK = 8
LATENCY = LatencyModel(
    prefill_s_per_token=0.001,
    prefill_fixed_s=0.01,
    decode_step_s=0.02,
    decode_s_per_request=0.002,
    handoff_fixed_s=0.05,
    handoff_s_per_block=0.004,
)
CONFIG = SimulatedEngineConfig(
    model="simulated-model",
    max_model_len=256,
    block_size_tokens=BLOCK,
    num_kv_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    seed=1,
    latency=LATENCY,
)
