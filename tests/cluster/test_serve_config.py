"""What a Serve config that is deployed again replaces: another number of replicas nothing, another revision everything.

Engines are simulated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.agents.tenants import new_key
from gateway.settings import load
from tests.cluster.nodes import Node, Nodes, cluster
from tests.cluster.running import wait_until
from tests.cluster.test_scaling import DEADLINE_S, FEWEST, configuration, serve_config

pytestmark = pytest.mark.timeout(420)


def processes(nodes: Nodes, deployment: str) -> set[int]:
    return {one["pid"] for one in nodes.running(deployment)}


def is_whole(nodes: Nodes, num_decodes: int) -> bool:
    """No other replica starts or ends."""
    status = nodes.status()
    wanted = [("decode", "RUNNING")] * num_decodes + [("gateway", "RUNNING")]
    return status["status"] == "RUNNING" and sorted((r["deployment"], r["state"]) for r in status["replicas"]) == wanted


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Of pools that have a fixed size."""
    path = configuration(tmp_path, new_key())
    settings = yaml.safe_load(path.read_text())
    del settings["pools"]["decode"]["max_replicas"]
    path.write_text(yaml.safe_dump(settings))
    config = serve_config(path)
    del config["applications"][0]["autoscaling_policy"]
    return config


@pytest.fixture
def nodes(config: dict[str, Any]) -> Iterator[Nodes]:
    settings = load(Path(config["applications"][0]["args"]["config"]))
    with cluster(settings, "gateway.app:build", [], Node("head", "127.0.0.10", 4)) as nodes:
        yield nodes


def test_another_number_restarts_nothing_and_another_revision_everything(nodes: Nodes, config: dict[str, Any]) -> None:
    (application,) = config["applications"]

    def deploy(num_decodes: int) -> tuple[set[int], set[int]]:
        """The processes of gateway and decode."""
        nodes.deploy_config(config)
        wait_until(lambda: is_whole(nodes, num_decodes), f"{num_decodes} decode replicas and a gateway", DEADLINE_S)
        return processes(nodes, "gateway"), processes(nodes, "decode")

    gateways, first = deploy(FEWEST)
    application["deployments"] = [{"name": "decode", "num_replicas": FEWEST + 1}]
    same_gateways, more = deploy(FEWEST + 1)
    assert same_gateways == gateways
    assert more > first

    application["deployments"] = [{"name": "decode", "num_replicas": FEWEST}]
    same_gateways, fewer = deploy(FEWEST)
    assert same_gateways == gateways
    assert fewer < more

    def are_all_new() -> bool:
        before = gateways | fewer
        after = processes(nodes, "gateway") | processes(nodes, "decode")
        return is_whole(nodes, FEWEST) and before.isdisjoint(after)

    application["args"]["revision"] = "2"
    nodes.deploy_config(config)
    wait_until(are_all_new, "all to be replaced", DEADLINE_S)
