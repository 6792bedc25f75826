"""Where Serve puts the replicas of a pool: node labels, accelerators, and the GPUs of one engine on one node."""

from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve._private.config import ReplicaConfig

from engine.protocol import Phase
from gateway import app
from gateway.settings import PoolSettings, Settings, load

CONFIGS = Path(__file__).parents[3] / "configs"
SHARED = {"kv_cache_dtype": "fp8", "attention_backend": "FLASH_ATTN", "block_size_tokens": 16}


def pool(**values: Any) -> PoolSettings:
    return PoolSettings.model_validate(values)


def replica_config(pool: PoolSettings) -> ReplicaConfig:
    """As Serve takes the options. Serve itself checks them."""

    @serve.deployment
    class Replica:
        pass

    return Replica.options(**app.placement(pool))._replica_config


def test_an_engine_of_one_rank_is_an_actor_on_a_node_with_the_label() -> None:
    config = replica_config(pool(num_cpus=2, accelerator_type="L40S", label_selector={"baton.dev/pool": "decode"}))
    options = config.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"], options["accelerator_type"]) == (2, 1, "L40S")
    assert options["label_selector"] == {"baton.dev/pool": "decode"}
    assert config.placement_group_bundles is None


def test_the_gpus_of_an_engine_of_several_ranks_are_one_bundle_on_a_node_with_the_label() -> None:
    selector = {"baton.dev/pool": "prefill"}
    engine = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    config = replica_config(pool(num_cpus=16, accelerator_type="H100", label_selector=selector, engine=engine))
    assert config.placement_group_bundles == [{"CPU": 16, "GPU": 8, "accelerator_type:H100": 0.001}]
    assert config.placement_group_strategy == "STRICT_PACK"
    assert config.placement_group_bundle_label_selector == [selector]
    # Serve puts the replica into the first bundle: what it asks for must be there.
    assert config.resource_dict == {"CPU": 16, "GPU": 8, "accelerator_type:H100": 0.001}
    assert "label_selector" not in config.ray_actor_options


def test_ranks_on_cores_are_a_bundle_too() -> None:
    config = replica_config(pool(device="cpu", num_cpus=2, engine={"tensor_parallel_size": 2}))
    assert config.placement_group_bundles == [{"CPU": 2}]


@pytest.mark.parametrize(
    ("name", "prefill_bundles", "decode_bundles"),
    [
        ("gpu.yaml", None, None),
        (
            "gpu-8x.yaml",
            [{"CPU": 16, "GPU": 8, "accelerator_type:H100": 0.001}],
            [{"CPU": 4, "GPU": 2, "accelerator_type:H200": 0.001}],
        ),
    ],
)
def test_the_node_groups_that_ship(name: str, prefill_bundles: Any, decode_bundles: Any) -> None:
    pools = load(CONFIGS / name).pools
    assert replica_config(pools.prefill).placement_group_bundles == prefill_bundles
    assert replica_config(pools.decode).placement_group_bundles == decode_bundles


def test_gateways_stay_on_nodes_with_their_label() -> None:
    settings = load(CONFIGS / "gpu-8x.yaml")
    gateway = app.build(settings)._bound_deployment
    assert gateway.ray_actor_options["label_selector"] == {"baton.dev/pool": "gateway"}


def test_what_a_pool_sets_reaches_its_engines_and_no_others() -> None:
    settings = Settings.model_validate(
        {
            "model": {"path": "m", "dtype": "bfloat16"},
            "pools": {
                "prefill": {"replicas": 1, "engine": {"max_num_batched_tokens": 16384, "quantization": "fp8"} | SHARED},
                "decode": {"engine": {"max_num_batched_tokens": 2048, "tensor_parallel_size": 2} | SHARED},
            },
        }
    )
    prefill, decode = (app.engine_spec(settings, phase).engine_args for phase in (Phase.PREFILL, Phase.DECODE))
    assert (prefill["max_num_batched_tokens"], decode["max_num_batched_tokens"]) == (16384, 2048)
    assert (prefill["tensor_parallel_size"], decode["tensor_parallel_size"]) == (1, 2)
    assert prefill["quantization"] == "fp8"
    assert "quantization" not in decode
    for arguments in (prefill, decode):
        assert arguments["kv_cache_dtype"] == "fp8"
        assert arguments["attention_backend"] == "FLASH_ATTN"
        assert arguments["dtype"] == "bfloat16"
