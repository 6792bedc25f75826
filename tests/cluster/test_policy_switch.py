"""A switch of policy under load, with two gateways: no request fails, no replica is replaced, and gateways that start
later decide by the new one."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner, Result

from gateway import cli, client, receipt_log
from tests.cluster.control import Control
from tests.cluster.running import Run, running, wait_until

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = f"""
model:
  path: {CONFIGS / "models" / "mini"}
  served_name: baton-mini
  max_model_len: 8192
  dtype: float32
simulation: {{decode_step_s: 0.005}}
pools:
  decode:
    replicas: 2
    device: cpu
    num_cpus: 0.5
    engine: {{block_size_tokens: 32, max_num_batched_tokens: 8192, max_num_seqs: 256}}
gateway: {{replicas: 2, num_cpus: 0.5}}
routing: {{receipts_folder: ./receipts}}
runtime: {{num_cpus: 4, demo_prompt: null}}
"""
DEPLOYMENTS = ("gateway", "decode")
CLIENTS = 8
MORE_ANSWERS = 40
DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the gateways' files."""
    return tmp_path_factory.mktemp("switch") / "receipts"


@pytest.fixture(scope="module")
def run(receipts: Path) -> Iterator[Run]:
    config = receipts.parent / "config.yaml"
    config.write_text(CONFIG)
    with running(config, "tests.cluster.scalable_app:build") as run:
        yield run


@pytest.fixture(scope="module")
def control(run: Run) -> Iterator[Control]:
    control = Control(run)
    yield control
    control.close()


@dataclass
class Load:
    """Clients that stream one answer after the other. `receipts`: the ids of those that came whole, in order."""

    receipts: list[str]
    failures: list[str]

    def goes_on(self) -> None:
        """Waits for answers that were asked for after now."""
        enough = len(self.receipts) + CLIENTS + MORE_ANSWERS
        wait_until(lambda: len(self.receipts) >= enough or self.failures, "more answers", DEADLINE_S)


@contextmanager
def under_load(url: str) -> Iterator[Load]:
    load, ended = Load([], []), threading.Event()

    def ask_on(number: int) -> None:
        body = {"model": "baton-mini", "prompt": [50 + number] * 64, "max_tokens": 20, "stream": True}
        with httpx.Client(timeout=DEADLINE_S) as http:
            while not ended.is_set():
                # Every other client opens a connection for each request: HAProxy must take those as well.
                headers = {"connection": "close"} if number % 2 else {}
                try:
                    response = http.post(f"{url}/v1/completions", json=body, headers=headers)
                except httpx.HTTPError as error:
                    load.failures.append(repr(error))
                    continue
                if response.status_code != 200 or not response.text.rstrip().endswith("data: [DONE]"):
                    load.failures.append(f"{response.status_code}: {response.text[-300:]}")
                load.receipts.append(response.headers["x-baton-request-id"])

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[Future[None]] = [pool.submit(ask_on, number) for number in range(CLIENTS)]
        try:
            yield load
        finally:
            ended.set()
        for client_ in clients:
            client_.result()


def policy(url: str, *arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["policy", *arguments, "--url", url])
    assert result.exit_code == 0, result.output
    return result


def decisions(folder: Path, gateway: str) -> list[tuple[str, str | None]]:
    """By which policies a gateway has decided, the live and the shadow one, request after request."""
    receipts = list(receipt_log.read(folder / f"{gateway}{receipt_log.SUFFIX}"))
    receipts.sort(key=lambda receipt: receipt.created_s)
    return [(receipt.policy, receipt.shadow.policy if receipt.shadow else None) for receipt in receipts]


def policies_of(url: str) -> dict[str, str]:
    return {gateway: one["policy"] for gateway, one in client.policies(url)["gateways"].items()}


def switches(url: str) -> dict[str, float]:
    """How many each gateway has counted."""
    counted: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=DEADLINE_S).text):
        for sample in family.samples:
            if sample.name == "baton_policy_switches_total":
                gateway = sample.labels["gateway"]
                counted[gateway] = counted.get(gateway, 0.0) + sample.value
    return counted


def test_a_switch_under_load_fails_no_request_and_replaces_no_replica(
    run: Run, receipts: Path, control: Control
) -> None:
    url = f"http://127.0.0.1:{run.port}"
    before = {name: control.pids(name) for name in DEPLOYMENTS}
    assert {name: len(pids) for name, pids in before.items()} == {"gateway": 2, "decode": 2}
    with under_load(url) as load:
        load.goes_on()
        shown = policy(url, "llm-d", "--shadow", "dynamo").stdout
        load.goes_on()
        policy(url, "round-robin", "--shadow", "none")
        load.goes_on()
    assert load.failures == []
    # For a moment after it has followed, a gateway is not yet running in Serve's eyes.
    wait_until(lambda: {name: control.pids(name) for name in DEPLOYMENTS} == before, "the same replicas", DEADLINE_S)
    assert all(gateway in shown for gateway in before["gateway"])
    assert shown.count("llm-d") == shown.count("dynamo") == 2

    def decided() -> list[list[tuple[str, str | None]]]:
        return [decisions(receipts, gateway) for gateway in before["gateway"]]

    wait_until(lambda: sum(map(len, decided())) == len(load.receipts), "a receipt of each request", DEADLINE_S)
    in_order = [("least-tokens", None), ("llm-d", "dynamo"), ("round-robin", None)]
    assert [[one for one, _ in itertools.groupby(made)] for made in decided()] == [in_order, in_order]
    assert switches(url) == dict.fromkeys(before["gateway"], 2.0)
    wait_until(lambda: "policy round-robin, shadow none, as told" in run.output, run.output, DEADLINE_S)


def test_an_application_on_a_ray_cluster_is_switched_by_the_cluster_address(run: Run, control: Control) -> None:
    url = f"http://127.0.0.1:{run.port}"
    before = {name: control.pids(name) for name in DEPLOYMENTS}
    command = [sys.executable, "-m", "gateway.cli", "policy", "dynamo", "--url", url]
    done = subprocess.run(
        [*command, "--ray-address", control.ray_address],
        env=control.environment,
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dynamo") == 2
    wait_until(lambda: {name: control.pids(name) for name in DEPLOYMENTS} == before, "the same replicas", DEADLINE_S)


def test_a_gateway_that_starts_later_decides_by_what_was_switched_to(run: Run, control: Control) -> None:
    url = f"http://127.0.0.1:{run.port}"
    policy(url, "session-affinity")
    first = set(control.pids("gateway"))
    control.scale("gateway", 3)
    wait_until(lambda: len(policies_of(url)) == 3, "a third gateway", DEADLINE_S)
    told = policies_of(url)
    assert set(told) > first
    assert set(told.values()) == {"session-affinity"}
    policy(url, "dynamo")
    wait_until(lambda: set(control.pids("gateway")) == set(told), "the same three gateways", DEADLINE_S)
    wait_until(lambda: policies_of(url) == dict.fromkeys(told, "dynamo"), "what all three decide by", DEADLINE_S)
