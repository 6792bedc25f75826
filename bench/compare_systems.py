"""Owns what stands behind the words of `bench compare`: every system on the same cores or GPUs, taken from one
configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bench.compare_plan import Contestant, SystemKind
from bench.load_server import local_processes
from bench.systems import LocalSystem, System, bare_parallel, make_system
from gateway.runtime.processes import ProcessId
from gateway.settings import Settings, load

SHARING_ARGUMENT = "gpu_memory_utilization"
"""What engines that share a GPU are given, each its part, and one that has it alone needs not."""


class RunningServer:
    """A system that somebody else starts and stops."""

    def __init__(self, name: str, url: str):
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self.engine_is_inside = False
        self.pages: dict[str, str] = {}

    def start(self) -> None:
        """It runs."""

    def stop(self) -> None:
        """It goes on."""

    def processes(self) -> list[ProcessId]:
        return local_processes(self.url)


def make(contestant: Contestant, settings: Settings, config: Path, folder: Path) -> System:
    """The system, not started; `settings` is what `config` holds. Configurations are written into `folder`. Raises
    ConfigError, ValueError."""
    name, argument = contestant.name, contestant.argument
    match contestant.kind:
        case SystemKind.SERVER:
            return RunningServer(name, argument)
        case SystemKind.CONFIG:
            made = _baton(Path(argument))
        case SystemKind.SPLIT:
            made = _baton(split_config(settings, argument, folder))
        case SystemKind.AGGREGATED:
            made = _baton(aggregated_config(settings, int(argument or 0), folder))
        case SystemKind.BARE:
            _check_is_here(name, settings)
            whole = load(aggregated_config(settings, 0, folder))
            made = LocalSystem(name, lambda own: bare_parallel(whole, own), settings.runtime.start_timeout_s)
        case SystemKind.ROUTER:
            made = _router("router-equal", settings, config)
        case SystemKind.ROUTER_STOCK:
            made = _router("router-stock", settings, config)
    return replace(made, name=name)


def _baton(config: Path) -> LocalSystem:
    return make_system("baton", load(config), config)


def _router(name: str, settings: Settings, config: Path) -> LocalSystem:
    _check_is_here(name, settings)
    if not settings.pools.prefill.replicas:
        raise ValueError(f"{name} needs a prefill pool, and {config} has none")
    return make_system(name, settings, config)


def _check_is_here(name: str, settings: Settings) -> None:
    if settings.runtime.ray_address is not None:
        raise ValueError(
            f"{name} is started on this machine, and the configuration's pools are on a cluster (runtime.ray_address); "
            "start it where its engines belong and name it, e.g. vllm=http://node:8000"
        )


def split_config(settings: Settings, policy: str, folder: Path) -> Path:
    """The configuration as it is, or routed by another policy. Raises ConfigError, ValueError."""
    if not settings.pools.prefill.replicas:
        raise ValueError("split needs a configuration with a prefill pool")
    data = _data(settings)
    if policy:
        data["routing"] = data.get("routing", {}) | {"policy": policy}
    return _written(data, folder / f"split-{policy}.yaml")


def aggregated_config(settings: Settings, chunk_tokens: int, folder: Path) -> Path:
    """A configuration without a prefill pool, whose engines have the cores or GPUs of both pools, and otherwise what
    the decode engines had; `chunk_tokens`, unless 0, is how many tokens of prompts a step reads at most. Engines that
    shared a GPU become one that has it whole; where each pool had its group of nodes, engines run in both. Raises
    ConfigError, ValueError."""
    prefill, decode = settings.pools.prefill, settings.pools.decode
    for field in _ALIKE if prefill.replicas else ():
        if getattr(prefill, field) != getattr(decode, field):
            raise ValueError(
                f"the pools have another {field} each ({getattr(prefill, field)!r}, {getattr(decode, field)!r}), so "
                "no pool of one kind has what both have; say what is to be compared: aggregated=FILE.yaml"
            )
    data = _data(settings)
    data["pools"].pop("prefill", None)
    pool = data["pools"]["decode"]
    pool.pop("max_replicas", None)
    if prefill.replicas and prefill.label_selector != decode.label_selector:
        pool.pop("label_selector", None)
    engine = pool.setdefault("engine", {})
    if decode.device == "cpu":
        pool["replicas"] = prefill.replicas + decode.replicas
        if decode.cpu_cores is not None:
            both = [(prefill.cpu_cores or [])[: prefill.replicas], decode.cpu_cores[: decode.replicas]]
            pool["cpu_cores"] = [cores for pools_cores in both for cores in pools_cores]
    else:
        num_gpus = sum(one.replicas * one.gpus_per_replica for one in (prefill, decode))
        pool["replicas"] = max(int(num_gpus) // decode.ranks_per_replica, 1)
        if pool.pop("num_gpus", None) is not None:
            engine.get("extra_args", {}).pop(SHARING_ARGUMENT, None)
    if chunk_tokens:
        engine["max_num_batched_tokens"] = chunk_tokens
    return _written(data, folder / f"aggregated-{chunk_tokens}.yaml")


_ALIKE = ("device", "ranks_per_replica", "accelerator_type")


def _data(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_unset=True)


def _written(data: dict[str, Any], path: Path) -> Path:
    """Raises ConfigError."""
    path.write_text(yaml.safe_dump(data))
    load(path)
    return path
