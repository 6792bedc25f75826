"""The configuration: what is refused, in which words, and who overrides whom."""

from pathlib import Path

import pytest

from gateway.app import from_config
from gateway.app import tenants as tenants_of
from gateway.routing.admission import AdmissionConfig
from gateway.settings import NO_KEY, ConfigError, load

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
    message = refusal(written(tmp_path, text))
    assert "block_size_tokens is 32 and pools.decode.engine.block_size_tokens is 64" in message
    assert "the hand-off needs the same on both sides" in message


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


# -- tenants

A, B = "a" * 64, "b" * 64


def with_tenants(folder: Path, *tenants: str, more: str = "") -> Path:
    return written(folder, GOOD + "tenants:\n" + "".join(f"  - {{{tenant}}}\n" for tenant in tenants) + more)


def test_tenants_have_names_keys_and_limits(tmp_path: Path) -> None:
    alice, operator = load(
        with_tenants(
            tmp_path,
            f"name: alice, api_key_sha256: [{A}, {B}], max_priority: high, requests_per_minute: 0.5",
            f"name: ops, api_key_sha256: [{'c' * 64}], operator: true",
        )
    ).tenants
    assert (alice.api_key_sha256, alice.max_priority, alice.requests_per_minute) == ([A, B], "high", 0.5)
    assert (alice.operator, operator.operator, operator.max_priority) == (False, True, "normal")
    assert operator.max_concurrent_requests is None


def test_two_tenants_of_one_name_are_refused(tmp_path: Path) -> None:
    path = with_tenants(tmp_path, f"name: alice, api_key_sha256: [{A}]", f"name: alice, api_key_sha256: [{B}]")
    assert "tenants holds 'alice' twice" in refusal(path)


def test_two_tenants_with_one_key_are_refused_by_name(tmp_path: Path) -> None:
    path = with_tenants(tmp_path, f"name: alice, api_key_sha256: [{A}, {B}]", f"name: bob, api_key_sha256: [{B}]")
    assert "tenants 'alice' and 'bob' have the same key" in refusal(path)


def test_the_placeholder_of_a_key_is_nobodys_and_may_be_everybodys(tmp_path: Path) -> None:
    placeholder = f"api_key_sha256: ['{NO_KEY}']"
    settings = load(with_tenants(tmp_path, f"name: alice, {placeholder}", f"name: bob, {placeholder}"))
    assert [tenant.key_digests for tenant in tenants_of(settings)] == [(), ()]


PASTED = "baton-a-key-that-was-pasted-in-the-place-of-its-digest"


@pytest.mark.parametrize("digest", [PASTED, f"'{'A' * 64}'", "'abc'", "''", f"'{'a' * 65}'"])
def test_what_is_no_digest_is_refused_and_not_repeated(tmp_path: Path, digest: str) -> None:
    path = with_tenants(tmp_path, f"name: alice, api_key_sha256: [{digest}]")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert "tenants.0.api_key_sha256.0: must be the SHA-256 of a key" in str(error.value)
    assert "as `baton key NAME` prints it" in str(error.value)
    # Nor in what it came from, which a traceback shows.
    assert PASTED not in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    ("tenant", "says"),
    [
        ("name: alice, api_key_sha256: []", "tenants.0.api_key_sha256: "),
        ("name: alice", "tenants.0.api_key_sha256: Field required"),
        (f"name: 'a b', api_key_sha256: [{A}]", "tenants.0.name: "),
        (f"name: '', api_key_sha256: [{A}]", "tenants.0.name: "),
        (f"name: alice, api_key_sha256: [{A}], max_priority: urgent", "tenants.0.max_priority: "),
        (f"name: alice, api_key_sha256: [{A}], requests_per_minute: 0", "tenants.0.requests_per_minute: "),
        (f"name: alice, api_key_sha256: [{A}], max_concurrent_requests: 0", "tenants.0.max_concurrent_requests: "),
        (f"name: alice, api_key_sha256: [{A}], api_key: x", "tenants.0.api_key: unknown key"),
        (f"name: alice, api_key_sha256: [{A}], min_ttft_deadline_s: 31", "'alice' may name no deadline"),
    ],
)
def test_a_tenant_that_cannot_be_is_refused_with_its_place(tmp_path: Path, tenant: str, says: str) -> None:
    assert says in refusal(with_tenants(tmp_path, tenant))


def test_the_longest_deadline_a_tenant_may_name_is_the_configurations_unless_it_says_more(tmp_path: Path) -> None:
    path = with_tenants(
        tmp_path,
        f"name: alice, api_key_sha256: [{A}]",
        f"name: bob, api_key_sha256: [{B}], max_ttft_deadline_s: 300",
        more="admission: {ttft_deadline_s: 20}\n",
    )
    assert [tenant.max_ttft_deadline_s for tenant in tenants_of(load(path))] == [20, 300]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_without_tenants_it_may_listen_on_loopback(config: Path, host: str) -> None:
    assert load(config, {"gateway.host": host}).gateway.host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example", ""])
def test_without_tenants_it_may_listen_nowhere_else(tmp_path: Path, config: Path, host: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(config, {"gateway.host": host})
    assert f"gateway.host is {host!r}, which others can reach, and there are no tenants" in str(error.value)
    assert "`baton key NAME`" in str(error.value)
    path = with_tenants(tmp_path, f"name: alice, api_key_sha256: [{A}]")
    assert load(path, {"gateway.host": host}).gateway.host == host


def test_without_tenants_it_may_run_on_no_cluster_whatever_the_host(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"whatever gateway\.host says"):
        load(config, {"runtime.ray_address": "auto"})


def test_an_application_for_an_existing_cluster_has_tenants(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tenants, and Ray Serve listens on every network"):
        from_config({"config": str(config)})


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ("replicas: 3, max_replicas: 2", "max_replicas is 2, and replicas, the fewest that there are, is 3"),
        ("replicas: 1, max_replicas: 2", "lists 1 core sets for 2 replicas"),
    ],
)
def test_a_pool_that_cannot_grow_as_it_says_is_refused(tmp_path: Path, pool: str, says: str) -> None:
    text = GOOD.replace("decode: {device", f"decode: {{{pool}, device")
    assert says in refusal(written(tmp_path, text))


def test_a_prefill_pool_that_grows_begins_with_a_replica(tmp_path: Path) -> None:
    text = GOOD.replace("pools:\n", "pools:\n  prefill: {replicas: 0, max_replicas: 2, device: cpu}\n")
    assert "a pool that grows begins with one replica or more" in refusal(written(tmp_path, text))


def test_nothing_is_traced_unless_a_collector_is_named(tmp_path: Path, config: Path) -> None:
    assert load(config).tracing is None
    traced = load(written(tmp_path, GOOD + "tracing: {otlp_endpoint: 'http://collector:4318'}\n")).tracing
    assert traced is not None
    assert (traced.otlp_endpoint, traced.sample_ratio) == ("http://collector:4318", 1.0)


@pytest.mark.parametrize(
    ("tracing", "key"),
    [
        ("otlp_endpoint: 'collector:4318'", "tracing.otlp_endpoint"),
        ("sample_ratio: 0.5", "tracing.otlp_endpoint"),
        ("otlp_endpoint: 'http://c', sample_ratio: 1.5", "tracing.sample_ratio"),
    ],
)
def test_a_collector_has_an_address_and_a_ratio_is_one(tmp_path: Path, tracing: str, key: str) -> None:
    assert f"{key}: " in refusal(written(tmp_path, GOOD + f"tracing: {{{tracing}}}\n"))
