"""The configuration: what is refused, in which words, and who overrides whom."""

from pathlib import Path

import pytest

from gateway.routing.admission import AdmissionConfig
from gateway.settings import ConfigError, load

GOOD = """
model: {path: ./model}
pools:
  decode: {device: cpu, cpu_cores: [[1]]}
gateway: {port: 8001}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path, GOOD)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load(path)
    return str(error.value)


def test_the_shipped_configurations_load() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        load(path)


def test_an_unknown_key_is_named_with_its_place(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, GOOD + "runtime: {demo_promt: hi}\n"))
    assert "runtime.demo_promt: unknown key; check the spelling" in message
    assert "config.yaml" in message


def test_a_wrong_type_is_named_with_its_place(tmp_path: Path) -> None:
    assert "gateway.port: " in refusal(written(tmp_path, GOOD.replace("8001", "eighty")))


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "model: {path: x\npools: ["))
    assert "config.yaml is not valid YAML" in message
    assert "line 2" in message


@pytest.mark.parametrize("text", ["", "- model", "42"])
def test_yaml_that_is_no_mapping_is_refused_with_what_is_expected(tmp_path: Path, text: str) -> None:
    assert "must hold a mapping with at least `model` and `pools`" in refusal(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot read the config" in refusal(tmp_path / "none.yaml")


def test_two_engines_on_one_core_are_refused_by_name(tmp_path: Path) -> None:
    pools = """
model: {path: ./model}
pools:
  prefill: {device: cpu, cpu_cores: [[0, 1]]}
  decode: {device: cpu, cpu_cores: [[1]]}
"""
    message = refusal(written(tmp_path, pools))
    assert "core 1 is bound to two engines (pools.prefill.cpu_cores[0] and pools.decode.cpu_cores[0])" in message


def test_fewer_core_sets_than_replicas_are_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, GOOD.replace("cpu_cores: [[1]]", "cpu_cores: [[1]], replicas: 2")))
    assert "lists 1 core sets for 2 replicas" in message


def test_a_configuration_without_decode_engines_is_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, GOOD.replace("cpu_cores: [[1]]", "replicas: 0")))
    assert "pools.decode.replicas must be at least 1" in message


def test_different_block_sizes_are_refused(tmp_path: Path) -> None:
    text = """
model: {path: ./model}
pools:
  prefill: {engine: {block_size_tokens: 32}}
  decode: {engine: {block_size_tokens: 64}}
"""
    assert "the hand-off needs the same block size on both sides" in refusal(written(tmp_path, text))


def test_a_relative_model_path_starts_at_the_configs_folder(config: Path) -> None:
    assert load(config).model.path == str(config.parent / "model")


def test_defaults_give_way_to_yaml(config: Path) -> None:
    assert load(config).gateway.port == 8001
    assert load(config).gateway.host == "127.0.0.1"


def test_yaml_gives_way_to_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_GATEWAY__PORT", "8002")
    assert load(config).gateway.port == 8002
    assert load(config).pools.decode.cpu_cores == [[1]]


def test_the_environment_gives_way_to_the_command_line(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_GATEWAY__PORT", "8002")
    assert load(config, {"gateway.port": 8003}).gateway.port == 8003


def test_a_bad_value_of_the_environment_is_refused_readably(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_GATEWAY__PORT", "many")
    assert "gateway.port: " in refusal(config)


@pytest.mark.parametrize(
    ("admission", "says"),
    [
        ("{low_share: 0.8}", "must grow in this order"),
        ("{high_share: 1.5}", "admission.high_share: "),
        ("{ttft_deadline_s: 0}", "admission.ttft_deadline_s: "),
    ],
)
def test_an_admission_that_cannot_be_is_refused(tmp_path: Path, admission: str, says: str) -> None:
    assert says in refusal(written(tmp_path, GOOD + f"admission: {admission}\n"))


def test_the_defaults_of_admission_are_those_of_the_deciding_code(config: Path) -> None:
    assert AdmissionConfig(**load(config).admission.model_dump()) == AdmissionConfig()


def test_settings_cannot_be_changed(config: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(config).gateway.port = 1


SIMULATED = """
model: {path: ./model, max_model_len: 4096}
simulation: {}
pools:
  decode: {device: cpu, engine: {block_size_tokens: 32}}
"""


def test_simulated_engines_need_no_cores_and_are_fast_by_default(tmp_path: Path) -> None:
    settings = load(written(tmp_path, SIMULATED))
    assert settings.simulation is not None
    assert settings.simulation.decode_step_s == 0.001
    assert settings.pools.decode.cpu_cores is None
    assert load(written(tmp_path, GOOD)).simulation is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("decode:", "prefill: {device: cpu, engine: {block_size_tokens: 32}}\n  decode:", "remove pools.prefill"),
        ("device: cpu", "device: cuda", "set pools.decode.device to cpu"),
        ("device: cpu", "device: cpu, cpu_cores: [[0]]", "remove pools.decode.cpu_cores"),
        (", max_model_len: 4096", "", "set model.max_model_len"),
        ("block_size_tokens: 32", "max_num_seqs: 8", "pools.decode.engine.block_size_tokens"),
        ("{}", "{num_kv_blocks: 100}", "cannot hold one request of model.max_model_len, 4096; raise it"),
        ("{}", "{decode_step_s: 0}", "simulation.decode_step_s: "),
        ("{}", "{step_s: 1}", "simulation.step_s: unknown key"),
    ],
)
def test_a_simulation_that_cannot_be_is_refused_with_what_to_do(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert says in refusal(written(tmp_path, SIMULATED.replace(old, new, 1)))


SPLIT = """
model: {path: ./model}
pools:
  prefill: {device: cpu, cpu_cores: [[0]]}
  decode: {device: cpu, cpu_cores: [[1]]}
"""


def test_spare_core_sets_are_taken_by_replicas_and_so_must_be_free(tmp_path: Path) -> None:
    spare = SPLIT.replace("cpu_cores: [[0]]", "cpu_cores: [[0], [1]]")
    assert "core 1 is bound to two engines" in refusal(written(tmp_path, spare))


def test_a_lease_too_short_for_heartbeats_is_refused(tmp_path: Path) -> None:
    assert "handoff.lease_s" in refusal(written(tmp_path, SPLIT + "handoff: {lease_s: 5}\n"))
    assert load(written(tmp_path, SPLIT + "handoff: {lease_s: 6}\n")).handoff.lease_s == 6
