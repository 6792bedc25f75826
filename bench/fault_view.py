"""Owns how a run under faults is seen: what gateways say of the pools, and which process is what. Pure."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from bench.fault_cases import Victim


class LoadView(msgspec.Struct, frozen=True):
    """The part of an engine's load that is looked at (`engine.protocol.EngineLoad`)."""

    num_running_requests: int
    num_waiting_requests: int
    num_kv_blocks_used: int
    kv_leases_expired_total: int = 0
    kv_transfer_failures_total: int = 0


class InfoView(msgspec.Struct, frozen=True):
    pids: list[int] = []
    max_num_seqs: int = 0


class ReplicaView(msgspec.Struct, frozen=True):
    """One engine as one gateway sees it."""

    id: str
    phase: str
    attached: bool
    ready: bool
    in_flight_requests: int
    own_in_flight_requests: int
    load: LoadView
    info: InfoView | None = None


class GatewayView(msgspec.Struct, frozen=True):
    """What one gateway says (GET /baton/status)."""

    gateway: str
    gateways: list[str]
    pools: dict[str, list[ReplicaView]]

    def replicas(self) -> list[ReplicaView]:
        return [replica for pool in self.pools.values() for replica in pool]

    @property
    def own_in_flight(self) -> int:
        return sum(replica.own_in_flight_requests for replica in self.replicas())


class PlacementView(msgspec.Struct, frozen=True):
    prefill: str | None
    decode: str


class OutcomeView(msgspec.Struct, frozen=True):
    status: str
    faults: tuple[str, ...] = ()
    fault_kinds: tuple[str, ...] = ()


class ReceiptView(msgspec.Struct, frozen=True):
    """The part of a receipt that is looked at (`gateway.routing.receipts.Receipt`): the first placement."""

    placement: PlacementView
    outcome: OutcomeView


Views = Sequence[GatewayView]
"""Of every gateway that answers."""


def replicas_of(views: Views, phase: str | None = None) -> dict[str, list[ReplicaView]]:
    """Each engine as the gateways see it, by its id."""
    found: dict[str, list[ReplicaView]] = {}
    for view in views:
        for replica in view.replicas():
            if phase in (None, replica.phase):
                found.setdefault(replica.id, []).append(replica)
    return found


def in_flight(views: Views) -> dict[str, int]:
    """What all gateways together have on each engine, by their own counts."""
    return {
        replica_id: sum(replica.own_in_flight_requests for replica in seen)
        for replica_id, seen in replicas_of(views).items()
    }


def held_by_gateway(views: Views) -> dict[str, int]:
    """What each gateway has in flight, by its id."""
    return {view.gateway: view.own_in_flight for view in views}


def load_of(views: Views, replica_id: str) -> LoadView | None:
    """What the first gateway that knows the engine says of its load."""
    return next((seen[0].load for id, seen in replicas_of(views).items() if id == replica_id), None)


def rise(before: Mapping[str, int], after: Mapping[str, int], among: Iterable[str]) -> str | None:
    """Whose count has risen most; None if nobody's."""
    risen = {key: after.get(key, 0) - before.get(key, 0) for key in among}
    best = max(risen, key=lambda key: risen[key], default=None)
    return best if best is not None and risen[best] > 0 else None


@dataclass(frozen=True)
class Size:
    """How many of each there are in a whole run."""

    gateways: int
    prefill: int
    decode: int


def not_whole(views: Views, size: Size, without: Collection[str] = ()) -> str:
    """Why the run is not whole as its gateways see it; empty if it is: all are there and know all, and nobody knows any
    of `without`, which have died."""
    for view in views:
        if dead := {view.gateway, *view.gateways, *(replica.id for replica in view.replicas())} & set(without):
            return f"{view.gateway} knows {sorted(dead)} still"
    if len(views) != size.gateways:
        return f"{len(views)} of {size.gateways} gateways answer"
    members = sorted(view.gateway for view in views)
    for view in views:
        if sorted(view.gateways) != members:
            return f"{view.gateway} knows {view.gateways} of {members}"
        for phase, number in (("prefill", size.prefill), ("decode", size.decode)):
            pool = view.pools.get(phase, [])
            fit = [replica.id for replica in pool if replica.ready and replica.attached]
            if (len(fit), len(pool)) != (number, number):
                return f"{view.gateway} has {fit} ready of {[replica.id for replica in pool]}"
    return ""


def not_empty(views: Views, but: Iterable[str] = ()) -> str:
    """Which engine still holds KV blocks or requests, by what any gateway says; empty if none. `but` are left out, and
    engines that a gateway has no reports of."""
    for replica_id, seen in replicas_of(views).items():
        for replica in seen if replica_id not in but else ():
            load = replica.load
            held = load.num_kv_blocks_used, load.num_running_requests, load.num_waiting_requests
            if replica.attached and (any(held) or replica.in_flight_requests):
                return (
                    f"{replica_id} holds {load.num_kv_blocks_used} KV blocks and {load.num_running_requests} running, "
                    f"{load.num_waiting_requests} waiting, {replica.in_flight_requests} sent requests"
                )
    return ""


class Part(StrEnum):
    """What a process of a run is; those a fault may strike have the victims' names."""

    PREFILL_ACTOR = Victim.PREFILL_ACTOR.value
    DECODE_ACTOR = Victim.DECODE_ACTOR.value
    PREFILL_CORE = Victim.PREFILL_CORE.value
    DECODE_CORE = Victim.DECODE_CORE.value
    GATEWAY = Victim.GATEWAY.value
    HAPROXY = Victim.HAPROXY.value
    STRAY_ENGINE = "stray engine"
    """An engine's process whose replica is gone."""
    IDLE_WORKER = "idle Ray worker"
    OTHER = "other"


@dataclass(frozen=True)
class ProcessView:
    """A process of the run. `title` is its command line, or what it set in its place."""

    pid: int
    parent_pid: int
    title: str


_ACTORS = {
    "ray::ServeReplica:baton:prefill": Part.PREFILL_ACTOR,
    "ray::ServeReplica:baton:decode": Part.DECODE_ACTOR,
    "ray::ServeReplica:baton:gateway": Part.GATEWAY,
}
_CORES = {Part.PREFILL_ACTOR: Part.PREFILL_CORE, Part.DECODE_ACTOR: Part.DECODE_CORE}


def parts(processes: Sequence[ProcessView]) -> dict[int, Part]:
    """What each process is, by its pid."""
    found: dict[int, Part] = {}
    for process in processes:
        actor = next((part for title, part in _ACTORS.items() if process.title.startswith(title)), None)
        if actor is not None:
            found[process.pid] = actor
        elif "/haproxy" in process.title.partition(" ")[0] or process.title.startswith("haproxy"):
            found[process.pid] = Part.HAPROXY
        elif process.title.startswith("ray::IDLE"):
            found[process.pid] = Part.IDLE_WORKER
        else:
            found[process.pid] = Part.OTHER
    for process in processes:
        if process.title.startswith("VLLM::"):
            parent = found.get(process.parent_pid)
            found[process.pid] = _CORES.get(parent, Part.STRAY_ENGINE) if parent else Part.STRAY_ENGINE
    return found


def expected_parts(size: Size) -> dict[Part, int]:
    """How many processes of each part a whole run has."""
    return {
        Part.PREFILL_ACTOR: size.prefill,
        Part.PREFILL_CORE: size.prefill,
        Part.DECODE_ACTOR: size.decode,
        Part.DECODE_CORE: size.decode,
        Part.GATEWAY: size.gateways,
        Part.HAPROXY: 1,
    }


def not_tidy(processes: Sequence[ProcessView], size: Size, usual_others: int) -> str:
    """What there is too much or too little of; empty if nothing. `usual_others` is how many processes of no part the
    run had when it was new."""
    count = Counter(parts(processes).values())
    wanted = expected_parts(size)
    wrong = [f"{count[part]} of {number} {part}" for part, number in wanted.items() if count[part] != number]
    if count[Part.STRAY_ENGINE]:
        wrong.append(f"{count[Part.STRAY_ENGINE]} {Part.STRAY_ENGINE}")
    if count[Part.OTHER] > usual_others:
        wrong.append(f"{count[Part.OTHER]} processes of Ray and others instead of {usual_others}")
    return ", ".join(wrong)
