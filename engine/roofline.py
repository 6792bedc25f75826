"""Owns the roofline of a GPU and a model: how long a step takes from its arithmetic and its memory traffic. Pure.

It is a model and not a measurement. A step takes as long as the slower of two things, and a fixed overhead:

- arithmetic: 2 operations per active parameter and token, at the rate of the weights' number format; and attention,
  `4 * layers * query heads * head size` operations for each pair of a token and one it attends to, at the rate of
  bfloat16. Both at `compute_efficiency` of the peak.
- memory: the weights once (of a mixture of experts those that the step's tokens touch: with top-k of n experts drawn
  evenly, `1 - (1 - k/n) ** tokens` of them), and the KV of every sequence once, at `bandwidth_efficiency` of the peak.

Left out: activations, the output layer's share, sampling, communication between GPUs (a model fits one GPU here), and
the imbalance of experts. A hand-off moves its blocks over one network port and pays a fixed time to be set up.

Sources. H100 SXM: NVIDIA's data sheet (80 GB, 3.35 TB/s; 989 TFLOP/s bfloat16 and 1,979 TFLOP/s FP8, both dense);
H200 SXM: its own (141 GB, 4.8 TB/s, the same arithmetic).
Models: the configurations that are published with their weights (layers, heads, experts, context). Assumed: 0.45 of
the peak arithmetic and 0.8 of the peak bandwidth, which is what good kernels reach; 3 ms per step for everything that
is launched and scheduled; a 400 Gbit/s port at 0.8 of its rate and 3 ms for each hand-off; 0.9 of the memory for the
engine (vLLM's default) and 4 GB of it for activations and graphs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.latency import StepWork


@dataclass(frozen=True)
class Gpu:
    """Rates are dense peaks."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    network_bytes_per_s: float = 50e9
    compute_efficiency: float = 0.45
    bandwidth_efficiency: float = 0.8
    network_efficiency: float = 0.8
    step_overhead_s: float = 0.003
    handoff_fixed_s: float = 0.003
    usable_memory: float = 0.9
    activation_bytes: float = 4e9


@dataclass(frozen=True)
class Model:
    """`num_active_params` are those that one token is multiplied with; a dense model has one expert and uses it."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    num_params: float
    num_active_params: float
    bytes_per_param: int
    max_model_len: int
    num_experts: int = 1
    num_active_experts: int = 1
    bytes_per_kv_number: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.bytes_per_kv_number

    @property
    def num_expert_params(self) -> float:
        """Of all experts together: what is not active of the model is the experts that are not."""
        if self.num_experts == self.num_active_experts:
            return 0.0
        return (self.num_params - self.num_active_params) / (1 - self.num_active_experts / self.num_experts)


@dataclass(frozen=True)
class Roofline:
    """An engine of one GPU (`engine.latency.Latency`). It has `kv_factor` times the KV memory that the GPU has: what
    is above 1 is a tier that does not exist, which costs no time, to see what more of it would be worth."""

    gpu: Gpu
    model: Model
    block_size_tokens: int = 64
    kv_factor: float = 1.0

    @property
    def decode_interval_s(self) -> float:
        return 0.0

    @property
    def num_kv_tokens(self) -> int:
        """What fits beside the weights."""
        gpu, model = self.gpu, self.model
        weight_bytes = model.num_params * model.bytes_per_param
        free_bytes = gpu.usable_memory * gpu.memory_bytes - weight_bytes - gpu.activation_bytes
        return int(free_bytes * self.kv_factor / model.kv_bytes_per_token)

    @property
    def num_kv_blocks(self) -> int:
        return self.num_kv_tokens // self.block_size_tokens

    @property
    def kv_block_bytes(self) -> int:
        return self.model.kv_bytes_per_token * self.block_size_tokens

    def step_s(self, work: StepWork) -> float:
        return max(self.compute_s(work.num_tokens, work.num_attended_tokens), self.memory_s(work)) + (
            self.gpu.step_overhead_s
        )

    def compute_s(self, num_tokens: int, num_attended_tokens: int) -> float:
        """The arithmetic alone."""
        gpu, model = self.gpu, self.model
        weight_flops = gpu.fp8_flops if model.bytes_per_param == 1 else gpu.bf16_flops
        attention = 4 * model.num_layers * model.num_query_heads * model.head_size * num_attended_tokens
        matrices_s = 2 * model.num_active_params * num_tokens / (weight_flops * gpu.compute_efficiency)
        return matrices_s + attention / (gpu.bf16_flops * gpu.compute_efficiency)

    def memory_s(self, work: StepWork) -> float:
        """The memory traffic alone."""
        weight_bytes = self.weight_bytes(work.num_tokens)
        return self.read_s(weight_bytes + self.model.kv_bytes_per_token * work.num_kv_tokens)

    def weight_bytes(self, num_tokens: int) -> float:
        """Of the weights that a step with so many tokens reads."""
        model = self.model
        touched = 1 - (1 - model.num_active_experts / model.num_experts) ** num_tokens
        num_always = model.num_params - model.num_expert_params
        return (num_always + touched * model.num_expert_params) * model.bytes_per_param

    def read_s(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.bandwidth_bytes_per_s * self.gpu.bandwidth_efficiency)

    def handoff_s(self, num_blocks: int) -> float:
        rate = self.gpu.network_bytes_per_s * self.gpu.network_efficiency
        return self.gpu.handoff_fixed_s + num_blocks * self.kv_block_bytes / rate


H100 = Gpu("H100 SXM 80 GB", 80e9, 3.35e12, bf16_flops=989e12, fp8_flops=1979e12)
H200 = Gpu("H200 SXM 141 GB", 141e9, 4.8e12, bf16_flops=989e12, fp8_flops=1979e12)
QWEN3_CODER_30B_A3B_FP8 = Model(
    "Qwen3-Coder-30B-A3B FP8",
    num_layers=48,
    num_query_heads=32,
    num_kv_heads=4,
    head_size=128,
    num_params=30.5e9,
    num_active_params=3.3e9,
    bytes_per_param=1,
    max_model_len=262_144,
    num_experts=128,
    num_active_experts=8,
)
LLAMA_3_1_8B = Model(
    "Llama-3.1-8B bfloat16",
    num_layers=32,
    num_query_heads=32,
    num_kv_heads=8,
    head_size=128,
    num_params=8.03e9,
    num_active_params=8.03e9,
    bytes_per_param=2,
    max_model_len=131_072,
)

ROOFLINES: Mapping[str, Roofline] = {
    "qwen3-coder-30b-a3b-fp8-h100": Roofline(H100, QWEN3_CODER_30B_A3B_FP8),
    "qwen3-coder-30b-a3b-fp8-h200": Roofline(H200, QWEN3_CODER_30B_A3B_FP8),
    "llama-3.1-8b-bf16-h100": Roofline(H100, LLAMA_3_1_8B),
}
"""By the name that the command line gives them."""
