"""The configurations that bench/gpu.sh compares with, and what the script says where it cannot."""

import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench.recipe import on_groups, on_one_gpu, with_model, with_random_weights
from gateway.agents.tenants import key_sha256
from gateway.settings import Settings, load

ROOT = Path(__file__).resolve().parents[3]
NODE = ROOT / "configs" / "gpu-node.yaml"
SCRIPT = ROOT / "bench" / "gpu.sh"
BASE = load(NODE).model_dump(mode="json", exclude_unset=True)
DIGEST = "ab" * 32


def checked(config: dict, tmp_path: Path) -> Settings:
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(config))
    return load(path)


def test_another_model_keeps_nothing_that_held_for_the_first(tmp_path: Path) -> None:
    made = checked(with_model(BASE, "org/Other-8B"), tmp_path).model
    assert (made.path, made.served_name, made.dtype) == ("org/Other-8B", "other-8b", "bfloat16")
    assert (made.tool_call_parser, made.reasoning_parser, made.max_model_len) == (None, None, None)


def test_random_weights_are_those_of_both_pools(tmp_path: Path) -> None:
    pools = checked(with_random_weights(BASE), tmp_path).pools
    assert pools.prefill.engine.extra_args == pools.decode.engine.extra_args == {"load_format": "dummy"}


def test_engines_on_one_gpu_take_half_of_it_each_and_less_than_half_of_its_memory(tmp_path: Path) -> None:
    pools = checked(on_one_gpu(with_random_weights(BASE)), tmp_path).pools
    for pool in (pools.prefill, pools.decode):
        assert pool.gpus_per_replica == 0.5
        assert pool.engine.extra_args == {"load_format": "dummy", "gpu_memory_utilization": 0.42}


def test_each_group_of_nodes_has_its_pool_and_whoever_asks_needs_the_key(tmp_path: Path) -> None:
    made = checked(on_groups(BASE, DIGEST), tmp_path)
    assert made.pools.prefill.label_selector == {"baton.dev/pool": "prefill"}
    assert made.pools.decode.label_selector == {"baton.dev/pool": "decode"}
    assert made.runtime.ray_address == "auto"
    assert made.runtime.start_timeout_s == 900, "what was there stays"
    (tenant,) = made.tenants
    assert tenant.operator
    assert tenant.api_key_sha256 == [DIGEST]


def test_the_key_is_told_once_and_only_its_digest_is_written(tmp_path: Path) -> None:
    import typer

    from bench.recipe import main

    app = typer.Typer()
    app.command()(main)
    made = tmp_path / "made.yaml"
    result = CliRunner().invoke(app, [str(ROOT / "configs" / "local.yaml"), str(made), "--groups"])
    assert result.exit_code == 0
    key = result.stdout.strip()
    assert load(made).tenants[0].api_key_sha256 == [key_sha256(key.encode()).hex()]
    assert key not in made.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--x"], "there is no option --x; see bench/gpu.sh --help"),
        (["--model"], "--model needs a value"),
        (["--share", "--cpu"], "--share is for a GPU"),
    ],
)
def test_the_script_refuses_what_it_cannot_do_in_one_line(arguments: list[str], says: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_script_explains_its_forms() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--groups" in done.stdout
