"""Owns which pools can hand KV blocks to each other, and which engine arguments are Baton's own (pure).

What vLLM's NIXL connector demands of both sides: `compute_nixl_compatibility_hash` and
`_validate_remote_agent_handshake` in vllm/distributed/kv_transfer/kv_connector/v1/nixl. A pair that does not fit fails
its handshake, and decode then reads every prompt itself: an error before the start is kinder.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.settings import EngineSettings, ModelSettings, PoolSettings

SETTINGS_OF = {
    "model": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "model.max_model_len",
    "trust_remote_code": "model.trust_remote_code",
    "reasoning_parser": "model.reasoning_parser",
    "block_size": "engine.block_size_tokens",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "max_num_seqs": "engine.max_num_seqs",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "kv_cache_dtype": "engine.kv_cache_dtype",
    "quantization": "engine.quantization",
    "attention_backend": "engine.attention_backend",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "pipeline_parallel_size": "engine.pipeline_parallel_size",
    "enforce_eager": "engine.enforce_eager",
}
"""vLLM's engine arguments that have a setting of their own: given twice, nothing could check them."""

BATONS_OWN = frozenset(
    {
        "kv_transfer_config",
        "kv_events_config",
        "scheduling_policy",
        "disable_log_stats",
        "enable_logging_iteration_details",
        "worker_cls",
    }
)

SEVERAL_NODES = frozenset(
    {
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "distributed_executor_backend",
        "data_parallel_size",
        "data_parallel_size_local",
        "data_parallel_backend",
        "data_parallel_address",
        "data_parallel_rank",
    }
)
"""Arguments that spread an engine over nodes, or make one of several."""

SAME_EXTRA_ARGUMENTS = (
    "revision",
    "code_revision",
    "hf_overrides",
    "attention_config",
    "kv_cache_dtype_skip_layers",
    "disable_hybrid_kv_cache_manager",
    "disable_sliding_window",
    "decode_context_parallel_size",
)
"""Of `extra_args`: they shape the KV cache, or say which model it is of."""

SAME_VARIABLES = ("VLLM_KV_CACHE_LAYOUT",)

WHY = {
    "block_size_tokens": "blocks are handed over and looked up whole",
    "kv_cache_dtype": "blocks are copied as they are",
    "attention_backend": "it decides how a block is laid out; vLLM chooses by GPU where none is named",
}


def argument_problems(name: str, engine: "EngineSettings") -> Iterator[str]:
    """What a pool's `extra_args` may not set."""
    where = f"pools.{name}.engine.extra_args"
    for argument in sorted(engine.extra_args):
        if (setting := SETTINGS_OF.get(argument)) is not None:
            place = setting if setting.startswith("model.") else f"pools.{name}.{setting}"
            yield f"{where}.{argument} has a setting of its own, which is checked; move it to {place}"
        elif argument in BATONS_OWN:
            yield f"{where}.{argument} is set by Baton itself; remove it"
        elif argument in SEVERAL_NODES:
            yield (
                f"{where}.{argument}: an engine is one of its replica's and runs on one node, whose GPUs "
                "tensor_parallel_size and pipeline_parallel_size share out; remove it, and raise replicas for more"
            )


def parallel_problems(name: str, pool: "PoolSettings") -> Iterator[str]:
    """How a pool's engines cannot be cut into ranks."""
    engine, ranks = pool.engine, pool.ranks_per_replica
    if pool.device == "cuda" and ranks > 1 and pool.gpus_per_replica < ranks:
        yield (
            f"pools.{name}.num_gpus is {pool.gpus_per_replica:g}, but tensor_parallel_size "
            f"{engine.tensor_parallel_size} x pipeline_parallel_size {engine.pipeline_parallel_size} takes {ranks}: "
            "each rank has a GPU of its own; remove num_gpus, or lower them"
        )
    for cores in pool.cpu_cores or []:
        if len(cores) % ranks:
            yield f"pools.{name}.cpu_cores: {cores} cannot be shared out to {ranks} ranks; give each as many cores"


def handoff_problems(
    prefill: "PoolSettings", decode: "PoolSettings", model: "ModelSettings", reverse: bool
) -> Iterator[str]:
    """Why no block could be handed over between engines of these pools, as far as settings tell."""
    if prefill.device != decode.device:
        yield (
            f"{_both('device', prefill.device, decode.device)}: their attention backends lay blocks out differently; "
            "give both pools the same device"
        )
    for key, why in WHY.items():
        ours, theirs = getattr(prefill.engine, key), getattr(decode.engine, key)
        if ours != theirs:
            yield f"{_both(f'engine.{key}', ours, theirs)}: {why}, so the hand-off needs the same on both sides"
    for key in SAME_EXTRA_ARGUMENTS:
        yield from _same(f"engine.extra_args.{key}", key, prefill.engine.extra_args, decode.engine.extra_args)
    for key in SAME_VARIABLES:
        yield from _same(f"env.{key}", key, prefill.env, decode.env)
    for name, pool in (("prefill", prefill), ("decode", decode)):
        if pool.engine.pipeline_parallel_size > 1:
            yield (
                f"pools.{name}.engine.pipeline_parallel_size is {pool.engine.pipeline_parallel_size}: NIXL "
                "fetches from and into engines that hold every layer; set it to 1 and raise tensor_parallel_size, or "
                "serve without pools.prefill"
            )
    ours, theirs = prefill.engine.tensor_parallel_size, decode.engine.tensor_parallel_size
    if max(ours, theirs) % min(ours, theirs):
        yield (
            f"{_both('engine.tensor_parallel_size', ours, theirs)}: a rank fetches whole ranks' heads, or its share of "
            "one's; make one a multiple of the other"
        )
    elif reverse and ours != theirs:
        yield (
            f"{_both('engine.tensor_parallel_size', ours, theirs)}, and handoff.reverse is set, which is tried with "
            "equal ranks only; make them equal, or remove handoff.reverse"
        )
    if prefill.accelerator_type != decode.accelerator_type:
        both = _both("accelerator_type", prefill.accelerator_type, decode.accelerator_type)
        if model.dtype == "auto":
            yield f"{both}, and model.dtype is auto, which vLLM reads by GPU; name it, e.g. bfloat16"
        if prefill.engine.block_size_tokens is None and decode.engine.block_size_tokens is None:
            yield f"{both}, and vLLM chooses the block size by GPU; set engine.block_size_tokens in both pools, e.g. 16"


def head_problem(prefill_tp: int, decode_tp: int, num_kv_heads: int) -> str:
    """Why the model's KV heads cannot be handed over between engines of these tensor parallel sizes; empty if they can.

    With more ranks than heads vLLM keeps copies of a head, and does not gather them into a rank that has several.
    """
    if prefill_tp <= decode_tp or prefill_tp <= num_kv_heads:
        return ""
    return (
        f"{_both('engine.tensor_parallel_size', prefill_tp, decode_tp)}, and the model has {num_kv_heads} KV heads: "
        "prefill ranks would hold copies, from which fewer decode ranks cannot fetch"
    )


def _same(place: str, key: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[str]:
    if ours.get(key) != theirs.get(key):
        yield f"{_both(place, ours.get(key), theirs.get(key))}: it shapes the KV cache; give both pools the same"


def _both(key: str, prefill: object, decode: object) -> str:
    ours, theirs = ("not set" if value is None else value for value in (prefill, decode))
    return f"pools.prefill.{key} is {ours} and pools.decode.{key} is {theirs}"
