"""Gateways of one deployment over Ray Serve and HAProxy: each speaks for all, and none waits long for another."""

import os
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.peers_ray import TIMEOUT_S
from tests.cluster.running import Run, running, wait_until

CONFIG = """
model: {path: trivial/model, served_name: trivial}
pools: {decode: {device: cpu}}
gateway: {replicas: 2, num_cpus: 0.5}
runtime: {demo_prompt: null}
"""
DEADLINE_S = 60.0
SLACK_S = 1.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    config = tmp_path_factory.mktemp("peers") / "config.yaml"
    config.write_text(CONFIG)
    with running(config, "tests.cluster.peers_app:build") as run:
        wait_until(lambda: len(members(run)) == 2, "two gateways that know each other", DEADLINE_S)
        yield run


def get(run: Run, path: str) -> httpx.Response:
    """Over a connection of its own. HAProxy may hand it to a gateway that hangs: then again."""
    response: list[httpx.Response] = []

    def answered() -> bool:
        try:
            response.append(httpx.get(f"http://127.0.0.1:{run.port}{path}", timeout=TIMEOUT_S + SLACK_S))
        except httpx.HTTPError:
            return False
        return response[-1].status_code == 200

    wait_until(answered, f"an answer to {path}", DEADLINE_S)
    return response[-1]


def members(run: Run) -> list[str]:
    """The gateways, if all of them agree."""
    views = {status["gateway"]: status["gateways"] for status in (get(run, "/baton/status").json() for _ in range(8))}
    agreed = sorted(views)
    return agreed if all(view == agreed for view in views.values()) else []


def scraped(run: Run, sample_name: str) -> dict[str, float]:
    """A sample by gateway, from one scrape."""
    families = text_string_to_metric_families(get(run, "/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == sample_name]
    return {sample.labels["gateway"]: sample.value for sample in samples}


def gateway_processes(run: Run) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in run.pids()]
    return [process for process in found if "ServeReplica:baton:gateway" in " ".join(process.cmdline())]


def test_every_scrape_speaks_for_both_gateways(run: Run) -> None:
    before = sum(scraped(run, "work_total").values())
    for count in range(1, 11):
        for _ in range(3):
            get(run, "/work")
        by_gateway = scraped(run, "work_total")
        assert len(by_gateway) == 2
        assert sum(by_gateway.values()) - before == 3 * count
    assert min(by_gateway.values()) > 0, "all requests went to one gateway: the sum proves nothing"
    assert set(scraped(run, "baton_gateway_up").values()) == {1.0}


def test_a_receipt_is_found_from_the_other_gateway(run: Run) -> None:
    for owner in members(run):
        answers = [get(run, f"/receipts/of-{owner}").json() for _ in range(8)]
        assert all(answer["missing"] == [] for answer in answers)
        found = [list(answer["found"].values()) for answer in answers]
        # The owner itself is asked every other time, and has only the other one to ask.
        assert found.count([{"gateway": owner}]) == found.count([None]) == 4


def test_a_gateway_that_dies_is_no_member_any_more_and_its_successor_is_one(run: Run) -> None:
    both = members(run)
    os.kill(gateway_processes(run)[0].pid, signal.SIGKILL)

    def is_replaced() -> bool:
        found = members(run)
        return len(found) == 2 and len(set(found) - set(both)) == 1

    wait_until(is_replaced, "a new gateway in place of the dead one", DEADLINE_S)
    assert sorted(scraped(run, "baton_gateway_up")) == members(run)


def test_a_gateway_that_hangs_is_left_out_in_time_and_named(run: Run) -> None:
    both = members(run)
    process = gateway_processes(run)[0]
    process.send_signal(signal.SIGSTOP)
    try:
        up = scraped(run, "baton_gateway_up")
        assert sorted(up) == both
        assert sorted(up.values()) == [0.0, 1.0]
        (hanging,) = (gateway for gateway, value in up.items() if value == 0.0)
        assert hanging not in scraped(run, "work_total")
        answer = get(run, f"/receipts/of-{hanging}").json()
        assert answer["missing"] == [hanging]
        assert TIMEOUT_S <= answer["waited_s"] < TIMEOUT_S + SLACK_S
    finally:
        process.send_signal(signal.SIGCONT)
    wait_until(lambda: set(scraped(run, "baton_gateway_up").values()) == {1.0}, "both in a scrape", DEADLINE_S)
