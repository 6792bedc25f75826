"""Owns the sizing of both pools as an application-level autoscaling policy of Ray Serve (docs/adr/0020).

Serve's controller asks it, ten times a second by default, with what the gateways have last told of the demand; Serve
starts and drains the replicas. It is named in the application's Serve config, `autoscaling_policy`; without that the
pools keep their sizes (`KeepSize`). In no case are they sized by requests in progress, Serve's default.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext

from engine.protocol import Phase
from gateway.scaling.demand import Demand
from gateway.scaling.sizing import Bounds, Memory, PoolSizes, SizingConfig, size_pools

log = logging.getLogger("ray.serve")

GATEWAY = "gateway"
TOLD_EVERY_S = 5.0
_NEVER = 0.0


class KeepSize:
    """What each deployment scales by if the application names no policy: not at all. Carries the sizing's settings."""

    def __init__(self, **sizing: Any) -> None:
        SizingConfig(**sizing)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        return context.target_num_replicas, {}


def autoscaling_config(least: int, most: int, sizing: SizingConfig) -> AutoscalingConfig:
    """Of one deployment, which begins with the fewest. The delays are the sizing's own."""
    return AutoscalingConfig(
        min_replicas=least,
        initial_replicas=least,
        max_replicas=most,
        metrics_interval_s=TOLD_EVERY_S,
        look_back_period_s=2 * TOLD_EVERY_S,
        upscale_delay_s=_NEVER,
        downscale_delay_s=_NEVER,
        policy={"policy_function": f"{__name__}:{KeepSize.__name__}", "policy_kwargs": asdict(sizing)},  # type: ignore[arg-type]
    )


def told(demand: Demand) -> dict[str, float]:
    """What a gateway answers to Serve's `record_autoscaling_stats`."""
    return asdict(demand)


def added_up(metrics: Mapping[str, Mapping[Any, float]], gateways: Iterable[Any]) -> Demand | None:
    """What these gateways have told, together; None while one of them has told nothing."""
    names = [field.name for field in fields(Demand)]
    ids = list(gateways)
    if not ids or any(one not in metrics.get(name, {}) for one in ids for name in names):
        return None
    return Demand(**{name: sum(metrics[name][one] for one in ids) for name in names})


class PoolScaling:
    """The policy: `autoscaling_policy: {policy_function: gateway.scaling_ray:PoolScaling}`. Serve keeps one object of
    it for an application, and with it the memory; after a restart of the controller it begins anew."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._told: Demand | None = None
        self._sizes: PoolSizes | None = None

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], None]:
        ids = {context.deployment_name: id for id, context in contexts.items()}
        if GATEWAY not in ids or Phase.DECODE not in ids:
            return {}, None
        gateway = contexts[ids[GATEWAY]]
        demand = added_up(gateway.aggregated_metrics or {}, gateway.running_replicas)
        if demand is None:
            return {}, None
        if demand != self._told:
            # Between two tellings there is nothing new to decide on.
            self._told = demand
            try:
                self._size(demand, contexts, ids)
            except Exception:
                # What a policy raises keeps Serve from looking after any application, and that ten times a second.
                log.exception("pools keep the sizes that they have: %s could not be weighed", demand)
        if self._sizes is None:
            return {}, None
        sizes = {Phase.PREFILL: self._sizes.prefill, Phase.DECODE: self._sizes.decode}
        return {ids[phase]: number for phase, number in sizes.items() if phase in ids}, None

    def _size(self, demand: Demand, contexts: Mapping[Any, AutoscalingContext], ids: Mapping[str, Any]) -> None:
        decode = contexts[ids[Phase.DECODE]]
        now_s = decode.current_time or 0.0
        serving = PoolSizes(*(len(contexts[ids[p]].running_replicas) if p in ids else 0 for p in Phase))
        sizing = size_pools(demand, _bounds(contexts, ids), serving, self._memory, now_s, _config(decode))
        self._memory = sizing.memory
        if sizing.sizes != self._sizes:
            log.info("pools: %s", sizing.reason)
        self._sizes = sizing.sizes


def _bounds(contexts: Mapping[Any, AutoscalingContext], ids: Mapping[str, Any]) -> Bounds:
    def of(phase: Phase) -> tuple[int, int]:
        if phase not in ids:
            return 0, 0
        context = contexts[ids[phase]]
        return context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas

    (least_prefill, most_prefill), (least_decode, most_decode) = of(Phase.PREFILL), of(Phase.DECODE)
    return Bounds(PoolSizes(least_prefill, least_decode), PoolSizes(most_prefill, most_decode))


def _config(context: AutoscalingContext) -> SizingConfig:
    settings = context.config.policy.policy_kwargs if context.config is not None else {}
    return SizingConfig(**settings)
