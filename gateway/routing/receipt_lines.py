"""Owns the line of JSON that a receipt is in a file: like the receipt, but a pool's replicas are columns. Pure.

A receipt holds all replicas, so in a large cluster its line is little else. A pool is written as what its replicas have
each (`each`, for every such field a list in the order of the replicas) and what all have alike (`same`): a field's name
is there once, and so is a value in which no replica differs. Earlier lines, with an object for each replica, are read
as well, and what later versions have added to a decision's inputs has its default there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import msgspec

from gateway.routing.receipts import Receipt
from gateway.routing.types import ClusterSnapshot, Hints, ReplicaView, RequestView, SessionView

_POOLS = ("prefill", "decode")
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder()


def encode(receipt: Receipt) -> bytes:
    """Without the end of the line."""
    # The snapshot's other fields are turned into builtins together with the receipt, its replicas never.
    without = [replace(snapshot, prefill=(), decode=()) for snapshot in _snapshots(receipt)]
    later = tuple(replace(one, snapshot=bare) for one, bare in zip(receipt.later, without[1:], strict=True))
    data = msgspec.to_builtins(replace(receipt, snapshot=without[0], later=later))
    for snapshot, written in zip(_snapshots(receipt), _written(data), strict=True):
        written["prefill"], written["decode"] = _columns(snapshot.prefill), _columns(snapshot.decode)
    return _ENCODER.encode(data)


def decode(line: bytes, absent: Counter[str] | None = None) -> Receipt:
    """In `absent` is counted what the line does not say of the first decision's inputs, because an earlier version has
    written it: each as the type that it is a field of, and its name. Raises msgspec.DecodeError."""
    data = _DECODER.decode(line)
    for snapshot in _written(data):
        for pool in _POOLS:
            snapshot[pool] = _rows(snapshot.get(pool))
    receipt = msgspec.convert(data, Receipt)
    if absent is not None:
        absent.update(set(_absent(data)))
    return receipt


def _absent(data: Any) -> Iterator[str]:
    """Of a receipt, with an object for each replica."""
    first, request = data["snapshot"], data["request"]
    for kind, there in ((RequestView, request), (Hints, request.get("hints")), (SessionView, request.get("session"))):
        if there is not None:
            yield from (f"{kind.__name__}.{one.name}" for one in fields(kind) if one.name not in there)
    yield from (f"ClusterSnapshot.{one.name}" for one in fields(ClusterSnapshot) if one.name not in first)
    for pool in (first[name] for name in _POOLS):
        if pool:
            yield from (f"ReplicaView.{name}" for name in ReplicaView.__struct_fields__ if name not in pool[0])


def _snapshots(receipt: Receipt) -> list[ClusterSnapshot]:
    return [receipt.snapshot, *(decision.snapshot for decision in receipt.later)]


def _written(data: Any) -> list[dict[str, Any]]:
    """The snapshots of a line, in the order of `_snapshots`."""
    try:
        return [data["snapshot"], *(decision["snapshot"] for decision in data.get("later", ()))]
    except (TypeError, KeyError, AttributeError) as error:
        raise msgspec.ValidationError("a receipt and its later decisions have a `snapshot` each") from error


def _columns(pool: Sequence[ReplicaView]) -> dict[str, Any]:
    each: dict[str, Sequence[Any]] = {}
    same: dict[str, Any] = {}
    columns = zip(*map(msgspec.structs.astuple, pool), strict=True)
    for name, column in zip(ReplicaView.__struct_fields__, columns, strict=False):
        if name != "replica_id" and column.count(column[0]) == len(column):
            same[name] = column[0]
        else:
            each[name] = column
    return {"each": each, "same": same}


def _rows(pool: Any) -> Any:
    """Replicas as objects, whichever way they are written."""
    if not isinstance(pool, dict):
        return pool
    try:
        columns = cast("dict[str, dict[str, Any]]", pool)
        each, same = columns["each"], columns["same"]
        return [same | dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise msgspec.ValidationError(f"a pool has columns of one length in `each`, and `same`: {error}") from error
