"""A switch of policy: Serve gets the application back as it is, with another `user_config` of the gateways."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from ray.serve._private.build_app import build_app
from ray.serve._private.common import DeploymentID
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.version import DeploymentVersion
from ray.serve.generated import serve_pb2

from engine.ports import free_ports
from gateway import app
from gateway.peers import PoliciesInUse
from gateway.routing.policies import POLICIES
from gateway.runtime import live_policies
from gateway.runtime.control import OrderFailed, Switch, Switched
from gateway.settings import PolicySettings, Settings

messages: Any = serve_pb2


def settings(**routing: str) -> Settings:
    pools = {"prefill": {"replicas": 1, "device": "cpu"}, "decode": {"device": "cpu"}}
    return Settings.model_validate({"model": {"path": "org/model"}, "pools": pools, "routing": routing})


def deployments(**routing: str) -> dict[str, Any]:
    """As Serve builds them of the application."""
    no_handle: Any = lambda *_: None  # noqa: E731
    built = build_app(app.build(settings(**routing)), name="baton", make_deployment_handle=no_handle)
    return {deployment.name: deployment for deployment in built.deployments}


def test_a_cluster_without_its_head_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray tries for minutes")

    monkeypatch.setattr("ray.init", init)
    address = f"127.0.0.1:{free_ports('127.0.0.1')[0]}"
    with pytest.raises(OrderFailed, match=f"no Ray cluster at {address}: .*refused"):
        live_policies.connect(address)


class Controller:
    """Serve's controller with the application deployed. `redeployed` is what it was given back."""

    def __init__(self, *, from_config_file: bool = False, num_gateways: int = 1) -> None:
        self._deployed = deployments(policy="dynamo", shadow_policy="llm-d")
        self._from_config_file = from_config_file
        self._num_gateways = num_gateways
        self.redeployed: dict[str, Any] = {}

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(type(self), f"_{method}").__get__(self))

    def infos(self) -> dict[str, DeploymentInfo]:
        return {
            name: DeploymentInfo(
                DeploymentConfig.from_proto(
                    deployment._deployment_config.model_copy(update={"version": f"version of {name}"}).to_proto()
                ),
                ReplicaConfig.from_proto(deployment._replica_config.to_proto()),
                0,
                "job",
                version=f"version of {name}",
                ingress=name == "gateway",
            )
            for name, deployment in self._deployed.items()
        }

    def _get_app_configs(self) -> dict[str, Any]:
        return {"baton": object()} if self._from_config_file else {}

    def _list_deployments_internal(self) -> dict[DeploymentID, tuple[DeploymentInfo, str | None]]:
        other = DeploymentID("gateway", "other"), (self.infos()["gateway"], "/other")
        ours = {
            DeploymentID(name, "baton"): (info, "/" if info.ingress else None) for name, info in self.infos().items()
        }
        return {**ours, other[0]: other[1]}

    def _get_deployment_details(self, app_name: str, deployment_name: str) -> Any:
        assert (app_name, deployment_name) == ("baton", "gateway")
        return SimpleNamespace(target_num_replicas=self._num_gateways)

    def _get_external_scaler_enabled(self, app_name: str) -> bool:
        return True

    def _deploy_applications(self, deployed: dict[str, list[bytes]], applications: dict[str, bytes]) -> None:
        assert list(deployed) == list(applications) == ["baton"]
        assert messages.ApplicationArgs.FromString(applications["baton"]).external_scaler_enabled
        arguments = [messages.DeploymentArgs.FromString(one) for one in deployed["baton"]]
        self.redeployed = {one.deployment_name: one for one in arguments}


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    return connected(monkeypatch, Controller())


def connected(monkeypatch: pytest.MonkeyPatch, controller: Controller) -> Controller:
    client = SimpleNamespace(_controller=controller)
    monkeypatch.setattr(live_policies, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(live_policies.ray, "get", lambda answer, timeout: answer)
    return controller


def version(info: DeploymentInfo, config: DeploymentConfig, replica: ReplicaConfig) -> DeploymentVersion:
    return DeploymentVersion(config.version, config, replica.ray_actor_options, route_prefix=info.route_prefix)


# the application


def test_policies_are_no_constructors_argument_and_everything_else_is() -> None:
    def arguments(**routing: str) -> Any:
        return deployments(**routing)["gateway"].init_args[0]

    assert arguments(policy="llm-d", shadow_policy="dynamo") == arguments()
    assert arguments(receipts_folder="/receipts") != arguments()
    assert Settings.model_validate(arguments()) == settings()


# the switch


@pytest.mark.parametrize(
    ("order", "policy", "shadow"),
    [
        (Switch("round-robin"), "round-robin", "llm-d"),
        (Switch(shadow_policy=None), "dynamo", None),
        (Switch(shadow_policy="round-robin"), "dynamo", "round-robin"),
        (Switch("llm-d", None), "llm-d", None),
    ],
)
def test_an_order_changes_what_it_names(controller: Controller, order: Switch, policy: str, shadow: str | None) -> None:
    assert live_policies.switch("baton", order) == Switched(policy, shadow)
    told = DeploymentConfig.from_proto_bytes(controller.redeployed["gateway"].deployment_config)
    assert told.user_config == {"policy": policy, "shadow_policy": shadow}


def test_no_replica_is_replaced_and_only_gateways_are_told(controller: Controller) -> None:
    live_policies.switch("baton", Switch("round-robin"))
    assert set(controller.redeployed) == {"gateway", "prefill", "decode"}
    for name, before in controller.infos().items():
        told = controller.redeployed[name]
        config = DeploymentConfig.from_proto_bytes(told.deployment_config)
        replica = ReplicaConfig.from_proto_bytes(told.replica_config)
        old = version(before, before.deployment_config, before.replica_config)
        new = version(before, config, replica)
        assert not old.requires_actor_restart(new)
        assert old.requires_actor_reconfigure(new) == (name == "gateway")
        assert (config == before.deployment_config) == (name != "gateway")
        assert replica.to_proto_bytes() == before.replica_config.to_proto_bytes()
        assert (told.ingress, told.route_prefix) == ((True, "/") if name == "gateway" else (False, ""))


def test_a_switch_keeps_the_number_of_gateways_that_serve_was_asked_for_since(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = connected(monkeypatch, Controller(num_gateways=5))
    live_policies.switch("baton", Switch("round-robin"))
    assert DeploymentConfig.from_proto_bytes(controller.redeployed["gateway"].deployment_config).num_replicas == 5


def test_an_unknown_policy_is_refused_and_nothing_is_deployed(controller: Controller) -> None:
    with pytest.raises(OrderFailed, match=r"policy: Input should be .*'least-tokens', .* or"):
        live_policies.switch("baton", Switch("best"))
    assert not controller.redeployed


def test_an_application_of_a_serve_config_file_is_left_to_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = connected(monkeypatch, Controller(from_config_file=True))
    with pytest.raises(OrderFailed, match="user_config"):
        live_policies.switch("baton", Switch("round-robin"))
    assert not controller.redeployed


def test_a_cluster_without_the_application_or_without_serve_is_named(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OrderFailed, match="no application elsewhere"):
        live_policies.switch("elsewhere", Switch("round-robin"))
    monkeypatch.setattr(live_policies, "_get_global_client", lambda **_: None)
    with pytest.raises(OrderFailed, match="Serve does not run"):
        live_policies.switch("baton", Switch("round-robin"))


# the gateway


class Decider:
    """An orchestrator that is told by which policies to decide."""

    def __init__(self) -> None:
        self.policies: list[tuple[Any, Any]] = []

    def use(self, policy: Any, shadow: Any) -> None:
        self.policies.append((policy, shadow))


def switches(policy: str, shadow: str) -> float:
    labels = {"policy": policy, "shadow_policy": shadow}
    return REGISTRY.get_sample_value("baton_policy_switches_total", labels) or 0.0


def test_a_gateway_decides_by_its_user_config_and_counts_each_change_but_not_its_start() -> None:
    gateway = SimpleNamespace(_policies=None, _orchestrator=Decider())
    gateways_class: Any = app.Gateway.func_or_class
    before = switches("llm-d", "none"), switches("round-robin", "dynamo")
    for user_config in ({"policy": "llm-d"}, {"policy": "round-robin", "shadow_policy": "dynamo"}):
        asyncio.run(gateways_class.reconfigure(gateway, user_config))
    named = [(POLICIES["llm-d"], None), (POLICIES["round-robin"], POLICIES["dynamo"])]
    assert gateway._orchestrator.policies == named
    in_use: Any = gateway._policies
    assert in_use == PoliciesInUse("round-robin", "dynamo", in_use.since_s)
    assert (switches("llm-d", "none"), switches("round-robin", "dynamo")) == (before[0], before[1] + 1)


def test_every_policy_can_be_ordered() -> None:
    for name in POLICIES:
        assert live_policies.changed(PolicySettings(), Switch(name)).policy == name
