"""What a user reads when a start fails: the root cause, not the traceback. And how Ray is kept on loopback."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import client, launcher
from gateway.agents.tenants import Tenants
from gateway.app import tenants
from gateway.runtime import confine
from gateway.runtime import environment as local_environment
from gateway.runtime.environment import RunPaths, environment, free_fallback_port, variables
from gateway.runtime.events import AppStatus, DeploymentState
from gateway.runtime.local import StartError
from gateway.settings import Settings

CONSTRUCTOR_FAILED = """The deployment failed to start 1 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:baton:decode.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
OSError: the disk is on fire

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/app/decode/deployment.py", line 1, in __init__
    raise RuntimeError("boom")
engine.protocol.EngineGoneError: the model cannot be read
  hint: check model.path
"""


def settings(host: str = "127.0.0.1", tenant: str = "alice") -> Settings:
    return Settings.model_validate(
        {
            "model": {"path": "org/model"},
            "pools": {"decode": {"device": "cpu"}},
            "gateway": {"host": host},
            "tenants": [{"name": tenant, "api_key_sha256": ["a" * 64]}],
        }
    )


def test_a_run_has_a_key_of_its_own_where_keys_are_asked_for() -> None:
    changed, key = launcher.with_own_key(settings())
    assert key is not None
    alice, own = tenants(changed)
    assert (alice.name, alice.operator) == ("alice", False)
    assert own.operator
    assert Tenants([alice, own]).of(key.encode()) == own
    assert key not in changed.model_dump_json()
    assert Settings.model_validate_json(changed.model_dump_json()) == changed
    assert launcher.with_own_key(settings())[1] != key


def test_a_run_without_tenants_needs_no_key() -> None:
    without = settings().model_copy(update={"tenants": []})
    assert launcher.with_own_key(without) == (without, None)


def test_a_tenant_that_is_called_as_the_run_calls_itself_is_refused() -> None:
    with pytest.raises(StartError, match="give it another name"):
        launcher.with_own_key(settings(tenant=launcher.OWN_TENANT))


def test_the_root_cause_is_the_last_exception_with_its_lines() -> None:
    assert (
        launcher.root_cause(CONSTRUCTOR_FAILED) == "EngineGoneError: the model cannot be read\n  hint: check model.path"
    )


def test_a_message_without_a_traceback_is_kept() -> None:
    assert launcher.root_cause("Not enough CPUs.\nSee the logs.") == "Not enough CPUs."


def test_a_failure_names_the_deployment_that_failed() -> None:
    states = [
        DeploymentState("gateway", "UPDATING", 0, 1, "waiting"),
        DeploymentState("decode", "DEPLOY_FAILED", 0, 1, CONSTRUCTOR_FAILED),
    ]
    told = launcher.failure_of(AppStatus("DEPLOY_FAILED", "Failed to update the deployments ['decode'].", states))
    assert told.startswith("decode: EngineGoneError: ")
    assert "waiting" not in told


def test_a_failure_without_details_is_still_told() -> None:
    assert "UNHEALTHY" in launcher.failure_of(AppStatus("UNHEALTHY", "", []))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
    ],
)
def test_the_printed_url_is_one_a_client_can_use(host: str, url: str) -> None:
    assert launcher.base_url(settings(host)) == url


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "bind 127.0.0.1:{{ config.frontend_port }}"),
        ("0.0.0.0", "bind 0.0.0.0:{{ config.frontend_port }}"),
        ("::1", "bind [::1]:{{ config.frontend_port }}"),
    ],
)
def test_the_pinned_haproxy_template_binds_the_front_door_only(host: str, bind: str) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    templates = runpy.run_path(str(Path(ray.origin).parent / "serve/_private/haproxy_templates.py"))
    template = templates["HAPROXY_CONFIG_TEMPLATE"]
    confined = confine.confined_template(template, host)
    binds = [line.strip() for line in confined.splitlines() if line.strip().startswith("bind ")]
    assert binds == [bind, "bind {{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2"]
    assert "level admin" in confined
    assert "mode 666" not in confined


def test_a_haproxy_template_that_changed_is_refused_not_let_through() -> None:
    with pytest.raises(confine.ConfinementError, match=r"confine\.py"):
        confine.confined_template("frontend new\n  bind :9101\n", "127.0.0.1")


def test_replicas_bind_loopback_and_an_unknown_address_is_refused() -> None:
    assert confine.loopback_address("[::]:0") == "127.0.0.1:0"
    with pytest.raises(confine.ConfinementError):
        confine.loopback_address("10.0.0.1:0")


def test_the_environment_is_the_table_over_the_users_without_settings_and_foreign_clusters() -> None:
    paths = RunPaths(Path("/tmp/baton-1000/8000"))
    table = variables(settings(), paths, "1:2", fallback_port=8500, cores=2, open_files=4096)
    base = {
        "HOME": "/home/me",
        "BATON_GATEWAY__PORT": "1",
        "RAY_ADDRESS": "ray://elsewhere",
        "RAY_USAGE_STATS_ENABLED": "1",
        "PYTHONPATH": "/mine",
    }
    result = environment(table, base)
    assert result["HOME"] == "/home/me"
    assert result["BATON_RUN"] == "1:2"
    assert result["RAY_USAGE_STATS_ENABLED"] == "0"
    assert result["PYTHONPATH"].endswith(":/mine")
    assert "BATON_GATEWAY__PORT" not in result
    assert "RAY_ADDRESS" not in result
    # 2.5 files for each connection, and 1024 of its own, fit in the limit.
    assert int(result["RAY_SERVE_HAPROXY_MAXCONN"]) * 5 // 2 + 1024 <= 4096


def test_serves_fallback_proxy_never_gets_the_gateways_own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_environment, "free_ports", lambda _host, count: [20_001, 20_002][:count])
    assert free_fallback_port(gateway_port=20_001) == 20_002
    assert free_fallback_port(gateway_port=20_002) == 20_001


def test_every_variable_appears_once_and_says_why() -> None:
    table = variables(settings(), RunPaths(Path("/x")), "1:2", fallback_port=1, cores=2, open_files=1 << 20)
    names = [variable.name for variable in table]
    assert len(names) == len(set(names))
    assert all(variable.reason for variable in table)


def test_haproxys_longest_socket_path_fits() -> None:
    base = Path("/tmp/baton-4294967295")
    paths = RunPaths(base / "65535")
    socket = paths.haproxy / ("n" * 56) / "a.sock"
    assert len(str(socket)) <= 97


# when a run is complete


def pools(prefill: list[bool], decode: list[bool]) -> dict[str, list[dict[str, bool]]]:
    return {"prefill": [{"ready": ready} for ready in prefill], "decode": [{"ready": ready} for ready in decode]}


@pytest.mark.parametrize(
    ("prefill", "decode", "missing"),
    [
        ([True], [True, True], ""),
        ([True, True], [True, True, False], ""),
        ([False], [True, True], "0 of 1 prefill replicas are ready"),
        ([], [True, False], "0 of 1 prefill replicas and 1 of 2 decode replicas are ready"),
    ],
)
def test_a_gateway_lacks_what_is_not_ready(prefill: list[bool], decode: list[bool], missing: str) -> None:
    status = {"pools": pools(prefill, decode)}
    assert client.missing_replicas(status, {"prefill": 1, "decode": 2}) == missing


def test_a_gateway_that_says_nothing_of_its_pools_lacks_all_of_them() -> None:
    assert client.missing_replicas({}, {"prefill": 0, "decode": 1}) == "0 of 1 decode replicas are ready"


def test_a_run_is_complete_when_every_gateway_has_seen_all_replicas_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    two_gateways = settings().model_copy(update={"gateway": settings().gateway.model_copy(update={"replicas": 2})})
    answers = iter(
        [
            client.GatewayError("http://127.0.0.1:8000 did not answer in time"),
            {"gateway": "one", "pools": pools([], [False])},
            {"gateway": "two", "pools": pools([], [True])},
            {"gateway": "one", "pools": pools([], [True])},
        ]
    )

    def status(url: str, timeout_s: float, api_key: str | None) -> dict[str, object]:
        assert (url, api_key) == ("http://127.0.0.1:8000", "key")
        answer = next(answers)
        if isinstance(answer, client.GatewayError):
            raise answer
        return answer

    monkeypatch.setattr(client, "status", status)
    watch = launcher.PoolWatch(two_gateways, "key")
    assert [watch.look() for _ in range(4)] == [
        "http://127.0.0.1:8000 did not answer in time",
        "0 of 1 decode replicas are ready",
        "0 of 1 decode replicas are ready",
        "",
    ]


def test_a_run_is_not_complete_before_every_gateway_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    two_gateways = settings().model_copy(update={"gateway": settings().gateway.model_copy(update={"replicas": 2})})
    monkeypatch.setattr(client, "status", lambda *_: {"gateway": "one", "pools": pools([], [True])})
    watch = launcher.PoolWatch(two_gateways)
    assert {watch.look() for _ in range(3)} == {"1 of 2 gateways have answered"}


def test_a_stop_says_what_it_does_and_goes_on_when_nobody_reads_it() -> None:
    code = (
        "import os, sys; from rich.console import Console; from gateway.launcher import _Sayer\n"
        "say = _Sayer(Console()); say('stopping'); say('stopped'); print('went on', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "went on\n")
