"""A pool that follows the demand, on Ray Serve as an operator deploys it: load makes replicas join and take requests,
and when it is over they drain and leave, and nobody notices.

Engines are simulated and slow: what one writes in time is known, whatever the machine.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.ports import free_ports
from gateway.agents.tenants import key_sha256, new_key
from gateway.settings import load
from tests.cluster.nodes import Node, Nodes, cluster
from tests.cluster.running import wait_until
from tests.cluster.streams import Stream

pytestmark = pytest.mark.timeout(420)

ROOT = Path(__file__).parents[2]
FEWEST, MOST = 2, 4
CLIENTS = 24
ANSWER_TOKENS = 40
"""A replica writes 55 tokens a second in time, in steps of two requests or three. The clients get five times that from
two replicas, late."""

STEP_S, STEP_PER_REQUEST_S, TPOT_S = 0.04, 0.002, 0.045
WINDOW_S = 60.0
"""For so long the demand of the load is seen when it is over (`gateway.scaling.demand`), and then `HOLD_S`."""

HOLD_S = 5.0
LONG_TOKENS = round(1.4 * (WINDOW_S + HOLD_S) / STEP_S)
"""Of an answer that is still being written when pools shrink."""

DEADLINE_S = 150.0


@dataclass
class Site:
    """The application, and its operator who is its client."""

    nodes: Nodes
    headers: dict[str, str]

    @property
    def url(self) -> str:
        return self.nodes.url

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=DEADLINE_S)

    def has_started(self) -> bool:
        try:
            return self.get("/baton/status").status_code == 200 and len(self.ready()) == FEWEST
        except httpx.TransportError:
            return False

    def ready(self) -> dict[str, int]:
        """The ready decode replicas, and how many requests the gateway has in flight on each."""
        status = self.get("/baton/status")
        assert status.status_code == 200, status.text
        pool = status.json()["pools"]["decode"]
        return {replica["id"]: replica["in_flight_requests"] for replica in pool if replica["ready"]}

    def states(self) -> dict[str, str]:
        """Of the decode replicas, as Serve sees them."""
        return {one["id"]: one["state"] for one in self.nodes.status()["replicas"] if one["deployment"] == "decode"}

    def wanted(self) -> float:
        """How many decode replicas are wanted, as Prometheus is told."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == "baton_pool_replicas"]
        (number,) = {s.value for s in samples if s.labels["pool"] == "decode" and s.labels["state"] == "wanted"}
        return number

    def receipt(self, request_id: str) -> dict[str, Any]:
        response = self.get(f"/baton/receipts/{request_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, max_tokens: int) -> Stream:
        return Stream(self.url, max_tokens, self.headers)

    def answered(self) -> Stream:
        """One that has ended."""
        stream = self.stream(ANSWER_TOKENS)
        wait_until(lambda: stream.has_ended, f"the end of {stream}", DEADLINE_S)
        return stream


def configuration(folder: Path, key: str) -> Path:
    config = {
        "model": {
            "path": str(ROOT / "configs/models/mini"),
            "served_name": "baton-mini",
            "max_model_len": 8192,
            "dtype": "float32",
        },
        "simulation": {"decode_step_s": STEP_S, "decode_s_per_request": STEP_PER_REQUEST_S},
        "pools": {
            "decode": {
                "replicas": FEWEST,
                "max_replicas": MOST,
                "device": "cpu",
                "num_cpus": 0.5,
                "engine": {"block_size_tokens": 32, "max_num_batched_tokens": 8192, "max_num_seqs": 256},
            }
        },
        "gateway": {"num_cpus": 0.5, "port": free_ports("127.0.0.1")[0]},
        "tenants": [{"name": "operator", "operator": True, "api_key_sha256": [key_sha256(key.encode()).hex()]}],
        "scaling": {"tpot_s": TPOT_S, "hold_s": HOLD_S},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def serve_config(path: Path) -> dict[str, Any]:
    """The one that is shipped, with another configuration and a front door on loopback."""
    config = yaml.safe_load((ROOT / "configs/serve/gpu.yaml").read_text())
    config["proxy_location"] = "HeadOnly"
    config["http_options"] = {"host": "127.0.0.1", "port": load(path).gateway.port}
    config["applications"][0]["args"]["config"] = str(path)
    return config


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    key = new_key()
    path = configuration(tmp_path, key)
    head = Node("head", "127.0.0.10", 4)
    with cluster(load(path), "gateway.app:build", [], head) as nodes:
        nodes.deploy_config(serve_config(path))
        site = Site(nodes, {"authorization": f"Bearer {key}"})
        wait_until(site.has_started, f"{FEWEST} replicas: {nodes.status()}", DEADLINE_S)
        yield site


@dataclass
class Load:
    """Clients that stream one answer after the other."""

    answers: list[Stream]

    def request_ids(self) -> list[str]:
        return [answer.request_id for answer in list(self.answers)]


@contextmanager
def under_load(site: Site) -> Iterator[Load]:
    load, ended = Load([]), threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            load.answers.append(site.answered())

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[Future[None]] = [pool.submit(ask_on) for _ in range(CLIENTS)]
        try:
            yield load
        finally:
            ended.set()
        for client in clients:
            client.result()


def test_a_pool_grows_with_load_and_shrinks_after_it_and_no_client_notices(site: Site) -> None:
    first = set(site.ready())
    assert site.wanted() == FEWEST

    with under_load(site) as load:
        wait_until(lambda: len(site.ready()) == MOST, f"{MOST} replicas: {site.states()}", DEADLINE_S)
        num_before = len(load.answers)
        wait_until(lambda: len(load.answers) > num_before + 2 * CLIENTS, "answers of all four replicas", DEADLINE_S)
        wait_until(lambda: site.wanted() == MOST, f"{MOST} to be wanted", DEADLINE_S)
    all_replicas = set(site.ready())
    assert first < all_replicas
    by_replica = {site.receipt(request_id)["placement"]["decode"] for request_id in load.request_ids()}
    assert by_replica == all_replicas

    long: list[Stream] = []

    def each_replica_writes() -> bool:
        if all(in_flight > 0 for in_flight in site.ready().values()):
            return True
        if all(stream.has_begun for stream in long):
            long.append(site.stream(LONG_TOKENS))
        return False

    wait_until(each_replica_writes, f"a long answer on each replica: {site.ready()}", DEADLINE_S)

    wait_until(lambda: len(site.ready()) < MOST, "a replica that is not asked any more", DEADLINE_S)
    assert not any(stream.has_ended for stream in long), "nothing was in flight when the pool shrank"
    wait_until(lambda: len(site.ready()) == FEWEST, f"{FEWEST} replicas: {site.states()}", DEADLINE_S)
    leaving = all_replicas - set(site.ready())
    assert len(leaving) == MOST - FEWEST

    wait_until(lambda: all(stream.has_ended for stream in long), f"the end of {long}", DEADLINE_S)
    receipts = [site.receipt(stream.request_id) for stream in long]
    assert leaving <= {receipt["placement"]["decode"] for receipt in receipts}, "no replica left while it wrote"
    assert [receipt["later"] for receipt in receipts] == [[]] * len(long), "what leaves writes to its end"
    wait_until(lambda: not leaving & site.states().keys(), f"the end of {leaving}: {site.states()}", DEADLINE_S)

    assert [stream for stream in load.answers + long if not stream.is_complete] == []
    assert set(site.states().values()) == {"RUNNING"}
    assert set(site.states()) == set(site.ready()), "as many as the configuration asks for at the least"
    wait_until(lambda: site.wanted() == FEWEST, f"{FEWEST} to be wanted", DEADLINE_S)
    gateways = [one for one in site.nodes.status()["replicas"] if one["deployment"] == "gateway"]
    assert len(gateways) == 1
    assert site.answered().is_complete
