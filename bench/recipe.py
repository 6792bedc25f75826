"""Owns the configuration that `bench/gpu.sh` compares with: a shipped one, with another model, random weights, on one
GPU or on two groups of nodes. `python -m bench.recipe --help`"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from gateway.agents.tenants import key_sha256, new_key
from gateway.settings import ConfigError, load

POOL_LABEL = "baton.dev/pool"
TENANT = "bench"
SHARED_GPUS = 0.5
SHARED_GPU_MEMORY = 0.42
"""Of each of two engines on one GPU; what CUDA itself takes beside them is left."""
RANDOM_WEIGHTS = {"load_format": "dummy"}
Config = dict[str, Any]


def with_model(config: Config, path: str) -> Config:
    """Without what holds for the model that was there before: its parsers and its context."""
    kept = {name: value for name, value in config["model"].items() if name == "dtype"}
    return config | {"model": kept | {"path": path, "served_name": Path(path).name.lower()}}


def with_random_weights(config: Config) -> Config:
    return _in_each_pool(config, lambda _name, pool: _with_arguments(pool, RANDOM_WEIGHTS))


def on_one_gpu(config: Config) -> Config:
    """One prefill and one decode engine that share it."""
    memory = {"gpu_memory_utilization": SHARED_GPU_MEMORY}
    return _in_each_pool(config, lambda _name, pool: _with_arguments(pool, memory) | {"num_gpus": SHARED_GPUS})


def on_groups(config: Config, key_digest: str) -> Config:
    """On the Ray cluster that this machine is in, each pool on the nodes with its label. Who asks has the key of this
    digest."""
    labelled = _in_each_pool(config, lambda name, pool: pool | {"label_selector": {POOL_LABEL: name}})
    tenant = {"name": TENANT, "operator": True, "api_key_sha256": [key_digest]}
    runtime = config.get("runtime", {}) | {"ray_address": "auto"}
    return labelled | {"tenants": [tenant], "runtime": runtime}


def _in_each_pool(config: Config, change: Callable[[str, Config], Config]) -> Config:
    pools = {name: change(name, pool) for name, pool in config["pools"].items() if isinstance(pool, dict)}
    return config | {"pools": config["pools"] | pools}


def _with_arguments(pool: Config, arguments: Config) -> Config:
    engine = pool.get("engine", {})
    return pool | {"engine": engine | {"extra_args": engine.get("extra_args", {}) | arguments}}


def main(
    base: Annotated[Path, typer.Argument(help="The shipped configuration.")],
    made: Annotated[Path, typer.Argument(help="Where to write the other one.")],
    model: Annotated[str, typer.Option(help="Hugging Face id, or an absolute path.")] = "",
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights.")] = False,
    share: Annotated[bool, typer.Option("--share", help="Both engines on one GPU.")] = False,
    groups: Annotated[bool, typer.Option("--groups", help="On two groups of nodes; prints a key for it.")] = False,
) -> None:
    """Write the configuration of a comparison."""
    try:
        config = load(base).model_dump(mode="json", exclude_unset=True)
        if model:
            config = with_model(config, model)
        if dummy:
            config = with_random_weights(config)
        if share:
            config = on_one_gpu(config)
        if groups:
            key = new_key()
            config = on_groups(config, key_sha256(key.encode()).hex())
            typer.echo(key)
        made.write_text(yaml.safe_dump(config))
        load(made)
    except (ConfigError, OSError) as error:
        typer.secho(f"recipe: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
