"""Recorded decisions decided again: the same by their own policy, and what another would have done."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from gateway import receipt_log
from gateway.receipt_log import ReceiptLog, UnreadableReceipt, files_in, read
from gateway.routing import receipt_lines
from gateway.routing.policies import POLICIES, place
from gateway.routing.receipts import Decision, Outcome, Receipt
from gateway.routing.replay import MAX_DIFFERENCES, replay
from gateway.routing.types import ClusterSnapshot, Hints, Placement, Priority, ReplicaView, RequestView, SessionView

REQUEST = RequestView("r", 100, 10, hints=Hints(Priority.LOW, 1.5, "s"), session=SessionView(1, "p1", "d0"))
SNAPSHOT = ClusterSnapshot(
    prefill=(ReplicaView("p0", 0, 5, 64, 0), ReplicaView("p1", 2, 90, 64, 3)),
    decode=(ReplicaView("d0", 1, 50, 64, 0), ReplicaView("d1", 1, 50, 64, 0)),
    cached_tokens={"p1": 96},
)


def receipt(request_id: str = "r", policy: str = "least-tokens", seed: int = 7) -> Receipt:
    placement = place(POLICIES[policy], REQUEST, SNAPSHOT, seed)
    assert isinstance(placement, Placement)
    return Receipt(request_id, 1.5, policy, seed, REQUEST, SNAPSHOT, placement, Outcome("finished", ttft_ms=0.1))


def changed(kept: Receipt, **placement: str | None) -> Receipt:
    return dataclasses.replace(kept, placement=dataclasses.replace(kept.placement, **placement))


@pytest.mark.parametrize("policy", POLICIES)
def test_their_own_policy_decides_the_same(policy: str) -> None:
    found = replay([receipt(policy=policy, seed=seed) for seed in range(20)])
    assert (found.num_decisions, found.num_same, found.differences) == (20, 20, [])
    assert found.replayed == found.recorded


def test_a_decision_that_does_not_come_out_the_same_is_told() -> None:
    found = replay([receipt(), changed(receipt("odd"), reason="another")])
    assert (found.num_decisions, found.num_same) == (2, 1)
    assert found.differences[0].startswith("odd: p0, ")
    assert len(replay([changed(receipt(), reason="x")] * 20).differences) == MAX_DIFFERENCES


def test_placements_after_faults_are_replayed_as_well() -> None:
    first = receipt()
    later = Decision("r~2", 8, REQUEST, SNAPSHOT, dataclasses.replace(first.placement, prefill="p9"))
    found = replay([dataclasses.replace(first, later=(later,))])
    assert (found.num_decisions, found.num_same, found.num_other_prefill) == (2, 1, 1)


def test_another_policy_is_compared_by_where_requests_go_and_what_is_to_be_read() -> None:
    found = replay([receipt(seed=seed) for seed in range(10)], "session-affinity")
    assert found.num_decisions == found.num_other_prefill == 10
    assert 0 < found.num_other_decode < 10
    assert (found.recorded.read_tokens, found.recorded.reused_tokens) == (1000, 0)
    assert (found.replayed.read_tokens, found.replayed.reused_tokens) == (40, 960)
    assert found.replayed.num_split == 10


def test_a_policy_that_is_gone_is_counted_and_one_that_never_was_is_an_error() -> None:
    old = dataclasses.replace(receipt(), placement=dataclasses.replace(receipt().placement, policy="old"))
    assert replay([old]).unknown == {"old": 1}
    with pytest.raises(KeyError):
        replay([], "nobody's")


# -- files


def written(file: Path, *receipts: Receipt, max_bytes: int = 1_000_000) -> None:
    def dropped() -> None:
        raise AssertionError("a receipt was left out")

    log = ReceiptLog(file, max_bytes, dropped)
    for kept in receipts:
        log.append(kept)
    log.close()


def test_receipts_are_read_as_they_were_written_bit_for_bit(tmp_path: Path) -> None:
    receipts = [receipt(f"r{seed}", seed=seed) for seed in range(3)]
    written(tmp_path / "new" / "gateway.jsonl", *receipts)
    absent: Counter[str] = Counter()
    assert list(read(tmp_path / "new" / "gateway.jsonl", absent)) == receipts
    assert not absent


def views(number: int, phase: str) -> tuple[ReplicaView, ...]:
    return tuple(
        ReplicaView(f"{phase}{index:03}", index % 7, index * 1_000, 6_000, index, slot_s=index / 3, max_num_seqs=256)
        for index in range(number)
    )


def large(number: int) -> Receipt:
    snapshot = dataclasses.replace(SNAPSHOT, prefill=views(number, "p"), decode=views(number, "d"))
    kept = dataclasses.replace(receipt(), snapshot=snapshot)
    return dataclasses.replace(kept, later=(Decision("r~2", 8, REQUEST, snapshot, kept.placement),))


@pytest.mark.parametrize("number", [0, 1, 2, 128])
def test_a_line_holds_all_replicas_bit_for_bit(number: int) -> None:
    kept = large(number)
    read_again = receipt_lines.decode(receipt_lines.encode(kept))
    assert read_again == kept
    assert msgspec.json.encode(read_again) == msgspec.json.encode(kept)


def test_lines_of_earlier_versions_are_read() -> None:
    assert receipt_lines.decode(msgspec.json.encode(large(2))) == large(2)


def test_in_a_large_cluster_a_line_is_a_fraction_of_its_receipt() -> None:
    assert len(receipt_lines.encode(large(128))) < len(msgspec.json.encode(large(128))) / 4


def test_what_queries_ask_for_is_where_it_is_in_the_receipt() -> None:
    line = json.loads(receipt_lines.encode(large(2)))
    assert (line["policy"], line["outcome"]["ttft_ms"]) == ("least-tokens", 0.1)


@pytest.mark.parametrize("pool", [{}, {"each": {}}, {"each": {"replica_id": ["a"], "slot_s": [1, 2]}, "same": {}}, 7])
def test_a_pool_that_is_none_makes_its_line_no_receipt(pool: object) -> None:
    line = json.loads(receipt_lines.encode(large(2)))
    line["snapshot"]["decode"] = pool
    with pytest.raises(msgspec.DecodeError):
        receipt_lines.decode(json.dumps(line).encode())


def test_what_an_older_version_has_written_is_read_and_replayed(tmp_path: Path) -> None:
    kept = receipt(policy="session-affinity")
    data = json.loads(msgspec.json.encode(kept))
    gone = {"trajectory_turns": 9, "is_child": True, "parent_waits": True, "pause_s": 0.5, "pause_p90_s": 8.0}
    data["request"]["session"] |= gone | {"return_probability": 0.9}
    del data["request"]["hints"]["is_retry"], data["rank_ms"]
    del data["snapshot"]["prefill"][0]["slot_s"], data["snapshot"]["costs"]
    (tmp_path / "old.jsonl").write_text(json.dumps(data) + "\n")
    absent: Counter[str] = Counter()
    receipts = list(read(tmp_path / "old.jsonl", absent))
    assert receipts == [kept]
    assert absent == {"Hints.is_retry": 1, "ReplicaView.slot_s": 1, "ClusterSnapshot.costs": 1}
    assert replay(receipts).num_same == 1


def test_files_are_bounded_and_the_last_receipts_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "gateway.jsonl"
    written(file, *(receipt(f"r{number}") for number in range(100)), max_bytes=10_000)
    assert files_in([tmp_path]) == [tmp_path / "gateway.jsonl.1", file]
    assert all(found.stat().st_size <= 10_000 for found in files_in([tmp_path]))
    ids = [kept.request_id for found in files_in([tmp_path]) for kept in read(found)]
    assert ids == [f"r{number}" for number in range(100 - len(ids), 100)]


def test_a_folder_keeps_the_files_that_were_written_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt_log, "MAX_FILES", 3)
    (tmp_path / "notes.txt").write_text("not a file of receipts")
    for number, name in enumerate(("d.jsonl", "c.jsonl.1", "b.jsonl", "a.jsonl")):
        written(tmp_path / name, receipt())
        os.utime(tmp_path / name, (number, number))
    written(tmp_path / "new.jsonl", receipt())
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "new.jsonl", "a.jsonl", "b.jsonl"}


def test_a_line_that_was_cut_off_is_none_and_another_that_is_no_receipt_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gateway.jsonl"
    written(file, receipt("whole"))
    with file.open("a") as lines:
        lines.write('{"request_id": "cu')
    assert [kept.request_id for kept in read(file)] == ["whole"]
    with file.open("a") as lines:
        lines.write("\n")
    with pytest.raises(UnreadableReceipt, match="line 2"):
        list(read(file))


def test_what_the_disk_does_not_take_in_time_is_left_out_and_counted(tmp_path: Path) -> None:
    dropped: list[None] = []
    log = ReceiptLog(tmp_path / "gateway.jsonl", 1_000_000, lambda: dropped.append(None))
    log._listener.stop()
    log._listener.queue.maxsize = 2
    for number in range(5):
        log.append(receipt(f"r{number}"))
    assert len(dropped) == 3
