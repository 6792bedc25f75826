"""What a server says of itself before it is loaded, and the one clear line where it cannot be."""

import os
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from bench import load_server
from bench.load_metrics import Counters
from bench.load_plan import ServerFacts, ServerKind
from bench.load_server import ServerError, counters, facts, local_processes, memory_mib
from bench.results import EngineKind
from gateway.runtime import processes
from tests.unit.bench.fake_server import FakeServer

URL = "http://there:1"
MODELS = {"data": [{"id": "m", "max_model_len": 4096}]}
Serve = Callable[[dict[str, Any]], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """A server with these answers; a number is a status, an exception is raised."""

    def with_answers(answers: dict[str, Any]) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            found = answers.get(request.url.path, 404)
            if isinstance(found, Exception):
                raise found
            return httpx.Response(found) if isinstance(found, int) else httpx.Response(200, json=found)

        transport = httpx.MockTransport(answer)
        monkeypatch.setattr(load_server, "_http", lambda url, _: httpx.Client(base_url=url, transport=transport))

    return with_answers


def status(*kinds: str) -> dict[str, Any]:
    replicas = [{"id": kind, "info": {"kind": kind}} for kind in kinds]
    return {
        "version": "0.1",
        "policies": {"policy": "baton"},
        "pools": {"prefill": replicas, "decode": [{"info": None}]},
    }


def test_a_server_of_another_kind_does_not_tell_its_engine(serve: Serve) -> None:
    serve({"/v1/models": MODELS, "/version": {"version": "0.32"}})
    assert facts(URL, None, None) == ServerFacts(URL, "m", ServerKind.OTHER, None, "0.32", 4096)


@pytest.mark.parametrize(("kind", "engine"), [("simulated", EngineKind.SIMULATED), ("vllm", EngineKind.VLLM)])
def test_baton_tells_its_engines_pools_and_policy(serve: Serve, kind: str, engine: EngineKind) -> None:
    serve({"/v1/models": MODELS, "/baton/status": status(kind)})
    found = facts(URL, "m", None)
    assert (found.kind, found.engine, found.policy) == (ServerKind.BATON, engine, "baton")
    assert found.pools == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"/v1/models": httpx.ConnectError("refused")}, "cannot reach http://there:1: refused"),
        ({"/v1/models": 401}, "it wants a key"),
        ({}, "answers 404 and no list of models"),
        ({"/v1/models": {"data": "m"}}, "no OpenAI API there"),
        ({"/v1/models": {"data": []}}, "serves no model"),
        ({"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}, "several models; name one with --model: a, b"),
        ({"/v1/models": MODELS, "/baton/status": status("simulated", "vllm")}, "simulated and real engines"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused_in_one_line(serve: Serve, answers: Any, error: str) -> None:
    serve(answers)
    with pytest.raises(ServerError, match=error) as raised:
        facts(URL, None, None)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_not_served_is_refused(serve: Serve) -> None:
    serve({"/v1/models": MODELS})
    with pytest.raises(ServerError, match=r"does not serve 'x' \(--model\); it serves m"):
        facts(URL, "x", None)


def test_counters_of_all_pages_add_up_and_one_that_is_missing_spoils_them(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "# TYPE baton_kv_moved_bytes counter\nbaton_kv_moved_bytes_total 7.0\n"

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=page) if request.url.path == "/metrics" else httpx.Response(404)

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(load_server, "_http", lambda url, _: httpx.Client(base_url=url, transport=transport))
    assert counters([f"{URL}/metrics", f"{URL}/metrics"], None) == Counters(14.0, 0.0)
    assert counters([f"{URL}/metrics", f"{URL}/none"], None) is None


def test_a_server_on_this_machine_is_found_by_its_port_and_one_elsewhere_is_not() -> None:
    with FakeServer().serving_in_a_thread() as server:
        found = local_processes(server.url)
        assert found[0] == processes.this_process() or os.getpid() in {id.pid for id in found}
    assert local_processes(server.url.replace("127.0.0.1", "192.0.2.1")) == []
    assert local_processes(server.url) == [], "nobody listens any more"


def test_memory_is_of_those_that_live() -> None:
    own, gone = processes.this_process(), processes.ProcessId(2**30, 1)
    memory = memory_mib([own, gone])
    assert list(memory) == [own]
    assert memory[own] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.5)
