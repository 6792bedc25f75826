"""Owns the hold of a test on a Ray cluster of several nodes: it deploys the application and says what runs where.

A process of its own, because Ray takes a process for good: python -m tests.cluster.node_control ADDRESS BUILD
It reads orders from standard input and answers each on standard output, both as a line of JSON.
"""

import importlib
import json
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema, ServeInstanceDetails

from gateway.settings import Settings

APP_NAME = "baton"


def deploy(build: str, settings_json: str, host: str, proxy_location: str) -> None:
    """Returns when Serve has been told; it takes its time."""
    settings = Settings.model_validate_json(settings_json)
    module, _, name = build.partition(":")
    application = getattr(importlib.import_module(module), name)(settings)
    serve.start(proxy_location=proxy_location, http_options={"host": host, "port": settings.gateway.port})
    target = serve.RunTarget(target=application, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def deploy_config(config_json: str) -> None:
    """As `serve run CONFIG` does, and as far as it goes for the application's own process: Serve builds it from where
    the config says that it is. Returns when Serve has been told."""
    config = ServeDeploySchema.model_validate_json(config_json)
    serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(config)


def nodes() -> list[dict[str, Any]]:
    """Every node that Ray takes for alive: id, address, labels, resources."""
    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "labels": node["Labels"],
            "has": node["Resources"],
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def status() -> dict[str, Any]:
    """The application's state and why, and its replicas: deployment, id, state, process, node and its address."""
    client = _get_global_client()
    assert client is not None
    controller: Any = client._controller
    told: Any = ray.get(controller.get_serve_instance_details.remote())
    app = ServeInstanceDetails(**told).applications.get(APP_NAME)
    if app is None:
        return {"status": "", "message": "", "replicas": []}
    messages = [app.message, *(one.message for one in app.deployments.values())]
    replicas = [
        {
            "deployment": name,
            "id": replica.replica_id,
            "state": str(replica.state.value),
            "pid": replica.pid,
            "node": replica.node_id,
            "address": replica.node_ip,
        }
        for name, deployment in app.deployments.items()
        for replica in deployment.replicas
    ]
    return {"status": str(app.status.value), "message": " ".join(filter(None, messages)), "replicas": replicas}


def placement_groups() -> list[dict[str, Any]]:
    """Those that hold resources: the bundles of each and the nodes they are on."""
    table: Any = ray.util.placement_group_table()
    return [
        {"state": group["state"], "bundles": group["bundles"], "nodes": group["bundles_to_node_id"]}
        for group in table.values()
        if group["state"] != "REMOVED"
    ]


def main(address: str, build: str) -> None:
    # Ray prints to standard output too, of nodes that died for one.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    hook = {"worker_process_setup_hook": "gateway.runtime.confine.confine"}
    ray.init(address, log_to_driver=False, configure_logging=False, namespace="serve", runtime_env=hook)

    def deploy_it(settings_json: str, host: str, proxy_location: str) -> None:
        deploy(build, settings_json, host, proxy_location)

    commands = {
        "deploy": deploy_it,
        "deploy_config": deploy_config,
        "nodes": nodes,
        "status": status,
        "placement_groups": placement_groups,
    }
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
