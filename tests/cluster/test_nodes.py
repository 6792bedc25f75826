"""Two prefill and two decode engines on a node each: pools land where their labels are, KV blocks go from node to node,
and the loss of a node is a fault of the table in docs/life-cycle.md, no more.

A node is a raylet of its own with an address of its own. It is killed as a machine loses power, but for its sockets,
which the kernel closes.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml

from bench.fault_asks import COMPLETIONS, Answer, Ask, End, LoopAsks, difference
from bench.fault_clients import Client, all_ended, connections
from bench.fault_view import GatewayView, Views, in_flight, not_empty
from engine.ports import free_ports
from gateway.settings import Settings, load
from tests.cluster.nodes import Node, Nodes, cluster

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

CONFIGS = Path(__file__).parents[2] / "configs"
LABEL = "baton.dev/pool"
HEAD = Node("head", "127.0.0.10", 1, {LABEL: "gateway"})
NUM_CLIENTS = 8
READY_S = 400.0
NOTICED_S = 60.0
ANSWERED_S = 200.0
POLL_S = 0.1


def node(pool: str, number: int) -> Node:
    """With room for one replica of that pool."""
    return Node(f"{pool}-{number}", f"127.0.0.{ {'prefill': 20, 'decode': 30}[pool] + number }", 1, {LABEL: pool})


def node_settings(folder: Path) -> Settings:
    """configs/local-2p2d.yaml, each replica bound to a node of its pool."""
    config = yaml.safe_load((CONFIGS / "local-2p2d.yaml").read_text())
    config["model"]["path"] = str(CONFIGS / "models" / "mini")
    for name, pool in config["pools"].items():
        if isinstance(pool, dict):
            pool |= {"num_cpus": 1, "label_selector": {LABEL: name}}
            pool["engine"] = pool["engine"] | {"kv_cache_gib": 0.25, "max_num_batched_tokens": 512}
    config["gateway"] = {"label_selector": {LABEL: "gateway"}, "port": free_ports("127.0.0.1")[0]}
    config["admission"] = {"ttft_deadline_s": 600}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load(path)


class Site:
    """The application on its cluster, as clients and its gateway see it."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.http = connections()
        self._clock_s = time.monotonic()

    async def views(self) -> Views:
        with suppress(httpx.HTTPError, msgspec.DecodeError):
            response = await self.http.get(f"{self.nodes.url}/baton/status", timeout=5.0)
            return [msgspec.json.decode(response.content, type=GatewayView)]
        return []

    async def ready(self, pool: str) -> set[str]:
        return {replica.id for view in await self.views() for replica in view.pools.get(pool, ()) if replica.ready}

    async def until(self, condition: Any, what: str, timeout_s: float) -> float:
        """How long it took."""
        began_s = time.monotonic()
        while not await condition():
            took_s = time.monotonic() - began_s
            assert took_s < timeout_s, f"not within {timeout_s} s: {what}; {await self.views()}"
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began_s

    async def is_whole(self) -> bool:
        return all([len(await self.ready(pool)) == 2 for pool in ("prefill", "decode")])

    async def places(self, pool: str) -> dict[str, str]:
        """The name of each running replica's node, by its id."""
        names = {one["id"]: one["labels"].get(LABEL, "") for one in await asyncio.to_thread(self.nodes.nodes)}
        found = await asyncio.to_thread(self.nodes.running, pool)
        assert all(names[one["node"]] == pool for one in found if one["node"] in names), (found, names)
        return {one["id"]: self.nodes.name_of(one["address"]) for one in found}

    def asks(self, asks: Sequence[Ask]) -> list[Client]:
        return [Client(self.http, self.nodes.url, ask, self._clock_s) for ask in asks]

    async def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        clients = self.asks(asks)
        assert await all_ended(clients, ANSWERED_S)
        return [client.answer for client in clients]

    async def receipt(self, answer: Answer) -> dict[str, Any]:
        response = await self.http.get(f"{self.nodes.url}/baton/receipts/{answer.receipt_id}")
        assert response.status_code == 200, response.text
        return response.json()

    async def loads(self) -> dict[str, dict[str, Any]]:
        status = (await self.http.get(f"{self.nodes.url}/baton/status")).json()
        return {replica["id"]: replica["load"] for pool in status["pools"].values() for replica in pool}

    async def is_empty(self) -> bool:
        views = await self.views()
        return bool(views) and not not_empty(views)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    settings = node_settings(tmp_path_factory.mktemp("nodes"))
    members = [node(pool, number) for pool in ("prefill", "decode") for number in (1, 2)]
    with cluster(settings, "gateway.app:build", members, HEAD) as found:
        found.deploy()
        yield found


@pytest.fixture
async def site(nodes: Nodes) -> Any:
    site = Site(nodes)
    await site.until(site.is_whole, "both pools to be whole", READY_S)
    yield site
    await site.http.aclose()


def some(seed: int, number: int = NUM_CLIENTS, *, max_tokens: int = 400, prompt_tokens: int | None = None) -> list[Ask]:
    """Of each kind that is continued after a loss, and that is replayed."""
    asks = [LoopAsks(client, seed).next() for client in range(number)]
    for index, ask in enumerate(asks):
        if ask.path == COMPLETIONS:
            ask.body["max_tokens"] = max_tokens
            if prompt_tokens is not None:
                ask.body["prompt"] = [20 + (seed + index * 7919 + token * 31) % 1400 for token in range(prompt_tokens)]
    return asks


async def test_pools_are_where_their_labels_are_and_blocks_go_from_node_to_node(site: Site) -> None:
    prefills, decodes = await site.places("prefill"), await site.places("decode")
    assert sorted(prefills.values()) == ["prefill-1", "prefill-2"]
    assert sorted(decodes.values()) == ["decode-1", "decode-2"]
    (gateway,) = await asyncio.to_thread(site.nodes.running, "gateway")
    assert gateway["address"] == HEAD.address

    answers = await site.answers(some(1, max_tokens=32))
    assert [answer.end for answer in answers] == [End.COMPLETE] * NUM_CLIENTS
    receipts = [await site.receipt(answer) for answer in answers]
    pairs = {(receipt["placement"]["prefill"], receipt["placement"]["decode"]) for receipt in receipts}
    assert {prefill for prefill, _ in pairs} == set(prefills)
    assert {decode for _, decode in pairs} == set(decodes)
    assert all(receipt["outcome"]["kv_bytes_moved"] > 0 for receipt in receipts if receipt["placement"]["prefill"])
    assert not [fault for receipt in receipts for fault in receipt["outcome"]["fault_kinds"]]
    loads = await site.loads()
    received = {decodes[id]: loads[id]["kv_bytes_received_total"] for id in decodes}
    assert all(received.values()), received
    moved = sum(receipt["outcome"]["kv_bytes_moved"] for receipt in receipts)
    print(f"{len(pairs)} pairs of nodes, {moved} bytes of KV by the receipts; received in all: {received}")
    await site.until(site.is_empty, "no KV block in use", NOTICED_S)


@pytest.mark.parametrize("pool", ["decode", "prefill"])
async def test_a_node_that_dies_costs_no_answer_and_its_pool_is_whole_when_another_joins(site: Site, pool: str) -> None:
    places = await site.places(pool)
    # Prompts that take many steps to read, so that prefill is met in between.
    asks = some(2, max_tokens=1200) if pool == "decode" else some(3, max_tokens=64, prompt_tokens=2500)
    late_asks = some(4, 1, max_tokens=32)
    clients = site.asks(asks)

    async def is_met() -> bool:
        """Every replica of the pool has requests; of decode, some answers have begun."""
        counts = in_flight(await site.views())
        num_begun = sum(client.has_begun and not client.has_ended for client in clients)
        return all(counts.get(id) for id in places) and (pool == "prefill" or num_begun > 2)

    await site.until(is_met, f"requests on every {pool} replica", NOTICED_S)
    counts = in_flight(await site.views())
    victim = max(places, key=lambda id: counts.get(id, 0))
    name, num_held = places[victim], counts.get(victim, 0)
    await asyncio.to_thread(site.nodes.kill, name)
    blow_s = time.monotonic()

    async def is_noticed() -> bool:
        return victim not in await site.ready(pool)

    noticed_s = await site.until(is_noticed, f"the gateway to know of the loss of {name}", NOTICED_S)
    late = site.asks(late_asks)
    assert await all_ended([*clients, *late], ANSWERED_S)
    answers = [client.answer for client in [*clients, *late]]
    assert [answer.end for answer in answers] == [End.COMPLETE] * len(answers), answers
    receipts = [await site.receipt(answer) for answer in answers]
    kinds = [kind for receipt in receipts for kind in receipt["outcome"]["fault_kinds"]]
    allowed = {
        "decode": {"decode_lost_mid_stream", "decode_lost_before_token"},
        "prefill": {"prefill_lost", "pull_failed"},
    }[pool]
    assert kinds
    assert set(kinds) <= allowed
    answered_s = time.monotonic() - blow_s

    # Nodes of other pools have no room for it, and none may take it.
    assert len(await site.ready(pool)) == 1
    assert name not in (await site.places(pool)).values()
    joins_s = time.monotonic()
    await asyncio.to_thread(site.nodes.join, node(pool, 3))
    await site.until(site.is_whole, f"{pool} to be whole again", READY_S)
    whole_s = time.monotonic() - joins_s
    remaining = sorted(set(places.values()) - {name})
    assert sorted((await site.places(pool)).values()) == [*remaining, f"{pool}-3"]

    undisturbed = await site.answers([*asks, *late_asks])
    assert [difference(*pair) for pair in zip(answers, undisturbed, strict=True)] == [""] * len(answers)
    await site.until(site.is_empty, "no KV block in use", NOTICED_S)
    print(
        f"{name} died with {num_held} requests: known after {noticed_s:.1f} s, {sorted(kinds)}, every answer after "
        f"{answered_s:.1f} s, whole {whole_s:.1f} s after {pool}-3 began to join"
    )
