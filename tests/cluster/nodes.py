"""Owns a Ray cluster of several nodes on one machine: a raylet for each, with an address and labels of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.ports import free_ports
from gateway.runtime import processes
from gateway.runtime.environment import HTTP_HOST, LOOPBACK, RunPaths, environment, free_fallback_port, variables
from gateway.runtime.local import base_dir
from gateway.settings import Settings
from tests.cluster.operations import documented
from tests.cluster.running import wait_until

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
NODE_VARIABLE = "BATON_TEST_NODE"
"""What every process of a node carries, Ray's and the engines' alike."""

START_S = 120.0
STOP_S = 10.0
OBJECT_STORE_BYTES = 80 * 1024 * 1024


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as Ray sees it. All are on loopback, each at an address of its own."""

    name: str
    address: str
    num_cpus: int
    labels: dict[str, str] = field(default_factory=dict)
    num_gpus: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    """What this machine's environment has beside that of all."""
    words: tuple[str, ...] = ()
    """Further words of its `ray start`."""


HEAD = Node("head", "127.0.0.10", 1)
"""Not 127.0.0.1, which Ray takes for no address and replaces with one that others can reach."""


class Nodes:
    """A head and what has joined it. Everything it starts carries this process's run marker."""

    def __init__(self, settings: Settings, build: str, entry: Node | None = None) -> None:
        """`build` names a function `Settings -> ray.serve.Application` as module:function. `entry` is the node whose
        HAProxy clients ask, and then each node has one at its own address; else there is one, the head's."""
        self.settings = settings
        self._build = build
        self._entry = entry
        # Short: the paths of sockets below it must fit into 107 bytes.
        self.paths = RunPaths(Path(tempfile.mkdtemp(prefix="n-", dir=base_dir())))
        for folder in (self.paths.haproxy, self.paths.logs, self.paths.tmp, self.paths.ray):
            folder.mkdir(mode=0o700)
        self.paths.token.write_text("0" * 64)
        self._began_s = time.time()
        self._owner = processes.this_process()
        spare_port = free_fallback_port(settings.gateway.port)
        table = variables(settings, self.paths, str(self._owner), spare_port, cores=2, open_files=8192)
        # For a local run Ray is told that it is alone, and then no node may join.
        own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        # Of several nodes on few cores each part starts slowly, and Serve gives a proxy up after three such times.
        own |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30"}
        # How long a gateway that is replaced stays for load balancers before Serve's own, of which there are none.
        own |= {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10"}
        self._environment = environment(table, os.environ) | own
        self._port, self._client_port, self._dashboard_port = free_ports(HEAD.address, 3)
        self._commands: dict[str, subprocess.Popen[bytes]] = {}
        self._control: subprocess.Popen[str] | None = None
        self._names: dict[str, str] = {}

    @property
    def url(self) -> str:
        host = self._entry.address if self._entry else LOOPBACK
        return f"http://{host}:{self.settings.gateway.port}"

    # -- nodes

    @property
    def _address(self) -> str:
        return f"{HEAD.address}:{self._port}"

    def start_head(self, head: Node = HEAD) -> None:
        """Also once more, after it was killed: it has the same address and ports, and an empty disk."""
        words = [
            "--head",
            f"--port={self._port}",
            "--include-dashboard=false",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={self._client_port}",
        ]
        self._start(head, words)
        self._wait_for(head)
        self._end_control()
        argv = [sys.executable, "-m", "tests.cluster.node_control", self._address, self._build]
        log = (self.paths.logs / "control.log").open("wb")
        self._control = subprocess.Popen(
            argv, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def _end_control(self) -> None:
        if self._control is not None:
            self._control.kill()
            self._control.communicate()

    def join(self, *nodes: Node) -> None:
        """Returns when Ray knows these nodes."""
        for node in nodes:
            self._start(node, [f"--address={self._address}"])
        for node in nodes:
            self._wait_for(node)
        wanted = {node.address for node in nodes}
        wait_until(lambda: wanted <= {one["address"] for one in self.nodes()}, f"{wanted} to join", START_S)

    def _start(self, node: Node, words: list[str]) -> None:
        # A folder of its own: nodes that start at once in one would take the same sockets.
        argv = [
            RAY, "start", "--block", "--disable-usage-stats", *words,
            f"--temp-dir={self.paths.ray / node.name}",
            f"--node-ip-address={node.address}", f"--num-cpus={node.num_cpus}", f"--num-gpus={node.num_gpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}", f"--labels={json.dumps(node.labels)}",
            f"--resources={json.dumps(node.resources)}", "--include-log-monitor=false", *node.words,
        ]  # fmt: skip
        self._names[node.address] = node.name
        own = {NODE_VARIABLE: node.name} | node.variables
        if self._entry is not None:
            own |= {HTTP_HOST: node.address}
        log = (self.paths.logs / f"{node.name}.log").open("wb")
        self._commands[node.name] = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=self._environment | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A session of its own would be a group of the scheduler, which may leave another one waiting for seconds.
            process_group=0,
        )

    def _wait_for(self, node: Node) -> None:
        log, command = self.paths.logs / f"{node.name}.log", self._commands[node.name]

        def has_started_or_ended() -> bool:
            return b"Ray runtime started." in log.read_bytes() or command.poll() is not None

        wait_until(has_started_or_ended, f"Ray of {node.name} to start", START_S)
        assert command.poll() is None, log.read_text()

    def processes_of(self, name: str) -> list[processes.ProcessId]:
        """Every living process of one node: its raylet, its agents, its replicas, their engines."""
        marker = f"{NODE_VARIABLE}={name}".encode()
        found: list[processes.ProcessId] = []
        for process in processes.marked(self._owner):
            with suppress(OSError):
                if marker in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
        return found

    def kill(self, name: str) -> None:
        """The machine of a node loses its power: all its processes end at once, the raylet first."""
        found = self.processes_of(name)
        found.sort(key=lambda process: _name(process.pid) != "raylet")
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not self.processes_of(name), f"the end of {name}", STOP_S)
        self._commands.pop(name).wait()
        shutil.rmtree(self.paths.ray / name)

    def name_of(self, address: str) -> str:
        """Of the node that has or had this address."""
        return self._names[address]

    def drain(self, name: str) -> None:
        """Asks Ray to place nothing there any more, with the command of docs/operations.md."""
        (node_id,) = [one["id"] for one in self.nodes() if self._names[one["address"]] == name]
        (words,) = documented("Node groups: adding and removing", "ray", "drain-node")
        argv = [RAY, *({"HEAD:6379": self._address, "ID": node_id}.get(word, word) for word in words[1:])]
        done = subprocess.run(argv, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=START_S)
        assert done.returncode == 0, done.stdout + done.stderr

    # -- what runs

    def deploy(self, settings: Settings | None = None) -> None:
        """`settings` other than the first are an update of what runs; they have the same port."""
        self.settings = settings or self.settings
        self._ask("deploy", self.settings.model_dump_json(), LOOPBACK, "EveryNode" if self._entry else "HeadOnly")

    def deploy_config(self, config: dict[str, Any]) -> None:
        """A Serve config, which names the application itself."""
        self._ask("deploy_config", json.dumps(config))

    def nodes(self) -> list[dict[str, Any]]:
        return self._ask("nodes")

    def status(self) -> dict[str, Any]:
        return self._ask("status")

    def running(self, deployment: str) -> list[dict[str, Any]]:
        """The replicas that Serve takes for running."""
        replicas = self.status()["replicas"]
        return [one for one in replicas if one["deployment"] == deployment and one["state"] == "RUNNING"]

    def placement_groups(self) -> list[dict[str, Any]]:
        return self._ask("placement_groups")

    def _ask(self, *words: Any) -> Any:
        assert self._control is not None
        assert self._control.stdin is not None
        assert self._control.stdout is not None
        self._control.stdin.write(json.dumps(words) + "\n")
        self._control.stdin.flush()
        answer = self._control.stdout.readline()
        assert answer, (self.paths.logs / "control.log").read_text()[-4000:]
        return json.loads(answer)

    # -- the end

    def left(self) -> list[processes.ProcessId]:
        return processes.marked(self._owner)

    def stop(self) -> None:
        """Ends everything that was started here, however that stands."""
        processes.end_processes(self.left)
        for command in [*self._commands.values(), self._control]:
            if command is not None:
                command.wait(STOP_S)
        processes.remove_orphaned_semaphores(self._began_s)

    def remove_files(self) -> None:
        shutil.rmtree(self.paths.root, ignore_errors=True)


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@contextmanager
def cluster(
    settings: Settings, build: str, nodes: list[Node], head: Node = HEAD, entry: Node | None = None
) -> Iterator[Nodes]:
    """A cluster with these nodes and nothing deployed; at the end nothing of it may be left."""
    found = Nodes(settings, build, entry)
    try:
        found.start_head(head)
        found.join(*nodes)
        yield found
    finally:
        found.stop()
        left = found.left()
        found.remove_files()
    assert left == []
