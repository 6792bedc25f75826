"""Receipts: what a client reads of them, and how many are kept."""

import dataclasses
import json

import msgspec

from gateway.routing.policies import least_tokens, place
from gateway.routing.receipts import Outcome, Receipt, ReceiptStore
from gateway.routing.types import ClusterSnapshot, Hints, Placement, ReplicaView, RequestView

REQUEST = RequestView("r", 100, 10, num_choices=2)
SNAPSHOT = ClusterSnapshot((ReplicaView("p0", 1, 7, 64, 3),), (ReplicaView("d0", 2, 9, 64, 4),))


def receipt(request_id: str, status: str = "finished", tenant: str | None = None) -> Receipt:
    placement = place(least_tokens, REQUEST, SNAPSHOT, 7)
    assert isinstance(placement, Placement)
    request = dataclasses.replace(REQUEST, hints=Hints(tenant=tenant))
    return Receipt(request_id, 1.5, placement.policy, 7, request, SNAPSHOT, placement, Outcome(status, ttft_ms=12.5))


def test_a_receipt_reads_as_json_with_its_reason_and_scores_in_front() -> None:
    data = json.loads(json.dumps(receipt("r").as_json()))
    assert (data["request_id"], data["created_s"], data["policy"], data["seed"]) == ("r", 1.5, "least-tokens", 7)
    assert data["reason"] == "fewest tokens in flight: 7 on p0, 9 on d0"
    assert data["scores"] == {"p0": 7.0, "d0": 9.0}
    assert (data["placement"]["prefill"], data["placement"]["decode"]) == ("p0", "d0")
    assert (data["outcome"]["status"], data["outcome"]["ttft_ms"], data["outcome"]["faults"]) == ("finished", 12.5, [])
    assert data["snapshot"]["decode"][0]["num_kv_blocks_used"] == 4
    assert data["request"]["num_choices"] == 2


def test_a_placement_can_be_replayed_from_a_receipts_json() -> None:
    data = json.loads(json.dumps(receipt("r").as_json()))
    request = msgspec.convert(data["request"], RequestView)
    snapshot = msgspec.convert(data["snapshot"], ClusterSnapshot)
    recorded = msgspec.convert(data["placement"], Placement)
    assert place(least_tokens, request, snapshot, data["seed"]) == recorded


def test_a_store_keeps_the_last_receipts() -> None:
    store = ReceiptStore(3)
    for number in range(5):
        store.put(receipt(f"r{number}"))
    assert len(store) == 3
    assert [store.get(f"r{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert store.get("unknown") is None


def test_a_tenant_that_asks_for_much_takes_no_receipts_from_others() -> None:
    store = ReceiptStore(4)
    store.put(receipt("quiet", tenant="a"))
    for number in range(9):
        store.put(receipt(f"r{number}", tenant="b"))
    store.put(receipt("other", tenant="c"))
    kept = [name for name in ("quiet", *(f"r{number}" for number in range(9)), "other") if store.get(name)]
    assert kept == ["quiet", "r7", "r8", "other"]
    assert len(store) == 4


def test_a_receipt_that_is_put_again_replaces_the_first_and_counts_as_new() -> None:
    store = ReceiptStore(2)
    store.put(receipt("r0", "running"))
    store.put(receipt("r1"))
    store.put(receipt("r0", "finished"))
    store.put(receipt("r2"))
    found = store.get("r0")
    assert found is not None
    assert found.outcome.status == "finished"
    assert store.get("r1") is None
    assert len(store) == 2
