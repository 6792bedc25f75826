"""Owns the driver process of a local run: starts Ray, deploys the application, reports its state as events, and takes
orders (`gateway.runtime.control`).

It runs apart from the launcher because Ray may end the process that holds it; the launcher must outlive that.
Usage: python -m gateway.runtime.driver RUN_DIR BUILD EVENTS_FD
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.runtime import control, events
from gateway.runtime.environment import LOOPBACK, RunPaths, cpus_needed
from gateway.settings import Settings

APP_NAME = "baton"
_STARTING_POLL_S = 0.25
_RUNNING_POLL_S = 2.0
_PR_SET_PDEATHSIG = 1


def main(run_dir: str, build_path: str, events_fd: int) -> None:
    _die_with_launcher()
    with os.fdopen(events_fd, "wb", buffering=0) as out:

        def emit(event: events.Event) -> None:
            out.write(events.encode(event))

        try:
            _run(RunPaths(Path(run_dir)), build_path, emit)
        except BrokenPipeError:
            return
        except Exception as error:
            emit(events.DriverFailed(f"{type(error).__name__}: {error}"))
            raise


def _run(paths: RunPaths, build_path: str, emit: Callable[[events.Event], None]) -> None:
    settings = Settings.model_validate(json.loads(paths.settings.read_text()))
    # Before Ray starts, so that a mistake in it costs a second, not ten.
    application = _load_build(build_path)(settings)

    import ray
    from ray import serve

    _slim_ray()
    ray.init(
        num_cpus=cpus_needed(settings),
        include_dashboard=False,
        object_store_memory=settings.runtime.object_store_mb * 1024 * 1024,
        configure_logging=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": "gateway.runtime.confine.confine"},
        _node_ip_address=LOOPBACK,
        _temp_dir=str(paths.ray),
    )
    emit(events.RayStarted(_ray_pids()))
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": LOOPBACK, "port": settings.gateway.port},
    )
    serve.run_many(
        [serve.RunTarget(target=application, name=APP_NAME, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    from gateway.runtime.live_policies import GATEWAY, switch

    def take(order: control.Order) -> control.Done:
        if isinstance(order, control.SendSpans):
            gateways = serve.get_deployment_handle(GATEWAY, APP_NAME)
            gateways.broadcast("send_spans").results(timeout_s=control.SPANS_S, return_exceptions=True)
            return control.Sent()
        switched = switch(APP_NAME, order)
        emit(events.PoliciesSwitched(switched.policy, switched.shadow_policy))
        return switched

    last: events.AppStatus | None = None
    with control.Orders(paths.control) as orders:
        while True:
            overview = serve.status().applications.get(APP_NAME)
            if overview is not None:
                status = _app_status(overview)
                if status != last:
                    emit(status)
                    last = status
            is_running = last is not None and last.status == "RUNNING"
            orders.take_for(_RUNNING_POLL_S if is_running else _STARTING_POLL_S, take)


def _app_status(overview: Any) -> events.AppStatus:
    return events.AppStatus(
        status=str(overview.status.value),
        message=overview.message,
        deployments=[
            events.DeploymentState(
                name=name,
                status=str(getattr(deployment.status, "value", deployment.status)),
                running=int(deployment.replica_states.get("RUNNING", 0)),
                replicas=sum(deployment.replica_states.values()),
                message=deployment.message,
            )
            for name, deployment in overview.deployments.items()
        ],
    )


def _load_build(path: str) -> Callable[[Settings], Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _slim_ray() -> None:
    """Leaves out three Python processes a local run has no use for (log monitor, autoscaler monitor, dashboard),
    and the agent's fixed port, on which a second run would wait. `ray.init` has no option for either."""
    from ray._private import parameter, services

    init = parameter.RayParams.__init__

    def slim_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(
            self,
            *args,
            **{**kwargs, "include_log_monitor": False, "no_monitor": True, "dashboard_agent_listen_port": 0},
        )

    def no_api_server(*_args: Any, **_kwargs: Any) -> tuple[None, None]:
        return None, None

    parameter.RayParams.__init__ = slim_init
    services.start_api_server = no_api_server


def _ray_pids() -> dict[str, int]:
    from ray._private import worker

    node: Any = worker._global_node
    if node is None:
        return {}
    return {name: infos[0].process.pid for name, infos in node.all_processes.items() if infos}


def _die_with_launcher() -> None:
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
