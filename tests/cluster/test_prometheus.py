"""A real Prometheus scrapes two gateways before a simulated engine, and every question of dashboard and alerts has an
answer.

It takes `prometheus` and `promtool`, which no package registry of Python has: from the folder that BATON_PROMETHEUS
names, or from PATH (Debian's package `prometheus` has both). Without them these tests are skipped.
"""

import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.ports import free_ports
from gateway.agents.tenants import key_sha256, new_key
from tests import monitoring
from tests.api.live import KNOWN_CHAT, ROOT, served
from tests.cluster.running import wait_until
from tests.monitoring import Query

pytestmark = pytest.mark.timeout(240)

SKIPPED = (
    f"neither PATH nor the folder of {monitoring.TOOLS_VARIABLE} has %s; Debian's package `prometheus` has it "
    "(`apt-get download prometheus && dpkg -x prometheus_*.deb DIR`, then DIR/usr/bin)"
)
needs_prometheus = pytest.mark.skipif(monitoring.tool("prometheus") is None, reason=SKIPPED % "prometheus")
needs_promtool = pytest.mark.skipif(monitoring.tool("promtool") is None, reason=SKIPPED % "promtool")

RULE_TESTS = Path(__file__).parent / "alert_rules_test.yaml"
DEADLINE_S = 60.0
SCRAPE_S = 1
NUM_REQUESTS = 16
NO_SPLIT = ('split="yes"', "baton_handoff_seconds")
"""Simulated engines are of one pool: what divides by split prompts has no number here."""


def promtool(*arguments: str) -> str:
    path = monitoring.tool("promtool")
    assert path is not None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    assert f"{len(monitoring.alerts())} rules found" in promtool("check", "rules", str(monitoring.ALERTS))
    assert "SUCCESS" in promtool("check", "config", str(monitoring.PROMETHEUS))


@needs_promtool
def test_alerts_fire_when_they_must_and_stay_silent_when_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(RULE_TESTS))


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    cases: dict[str, set[bool]] = {}
    for group in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in group["alert_rule_test"]:
            cases.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert cases == {rule["alert"]: {True, False} for rule in monitoring.alerts()}


@dataclass
class Watched:
    """A Prometheus that scrapes a Baton, and the keys of its tenants."""

    url: str
    prometheus: httpx.Client
    keys: dict[str, str]

    def get(self, path: str, **query: str) -> Any:
        response = self.prometheus.get(f"/api/v1/{path}", params=query)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, expression: str) -> list[float]:
        """One for each series; of a scalar its own."""
        data = self.get("query", query=expression)
        series = [{"value": data["result"]}] if data["resultType"] == "scalar" else data["result"]
        return [float(one["value"][1]) for one in series]

    def value(self, expression: str) -> float | None:
        values = self.values(expression)
        return values[0] if len(values) == 1 else None

    def ask(self, priority: str) -> None:
        headers = {"authorization": f"Bearer {self.keys['alice']}", "x-baton-priority": priority}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=KNOWN_CHAT, headers=headers, timeout=DEADLINE_S)
        assert response.status_code == 200, response.text


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    keys = {name: new_key() for name in ("alice", "prometheus")}
    config = yaml.safe_load((ROOT / "configs/simulated.yaml").read_text())
    config["model"]["path"] = str(ROOT / "configs/models/mini")
    config["gateway"] = {"replicas": 2, "num_cpus": 0.5}
    config["tenants"] = [
        {
            "name": name,
            "api_key_sha256": [key_sha256(key.encode()).hex()],
            "operator": name == "prometheus",
            "max_priority": "high",
        }
        for name, key in keys.items()
    ]
    with served(config, folder) as url, prometheus(url, keys["prometheus"], folder) as client:
        watched = Watched(url, client, keys)
        count = 'sum(baton_requests_total{job="baton"})'
        wait_until(lambda: watched.value(count) == 0, "a first scrape", DEADLINE_S)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(watched.ask, ("low", "normal", "high", "normal") * (NUM_REQUESTS // 4)))
        assert httpx.get(f"{url}/v1/models").status_code == 401
        wait_until(lambda: watched.value(count) == NUM_REQUESTS, "every request to be counted once", DEADLINE_S)
        grown = 'sum(rate(baton_requests_total{job="baton"}[1m])) > 0'
        wait_until(lambda: watched.value(grown), "two scrapes around the requests", DEADLINE_S)
        yield watched


@contextmanager
def prometheus(url: str, api_key: str, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with the configuration that ships, but for the target, the key and the pace."""
    config = yaml.safe_load(monitoring.PROMETHEUS.read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(monitoring.ALERTS)]
    (scrape,) = config["scrape_configs"]
    key_file = folder / "baton.key"
    key_file.write_text(api_key)
    scrape |= {
        "scrape_timeout": f"{SCRAPE_S}s",
        "static_configs": [{"targets": [url.removeprefix("http://")]}],
        "authorization": {"credentials_file": str(key_file)},
    }
    config_path, log_path = folder / "prometheus.yaml", folder / "prometheus.log"
    config_path.write_text(yaml.safe_dump(config))
    port = free_ports("127.0.0.1")[0]
    command = [
        str(monitoring.tool("prometheus")), f"--config.file={config_path}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with log_path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as client:
                wait_until(lambda: process.poll() is not None or is_ready(client), "Prometheus", DEADLINE_S)
                assert process.poll() is None, log_path.read_text()
                yield client
        finally:
            process.terminate()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def assert_answered(watched: Watched, query: Query) -> None:
    values = watched.values(query.text)
    assert values, f"{query.where} has no data: {query.text}"
    if not any(part in query.text for part in NO_SPLIT):
        assert not all(map(math.isnan, values)), f"{query.where} has no number: {query.text}"


@needs_prometheus
@pytest.mark.parametrize("query", monitoring.dashboard_queries(), ids=lambda query: query.where)
def test_every_query_of_the_dashboard_has_data(watched: Watched, query: Query) -> None:
    assert_answered(watched, query)


@needs_prometheus
@pytest.mark.parametrize("query", monitoring.alert_queries(), ids=lambda query: query.where)
def test_what_alerts_compare_has_data(watched: Watched, query: Query) -> None:
    assert_answered(watched, query)


@needs_prometheus
def test_the_choice_of_jobs_has_baton(watched: Watched) -> None:
    assert watched.get("label/job/values", **{"match[]": "baton_gateway_up"}) == [monitoring.JOB]


@needs_prometheus
def test_prometheus_evaluates_every_rule_and_none_fires_on_a_healthy_cluster(watched: Watched) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "all rules to be evaluated", DEADLINE_S)
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in monitoring.alerts()}
    assert [rule for rule in rules() if rule["health"] != "ok" or rule["state"] == "firing"] == []


@needs_prometheus
def test_two_gateways_count_each_request_once_and_the_pools_once(watched: Watched) -> None:
    own = watched.values("sum by (gateway) (baton_requests_total)")
    assert len(own) == 2
    assert all(own), "one gateway had all the requests"
    assert sum(own) == NUM_REQUESTS
    assert watched.value("sum(baton_output_tokens_total)") == NUM_REQUESTS * KNOWN_CHAT["max_tokens"]
    assert watched.value("sum(baton_queue_wait_seconds_count)") == NUM_REQUESTS
    assert watched.value('sum(baton_tenant_requests_total{tenant="alice",status="finished"})') == NUM_REQUESTS
    assert watched.value("sum(baton_gateway_up)") == watched.value("max(baton_gateways_wanted)") == 2
    for state in ("wanted", "ready"):
        assert watched.values(f'baton_pool_replicas{{pool="decode",state="{state}"}}') == [1, 1]
    num_blocks = watched.values('baton_pool_kv_blocks{state="total"}')
    assert len(num_blocks) == 2
    assert num_blocks[0] == num_blocks[1] > 0


@needs_prometheus
def test_each_class_and_each_tenant_has_its_series_whether_it_has_asked_or_not(watched: Watched) -> None:
    assert len(watched.values("max by (priority) (baton_oldest_wait_seconds)")) == 3
    tenants = {one["metric"]["tenant"] for one in watched.get("query", query="baton_tenant_requests_total")["result"]}
    assert {"alice", "prometheus"} <= tenants
    assert "none" not in tenants
