"""Clients that read slowly, stop reading, or read on through a reload of HAProxy, before simulated engines.

Each event of a stream repeats the model's name. It is very long here, so that a short answer fills every buffer between
gateway and client, those of the kernel too.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import h11
import psutil
import pytest
import yaml

from engine.protocol import Phase
from engine.simulated import SimulatedEngineConfig, TokenRule, expected_answer
from engine.vocabulary import read_vocabulary
from gateway.app import engine_spec
from gateway.settings import load
from tests.api.live import ROOT, Live, unique_tokens
from tests.cluster.running import Run, running, wait_until

pytestmark = pytest.mark.timeout(240)

NAME = "baton-" + "x" * 16_000
SEND_TIMEOUT_S = 5.0
DEADLINE_S = 90.0
NUM_CLIENTS = 50
NUM_STALLED = 15
"""Fewer: on a slow machine too the gateway has to fill their buffers, some 6 MB each, before their answers end."""

ANSWER_TOKENS = 2000
LONGEST_ANSWER_TOKENS = 8000
PIECE_BYTES = 16 * 1024
CLIENT_BUFFER_BYTES = 4096
MAX_ADDED_MIB = 64.0
"""For all clients together. What 50 read slowly is 1.6 GB when each token has an event of its own."""


class Server(Live):
    """The run under test, with its processes."""

    def __init__(self, run: Run, engine: SimulatedEngineConfig):
        self.run = run
        self.engine = engine
        (self._gateway,) = (p for p in map(psutil.Process, run.pids()) if is_gateway(p))
        super().__init__(f"http://127.0.0.1:{run.port}")

    def ask_known(self) -> str:
        """A small answer, complete."""
        response = self.http.post("/v1/completions", json=body(unique_tokens(8), 20) | {"stream": False})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 20
        return ""

    def gateway_mib(self) -> float:
        return self._gateway.memory_info().rss / 2**20

    def num_connections(self) -> int:
        """Open connections of clients to the gateway, through HAProxy."""
        haproxies = self.haproxies()
        ports = {c.raddr.port for pid in haproxies for c in psutil.Process(pid).net_connections("tcp") if c.raddr}
        mine = self._gateway.net_connections("tcp")
        listening = {c.laddr.port for c in mine if c.status == psutil.CONN_LISTEN}
        return len([c for c in mine if c.laddr.port in ports & listening and c.status != psutil.CONN_LISTEN])

    def haproxies(self) -> set[int]:
        return {p.pid for p in map(psutil.Process, self.run.pids()) if p.name() == "haproxy"}


def is_gateway(process: psutil.Process) -> bool:
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::ServeReplica:baton:gateway")


class Stream:
    """One streaming request over a socket of its own with a small buffer, and what was read of its answer."""

    def __init__(self, server: Server, max_tokens: int):
        self.prompt = unique_tokens(16)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CLIENT_BUFFER_BYTES)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(("127.0.0.1", server.run.port))
        self.response: h11.Response | None = None
        self.complete = False
        self.num_body_bytes = 0
        self._server = server
        self._max_tokens = max_tokens
        self._parser = h11.Connection(h11.CLIENT)
        self._rest = b""
        self.token_ids: list[list[int]] = []
        """Of each event that brings any."""
        self.last_event = b""
        content = json.dumps(body(self.prompt, max_tokens)).encode()
        headers = [("Host", "baton"), ("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        request = h11.Request(method="POST", target="/v1/completions", headers=headers)
        for event in (request, h11.Data(data=content), h11.EndOfMessage()):
            self.socket.sendall(self._parser.send(event) or b"")

    def read(self) -> bool:
        """One small read; whether more may come. Raises h11.RemoteProtocolError if the answer breaks off."""
        self._parser.receive_data(self.socket.recv(PIECE_BYTES))
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                return True
            if isinstance(event, h11.Response):
                self.response = event
            elif isinstance(event, h11.Data):
                self._take(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self.complete = True
                return False

    def _take(self, data: bytes) -> None:
        self.num_body_bytes += len(data)
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self.last_event = event
            if event.startswith(b"data: {"):
                (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
                if choice["token_ids"]:
                    self.token_ids.append(choice["token_ids"])

    @property
    def headers(self) -> dict[str, str]:
        assert self.response is not None
        assert self.response.status_code == 200
        return {name.decode(): value.decode() for name, value in self.response.headers}

    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def is_begun(self) -> bool:
        return bool(self.token_ids)

    def assert_whole(self) -> None:
        """Each token once and in order, and the end."""
        answer = [token_id for token_ids in self.token_ids for token_id in token_ids]
        assert answer == expected_answer(self._server.engine, self.prompt, self._max_tokens)
        assert self.complete
        assert (self.last_event, self._rest) == (b"data: [DONE]", b"")

    def read_all(self) -> None:
        while self.read():
            pass

    def assert_cut(self) -> None:
        """Each token that came is right; then the connection ends, and nothing claims that the answer has."""
        with pytest.raises(h11.RemoteProtocolError, match="incomplete chunked read"):
            self.read_all()
        answer = [token_id for token_ids in self.token_ids for token_id in token_ids]
        assert 0 < len(answer) < self._max_tokens
        assert answer == expected_answer(self._server.engine, self.prompt, len(answer))
        assert b"[DONE]" not in self.last_event


def body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": NAME, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "return_token_ids": True,
        "ignore_eos": True,
    }  # fmt: skip


def read_all(streams: list[Stream], server: Server) -> float:
    """Reads all to their ends, a small piece of each in turn. Returns the largest size of the gateway on the way."""
    largest_mib = 0.0
    reading = list(streams)
    while reading:
        largest_mib = max(largest_mib, server.gateway_mib())
        reading = [stream for stream in reading if stream.read()]
    return largest_mib


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = yaml.safe_load((ROOT / "configs/simulated.yaml").read_text())
    config["model"] |= {"path": str(ROOT / "configs/models/mini"), "served_name": NAME}
    config["gateway"] = {"send_timeout_s": SEND_TIMEOUT_S}
    config["simulation"]["decode_step_s"] = 0.0025
    path = tmp_path_factory.mktemp("slow-clients") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    settings = load(path)
    engine = engine_spec(settings, Phase.DECODE).simulation
    engine = replace(engine, token_rule=TokenRule(vocabulary=read_vocabulary(settings.model.path).plain))
    with running(path, "gateway.app:build") as run:
        server = Server(run, engine)
        yield server
        server.close()


def test_clients_that_read_slowly_get_every_token_and_cost_the_gateway_little_memory(server: Server) -> None:
    read_all([Stream(server, ANSWER_TOKENS) for _ in range(2)], server)
    server.quiet(DEADLINE_S)
    before_mib = server.gateway_mib()
    streams = [Stream(server, ANSWER_TOKENS) for _ in range(NUM_CLIENTS)]
    largest_mib = read_all(streams, server)
    server.quiet(DEADLINE_S)
    after_mib = server.gateway_mib()
    for stream in streams:
        stream.assert_whole()
        assert len(stream.token_ids) < ANSWER_TOKENS / 1.1, "tokens were not merged into events"
    added = f"{NUM_CLIENTS} slow clients added {largest_mib - before_mib:.1f} MiB to {before_mib:.1f} MiB"
    assert largest_mib - before_mib < MAX_ADDED_MIB, added
    assert after_mib - before_mib < MAX_ADDED_MIB, f"{added}, of which {after_mib - before_mib:.1f} MiB stayed"


def test_clients_that_stop_reading_are_cut_off_while_others_are_served(server: Server) -> None:
    server.quiet(DEADLINE_S)
    before_mib = server.gateway_mib()
    streams = [Stream(server, LONGEST_ANSWER_TOKENS) for _ in range(NUM_STALLED)]
    for stream in streams:
        while not stream.is_begun():
            stream.read()
    num_served, largest_mib = 0, before_mib

    def are_gone() -> bool:
        nonlocal num_served, largest_mib
        server.ask_known()
        num_served += 1
        largest_mib = max(largest_mib, server.gateway_mib())
        return server.is_quiet()

    server.wait(are_gone, "requests of clients that do not read are gone", DEADLINE_S)
    assert num_served > 1
    added = f"{NUM_STALLED} clients that do not read added {largest_mib - before_mib:.1f} MiB to {before_mib:.1f} MiB"
    assert largest_mib - before_mib < MAX_ADDED_MIB, added

    for stream in streams:
        assert server.receipt(stream.headers["x-baton-request-id"])["outcome"]["status"] == "aborted"
    # Their connections go although they still read nothing, and what is unsent with them.
    server.wait(
        lambda: server.num_connections() < NUM_STALLED / 2, "the gateway lets go of their connections", DEADLINE_S
    )
    for stream in streams:
        stream.assert_cut()


RELOAD = """
import sys
import ray
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, configure_logging=False)
haproxy = ray.get_actor("SERVE_PROXY_ACTOR-" + ray.get_runtime_context().get_node_id())
for draining in (True, False):
    ray.get(haproxy.update_draining.remote(draining), timeout=30)
"""


def reload_haproxy(run: Run) -> None:
    """Serve's own graceful reload, the one it does when its backends change: to "draining", and back."""
    (raylet,) = (p for p in map(psutil.Process, run.pids()) if p.name() == "raylet")
    (address,) = (a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--gcs-address="))
    command = [sys.executable, "-c", RELOAD, address]
    ended = subprocess.run(command, env=raylet.environ(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr


def test_a_stream_goes_on_to_its_end_through_a_reload_of_haproxy(server: Server) -> None:
    server.quiet(DEADLINE_S)
    (old,) = server.haproxies()
    stream = Stream(server, LONGEST_ANSWER_TOKENS)
    while not stream.is_begun():
        stream.read()
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(reload_haproxy, server.run)
        # A client that did not read meanwhile would be a stalled one, if the machine is slow.
        while not reload.done() and stream.read():
            pass
        reload.result()
    assert server.haproxies() > {old}, "there was no reload, or the old HAProxy did not wait for the stream"
    assert server.load("decode")["num_running_requests"] == 1, "the stream ended before the reload"
    stream.read_all()
    stream.assert_whole()
    stream.socket.close()
    wait_until(lambda: len(server.haproxies() - {old}) == len(server.haproxies()) == 1, "the old one ends", DEADLINE_S)
