"""Gateways and workers over real Ray Serve, with simulated engines: what each knows of the other, and what becomes of
the streams when one of them leaves or dies."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.cluster.control import Control
from tests.cluster.running import Run, running, wait_until
from tests.cluster.streams import Stream

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"
NUM_GATEWAYS = 2
NUM_WORKERS = 4
TOKEN_INTERVAL_S = 0.05
LONG_TOKENS = 200
PATIENCE_S = 60.0
START_S = 120.0
NUM_READINGS = 5
NUM_CLIENTS = 10
UPDATE_S = 240.0

DEATHS = (signal.SIGKILL, signal.SIGTERM)
NOTICED_S = 2.0
"""How soon a worker has ended what a gateway left that has vanished, and a gateway what was on a worker that has."""

DRAINED_S = 2.0
SERVE_LETS_GO_S = 3.0
"""What Serve takes to end a replica that has drained: its check every 0.5 s, and the end of the process."""


class Site:
    """A run of gateways and workers."""

    def __init__(self, run: Run) -> None:
        self.url = f"http://127.0.0.1:{run.port}"
        self.control = Control(run)

    def status(self) -> dict[str, Any]:
        """One gateway's view, over a connection of its own: HAProxy chooses whose."""
        while True:
            try:
                response = httpx.get(f"{self.url}/baton/status", timeout=NOTICED_S)
            except httpx.HTTPError:
                continue
            if response.status_code == 200:
                return response.json()

    def views(self, num_gateways: int = NUM_GATEWAYS) -> dict[str, dict[str, dict[str, Any]]]:
        """The decode replicas by id, as each gateway sees them."""
        views: dict[str, dict[str, dict[str, Any]]] = {}

        def all_have_answered() -> bool:
            status = self.status()
            views[status["gateway"]] = {replica["id"]: replica for replica in status["pools"]["decode"]}
            return len(views) == num_gateways

        wait_until(all_have_answered, f"a status of {num_gateways} gateways; answered have {list(views)}", PATIENCE_S)
        return views

    def missing(self, num_workers: int) -> str:
        """Why not every gateway and every worker is there, ready for each other and idle; empty if all are."""
        gateways = self.control.pids("gateway")
        workers = self.control.pids("decode")
        if len(gateways) != NUM_GATEWAYS or len(workers) != num_workers:
            return f"Serve has {gateways} and {workers}"
        status = self.status()
        if status["gateways"] != sorted(gateways):
            return f"{status['gateway']} knows {status['gateways']} of {sorted(gateways)}"
        for gateway, view in self.views().items():
            if set(view) != set(workers):
                return f"{gateway} knows {sorted(view)} of {sorted(workers)}"
            if busy := [r for r in view.values() if not r["ready"] or r["in_flight_requests"]]:
                return f"{gateway} sees {busy}"
        return ""

    def scale_and_wait(self, num_workers: int) -> None:
        self.control.scale("decode", num_workers)
        self.wait_until_whole(num_workers)

    def wait_until_whole(self, num_workers: int) -> None:
        deadline = time.monotonic() + START_S
        while missing := self.missing(num_workers):
            assert time.monotonic() < deadline, f"not within {START_S} s: {num_workers} workers ready; {missing}"

    def streams(self, count: int, max_tokens: int) -> list[Stream]:
        """Streams that have all begun."""
        streams = [Stream(self.url, max_tokens) for _ in range(count)]
        wait_until(lambda: all(s.has_begun or s.has_ended for s in streams), "a token of each stream", PATIENCE_S)
        assert not any(stream.has_ended for stream in streams), streams
        return streams

    def worker_of(self, stream: Stream) -> str:
        return httpx.get(f"{self.url}/baton/receipts/{stream.request_id}").json()["placement"]["decode"]

    def serves_with(self, workers: set[str]) -> None:
        """Asserts that new requests are answered, by these workers and no others."""
        streams = [Stream(self.url, 3) for _ in range(8)]
        ended(streams)
        assert all(stream.is_complete for stream in streams), streams
        assert {self.worker_of(stream) for stream in streams} <= workers


def ended(streams: list[Stream], timeout_s: float = PATIENCE_S) -> None:
    wait_until(lambda: all(stream.has_ended for stream in streams), f"the end of {streams}", timeout_s)


def num_requests(replica: dict[str, Any]) -> int:
    """What the worker's engine counts."""
    return replica["load"]["num_running_requests"] + replica["load"]["num_waiting_requests"]


def num_tokens(replica: dict[str, Any]) -> int:
    return replica["load"]["num_running_tokens"] + replica["load"]["num_queued_tokens"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["path"] = str(CONFIG.parent / "models" / "mini")
    config["simulation"]["decode_interval_s"] = TOKEN_INTERVAL_S
    config["pools"]["decode"] |= {"replicas": NUM_WORKERS, "num_cpus": 0.1}
    config["gateway"] = {"replicas": NUM_GATEWAYS, "num_cpus": 0.1}
    config["runtime"] = {"demo_prompt": None}
    path = tmp_path_factory.mktemp("links") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with running(path, "tests.cluster.scalable_app:build") as run:
        yield run


@pytest.fixture(scope="module")
def site(run: Run) -> Iterator[Site]:
    site = Site(run)
    yield site
    site.control.close()


def disagreement(site: Site, num_in_flight: int) -> str:
    """Where gateways and workers count differently what is in flight; empty if nowhere."""
    views = list(site.views().values())
    for worker in views[0]:
        replicas = [view[worker] for view in views]
        counts = {sum(replica["own_in_flight_requests"] for replica in replicas)}
        counts |= {replica["in_flight_requests"] for replica in replicas} | set(map(num_requests, replicas))
        if len(counts) > 1:
            return f"{worker} has {counts} requests: {replicas}"
        # While a stream goes on its tokens are on their way; those of an idle worker are comparable.
        tokens = {replica["in_flight_tokens"] for replica in replicas} | set(map(num_tokens, replicas))
        if counts == {0} and tokens != {0}:
            return f"{worker} is idle and has {tokens} tokens: {replicas}"
    total = sum(num_requests(replica) for replica in views[0].values())
    return "" if total == num_in_flight else f"{total} requests are in flight, not {num_in_flight}"


def assert_agreed(site: Site, num_in_flight: int) -> None:
    wait_until(lambda: not disagreement(site, num_in_flight), f"agreement on {num_in_flight} in flight", PATIENCE_S)
    for _ in range(NUM_READINGS):
        assert disagreement(site, num_in_flight) == ""


def test_gateways_and_workers_agree_on_what_is_in_flight_at_every_quiet_point(site: Site) -> None:
    site.scale_and_wait(NUM_WORKERS)
    for _ in range(3):
        ended(burst := [Stream(site.url, 1 + number % 7) for number in range(40)])
        assert all(stream.is_complete for stream in burst), burst
        assert_agreed(site, 0)
    held = site.streams(10, LONG_TOKENS * 3)
    assert_agreed(site, len(held))
    ended(burst := [Stream(site.url, 1 + number % 7) for number in range(40)])
    assert all(stream.is_complete for stream in burst), burst
    assert_agreed(site, len(held))
    assert not any(stream.has_ended for stream in held), "the streams were too short to be held open"
    ended(held)
    assert all(stream.is_complete for stream in held), held
    assert_agreed(site, 0)


def test_a_replica_that_leaves_ends_its_streams_and_drains_right_after_the_last(site: Site) -> None:
    site.scale_and_wait(2)
    pids = site.control.pids("decode")
    streams = site.streams(8, LONG_TOKENS)
    workers = {stream.request_id: site.worker_of(stream) for stream in streams}
    assert set(workers.values()) == set(pids)

    site.control.scale("decode", 1)

    def taking_requests() -> set[str]:
        return {worker for view in site.views().values() for worker, replica in view.items() if replica["ready"]}

    wait_until(lambda: len(taking_requests()) == 1, "both gateways to know who leaves", PATIENCE_S)
    (stays,) = taking_requests()
    (leaves,) = set(pids) - {stays}
    process = psutil.Process(pids[leaves])
    on_leaver = [stream for stream in streams if workers[stream.request_id] == leaves]
    assert not any(stream.has_ended for stream in on_leaver), "the streams were too short to be left behind"
    site.serves_with({stays})

    ended(on_leaver)
    last_s = max(stream.ended_s for stream in on_leaver if stream.ended_s is not None)
    wait_until(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE,
        f"the end of {leaves}",
        DRAINED_S + SERVE_LETS_GO_S - (time.monotonic() - last_s),
    )
    print(f"gone {time.monotonic() - last_s:.2f} s after its last request")
    ended(streams)
    assert all(stream.is_complete for stream in streams), streams
    assert len({stream.text for stream in streams}) == 1, "engines of one seed answer a prompt alike"
    assert all(set(view) == {stays} for view in site.views().values())


@pytest.mark.parametrize("number", DEATHS, ids=lambda number: number.name)
def test_what_a_vanished_gateway_left_is_aborted_within_two_seconds(site: Site, number: signal.Signals) -> None:
    site.scale_and_wait(NUM_WORKERS)
    streams: list[Stream] = []

    def owned() -> dict[str, int]:
        return {
            gateway: sum(replica["own_in_flight_requests"] for replica in view.values())
            for gateway, view in site.views().items()
        }

    while not streams or min(owned().values()) < 3:
        streams += site.streams(2, LONG_TOKENS * 2)
        assert len(streams) < 40, "one gateway gets all the streams"
    counts = owned()
    assert sum(counts.values()) == len(streams)
    victim, survivor = counts

    killed_s = time.monotonic()
    os.kill(site.control.pids("gateway")[victim], number)

    def is_rid_of_it() -> bool:
        status = site.status()
        assert status["gateway"] == survivor
        replicas = status["pools"]["decode"]
        return all(
            replica["others_in_flight_requests"] == 0
            and replica["own_in_flight_requests"] == replica["in_flight_requests"] == num_requests(replica)
            for replica in replicas
        )

    wait_until(is_rid_of_it, f"the requests of {victim} to be gone", NOTICED_S - (time.monotonic() - killed_s))
    print(f"rid of {counts[victim]} requests {time.monotonic() - killed_s:.2f} s after the kill")
    ended(streams)
    assert sum(stream.is_complete for stream in streams) == counts[survivor]
    assert sum(stream.broken is not None for stream in streams) == counts[victim]


@pytest.mark.parametrize("number", DEATHS, ids=lambda number: number.name)
def test_streams_on_a_worker_that_dies_go_on_elsewhere_and_a_new_one_joins(site: Site, number: signal.Signals) -> None:
    site.scale_and_wait(NUM_WORKERS)
    pids = site.control.pids("decode")
    streams = site.streams(8, LONG_TOKENS)
    workers = {stream.request_id: site.worker_of(stream) for stream in streams}
    victim = next(iter(workers.values()))
    survivors = set(pids) - {victim}

    os.kill(pids[victim], number)
    site.serves_with(survivors)
    ended(streams)
    assert all(stream.is_complete for stream in streams), streams
    assert len({stream.text for stream in streams}) == 1, "engines of one seed answer a prompt alike"
    for stream in streams:
        receipt = httpx.get(f"{site.url}/baton/receipts/{stream.request_id}").json()
        was_hit = workers[stream.request_id] == victim
        assert receipt["outcome"]["fault_kinds"] == ["decode_lost_mid_stream"] * was_hit, receipt["outcome"]
        assert {later["placement"]["decode"] for later in receipt["later"]} <= survivors

    site.wait_until_whole(NUM_WORKERS)
    replaced = set(site.control.pids("decode"))
    assert survivors < replaced
    assert victim not in replaced
    site.serves_with(replaced)


def test_a_rolling_update_of_everything_under_load_fails_no_request(site: Site, run: Run, tmp_path: Path) -> None:
    site.scale_and_wait(NUM_WORKERS)
    before = {name: set(site.control.pids(name)) for name in ("gateway", "decode")}
    running: list[Stream] = []
    finished: list[Stream] = []

    def is_replaced() -> bool:
        finished.extend(stream for stream in running if stream.has_ended)
        running[:] = [stream for stream in running if not stream.has_ended]
        while len(running) < NUM_CLIENTS:
            running.append(Stream(site.url, 20 + 20 * (len(finished) % 3)))
        now = {name: set(site.control.pids(name)) for name in before}
        return all(len(now[name]) == len(before[name]) and not now[name] & before[name] for name in before)

    settings = json.loads((run.run_dir / "settings.json").read_text())
    settings["simulation"]["decode_s_per_request"] = 1e-6
    (changed := tmp_path / "settings.json").write_text(json.dumps(settings))
    site.control.update(changed)
    wait_until(is_replaced, "all replicas to be new ones", UPDATE_S)
    ended(running)
    finished += running
    failed = [stream for stream in finished if not stream.is_complete]
    print(f"{len(finished)} requests while {sum(map(len, before.values()))} replicas were replaced")
    assert not failed, failed
    assert len(finished) > 5 * NUM_CLIENTS
    site.wait_until_whole(NUM_WORKERS)
