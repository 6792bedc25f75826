"""Every internal of Ray that Baton touches, by name: when an upgrade breaks one, the failing test says which."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import PendingRequest, RequestRouter

from engine import logs
from gateway.request_router import PinnedRequestRouter
from gateway.transport import ReplicaGoneError
from gateway.transport_ray import POOLS, TARGET

ROOT = Path(__file__).parents[2]


def test_the_pinned_version_is_installed():
    import ray

    assert ray.__version__ == "2.60.0"


def test_a_router_class_may_be_named_by_path_and_pickled():
    from ray.serve.config import RequestRouterConfig

    from gateway.transport_ray import REQUEST_ROUTER

    assert RequestRouterConfig(request_router_class=REQUEST_ROUTER).get_request_router_class()


def replica(unique_id: str) -> SimpleNamespace:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=unique_id))


def pending(**kwargs: str) -> PendingRequest:
    return PendingRequest(args=[], kwargs=kwargs, metadata=SimpleNamespace())


async def test_a_call_goes_to_the_replica_it_names():
    router = object.__new__(PinnedRequestRouter)
    one, two = replica("one"), replica("two")
    assert await router.choose_replicas([one, two], pending(**{TARGET: "two"})) == [[two]]


async def test_a_call_that_names_no_replica_may_go_anywhere():
    router = object.__new__(PinnedRequestRouter)
    both = [replica("one"), replica("two")]
    assert await router.choose_replicas(both, pending()) == [both]


async def test_a_call_to_a_replica_that_is_gone_fails_at_once():
    router = object.__new__(PinnedRequestRouter)
    request = pending(**{TARGET: "gone"})
    candidates = await router.choose_replicas([replica("one")], request)
    assert any(candidates), "returning no candidate is retried without end"
    with pytest.raises(ReplicaGoneError, match="gone is not in its pool"):
        await asyncio.wait_for(request.future, 1)


def test_serve_stops_choosing_for_a_call_that_has_failed():
    source = inspect.getsource(RequestRouter._fulfill_pending_requests)
    assert "if pending_request.future.done():\n                            break" in source


def test_update_replicas_tells_who_is_in_the_pool(monkeypatch):
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self, replicas: None)
    router = object.__new__(PinnedRequestRouter)
    router._deployment_id = DeploymentID(name="contract-test")
    router.update_replicas([replica("one"), replica("two")])
    assert POOLS.members("contract-test") == ("one", "two")


def test_an_ingress_may_build_its_application_in_the_replica():
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    assert SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"


def test_a_replica_knows_its_local_rank_and_its_tag():
    from ray.serve.context import ReplicaContext
    from ray.serve.schema import ReplicaRank

    assert "local_rank" in ReplicaRank.model_fields
    assert isinstance(ReplicaContext.replica_tag, property)


def test_serve_refuses_a_custom_router_for_the_gateways_so_that_they_are_asked_by_broadcast():
    from ray.serve._private import build_app

    assert "not supported on" in build_app.CUSTOM_INGRESS_REQUEST_ROUTER_UNSUPPORTED_ERROR


def test_a_handles_router_tells_the_deployments_replicas():
    from ray.serve._private.router import AsyncioRouter, CurrentLoopRouter, SingletonThreadRouter

    assert isinstance(RequestRouter.curr_replicas, property)
    assert isinstance(AsyncioRouter.request_router, property)
    for wrapper in (CurrentLoopRouter, SingletonThreadRouter):
        assert "self._asyncio_router = AsyncioRouter(" in inspect.getsource(wrapper.__init__)


async def test_a_broadcasts_results_can_be_waited_for_one_by_one():
    from ray.serve._private.replica_result import ReplicaResult
    from ray.serve.handle import DeploymentBroadcastResponse

    async def sent() -> list[str]:
        return ["one", "two"]

    assert await DeploymentBroadcastResponse(sent(), None)._fetch_replica_results_async() == ["one", "two"]
    assert {"get_async", "cancel"} <= set(dir(ReplicaResult))


def test_serve_replaces_a_replica_whose_process_is_gone_at_its_next_health_check_and_others_at_the_third():
    from ray.serve._private.constants import REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD
    from ray.serve._private.deployment_state import ActorReplicaWrapper

    assert REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD == 3
    crashed = inspect.getsource(ActorReplicaWrapper.check_health).partition("ReplicaHealthCheckResponse.ACTOR_CRASHED")
    assert "self._healthy = False" in crashed[2].partition("else:")[0]


def test_serve_lets_a_replica_that_fails_its_health_checks_drain():
    from ray.serve._private.constants import RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS

    assert not RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, "then a replica need not end its own process"


def test_a_replica_that_starts_takes_the_rank_of_one_that_is_gone():
    """Ranks choose an engine's cores: a replacement must not get a rank that no cores are set aside for."""
    from ray.serve._private.deployment_state import DeploymentRankManager

    ranks = DeploymentRankManager()
    for number in range(3):
        ranks.assign_rank(f"replica-{number}", "node")
    ranks.release_rank("replica-1")
    assert ranks.assign_rank("another", "node").local_rank == 1


def test_the_controller_gives_away_an_applications_wanted_state_and_takes_it_back():
    from ray.serve._private.controller import ServeController
    from ray.serve._private.deployment_info import DeploymentInfo
    from ray.serve.generated import serve_pb2
    from ray.serve.schema import DeploymentDetails

    methods = {
        "get_app_configs": ["self"],
        "list_deployments_internal": ["self"],
        "get_deployment_details": ["self", "app_name", "deployment_name"],
        "get_external_scaler_enabled": ["self", "app_name"],
        "deploy_applications": ["self", "name_to_deployment_args_list", "name_to_application_args"],
    }
    for name, parameters in methods.items():
        assert list(inspect.signature(getattr(ServeController, name)).parameters) == parameters
    assert "target_num_replicas" in DeploymentDetails.model_fields
    # `uses_multiplexing` is what a gateway does not do, and `docs_path` is nobody's any more.
    known = {"deployment_name", "deployment_config", "replica_config", "deployer_job_id", "route_prefix", "ingress"}
    known |= {"ingress_request_router", "uses_multiplexing", "docs_path"}
    assert {field.name for field in serve_pb2.DeploymentArgs.DESCRIPTOR.fields} == known
    assert {"version", "ingress", "ingress_request_router", "deployer_job_id"} <= set(
        inspect.signature(DeploymentInfo.__init__).parameters
    )


def test_serve_asks_an_applications_autoscaling_policy_in_each_of_its_rounds_and_outlives_what_it_raises():
    """But then it looks after no application in that round: `PoolScaling` raises nothing."""
    from ray.serve._private import constants
    from ray.serve._private.application_state import ApplicationState, ApplicationStateManager
    from ray.serve._private.controller import ServeController

    assert constants.CONTROL_LOOP_INTERVAL_S == 0.1
    assert "get_decision_num_replicas(" in inspect.getsource(ApplicationState.autoscale)
    assert "app.autoscale()" in inspect.getsource(ApplicationStateManager.update)
    round_ = inspect.getsource(ServeController.run_control_loop_step)
    _, _, after = round_.partition("self.application_state_manager.update()")
    assert after.partition("except Exception:")[2].lstrip().startswith("logger.exception(")


def test_serve_tells_a_replica_its_user_config_before_it_is_ready_and_restarts_none_for_a_new_one():
    from ray.serve._private.config import DeploymentConfig
    from ray.serve._private.replica import Replica
    from ray.serve._private.version import DeploymentVersion

    before, after = (DeploymentVersion("1", DeploymentConfig(user_config={"policy": name}), {}) for name in "ab")
    assert before.requires_actor_reconfigure(after)
    assert not before.requires_actor_restart(after)
    assert "call_reconfigure" in inspect.getsource(Replica.initialize)


LOG_LINES = """
import logging, logging.config, sys
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from engine import logs
configure_component_logger(
    component_name="baton_gateway", component_id="replica-1", component_type=ServeComponentType.REPLICA, max_bytes=9999,
    backup_count=1, logging_config=LoggingConfig(encoding=sys.argv[2], enable_access_log=False, logs_dir=sys.argv[1]),
)
logs.begin()
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
logs.adopt("vllm")
with logs.about("r1"):
    logging.getLogger("baton.access").info("a line", extra={"http_status": 200})
    logging.getLogger("ray.serve").info("GET / 200", extra={"serve_access_log": True})
logging.getLogger("baton.membership").warning("of no request")
"""


@pytest.mark.parametrize("encoding", ["JSON", "TEXT"])
def test_serves_log_files_take_batons_lines_with_the_id_of_their_request(tmp_path: Path, encoding: str) -> None:
    environment = os.environ | {"RAY_SERVE_LOG_TO_STDERR": "0"}
    subprocess.run(
        [sys.executable, "-c", LOG_LINES, str(tmp_path), encoding], check=True, cwd=ROOT, env=environment, timeout=60
    )
    (file,) = tmp_path.iterdir()
    access, other = file.read_text().splitlines()
    if encoding == "TEXT":
        assert access.endswith("r1 -- a line")
        assert other.endswith("-- of no request")
        return
    told = {"baton_request_id": "r1", "http_status": 200, "levelname": "INFO", "message": "a line"}
    assert json.loads(access).items() >= told.items()
    assert json.loads(other)["levelname"] == "WARNING"
    assert logs.REQUEST_ID not in json.loads(other)
