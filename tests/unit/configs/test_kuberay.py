"""The deployment on Kubernetes: its objects are what Kubernetes and KubeRay take, and fit Baton's configuration."""

import copy
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from engine.ports import FIRST, LAST
from gateway import app
from gateway.doctor import PINS
from gateway.runtime.environment import RunPaths, Variable, connections_needed, open_files_needed, variables
from gateway.settings import NO_KEY, PoolSettings, Settings, load
from tests.unit.configs.kustomize import Object, build, documents
from tests.unit.configs.network import Pod, may_connect, selects

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "configs" / "kuberay"
FOLDERS = {"base": KUBERAY / "base", "small": KUBERAY / "overlays" / "small"}
KUBERNETES = "1.33.0"
"""The version whose schemas the objects are held against; strict: an unknown field is an error."""

SLOWEST_TOKEN_S = 0.05
"""Between two tokens of an answer, when the longest stream is reckoned."""

EVICTED_S = 350.0
"""What Kubernetes takes by default until the pods of a machine that is lost may be put elsewhere."""

HEAD_STARTS_S = 900.0
"""What a machine takes that has to fetch the image first, which has CUDA in it."""

KUBERAY_OPEN_FILES = 65_536
"""What KubeRay sets `ulimit -n` to before it starts Ray."""

RUN_ONLY = {
    "RAY_ADDRESS": "KubeRay sets it",
    "RAY_AUTH_TOKEN": "KubeRay sets it",
    "RAY_AUTH_MODE": "KubeRay sets it, by authOptions",
    "RAY_AUTH_TOKEN_PATH": "KubeRay gives the token itself",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "keeps Ray on loopback",
    "RAY_prestart_worker_first_driver": "no worker hook on a cluster",
    "RAY_raylet_report_resources_period_milliseconds": "Ray's nodes must hear of each other",
    "RAY_task_events_report_interval_ms": "the dashboard runs",
    "RAY_metrics_report_interval_ms": "somebody may scrape them",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "a pod has its ports to itself",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "a pod has its files to itself",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "a pod has its files to itself",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "a pod has its files to itself",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "a pod has its files to itself",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "a pod has its files to itself",
    "RAY_SERVE_HAPROXY_LOG_TARGET": "a pod has its loopback to itself",
}
"""Variables of the local run that make no sense on a cluster's nodes."""

SHARED = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM")
"""What else of the local run's environment holds there."""

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
HEADLESS = "RAY_gcs_rpc_server_reconnect_timeout_s"


class Deployment:
    """The objects of one kustomization, and the configuration in them."""

    def __init__(self, objects: list[Object], folder: Path) -> None:
        self.objects = objects
        self.rayservice = self.the("RayService", "baton")
        self.spec = self.rayservice["spec"]
        self.cluster = self.spec["rayClusterConfig"]
        self.head = self.cluster["headGroupSpec"]
        self.groups = {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}
        (self.config_name,) = self.the("ConfigMap", "baton-config")["data"]
        self.settings = load(folder / self.config_name)

    def the(self, kind: str, name: str) -> Object:
        (found,) = [one for one in self.of(kind) if one["metadata"]["name"] == name]
        return found

    def of(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Head and groups by name, each with its pods' spec."""
        for name, group in {"head": self.head, **self.groups}.items():
            yield name, group["template"]["spec"]

    def pools(self) -> Iterator[tuple[str, PoolSettings]]:
        yield "prefill", self.settings.pools.prefill
        yield "decode", self.settings.pools.decode

    def ray_pod(self, group: str) -> Pod:
        """As KubeRay labels it."""
        node_type = "head" if group == "head" else "worker"
        return self.pod({"ray.io/node-type": node_type, "ray.io/group": "headgroup" if group == "head" else group})

    def pod(self, labels: dict[str, str]) -> Pod:
        return Pod(labels, "baton", {"kubernetes.io/metadata.name": "baton"})


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=list(FOLDERS))
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return Deployment(build(FOLDERS[request.param]), FOLDERS[request.param])


@pytest.fixture
def base() -> Deployment:
    return Deployment(build(FOLDERS["base"]), FOLDERS["base"])


@pytest.fixture(scope="module")
def rayservice_schema() -> Draft202012Validator:
    definitions = schema_contents(f"kubernetes-json-schema/v{KUBERNETES}-local-strict/_definitions.json", KUBERNETES)
    schema = yaml.safe_load(Path(__file__).with_name("rayservice-v1.schema.json").read_text())
    registry: Any = Resource.from_contents(definitions) @ Registry()
    return Draft202012Validator(schema, registry=registry)


def env_of(pod: Object) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod["containers"][0]["env"] if "value" in one}


def mounts_of(pod: Object) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def limit_of(pod: Object, resource: str) -> float:
    return float(pod["containers"][0]["resources"]["limits"].get(resource, 0))


def serve_config(deployment: Deployment) -> dict[str, Any]:
    return yaml.safe_load(deployment.spec["serveConfigV2"])


def run_variables(deployment: Deployment) -> list[Variable]:
    """The local run's, on a machine like a gateway's pod."""
    cores = int(limit_of(dict(deployment.pods())["gateway"], "cpu"))
    return variables(deployment.settings, RunPaths(Path("/run")), "1:1", 1, cores, KUBERAY_OPEN_FILES)


# What Kubernetes and KubeRay take


def test_every_file_is_yaml_and_belongs_to_a_kustomization() -> None:
    named: set[Path] = set()
    for path in KUBERAY.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        files = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]
        files += [name for entry in kustomization["configMapGenerator"] for name in entry["files"]]
        named |= {path, *(path.parent / name for name in files if (path.parent / name).is_file())}
    assert named == set(KUBERAY.rglob("*.yaml"))
    assert all(documents(path) for path in named)


def test_kubernetes_takes_its_own_objects(deployment: Deployment) -> None:
    checked = 0
    for one in deployment.objects:
        if one["kind"] != "RayService":
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
            checked += 1
    assert checked == 16


def test_the_rayservice_has_the_structure_of_its_crd(
    deployment: Deployment, rayservice_schema: Draft202012Validator
) -> None:
    assert [error.message for error in rayservice_schema.iter_errors(deployment.rayservice)] == []


def _misspell(path: str) -> Callable[[Object], None]:
    def change(rayservice: Object) -> None:
        node: Any = rayservice
        *parents, last = path.split("/")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last + "s"] = node.pop(last)

    return change


@pytest.mark.parametrize(
    "path",
    [
        "spec",
        "spec/serveConfigV2",
        "spec/upgradeStrategy/type",
        "spec/rayClusterConfig",
        "spec/rayClusterConfig/gcsFaultToleranceOptions",
        "spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef/key",
        "spec/rayClusterConfig/headGroupSpec/rayStartParams",
        "spec/rayClusterConfig/workerGroupSpecs/0/minReplicas",
        "spec/rayClusterConfig/workerGroupSpecs/1/labels",
        "spec/rayClusterConfig/workerGroupSpecs/1/template/spec",
        "spec/rayClusterConfig/workerGroupSpecs/1/template/spec/terminationGracePeriodSeconds",
        "spec/rayClusterConfig/workerGroupSpecs/2/template/spec/containers/0/readinessProbe/httpGet/port",
    ],
)
def test_a_misspelt_field_is_found(path: str, base: Deployment, rayservice_schema: Draft202012Validator) -> None:
    changed = copy.deepcopy(base.rayservice)
    _misspell(path)(changed)
    assert not rayservice_schema.is_valid(changed)


def test_kuberay_refuses_nothing_that_its_schema_admits(deployment: Deployment) -> None:
    """`ValidateRayClusterSpec` and `BuildServeService` of its operator."""
    cluster = deployment.cluster
    assert cluster["rayVersion"]  # a token needs it
    # Its own `labels` take that place, and Redis is set up by gcsFaultToleranceOptions alone.
    for group in (deployment.head, *deployment.groups.values()):
        assert not {"labels", "redis-password", "redis-username"} & set(group["rayStartParams"])
    assert not {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"} & set(env_of(dict(deployment.pods())["head"]))
    for group in deployment.groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    ports = {
        port["name"]: port["containerPort"] for port in deployment.head["template"]["spec"]["containers"][0]["ports"]
    }
    assert set(ports) >= {"gcs-server", "dashboard", "serve"}
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", deployment.rayservice["metadata"]["name"])


def test_serve_takes_its_configuration(deployment: Deployment) -> None:
    ServeDeploySchema.model_validate(serve_config(deployment))


def test_versions_are_those_that_baton_is_pinned_to(deployment: Deployment) -> None:
    assert deployment.cluster["rayVersion"] == PINS["ray"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for _, pod in deployment.pods():
        assert pod["containers"][0]["image"] == f"baton:{version}"
    (redis,) = deployment.the("StatefulSet", "baton-redis")["spec"]["template"]["spec"]["containers"]
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+", redis["image"])


# The configuration, and where it is


def test_the_configuration_in_the_config_map_is_the_file_and_lets_nobody_in_whose_key_is_known(
    deployment: Deployment, tmp_path: Path
) -> None:
    text = deployment.the("ConfigMap", "baton-config")["data"][deployment.config_name]
    (tmp_path / "baton.yaml").write_text(text)
    settings = load(tmp_path / "baton.yaml")
    assert settings == deployment.settings
    assert {digest for tenant in settings.tenants for digest in tenant.api_key_sha256} == {NO_KEY}
    assert [tenant.operator for tenant in settings.tenants] == [False, True]
    assert settings.runtime.ray_address is not None


def test_the_base_is_the_configuration_for_gpus_on_these_groups() -> None:
    ours, plain = (
        yaml.safe_load(path.read_text()) for path in (FOLDERS["base"] / "baton.yaml", ROOT / "configs" / "gpu.yaml")
    )
    assert ours["gateway"].pop("label_selector") == {"baton.dev/pool": "gateway"}
    assert ours["gateway"].pop("drain_timeout_s")
    # The groups have as many pods as replicas, and no others come by themselves.
    for pool in plain["pools"].values():
        del pool["max_replicas"]
    assert ours == plain


def test_serve_builds_baton_from_the_file_that_every_pod_mounts(deployment: Deployment) -> None:
    (application,) = serve_config(deployment)["applications"]
    assert (application["name"], application["route_prefix"]) == (app.APP_NAME, "/")
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == (app.__name__, app.from_config.__name__)
    path = Path(application["args"]["config"])
    assert path.name == deployment.config_name
    for _, pod in deployment.pods():
        volume = mounts_of(pod)[str(path.parent)]
        assert {"name": volume, "configMap": {"name": "baton-config"}} in pod["volumes"]
        # A file mounted by its subPath never changes.
        assert not any("subPath" in mount for mount in pod["containers"][0]["volumeMounts"])


def test_every_volume_that_is_mounted_is_there(deployment: Deployment) -> None:
    for _, pod in deployment.pods():
        assert set(mounts_of(pod).values()) == {volume["name"] for volume in pod["volumes"]}


def test_no_service_becomes_a_setting(deployment: Deployment) -> None:
    for _, pod in deployment.pods():
        assert pod["enableServiceLinks"] is False
        assert not any(name.startswith("BATON_") for name in env_of(pod))


# Who runs where


def test_labels_of_groups_are_those_that_the_configuration_selects(deployment: Deployment) -> None:
    wanted = {name: pool.label_selector for name, pool in deployment.pools()}
    wanted["gateway"] = deployment.settings.gateway.label_selector
    assert all(wanted.values())
    for name, selector in wanted.items():
        fitting = [group for group, spec in deployment.groups.items() if selector.items() <= spec["labels"].items()]
        assert fitting == [name]
        assert not selector.items() <= deployment.head.get("labels", {}).items()


def selectors(settings: Settings) -> dict[str, Any]:
    """Of the deployments, as Serve builds them; None for one that runs anywhere."""
    no_handle: Any = lambda *_: None  # noqa: E731
    built = build_app(app.build(settings), name=app.APP_NAME, make_deployment_handle=no_handle)
    return {one.name: (one.ray_actor_options or {}).get("label_selector") for one in built.deployments}


def test_serve_is_told_the_labels(deployment: Deployment) -> None:
    told = selectors(deployment.settings)
    assert sorted(told.values(), key=str) == sorted((one["labels"] for one in deployment.groups.values()), key=str)
    assert told["gateway"] == deployment.groups["gateway"]["labels"]


def test_a_gateway_without_labels_runs_anywhere() -> None:
    assert selectors(load(ROOT / "configs" / "gpu.yaml"))["gateway"] is None


def test_groups_have_the_gpus_and_cpus_that_their_replicas_need(deployment: Deployment) -> None:
    pods = dict(deployment.pods())
    for name, pool in deployment.pools():
        per_pod = limit_of(pods[name], "nvidia.com/gpu") // pool.gpus_per_replica
        assert per_pod * deployment.groups[name]["replicas"] >= pool.most_replicas
        assert limit_of(pods[name], "cpu") >= per_pod * pool.num_cpus
    assert limit_of(pods["gateway"], "nvidia.com/gpu") == limit_of(pods["head"], "nvidia.com/gpu") == 0


def test_each_gateway_has_a_pod_of_its_own(deployment: Deployment) -> None:
    gateway = deployment.settings.gateway
    assert limit_of(dict(deployment.pods())["gateway"], "cpu") // gateway.num_cpus == 1
    assert deployment.groups["gateway"]["replicas"] == gateway.replicas


def test_accelerators_are_asked_of_both_schedulers(base: Deployment) -> None:
    pods = dict(base.pods())
    for name, pool in base.pools():
        assert pool.accelerator_type in pods[name]["nodeSelector"]["nvidia.com/gpu.product"].split("-")


def test_the_head_offers_no_cpu(deployment: Deployment) -> None:
    assert deployment.head["rayStartParams"]["num-cpus"] == "0"
    assert not any("num-cpus" in group["rayStartParams"] for group in deployment.groups.values())


def test_requests_are_limits_so_that_ray_counts_what_kubernetes_gives(deployment: Deployment) -> None:
    for _, pod in deployment.pods():
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]


# The environment


def test_the_environment_is_the_local_runs_on_every_node(deployment: Deployment) -> None:
    expected = {
        variable.name: variable.value
        for variable in run_variables(deployment)
        if variable.name in SHARED or (variable.name.startswith("RAY_") and variable.name not in RUN_ONLY)
    }
    connections = expected.pop("RAY_SERVE_HAPROXY_MAXCONN")
    for name, pod in deployment.pods():
        found = env_of(pod)
        # The base's number may be more than an overlay needs.
        assert int(found.pop("RAY_SERVE_HAPROXY_MAXCONN")) >= int(connections or 0)
        found.pop(DRAIN)
        found.pop("HF_HOME", None)
        found.pop(HEADLESS, None)
        assert found == expected, name


def test_the_base_asks_for_no_more_connections_than_it_needs_and_files_allow(base: Deployment) -> None:
    assert {int(env_of(pod)["RAY_SERVE_HAPROXY_MAXCONN"]) for _, pod in base.pods()} == {
        connections_needed(base.settings)
    }
    assert open_files_needed(base.settings) <= KUBERAY_OPEN_FILES


def test_what_a_cluster_leaves_out_of_the_local_run_is_known(base: Deployment) -> None:
    names = {variable.name for variable in run_variables(base)}
    assert set(RUN_ONLY) <= names
    (mode,) = [variable.value for variable in run_variables(base) if variable.name == "RAY_AUTH_MODE"]
    assert base.cluster["authOptions"] == {"mode": mode}


# Probes, ends and budgets


def test_every_pod_is_probed(deployment: Deployment) -> None:
    for name, pod in deployment.pods():
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        path = "/-/healthz" if name == "gateway" else "/api/healthz"
        assert container["readinessProbe"]["httpGet"]["path"] == path


def test_times_to_end_are_longer_one_than_the_other(deployment: Deployment) -> None:
    settings = deployment.settings
    assert settings.model.max_model_len is not None
    longest_stream_s = settings.model.max_model_len * SLOWEST_TOKEN_S
    drain_s = settings.gateway.drain_timeout_s
    assert drain_s > longest_stream_s
    for name, pod in deployment.pods():
        env = env_of(pod)
        assert float(env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > drain_s
        if name == "head":
            assert env[DRAIN] == "0"
            continue
        # Serve lets a replica on a draining node begin to end when what is left is the replica's own time to drain.
        begins_after_s = float(env[DRAIN]) - drain_s
        assert app.SERVE_ENDS_WITHIN_S < begins_after_s <= 120
        assert pod["terminationGracePeriodSeconds"] - float(env[DRAIN]) >= app.SERVE_ENDS_WITHIN_S


def test_the_readme_has_the_bases_times(base: Deployment) -> None:
    text = (KUBERAY / "README.md").read_text()
    pod = dict(base.pods())["decode"]
    env = env_of(pod)
    times_s = [
        (base.settings.model.max_model_len or 0) * SLOWEST_TOKEN_S,
        base.settings.gateway.drain_timeout_s,
        float(env[DRAIN]),
        pod["terminationGracePeriodSeconds"],
        float(env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]),
    ]
    assert [f"{time_s:,.0f} s |" in text for time_s in times_s] == [True] * len(times_s)


def test_budgets_let_one_pod_of_a_group_go(deployment: Deployment) -> None:
    budgets = {
        name: one["spec"]["minAvailable"]
        for name in deployment.groups
        for one in deployment.of("PodDisruptionBudget")
        if selects(one["spec"]["selector"], deployment.ray_pod(name).labels)
    }
    assert budgets == {name: group["replicas"] - 1 for name, group in deployment.groups.items()}
    # Of pods that a RayCluster owns Kubernetes takes no other form.
    assert all(set(one["spec"]) == {"minAvailable", "selector"} for one in deployment.of("PodDisruptionBudget"))


# Redis


def test_the_head_keeps_its_state_in_a_redis_that_keeps_it_too(deployment: Deployment) -> None:
    options = deployment.cluster["gcsFaultToleranceOptions"]
    redis = deployment.the("StatefulSet", "baton-redis")["spec"]
    service = deployment.the("Service", "baton-redis")["spec"]
    host, _, port = options["redisAddress"].partition(":")
    assert host == "baton-redis"
    assert [one["port"] for one in service["ports"]] == [int(port)]
    assert selects({"matchLabels": service["selector"]}, redis["template"]["metadata"]["labels"])
    (container,) = redis["template"]["spec"]["containers"]
    assert [one["containerPort"] for one in container["ports"]] == [int(port)]
    (password,) = [one for one in container["env"] if one["name"] == "REDIS_PASSWORD"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    script = container["args"][0]
    assert {"requirepass $REDIS_PASSWORD", "appendonly yes"} <= set(script.splitlines())
    (directory,) = re.findall(r"^dir (.+)$", script, re.MULTILINE)
    claims = {claim["metadata"]["name"] for claim in redis["volumeClaimTemplates"]}
    assert {"name": "data", "mountPath": directory} in container["volumeMounts"]
    assert claims == {"data"}


def test_nodes_do_without_the_head_until_it_is_on_another_machine(deployment: Deployment) -> None:
    for name, pod in deployment.pods():
        if name != "head":
            assert float(env_of(pod)[HEADLESS]) > EVICTED_S + HEAD_STARTS_S


def test_no_secret_is_shipped(deployment: Deployment) -> None:
    assert deployment.of("Secret") == []


# The network


@pytest.fixture
def strangers() -> dict[str, Pod]:
    return {
        "anybody": Pod({}, "elsewhere", {"kubernetes.io/metadata.name": "elsewhere"}),
        "client": Pod({}, "agents", {"baton.dev/client": "true"}),
        "operator": Pod({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay", {}),
        "dns": Pod({"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"}),
    }


def ports_in_use(deployment: Deployment) -> list[int]:
    """Some of each kind."""
    return [6379, 8265, 10_002, FIRST, LAST, 30_000, 52_365, deployment.settings.gateway.port]


def test_clients_reach_gateways_and_nothing_else(deployment: Deployment, strangers: dict[str, Pod]) -> None:
    policies, port = deployment.of("NetworkPolicy"), deployment.settings.gateway.port
    assert may_connect(policies, strangers["client"], deployment.ray_pod("gateway"), port)
    redis = deployment.pod(deployment.the("StatefulSet", "baton-redis")["spec"]["template"]["metadata"]["labels"])
    for other in ports_in_use(deployment):
        for name in ("head", "prefill", "decode"):
            assert not may_connect(policies, strangers["client"], deployment.ray_pod(name), other)
        assert not may_connect(policies, strangers["client"], redis, other)
        if other != port:
            assert not may_connect(policies, strangers["client"], deployment.ray_pod("gateway"), other)


def test_a_stranger_reaches_nothing(deployment: Deployment, strangers: dict[str, Pod]) -> None:
    policies = deployment.of("NetworkPolicy")
    for name, _ in deployment.pods():
        for port in ports_in_use(deployment):
            assert not may_connect(policies, strangers["anybody"], deployment.ray_pod(name), port)
            assert not may_connect(policies, deployment.pod({}), deployment.ray_pod(name), port)


def test_a_pod_that_no_rule_names_is_closed(deployment: Deployment, strangers: dict[str, Pod]) -> None:
    policies, another = deployment.of("NetworkPolicy"), deployment.pod({})
    for port in (80, *ports_in_use(deployment)):
        assert not may_connect(policies, strangers["client"], another, port)
        assert not may_connect(policies, another, strangers["client"], port)
    assert not may_connect(policies, another, "203.0.113.7", 443)


def test_rays_nodes_reach_each_other_on_the_ports_they_choose(deployment: Deployment) -> None:
    policies = deployment.of("NetworkPolicy")
    for source, _ in deployment.pods():
        for target, _ in deployment.pods():
            for port in ports_in_use(deployment):
                assert may_connect(policies, deployment.ray_pod(source), deployment.ray_pod(target), port)


def test_the_operator_reaches_the_dashboard_and_the_heads_proxy(
    deployment: Deployment, strangers: dict[str, Pod]
) -> None:
    policies = deployment.of("NetworkPolicy")
    (container,) = deployment.head["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for name in ("dashboard", "serve"):
        assert may_connect(policies, strangers["operator"], deployment.ray_pod("head"), ports[name])
    assert not may_connect(policies, strangers["operator"], deployment.ray_pod("head"), ports["gcs-server"])


def test_redis_is_reached_by_the_head_and_its_clean_up_only(deployment: Deployment) -> None:
    policies = deployment.of("NetworkPolicy")
    redis = deployment.pod(deployment.the("StatefulSet", "baton-redis")["spec"]["template"]["metadata"]["labels"])
    clean_up = deployment.pod({"ray.io/node-type": "redis-cleanup"})
    for source, expected in [("head", True), ("gateway", False), ("prefill", False), ("decode", False)]:
        assert may_connect(policies, deployment.ray_pod(source), redis, 6379) is expected
    assert may_connect(policies, clean_up, redis, 6379)
    assert not may_connect(policies, redis, deployment.ray_pod("head"), 6379)


def test_everybody_asks_dns_and_workers_fetch_models_from_outside(
    deployment: Deployment, strangers: dict[str, Pod]
) -> None:
    policies = deployment.of("NetworkPolicy")
    for name, _ in deployment.pods():
        assert may_connect(policies, deployment.ray_pod(name), strangers["dns"], 53, "UDP")
        assert may_connect(policies, deployment.ray_pod(name), "203.0.113.7", 443) is (name != "head")
        assert not may_connect(policies, deployment.ray_pod(name), "203.0.113.7", 80)
        assert not may_connect(policies, deployment.ray_pod(name), "10.0.0.1", 443)


def test_one_port_leads_from_the_service_to_the_proxy(deployment: Deployment) -> None:
    config = serve_config(deployment)
    service = deployment.the("Service", "baton")["spec"]
    assert selects({"matchLabels": service["selector"]}, deployment.ray_pod("gateway").labels)
    assert not any(
        selects({"matchLabels": service["selector"]}, deployment.ray_pod(name).labels)
        for name in ("head", "prefill", "decode")
    )
    (gateway,) = dict(deployment.pods())["gateway"]["containers"]
    ports = {
        deployment.settings.gateway.port,
        config["http_options"]["port"],
        gateway["readinessProbe"]["httpGet"]["port"],
        *(port["containerPort"] for port in gateway["ports"]),
        *(port["targetPort"] for port in service["ports"]),
    }
    assert len(ports) == 1
    assert config["proxy_location"] == "EveryNode"
    assert config["http_options"]["host"] == deployment.settings.gateway.host


# The image


def test_the_image_is_of_the_python_that_baton_needs_and_installs_what_is_pinned() -> None:
    text = (KUBERAY / "Dockerfile").read_text()
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)\.\d+-", text, re.MULTILINE)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == f">={version},<3.{int(version.split('.')[1]) + 1}"
    assert ".[gpu]" in text
    assert "requirements.lock" in text
    pods = dict(Deployment(build(FOLDERS["base"]), FOLDERS["base"]).pods())
    users = {pod["containers"][0]["securityContext"]["runAsUser"] for pod in pods.values()}
    assert {int(uid) for uid in re.findall(r"--uid (\d+)", text)} == users
