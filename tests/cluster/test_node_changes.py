"""Nodes come and go while clients are served, as docs/operations.md has it: one is drained and replaced, one is added
for another replica. No answer fails. Engines are simulated.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import HEAD, Node, cluster
from tests.cluster.running import wait_until
from tests.cluster.simulated_site import (
    PATIENCE_S,
    Site,
    assert_end_whole,
    assert_going_on,
    decode_node,
    gateway_node,
    site_settings,
)

pytestmark = pytest.mark.timeout(600)

LONG_TOKENS = 1000
ENDED_S = 180.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    entry = gateway_node({})
    head = Node(HEAD.name, HEAD.address, 0)
    with cluster(
        site_settings(folder, 2), "gateway.app:build", [entry, decode_node(1, {}), decode_node(2, {})], head, entry
    ) as nodes:
        site = Site(nodes)
        site.deploy()
        yield site


def test_a_drained_node_ends_its_streams_and_the_one_that_was_added_serves(site: Site) -> None:
    (leaver, stayer), places = sorted(site.places()), site.places()
    streams = site.streams(LONG_TOKENS)
    on_leaver = [stream for stream in streams if site.worker_of(stream) == leaver]
    assert on_leaver
    with site.clients() as clients:
        site.nodes.join(decode_node(3, {}))
        site.nodes.drain(places[leaver])
        site.wait_until_whole()
        assert sorted(site.places().values()) == sorted(["decode-3", places[stayer]])
        (new,) = set(site.places()) - {stayer}
        wait_until(lambda: new in site.recent_workers(clients), f"answers of {new}", PATIENCE_S)
        assert_going_on(streams, clients)
        assert site.replicas_on(places[leaver]) == [leaver], "it has streams"

        assert_end_whole(streams, ENDED_S)
        assert [site.receipt(stream)["outcome"]["fault_kinds"] for stream in streams] == [[]] * len(streams)
        assert {site.worker_of(stream) for stream in on_leaver} == {leaver}
        wait_until(lambda: site.replicas_on(places[leaver]) == [], "the end of the old replica", PATIENCE_S)
        site.nodes.kill(places[leaver])
        assert_going_on([], clients)


def test_a_node_is_added_and_takes_a_further_replica(site: Site, folder: Path) -> None:
    before = site.places()
    streams = site.streams(LONG_TOKENS)
    with site.clients() as clients:
        site.nodes.join(decode_node(4, {}))
        site.deploy(site_settings(folder, 3, site.nodes.settings.gateway.port))
        places = site.places()
        assert sorted(places.values()) == sorted([*before.values(), "decode-4"])
        wait_until(lambda: site.recent_workers(clients) == set(places), f"answers of all of {places}", PATIENCE_S)
        assert_end_whole(streams, ENDED_S)
