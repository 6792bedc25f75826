"""Every variable by which Baton sets up Ray: the pinned version reads it, and reads it when Baton thinks it does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from gateway.app import RUNTIME_ENV
from gateway.runtime.environment import RunPaths, Variable, variables
from gateway.settings import load

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"
RAY = Path(ray.__file__).parent
CORE = ("_raylet.so", "core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server")
SEPARATE_THREAD = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"


def of_ray() -> list[Variable]:
    table = variables(load(CONFIG), RunPaths(Path("/run")), "1:1", 1, 2, 1024)
    return [variable for variable in table if variable.name.startswith("RAY_")]


@pytest.fixture(scope="module")
def named_in_python() -> set[str]:
    """The names of variables that stand in Ray's Python sources as strings of their own."""
    names: set[str] = set()
    for path in RAY.rglob("*.py"):
        names.update(re.findall(r"""["'](RAY_\w+)["']""", path.read_text(errors="replace")))
    return names


@pytest.fixture(scope="module")
def core() -> list[bytes]:
    return [(RAY / name).read_bytes() for name in CORE if (RAY / name).exists()]


def stands_in(name: str, core: list[bytes]) -> bool:
    return any(re.search(rb"(?<![A-Za-z0-9_])%s(?![A-Za-z0-9_])" % name.encode(), binary) for binary in core)


@pytest.mark.parametrize("name", [variable.name for variable in of_ray()])
def test_ray_knows_the_variable(name: str, named_in_python: set[str], core: list[bytes]) -> None:
    """Python names variables whole; the core has its options without the prefix."""
    known = name in named_in_python
    if not known and not name.startswith("RAY_SERVE_"):
        known = stands_in(name, core) or stands_in(name.removeprefix("RAY_"), core)
    assert known, f"the pinned Ray does not know {name}"


def test_a_variable_nobody_reads_would_be_found(named_in_python: set[str], core: list[bytes]) -> None:
    assert core
    for name in ("RAY_SERVE_NO_SUCH", "RAY_no_such_option"):
        assert name not in named_in_python
        assert not stands_in(name.removeprefix("RAY_"), core)


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, True)])
def test_the_loop_of_a_replica_is_chosen_by_its_environment_at_import(value: str | None, expected: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_SERVE_")}
    if value is not None:
        environment[SEPARATE_THREAD] = value
    code = f"from ray.serve._private import replica; assert replica.{SEPARATE_THREAD} is {expected}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_replicas_are_started_with_the_choice() -> None:
    assert RUNTIME_ENV["env_vars"] == {SEPARATE_THREAD: "0"}


def test_a_node_that_is_told_to_end_drains_for_as_long_as_its_environment_says() -> None:
    """configs/kuberay's times are made for it."""
    code = (
        "import inspect; from ray._private import node, ray_constants;"
        "assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S == 7;"
        "assert '_drain_node_before_shutdown' in inspect.getsource(node.Node._register_shutdown_hooks)"
    )
    environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "7"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
