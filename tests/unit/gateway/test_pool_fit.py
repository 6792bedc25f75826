"""Which pools can hand KV blocks to each other: what clashes is refused before anything starts, with both values."""

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.pool_fit import BATONS_OWN, SETTINGS_OF, SEVERAL_NODES, head_problem
from gateway.settings import Settings


def settings(prefill: dict[str, Any], decode: dict[str, Any], **more: Any) -> Settings:
    pools = {"prefill": {"replicas": 1} | prefill, "decode": decode}
    return Settings.model_validate({"model": {"path": "m"}, "pools": pools} | more)


def refusal(prefill: dict[str, Any], decode: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValidationError) as error:
        settings(prefill, decode, **more)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("block_size_tokens", 16, 32),
        ("kv_cache_dtype", "fp8", "auto"),
        ("attention_backend", "FLASHINFER", "FLASH_ATTN"),
        ("attention_backend", "FLASHINFER", None),
    ],
)
def test_what_shapes_a_block_must_be_the_same(key: str, ours: Any, theirs: Any) -> None:
    message = refusal({"engine": {key: ours}}, {"engine": {key: theirs}})
    said = "not set" if theirs is None else theirs
    assert f"pools.prefill.engine.{key} is {ours} and pools.decode.engine.{key} is {said}" in message
    assert "the hand-off needs the same on both sides" in message
    settings({"engine": {key: ours}}, {"engine": {key: ours}})


def test_without_a_prefill_pool_nothing_has_to_fit() -> None:
    prefill = {"replicas": 0, "device": "cpu", "engine": {"kv_cache_dtype": "fp8", "pipeline_parallel_size": 2}}
    assert settings(prefill, {"engine": {"pipeline_parallel_size": 2}}).pools.decode.ranks_per_replica == 2


def test_batch_sizes_and_quantisation_may_differ() -> None:
    settings(
        {"engine": {"max_num_batched_tokens": 16384, "max_num_seqs": 8, "quantization": "fp8", "enforce_eager": True}},
        {"engine": {"max_num_batched_tokens": 2048, "max_num_seqs": 256}},
    )


def test_a_cpu_and_a_gpu_cannot_hand_over() -> None:
    message = refusal({"device": "cpu"}, {"device": "cuda"})
    assert "pools.prefill.device is cpu and pools.decode.device is cuda" in message


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (8, 2), (2, 8), (4, 4)])
def test_tensor_parallel_sizes_may_be_multiples_of_each_other(ours: int, theirs: int) -> None:
    settings({"engine": {"tensor_parallel_size": ours}}, {"engine": {"tensor_parallel_size": theirs}})


def test_other_tensor_parallel_sizes_are_refused() -> None:
    message = refusal({"engine": {"tensor_parallel_size": 6}}, {"engine": {"tensor_parallel_size": 4}})
    assert "tensor_parallel_size is 6 and pools.decode.engine.tensor_parallel_size is 4" in message
    assert "make one a multiple of the other" in message


def test_the_reverse_transfer_asks_for_equal_sizes() -> None:
    sizes = {"engine": {"tensor_parallel_size": 2}}, {"engine": {"tensor_parallel_size": 1}}
    assert "remove handoff.reverse" in refusal(*sizes, handoff={"reverse": True})
    settings({}, {}, handoff={"reverse": True})


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_stages_cannot_hand_over(name: str) -> None:
    pools: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
    pools[name] = {"engine": {"pipeline_parallel_size": 2}}
    assert f"pools.{name}.engine.pipeline_parallel_size is 2" in refusal(**pools)


def test_what_vllm_chooses_by_gpu_is_to_be_named_where_gpus_differ() -> None:
    prefill, decode = {"accelerator_type": "H100"}, {"accelerator_type": "L40S"}
    message = refusal(prefill, decode)
    assert "pools.prefill.accelerator_type is H100 and pools.decode.accelerator_type is L40S" in message
    assert "model.dtype is auto" in message
    assert "set engine.block_size_tokens" in message
    named = {"engine": {"block_size_tokens": 16}}
    settings(prefill | named, decode | named, model={"path": "m", "dtype": "bfloat16"})
    settings(prefill, prefill)


@pytest.mark.parametrize("key", ["hf_overrides", "revision", "attention_config"])
def test_extra_arguments_that_shape_the_cache_must_be_the_same(key: str) -> None:
    value = "main" if key == "revision" else {"a": 1}
    message = refusal({"engine": {"extra_args": {key: value}}}, {})
    assert (
        f"pools.prefill.engine.extra_args.{key} is {value} and pools.decode.engine.extra_args.{key} is not" in message
    )
    both = {"engine": {"extra_args": {key: value}}}
    settings(both, both)
    settings({"engine": {"extra_args": {"load_format": "dummy"}}}, {})


def test_the_layout_of_the_cache_must_be_the_same() -> None:
    assert "env.VLLM_KV_CACHE_LAYOUT is NHD" in refusal({"env": {"VLLM_KV_CACHE_LAYOUT": "NHD"}}, {})


@pytest.mark.parametrize("argument", sorted(SETTINGS_OF))
def test_what_has_a_setting_is_not_taken_twice(argument: str) -> None:
    message = refusal({"replicas": 0}, {"engine": {"extra_args": {argument: 1}}})
    place = SETTINGS_OF[argument]
    assert f"pools.decode.engine.extra_args.{argument} has a setting of its own" in message
    assert (place if place.startswith("model.") else f"pools.decode.{place}") in message


@pytest.mark.parametrize("argument", sorted(BATONS_OWN))
def test_what_baton_sets_is_not_to_be_changed(argument: str) -> None:
    assert "is set by Baton itself; remove it" in refusal({"engine": {"extra_args": {argument: 1}}}, {})


@pytest.mark.parametrize("argument", sorted(SEVERAL_NODES))
def test_an_engine_over_several_nodes_is_refused(argument: str) -> None:
    message = refusal({}, {"engine": {"extra_args": {argument: 2}}})
    assert f"extra_args.{argument}: an engine is one of its replica's and runs on one node" in message
    assert "raise replicas" in message


def test_a_rank_has_a_gpu_of_its_own() -> None:
    engine = {"engine": {"tensor_parallel_size": 4}}
    assert "pools.decode.num_gpus is 2, but" in refusal({"replicas": 0}, engine | {"num_gpus": 2})
    settings({"replicas": 0}, engine | {"num_gpus": 4})
    settings({"replicas": 0}, {"num_gpus": 0.5})


def test_ranks_on_cores_get_as_many_each() -> None:
    decode = {"device": "cpu", "engine": {"tensor_parallel_size": 2}}
    message = refusal({"replicas": 0}, decode | {"cpu_cores": [[0, 1, 2]]})
    assert "[0, 1, 2] cannot be shared out to 2 ranks" in message
    settings({"replicas": 0}, decode | {"cpu_cores": [[0, 1]]})


def test_every_clash_is_told_at_once() -> None:
    message = refusal(
        {"engine": {"kv_cache_dtype": "fp8", "tensor_parallel_size": 3}}, {"engine": {"tensor_parallel_size": 2}}
    )
    assert "kv_cache_dtype is fp8" in message
    assert "tensor_parallel_size is 3" in message


@pytest.mark.parametrize(
    ("prefill_tp", "decode_tp", "heads", "fits"),
    [(8, 2, 8, True), (8, 2, 4, False), (2, 8, 4, True), (8, 8, 4, True)],
)
def test_copies_of_heads_cannot_be_fetched_by_fewer_ranks(
    prefill_tp: int, decode_tp: int, heads: int, fits: bool
) -> None:
    assert (head_problem(prefill_tp, decode_tp, heads) == "") is fits
