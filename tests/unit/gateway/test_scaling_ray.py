"""The sizing as Serve asks for it: with the context of each deployment of the application."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from gateway.app import build
from gateway.scaling.demand import Demand
from gateway.scaling.sizing import SizingConfig
from gateway.scaling_ray import KeepSize, PoolScaling, autoscaling_config, told
from gateway.settings import Settings, load


@dataclass
class Context:
    """What of Serve's AutoscalingContext is read."""

    deployment_name: str
    least: int = 1
    most: int = 8
    target_num_replicas: int = 1
    running_replicas: list[str] = field(default_factory=list[str])
    aggregated_metrics: dict[str, dict[str, float]] | None = None
    current_time: float = 0.0

    def __post_init__(self) -> None:
        self.capacity_adjusted_min_replicas, self.capacity_adjusted_max_replicas = self.least, self.most
        self.config = autoscaling_config(self.least, self.most, SizingConfig(read_share=1.0, write_share=1.0))


def contexts(*told_by: Demand, at_s: float = 0.0, prefill: bool = True, num_running: int = 1) -> dict[str, Any]:
    """Gateways that have told this, and so many replicas of each pool that run; a deployment's id is here its name with
    a prefix."""
    metrics: dict[str, dict[str, float]] = {}
    for number, demand in enumerate(told_by):
        for name, value in told(demand).items():
            metrics.setdefault(name, {})[f"g{number}"] = value
    gateway = Context(
        "gateway",
        len(told_by),
        len(told_by),
        running_replicas=[f"g{number}" for number in range(len(told_by))],
        aggregated_metrics=metrics,
    )
    pools = [
        Context(name, current_time=at_s, running_replicas=[f"{name}{number}" for number in range(num_running)])
        for name in ("decode", *(["prefill"] if prefill else []))
    ]
    return {f"id-{context.deployment_name}": context for context in (gateway, *pools)}


def test_what_all_gateways_tell_together_sizes_both_pools() -> None:
    sizes, _ = PoolScaling()(contexts(Demand(read=1.4, write=0.7), Demand(read=1.4, write=0.7)))
    assert sizes == {"id-prefill": 3, "id-decode": 2}


def test_an_application_without_a_prefill_pool_has_decode_sized() -> None:
    sizes, _ = PoolScaling()(contexts(Demand(read=1.4, read_on_decode=1.4, write=0.7), prefill=False))
    assert sizes == {"id-decode": 3}


def test_nothing_is_decided_before_every_gateway_has_told() -> None:
    asked = contexts(Demand(read=5.0), Demand(read=5.0))
    del asked["id-gateway"].aggregated_metrics["read"]["g1"]
    assert PoolScaling()(asked) == ({}, None)
    asked["id-gateway"].aggregated_metrics = None
    assert PoolScaling()(asked) == ({}, None)


def test_serve_asks_more_often_than_gateways_tell_and_only_news_is_weighed() -> None:
    policy = PoolScaling()
    late = Demand(num_ended=100, num_ttft_kept=0, num_tpot_kept=100)
    for at_s in range(100):
        policy(contexts(late, at_s=float(at_s)))
    assert policy._memory.read_margin == 1.0
    policy(contexts(Demand(num_ended=99, num_ttft_kept=0, num_tpot_kept=99), at_s=100.0))
    assert policy._memory.read_margin > 1.0


def test_turns_that_are_late_while_serve_starts_replicas_widen_no_margin() -> None:
    policy = PoolScaling()
    for at_s in range(100):
        late = Demand(read=2.5, write=2.5, num_ended=100 + at_s)
        policy(contexts(late, at_s=float(at_s), num_running=2))
    assert policy._memory.read_margin == 1.0
    for at_s in range(100, 110):
        policy(contexts(Demand(read=2.5, write=2.5, num_ended=100 + at_s), at_s=float(at_s), num_running=3))
    assert policy._memory.read_margin > 1.0


def test_it_remembers_from_one_call_to_the_next() -> None:
    policy = PoolScaling()
    policy(contexts(Demand(write=3.5)))
    assert policy(contexts(Demand(write=0.5), at_s=10.0))[0]["id-decode"] == 4


def test_pools_never_fall_below_what_the_configuration_asks_for_at_the_least() -> None:
    asked = contexts(Demand(), at_s=1e6)
    for phase in ("prefill", "decode"):
        asked[f"id-{phase}"].capacity_adjusted_min_replicas = 2
    assert PoolScaling()(asked)[0] == {"id-prefill": 2, "id-decode": 2}


def test_what_cannot_be_weighed_changes_nothing_is_logged_once_and_the_next_telling_is_weighed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = PoolScaling()
    nonsense = contexts(Demand(write=float("inf")))
    assert policy(nonsense) == ({}, None)
    policy(contexts(Demand(write=1.5), at_s=5.0))
    for at_s in range(10, 20):
        assert policy(contexts(Demand(write=float("inf")), at_s=float(at_s)))[0]["id-decode"] == 2
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2
    assert policy(contexts(Demand(write=2.5), at_s=20.0))[0]["id-decode"] == 3


def test_without_the_policy_pools_keep_their_size() -> None:
    config = autoscaling_config(1, 8, SizingConfig())
    keep = KeepSize(**config.policy.policy_kwargs)
    context: Any = Context("decode", target_num_replicas=3)
    assert keep(context) == (3, {})
    assert config.policy.policy_function == "gateway.scaling_ray:KeepSize"


def settings(**decode: Any) -> Settings:
    pool = {"device": "cpu", "engine": {"block_size_tokens": 32}, **decode}
    return Settings.model_validate(
        {
            "model": {"path": "m", "max_model_len": 1024},
            "simulation": {},
            "pools": {"decode": pool},
            "scaling": {"target": 0.9, "hold_s": 60},
        }
    )


def test_a_pool_that_may_grow_makes_serve_listen_to_the_gateways_too() -> None:
    graph = build(settings(replicas=2, max_replicas=5))
    gateway = graph._bound_deployment
    decode = gateway.init_args[1]._bound_deployment
    config = decode._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 2, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0)
    assert config.policy.policy_kwargs["target"] == 0.9
    assert config.policy.policy_kwargs["hold_s"] == 60
    config = gateway._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (1, 1)


def test_pools_of_a_fixed_size_are_left_alone() -> None:
    gateway = build(settings(replicas=2))._bound_deployment
    assert gateway._deployment_config.autoscaling_config is None
    assert gateway.init_args[1]._bound_deployment.num_replicas == 2


def test_the_shipped_serve_config_names_the_policy_and_a_configuration_that_grows() -> None:
    folder = Path(__file__).parents[3]
    schema = ServeDeploySchema.model_validate(yaml.safe_load((folder / "configs/serve/gpu.yaml").read_text()))
    (application,) = schema.applications
    assert application.autoscaling_policy is not None
    assert AutoscalingPolicy(**application.autoscaling_policy).get_policy() is PoolScaling
    assert load(folder / application.args["config"]).is_scaled
