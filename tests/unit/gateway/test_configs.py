"""The configurations that ship: each can be loaded, and asks for what its first comment promises."""

import json
import os
from pathlib import Path

import pytest

from gateway.settings import NO_KEY, Settings, load

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
GPU_NAMES = ["gpu.yaml", "gpu-8x.yaml"]
GPU_NODE = "gpu-node.yaml"
CPU_NAMES = [name for name in NAMES if name not in (*GPU_NAMES, GPU_NODE, "simulated.yaml")]


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)


def config(name: str) -> Settings:
    return load(CONFIGS / name)


def test_the_configurations_that_ship_are_known_here() -> None:
    assert sorted(["simulated.yaml", GPU_NODE, *GPU_NAMES, *CPU_NAMES]) == NAMES
    assert CPU_NAMES == ["aggregated.yaml", "faults.yaml", "local-2p2d.yaml", "local.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_loads_and_says_what_it_is_for(name: str) -> None:
    settings = config(name)
    assert (CONFIGS / name).read_text().startswith("# ")
    assert settings.model.served_name
    assert settings.gateway.max_choices <= settings.gateway.max_in_flight_requests


@pytest.mark.parametrize("name", NAMES)
def test_pools_fit_the_model_and_each_other(name: str) -> None:
    settings = config(name)
    prefill, decode = settings.pools.prefill, settings.pools.decode
    for pool in (prefill, decode) if prefill.replicas else (decode,):
        engine = pool.engine
        assert engine.block_size_tokens
        assert engine.max_num_batched_tokens
        assert engine.max_num_seqs
        assert settings.model.max_model_len
        assert settings.model.max_model_len % engine.block_size_tokens == 0
        assert engine.max_num_seqs <= engine.max_num_batched_tokens
        assert "kv_transfer_config" not in engine.extra_args
    if prefill.replicas:
        assert prefill.engine.block_size_tokens == decode.engine.block_size_tokens


@pytest.mark.parametrize("name", CPU_NAMES)
def test_a_cpu_configuration_serves_the_model_that_ships_on_at_most_two_cores(name: str) -> None:
    settings = config(name)
    model = Path(settings.model.path)
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] >= 8192
    assert settings.model.max_model_len == 8192
    assert settings.model.dtype == "float32"
    used: set[int] = set()
    for pool in (settings.pools.prefill, settings.pools.decode):
        if not pool.replicas:
            continue
        assert pool.device == "cpu"
        assert pool.gpus_per_replica == 0
        assert pool.accelerator_type is None
        assert pool.cpu_cores
        assert len(pool.cpu_cores) == pool.replicas
        used |= {core for cores in pool.cpu_cores for core in cores}
        assert pool.engine.kv_cache_gib is not None
        assert pool.engine.kv_cache_gib <= 1
    assert used == {0, 1}


def test_local_splits_one_to_one() -> None:
    pools = config("local.yaml").pools
    assert (pools.prefill.replicas, pools.decode.replicas, pools.allow_shared_cores) == (1, 1, False)


def test_local_2p2d_has_two_of_each_and_admits_that_they_share_cores() -> None:
    pools = config("local-2p2d.yaml").pools
    assert (pools.prefill.replicas, pools.decode.replicas, pools.allow_shared_cores) == (2, 2, True)
    assert sum(pool.replicas * pool.num_cpus for pool in (pools.prefill, pools.decode)) <= 2


def test_aggregated_has_no_prefill_pool() -> None:
    pools = config("aggregated.yaml").pools
    assert (pools.prefill.replicas, pools.decode.replicas) == (0, 2)


@pytest.mark.parametrize("name", GPU_NAMES)
def test_gpu_pools_read_and_write_on_node_groups_with_different_accelerators(name: str) -> None:
    settings = config(name)
    prefill, decode = settings.pools.prefill, settings.pools.decode
    assert prefill.accelerator_type
    assert decode.accelerator_type
    assert prefill.accelerator_type != decode.accelerator_type
    assert prefill.label_selector != decode.label_selector
    for pool in (prefill, decode):
        assert pool.device == "cuda"
        assert pool.cpu_cores is None
        # vLLM would choose it by GPU.
        assert pool.engine.attention_backend == "FLASH_ATTN"
    # Prefill reads many tokens a step, decode writes for many requests.
    assert prefill.engine.max_num_batched_tokens > decode.engine.max_num_batched_tokens
    assert prefill.engine.max_num_seqs < decode.engine.max_num_seqs
    assert settings.runtime.ray_address == "auto"
    assert settings.model.dtype == "bfloat16"


def test_a_gpu_node_has_two_gpus_for_both_pools_and_stays_on_loopback() -> None:
    settings = config(GPU_NODE)
    prefill, decode = settings.pools.prefill, settings.pools.decode
    assert [(pool.replicas, pool.gpus_per_replica, pool.device) for pool in (prefill, decode)] == [(1, 1, "cuda")] * 2
    assert prefill.engine.attention_backend == decode.engine.attention_backend == "FLASH_ATTN"
    assert prefill.engine.max_num_batched_tokens > decode.engine.max_num_batched_tokens
    assert settings.runtime.ray_address is None
    assert settings.gateway.host == "127.0.0.1"


def test_gpu_has_engines_of_one_gpu_and_gpu_8x_one_engine_over_eight() -> None:
    def shape(name: str) -> list[tuple[int, float, int]]:
        pools = config(name).pools
        return [
            (pool.replicas, pool.gpus_per_replica, pool.engine.tensor_parallel_size)
            for pool in (pools.prefill, pools.decode)
        ]

    assert shape("gpu.yaml") == [(2, 1, 1), (4, 1, 1)]
    assert shape("gpu-8x.yaml") == [(1, 8, 8), (4, 2, 2)]
    settings = config("gpu-8x.yaml")
    assert settings.gateway.label_selector not in (
        settings.pools.prefill.label_selector,
        settings.pools.decode.label_selector,
    )


def test_what_ships_lets_nobody_in_whose_key_is_known() -> None:
    assert [name for name in NAMES if config(name).tenants] == sorted(GPU_NAMES)
    for name in GPU_NAMES:
        settings = config(name)
        assert {digest for tenant in settings.tenants for digest in tenant.api_key_sha256} == {NO_KEY}
        assert [tenant.operator for tenant in settings.tenants] == [False, True]


def test_only_simulated_simulates_and_its_heading_says_what_its_figures_are_not() -> None:
    assert [name for name in NAMES if config(name).simulation] == ["simulated.yaml"]
    settings = config("simulated.yaml")
    pools = settings.pools
    assert (pools.prefill.replicas, pools.decode.replicas, pools.decode.cpu_cores) == (0, 1, None)
    assert Path(settings.model.path) == CONFIGS / "models" / "mini"
    heading = " ".join(
        line.removeprefix("# ")
        for line in (CONFIGS / "simulated.yaml").read_text().splitlines()
        if line.startswith("#")
    )
    assert "No figure of it is a figure of a model" in heading


def test_gpus_of_a_replica_follow_its_parallel_sizes_unless_they_are_given() -> None:
    def gpus(**overrides: object) -> float:
        changed = {f"pools.decode.{key.replace('__', '.')}": value for key, value in overrides.items()}
        return load(CONFIGS / "gpu.yaml", {"pools.prefill": {"replicas": 0}} | changed).pools.decode.gpus_per_replica

    assert gpus(engine__tensor_parallel_size=4, engine__pipeline_parallel_size=2) == 8
    assert gpus(num_gpus=0.5) == 0.5
    assert gpus(device="cpu", engine__tensor_parallel_size=4) == 0
