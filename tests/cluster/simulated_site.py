"""Owns an application of simulated engines on nodes of their own, and clients that never stop asking it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from engine.ports import free_ports
from gateway.settings import Settings, load
from tests.cluster.nodes import Node, Nodes
from tests.cluster.running import wait_until
from tests.cluster.streams import Stream

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"
LABEL = "baton.dev/pool"
GATEWAYS = ("127.0.0.40", 2)
"""The address of the node that has both gateways and the HAProxy that clients ask, and its CPUs."""

NUM_GATEWAYS = 2
TOKEN_INTERVAL_S = 0.05
NUM_STREAMS = 8
NUM_CLIENTS = 4
SHORT_TOKENS = 10

READY_S = 200.0
PATIENCE_S = 60.0
STATUS_S = 5.0


def gateway_node(variables: dict[str, str]) -> Node:
    return Node("gateways", GATEWAYS[0], GATEWAYS[1], {LABEL: "gateway"}, variables=variables)


def decode_node(number: int, variables: dict[str, str]) -> Node:
    """With room for one replica."""
    return Node(f"decode-{number}", f"127.0.0.{50 + number}", 1, {LABEL: "decode"}, variables=variables)


def site_settings(folder: Path, num_decodes: int, port: int | None = None) -> Settings:
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["path"] = str(CONFIG.parent / "models" / "mini")
    config["simulation"]["decode_interval_s"] = TOKEN_INTERVAL_S
    config["pools"]["decode"] |= {"replicas": num_decodes, "num_cpus": 1, "label_selector": {LABEL: "decode"}}
    config["gateway"] = {
        "replicas": NUM_GATEWAYS,
        "label_selector": {LABEL: "gateway"},
        "port": port or free_ports(GATEWAYS[0])[0],
    }
    path = folder / f"config-{num_decodes}.yaml"
    path.write_text(yaml.safe_dump(config))
    return load(path)


class Clients:
    """They ask for short answers, one after the other, until they are told to end."""

    def __init__(self, url: str) -> None:
        self.answers: list[Stream] = []
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._is_over.is_set():
            stream = Stream(self._url, SHORT_TOKENS)
            stream.join()
            self.answers.append(stream)

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Stream]:
        return [answer for answer in self.answers if not answer.is_complete]


class Site:
    """What clients and an operator see of it."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def deploy(self, settings: Settings | None = None) -> None:
        self.nodes.deploy(settings)
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Serve runs all that the settings ask for, and each gateway has every decode replica ready."""
        wait_until(lambda: not self.missing(), "the application to be whole", READY_S)

    def missing(self) -> str:
        settings = self.nodes.settings
        status = self.nodes.status()
        wanted = {"gateway": settings.gateway.replicas, "decode": settings.pools.decode.replicas}
        ids = {
            name: {one["id"] for one in status["replicas"] if one["deployment"] == name and one["state"] == "RUNNING"}
            for name in wanted
        }
        if status["status"] != "RUNNING" or {name: len(found) for name, found in ids.items()} != wanted:
            return f"Serve says {status}"
        views = self.views()
        if set(views) != ids["gateway"] or any(ready != ids["decode"] for ready in views.values()):
            return f"{ids}, and ready are by gateway {views}"
        return ""

    def views(self) -> dict[str, set[str]]:
        """The decode replicas that are ready, by each gateway that answers; HAProxy takes turns."""
        found: dict[str, set[str]] = {}
        for _ in range(2 * NUM_GATEWAYS):
            if status := self.status():
                found[status["gateway"]] = {one["id"] for one in status["pools"]["decode"] if one["ready"]}
        return found

    def status(self) -> dict[str, Any] | None:
        try:
            response = httpx.get(f"{self.nodes.url}/baton/status", timeout=STATUS_S)
        except httpx.HTTPError:
            return None
        return response.json() if response.status_code == 200 else None

    def places(self) -> dict[str, str]:
        """The node of each running decode replica."""
        return {one["id"]: self.nodes.name_of(one["address"]) for one in self.nodes.running("decode")}

    def replicas_on(self, name: str) -> list[str]:
        """Of any deployment and in any state, also those that end."""
        replicas = self.nodes.status()["replicas"]
        return [one["id"] for one in replicas if one["address"] and self.nodes.name_of(one["address"]) == name]

    def receipt(self, stream: Stream) -> dict[str, Any]:
        response = httpx.get(f"{self.nodes.url}/baton/receipts/{stream.request_id}", timeout=STATUS_S)
        assert response.status_code == 200, response.text
        return response.json()

    def worker_of(self, stream: Stream) -> str:
        return self.receipt(stream)["placement"]["decode"]

    def recent_workers(self, clients: Clients) -> set[str]:
        """Which replicas gave the latest answers."""
        return {self.worker_of(answer) for answer in clients.answers[-4 * NUM_CLIENTS :] if answer.is_complete}

    def streams(self, max_tokens: int) -> list[Stream]:
        """Streams that have all begun and have not ended."""
        streams = [Stream(self.nodes.url, max_tokens) for _ in range(NUM_STREAMS)]
        wait_until(lambda: all(s.has_begun or s.has_ended for s in streams), "a token of each stream", PATIENCE_S)
        assert not any(stream.has_ended for stream in streams), streams
        return streams

    @contextmanager
    def clients(self) -> Iterator[Clients]:
        """At the end none of them may have seen an answer fail."""
        clients = Clients(self.nodes.url)
        try:
            yield clients
        finally:
            clients.end()
        assert clients.answers
        assert clients.failed == []


def assert_going_on(streams: list[Stream], clients: Clients) -> None:
    """Asserts that each stream brings more tokens, and that who asks now is answered."""
    lengths, num_answers = [len(stream.text) for stream in streams], len(clients.answers)

    def all_have_gone_on() -> bool:
        assert not any(stream.has_ended for stream in streams), f"broken, or too short for this machine: {streams}"
        # Those that were under way do not count.
        return len(clients.answers) >= num_answers + 3 * NUM_CLIENTS and all(
            len(stream.text) > length for stream, length in zip(streams, lengths, strict=True)
        )

    wait_until(all_have_gone_on, f"more tokens and answers; failed are {clients.failed}", PATIENCE_S)


def assert_end_whole(streams: list[Stream], timeout_s: float) -> None:
    wait_until(lambda: all(stream.has_ended for stream in streams), f"the end of {streams}", timeout_s)
    assert all(stream.is_complete for stream in streams), streams
    assert len({stream.text for stream in streams}) == 1, "engines of one seed answer a prompt alike"
