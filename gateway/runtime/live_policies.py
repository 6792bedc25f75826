"""Owns the change of a running application's policies, through the Serve that runs it (docs/adr/0016).

`serve.run` gives each deployment a new version, and Serve replaces every replica of a version that is not the wanted
one. So the wanted state is read from Serve's controller and given back to it as it is, versions included, with another
`user_config` of the gateways: those that run are told, and those that start later are told before their first request.
"""

import socket
from typing import Any

import msgspec
import ray
from pydantic import ValidationError
from ray._private.services import canonicalize_bootstrap_address
from ray.serve._private.common import DeploymentID
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.context import _get_global_client
from ray.serve.generated import serve_pb2

from gateway.runtime.control import OrderFailed, Switch, Switched
from gateway.settings import PolicySettings

GATEWAY = "gateway"
_CALL_S = 20.0
_REACHED_S = 5.0

_messages: Any = serve_pb2


def connect(address: str) -> None:
    """Makes this process a client of a Ray cluster. Raises OrderFailed."""
    try:
        # Ray tries for minutes, and cannot be interrupted, while a cluster's head is away.
        host, _, port = (canonicalize_bootstrap_address(address) or "").rpartition(":")
        if port:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
        ray.init(address, namespace="serve", log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise OrderFailed(f"no Ray cluster at {address}: {error}") from error


def switch(app_name: str, order: Switch) -> Switched:
    """Tells Serve what the gateways of an application decide by. Returns when Serve has been told; gateways follow in
    their turn. Raises OrderFailed."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        raise OrderFailed("Ray Serve does not run on this cluster")
    controller = client._controller

    def call(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(controller, method).remote(*arguments), timeout=_CALL_S)

    if app_name in call("get_app_configs"):
        raise OrderFailed(
            f"{app_name} was deployed from a Serve config file, which stays the truth about it: write "
            f"`user_config: {{policy: ...}}` at its deployment {GATEWAY} and apply the file again"
        )
    infos: dict[DeploymentID, tuple[DeploymentInfo, str | None]] = call("list_deployments_internal")
    deployed = {id.name: infos[id] for id in infos if id.app_name == app_name}
    if GATEWAY not in deployed:
        raise OrderFailed(f"no application {app_name} with a deployment {GATEWAY} runs on this cluster")
    info, _ = deployed[GATEWAY]
    wanted = changed(PolicySettings.model_validate(info.deployment_config.user_config), order)
    info.deployment_config.user_config = wanted.model_dump(mode="json")
    # Serve may have been asked for another number since: the one of the deployment would set it back.
    if info.deployment_config.autoscaling_config is None:
        details = call("get_deployment_details", app_name, GATEWAY)
        info.deployment_config.num_replicas = details.target_num_replicas
    application = _messages.ApplicationArgs(external_scaler_enabled=call("get_external_scaler_enabled", app_name))
    deployments = [_arguments(name, *told).SerializeToString() for name, told in deployed.items()]
    call("deploy_applications", {app_name: deployments}, {app_name: application.SerializeToString()})
    return Switched(wanted.policy, wanted.shadow_policy)


def changed(before: PolicySettings, order: Switch) -> PolicySettings:
    """What `before` becomes. Raises OrderFailed for a policy that the application does not know."""
    values = before.model_dump()
    values |= {name: value for name, value in msgspec.structs.asdict(order).items() if value is not msgspec.UNSET}
    try:
        return PolicySettings.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise OrderFailed(f"this application cannot use that: {told}") from error


def _arguments(name: str, info: DeploymentInfo, route: str | None) -> Any:
    """A deployment as it is, in the words of the controller's `deploy_applications`."""
    arguments = _messages.DeploymentArgs(
        deployment_name=name,
        deployment_config=info.deployment_config.to_proto_bytes(),
        replica_config=info.replica_config.to_proto_bytes(),
        deployer_job_id=info.deployer_job_id,
        ingress=info.ingress,
        ingress_request_router=info.ingress_request_router,
    )
    if route is not None and info.ingress:
        arguments.route_prefix = route
    return arguments
