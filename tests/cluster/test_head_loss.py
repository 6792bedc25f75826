"""The head node loses its power while clients are served, and starts again with what its Redis has kept: streams go
on, new requests are answered meanwhile, and Serve replaces what has died. Settings and commands are those of
docs/operations.md. Engines are simulated.
"""

import os
import re
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.nodes import HEAD, Node, cluster
from tests.cluster.operations import documented, exported
from tests.cluster.redis_server import Redis, redis_server
from tests.cluster.running import wait_until
from tests.cluster.simulated_site import (
    NUM_GATEWAYS,
    PATIENCE_S,
    STATUS_S,
    Site,
    assert_end_whole,
    assert_going_on,
    decode_node,
    gateway_node,
    site_settings,
)

pytestmark = pytest.mark.timeout(600)

SECTION = "Losing the head node"
PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
UNSET_PATIENCE_S = 60.0
"""How long Ray's processes wait for the GCS where nothing is set, and then end themselves."""

MARGIN_S = 5.0
LONG_TOKENS = 2400
ENDED_S = 240.0


def head_node(redis: Redis) -> Node:
    stand_in = {"REDIS:6379": redis.address, "$REDIS_PASSWORD": redis.password}
    variables = {name: stand_in.get(value, value) for name, value in exported(SECTION).items()}
    ((_, _, _, *words),) = documented(SECTION, "ray", "start", "--head")
    return Node(HEAD.name, HEAD.address, 0, variables=variables, words=tuple(stand_in.get(one, one) for one in words))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis:
        yield head_node(redis)


@pytest.fixture(scope="module")
def site(head: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    everywhere = {PATIENCE: exported(SECTION)[PATIENCE]}
    entry = gateway_node(everywhere)
    members = [entry, decode_node(1, everywhere), decode_node(2, everywhere)]
    settings = site_settings(tmp_path_factory.mktemp("site"), 2)
    with cluster(settings, "gateway.app:build", members, head, entry) as nodes:
        site = Site(nodes)
        site.deploy()
        yield site


def gateways_that_tell(site: Site) -> int:
    """How many gateways' figures a scrape brings, of whichever is asked."""
    text = httpx.get(f"{site.nodes.url}/metrics", timeout=STATUS_S).text
    return len(re.findall(r"^baton_gateway_up\{.*\} 1(?:\.0)?$", text, re.MULTILINE))


def test_streams_outlive_the_head_and_what_died_meanwhile_is_replaced_when_it_is_back(site: Site, head: Node) -> None:
    before = {one["id"]: one["pid"] for name in ("gateway", "decode") for one in site.nodes.running(name)}
    (victim, survivor), places = sorted(site.places()), site.places()
    streams = site.streams(LONG_TOKENS)
    with site.clients() as clients:
        site.nodes.kill(HEAD.name)
        lost_s = time.monotonic()
        assert_going_on(streams, clients)
        wait_until(lambda: len(site.views()) == NUM_GATEWAYS, "both gateways to answer", PATIENCE_S)
        wait_until(lambda: gateways_that_tell(site) == NUM_GATEWAYS, "a scrape to have both", PATIENCE_S)

        os.kill(before[victim], signal.SIGKILL)
        wait_until(lambda: set().union(*site.views().values()) == {survivor}, "the loss to be known", PATIENCE_S)
        while time.monotonic() - lost_s < UNSET_PATIENCE_S + MARGIN_S:
            assert_going_on(streams, clients)

        site.nodes.start_head(head)
        site.wait_until_whole()
        assert_going_on(streams, clients)
        (new,) = set(site.places()) - {survivor}
        assert site.places()[new] == places[victim]
        after = {one["id"]: one["pid"] for name in ("gateway", "decode") for one in site.nodes.running(name)}
        del before[victim], after[new]
        assert after == before, "what lived on is what Serve has recovered"

        wait_until(lambda: new in site.recent_workers(clients), f"answers of {new}", PATIENCE_S)
        assert_end_whole(streams, ENDED_S)
