"""Engines, replicas and gateways that die, over real engines: who notices how soon, and that the run is whole again."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.api.live import KNOWN_CHAT, local_config
from tests.cluster.control import Control
from tests.cluster.running import Run, running, wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(480)]

NOTICED_S = 2.0
DETECTED_S = 5.0
COLD_STARTS = 1.5
"""A pool is whole DETECTED_S and so many cold starts of an engine after it has lost one."""

PATIENCE_S = 120.0


class Site:
    """A run with one replica of each kind."""

    def __init__(self, run: Run) -> None:
        self.url = f"http://127.0.0.1:{run.port}"
        self.control = Control(run)
        begin_s, end_s = (seconds_of(run.output, state) for state in ("decode: starting", "decode: ready"))
        self.whole_s = DETECTED_S + COLD_STARTS * (end_s - begin_s)

    def replicas(self, pool: str) -> list[dict[str, Any]]:
        """As the gateway sees them; none while there is no gateway."""
        try:
            response = httpx.get(f"{self.url}/baton/status", timeout=NOTICED_S)
        except httpx.HTTPError:
            return []
        return response.json()["pools"][pool] if response.status_code == 200 else []

    def ready(self, pool: str) -> set[str]:
        return {replica["id"] for replica in self.replicas(pool) if replica["ready"]}

    def is_whole_again(self, pool: str, without: set[str], since_s: float) -> None:
        def is_whole() -> bool:
            ready = self.ready(pool)
            return len(ready) == 1 and not ready & without

        wait_until(is_whole, f"{pool} to be whole again", self.whole_s - (time.monotonic() - since_s))
        print(f"{pool} is whole {time.monotonic() - since_s:.1f} s after its loss; {self.whole_s:.1f} s are allowed")
        assert self.ask() == 200

    def ask(self) -> int:
        try:
            return httpx.post(f"{self.url}/v1/chat/completions", json=KNOWN_CHAT, timeout=PATIENCE_S).status_code
        except httpx.HTTPError:
            return 0


def seconds_of(output: str, state: str) -> float:
    """When the run said so, from its start."""
    found = re.search(rf"\[\s*([\d.]+) s\] {re.escape(state)}", output)
    assert found, output
    return float(found.group(1))


def engine_of(replica: psutil.Process) -> psutil.Process:
    (engine,) = (child for child in replica.children() if "EngineCore" in child.name())
    return engine


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    config = local_config() | {"runtime": {"demo_prompt": None}}
    path: Path = tmp_path_factory.mktemp("dead-engines") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with running(path, "tests.cluster.scalable_app:build") as run:
        site = Site(run)
        yield site
        site.control.close()


def test_an_engine_that_dies_takes_its_replica_along_and_the_pool_is_soon_whole(site: Site) -> None:
    (replica_id,), (pid,) = site.ready("decode"), site.control.pids("decode").values()
    replica = psutil.Process(pid)
    killed_s = time.monotonic()
    engine_of(replica).send_signal(signal.SIGKILL)
    wait_until(lambda: not site.ready("decode"), "the gateway to know", NOTICED_S)
    wait_until(lambda: is_gone(replica), "the end of the replica", DETECTED_S - (time.monotonic() - killed_s))
    print(f"the replica is gone {time.monotonic() - killed_s:.2f} s after its engine")
    site.is_whole_again("decode", {replica_id}, killed_s)


def test_an_engine_does_not_outlive_its_replica_and_the_pool_is_soon_whole(site: Site) -> None:
    (replica_id,), (pid,) = site.ready("prefill"), site.control.pids("prefill").values()
    engine = engine_of(psutil.Process(pid))
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(engine), "the end of the engine", NOTICED_S)
    print(f"the engine is gone {time.monotonic() - killed_s:.2f} s after its replica")
    site.is_whole_again("prefill", {replica_id}, killed_s)


def test_a_gateway_starts_although_a_pool_is_empty(site: Site) -> None:
    site.control.scale("prefill", 0)
    wait_until(lambda: not site.replicas("prefill") and site.replicas("decode"), "an empty prefill pool", PATIENCE_S)
    (pid,) = site.control.pids("gateway").values()
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in site.control.pids("gateway").values(), "Serve to know", PATIENCE_S)
    wait_until(lambda: site.ask() == 200, "another gateway to answer", PATIENCE_S)
    print(f"answered {time.monotonic() - killed_s:.1f} s after the loss of the only gateway")
    assert site.replicas("prefill") == []
