"""That every system of a comparison gets the same cores or GPUs, taken from one configuration."""

import json
from pathlib import Path

import pytest
import yaml

from bench.compare_plan import Contestant
from bench.compare_systems import RunningServer, aggregated_config, make, split_config
from bench.systems import LocalSystem, Place, bare_parallel, places, router
from engine.protocol import Phase
from gateway.settings import Settings, load

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LOCAL = CONFIGS / "local.yaml"


def changed(tmp_path: Path, **pools: dict[str, object]) -> Settings:
    """Like the 1 + 1 engines of local.yaml, with these differences in its pools."""
    data = load(LOCAL).model_dump(mode="json", exclude_unset=True)
    for name, changes in pools.items():
        data["pools"][name] |= changes
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(data))
    return load(path)


def on_gpus(tmp_path: Path, replicas: int, num_gpus: float | None) -> Settings:
    engine = {"block_size_tokens": 16, "attention_backend": "FLASH_ATTN", "extra_args": {"gpu_memory_utilization": 0.4}}
    pool = {"device": "cuda", "cpu_cores": None, "replicas": replicas, "num_gpus": num_gpus, "engine": engine}
    return changed(tmp_path, prefill=pool, decode=pool)


def test_aggregated_has_the_cores_of_both_pools_and_the_shipped_engines(tmp_path: Path) -> None:
    found = load(aggregated_config(load(LOCAL), 0, tmp_path))
    assert found.pools.prefill.replicas == 0
    assert found.pools == load(CONFIGS / "aggregated.yaml").pools


def test_aggregated_reads_as_much_in_a_step_as_it_is_told(tmp_path: Path) -> None:
    found = load(aggregated_config(load(LOCAL), 512, tmp_path))
    assert found.pools.decode.engine.max_num_batched_tokens == 512


def test_split_takes_another_policy_and_nothing_else(tmp_path: Path) -> None:
    found = load(split_config(load(LOCAL), "baton", tmp_path))
    assert found.routing.policy == "baton"
    assert found.pools == load(LOCAL).pools


def test_what_has_no_prefill_pool_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a configuration with a prefill pool"):
        split_config(load(CONFIGS / "aggregated.yaml"), "", tmp_path)


def test_pools_of_two_kinds_are_not_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accelerator_type each \('H100', 'L40S'\).*aggregated=FILE.yaml"):
        aggregated_config(load(CONFIGS / "gpu.yaml"), 0, tmp_path)


def test_pools_with_a_group_of_nodes_each_become_one_in_both(tmp_path: Path) -> None:
    settings = changed(
        tmp_path, prefill={"label_selector": {"group": "prefill"}}, decode={"label_selector": {"group": "decode"}}
    )
    found = load(aggregated_config(settings, 0, tmp_path)).pools.decode
    assert (found.replicas, found.label_selector) == (2, {})


def test_on_a_cluster_baton_is_deployed_and_removed(tmp_path: Path) -> None:
    config = CONFIGS / "gpu.yaml"
    made = make(Contestant.parse("split"), load(config), config, tmp_path)
    assert isinstance(made, LocalSystem)
    recipe = made.make_recipe(tmp_path)
    ((command,),) = recipe.stages
    assert command.argv[1:3] == ["-m", "bench.on_cluster"]
    assert recipe.url == "http://127.0.0.1:8000"


def test_engines_on_gpus_of_their_own_stay_as_many(tmp_path: Path) -> None:
    settings = on_gpus(tmp_path, 2, None)
    found = load(aggregated_config(settings, 0, tmp_path)).pools.decode
    assert (found.replicas, found.gpus_per_replica) == (4, 1)
    assert found.engine.extra_args == {"gpu_memory_utilization": 0.4}, "as it was configured"
    assert [place.gpus for place in places(settings)] == [(0,), (1,), (2,), (3,)]


def test_engines_that_share_a_gpu_become_one_that_has_it_whole(tmp_path: Path) -> None:
    settings = on_gpus(tmp_path, 1, 0.5)
    found = load(aggregated_config(settings, 0, tmp_path)).pools.decode
    assert (found.replicas, found.gpus_per_replica, found.engine.extra_args) == (1, 1, {})
    assert [place.gpus for place in places(settings)] == [(0,), (0,)]


def test_places_on_cores(tmp_path: Path) -> None:
    assert places(load(LOCAL)) == [Place(Phase.PREFILL, (0,)), Place(Phase.DECODE, (1,))]


def test_bare_vllm_has_an_engine_in_each_place(tmp_path: Path) -> None:
    whole = load(aggregated_config(load(LOCAL), 0, tmp_path))
    ((command,),) = bare_parallel(whole, tmp_path).stages
    assert command.env["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert command.argv[command.argv.index("--data-parallel-size") + 1] == "2"
    ((command,),) = bare_parallel(on_gpus(tmp_path, 1, None), tmp_path).stages
    assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in command.env


def test_the_router_has_a_server_in_each_place_and_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.systems._router_executable", lambda: Path("router"))
    recipe = router(on_gpus(tmp_path, 1, None), tmp_path, is_equal=True)
    engines, (router_command,) = recipe.stages
    assert [engine.env["CUDA_VISIBLE_DEVICES"] for engine in engines] == ["0", "1"]
    assert set(recipe.pages) == {"prefill", "decode"}
    for engine in engines:
        handoff = json.loads(engine.argv[engine.argv.index("--kv-transfer-config") + 1])
        assert handoff["kv_connector_module_path"] == "bench.peer_nixl", "Baton's own reads anew what tells no lease"
    assert router_command.argv.count("--prefill") == router_command.argv.count("--decode") == 1


@pytest.mark.parametrize(
    "text", ["split", "split:baton", "aggregated", "aggregated:512", "bare", "router", f"x={LOCAL}"]
)
def test_every_word_makes_a_system_of_its_name(tmp_path: Path, text: str) -> None:
    contestant = Contestant.parse(text)
    made = make(contestant, load(LOCAL), LOCAL, tmp_path)
    assert isinstance(made, LocalSystem)
    assert made.name == contestant.name


def test_a_running_server_is_left_alone(tmp_path: Path) -> None:
    made = make(Contestant.parse("there=http://there:1/v1"), load(LOCAL), LOCAL, tmp_path)
    assert isinstance(made, RunningServer)
    assert made.url == "http://there:1"


def test_what_would_run_here_is_refused_where_the_pools_are_on_a_cluster(tmp_path: Path) -> None:
    config = CONFIGS / "gpu.yaml"
    for text in ("bare", "router"):
        with pytest.raises(ValueError, match="is started on this machine, and the configuration's pools are on a"):
            make(Contestant.parse(text), load(config), config, tmp_path)
