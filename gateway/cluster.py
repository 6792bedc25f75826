"""Owns the gateway's view of the cluster: it folds reports and its own sendings into a ClusterSnapshot."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from engine.blocks import BlockMirror
from engine.load import Recent
from engine.protocol import BlockChanges, EngineInfo, EngineLoad, InFlight, Phase, TokenDelta, WorkerReport
from gateway.routing.prefix_index import PrefixIndex
from gateway.routing.types import ClusterSnapshot, ReplicaView

RECENT_REQUESTS = 64
"""Over how many requests what is measured of a replica is averaged."""
TRUSTED_AFTER_TOKENS = 1024
"""So many tokens an engine must have computed before its prefill rate says something: warm-ups are short and slow."""


@dataclass
class Replica:
    """One member of a pool. `ready`: its stream is attached and every hand-off pair it is part of is warm.

    `in_flight` is what this gateway has sent there: tokens by request id, their sum in `in_flight_tokens`; it is exact
    and counts before the replica knows of it. `others_in_flight` is what the other gateways have there, as reported.
    `queued` are those of its own that have no token yet, with their tokens; `writing_since_s` those that run in decode.
    `blocks` are the engine's cached blocks, as reported. `computed_share` and `slot_s` are measured on this gateway's
    own requests (`gateway.routing.types.ReplicaView`).
    """

    replica_id: str
    phase: Phase
    info: EngineInfo | None = None
    load: EngineLoad = field(default_factory=EngineLoad)
    ready: bool = False
    in_flight: dict[str, int] = field(default_factory=dict)
    in_flight_tokens: int = 0
    queued: dict[str, int] = field(default_factory=dict)
    queued_tokens: int = 0
    writing_since_s: dict[str, float] = field(default_factory=dict)
    others_in_flight: InFlight = field(default_factory=InFlight)
    blocks: BlockMirror = field(default_factory=lambda: BlockMirror(0))
    computed_share: Recent = field(default_factory=lambda: Recent(RECENT_REQUESTS))
    slot_s: Recent = field(default_factory=lambda: Recent(RECENT_REQUESTS))

    @property
    def attached(self) -> bool:
        return self.info is not None

    @property
    def all_in_flight(self) -> InFlight:
        """What all gateways have in flight here."""
        return InFlight(
            len(self.in_flight) + self.others_in_flight.num_requests,
            self.in_flight_tokens + self.others_in_flight.num_tokens,
            self.queued_tokens + self.others_in_flight.num_queued_tokens,
        )


class Cluster:
    """The replicas of both pools, as reported, with what is in flight on each. `expects_prefill`: whether there should
    be prefill replicas."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.expects_prefill = False
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._cached = PrefixIndex()

    def add(self, replica_id: str, phase: Phase) -> Replica:
        replica = self._replicas[replica_id] = Replica(replica_id, phase)
        return replica

    def remove(self, replica_id: str) -> None:
        if replica := self._replicas.pop(replica_id, None):
            self._cached.forget(replica_id, replica.blocks)

    def detach(self, replica_id: str) -> None:
        """Forgets what a replica reported: nobody knows what has become of it since. Its next stream tells it anew."""
        replica = self._replicas[replica_id]
        self._cached.forget(replica_id, replica.blocks)
        replica.ready, replica.info = False, None
        replica.others_in_flight, replica.blocks = InFlight(), BlockMirror(0)
        replica.queued.clear()
        replica.queued_tokens = 0
        replica.writing_since_s.clear()

    def get(self, replica_id: str) -> Replica | None:
        return self._replicas.get(replica_id)

    def pool(self, phase: Phase, *, ready_only: bool = False) -> list[Replica]:
        """The replicas of one pool in the order of their ids."""
        return sorted(
            (r for r in self._replicas.values() if r.phase is phase and (r.ready or not ready_only)),
            key=lambda replica: replica.replica_id,
        )

    def fold(self, report: WorkerReport) -> None:
        replica = self._replicas.get(report.replica_id)
        if replica is None:
            return
        replica.load = report.load
        replica.others_in_flight = report.others_in_flight
        if report.info is not None:
            self._cached.forget(replica.replica_id, replica.blocks)
            replica.info = report.info
            replica.blocks = BlockMirror(report.info.num_kv_blocks)
        if report.blocks is not None:
            self._take_blocks(replica, report.blocks)
        for delta in report.deltas:
            self._learn(replica, delta)

    def sent(self, replica_id: str, request_id: str, tokens: int) -> None:
        """Counts a request's tokens as in flight on a replica until `ended`."""
        self.ended(replica_id, request_id)
        if replica := self._replicas.get(replica_id):
            replica.in_flight[request_id] = tokens
            replica.in_flight_tokens += tokens
            if replica.phase is Phase.PREFILL:
                self.queued(replica_id, request_id)

    def queued(self, replica_id: str, request_id: str) -> None:
        """Says that a request in flight is under way to its engine, where it waits until its first token."""
        replica = self._replicas.get(replica_id)
        if replica and request_id in replica.in_flight:
            self._has_token(replica, request_id)
            replica.queued[request_id] = replica.in_flight[request_id]
            replica.queued_tokens += replica.in_flight[request_id]

    def produced(self, replica_id: str, request_id: str, tokens: int) -> None:
        """Adds tokens a running request has written: its KV, and so each further step, has grown by them."""
        replica = self._replicas.get(replica_id)
        if replica and request_id in replica.in_flight:
            replica.in_flight[request_id] += tokens
            replica.in_flight_tokens += tokens

    def ended(self, replica_id: str, request_id: str) -> None:
        if replica := self._replicas.get(replica_id):
            replica.in_flight_tokens -= replica.in_flight.pop(request_id, 0)
            self._has_token(replica, request_id)
            began_s = replica.writing_since_s.pop(request_id, None)
            if began_s is not None:
                replica.slot_s.add(self._clock() - began_s)

    @property
    def block_size_tokens(self) -> int:
        """Of every engine's blocks, for what is handed over; 0 while no engine is known."""
        return next((r.info.block_size_tokens for r in self._replicas.values() if r.info), 0)

    def snapshot(self, hashes: Sequence[bytes] = ()) -> ClusterSnapshot:
        """The replicas a request may be placed on now. `hashes`: of the full blocks of its prompt."""
        num_cached = self._cached.num_leading(hashes)

        def views(phase: Phase) -> tuple[ReplicaView, ...]:
            return tuple(_view(r, num_cached.get(r.replica_id, 0)) for r in self.pool(phase, ready_only=True))

        return ClusterSnapshot(views(Phase.PREFILL), views(Phase.DECODE), self.expects_prefill)

    def _take_blocks(self, replica: Replica, told: BlockChanges) -> None:
        before = replica.blocks.held
        if (news := replica.blocks.apply(told)) is None:
            return
        # A mirror that is cleared because it would overflow has taken the removals over before.
        gone = chain(before, told.removed) if news.cleared else news.removed
        self._cached.remove(replica.replica_id, gone)
        self._cached.store(replica.replica_id, news.stored)

    def _learn(self, replica: Replica, delta: TokenDelta) -> None:
        """What a delta shows of the engine that wrote it."""
        if delta.request_id in replica.queued and (delta.token_ids or delta.finish_reason is not None):
            self._has_token(replica, delta.request_id)
        if (facts := delta.prefill) is None:
            return
        if not facts.num_external_cached_tokens:
            replica.computed_share.add(facts.num_computed_tokens, facts.num_prompt_tokens)
        if replica.phase is Phase.DECODE and delta.request_id in replica.in_flight:
            computed_s = delta.times.computed_s if delta.times else 0.0
            replica.writing_since_s[delta.request_id] = self._clock() - computed_s

    @staticmethod
    def _has_token(replica: Replica, request_id: str) -> None:
        replica.queued_tokens -= replica.queued.pop(request_id, 0)


def _view(replica: Replica, num_cached_blocks: int) -> ReplicaView:
    in_flight, info, load = replica.all_in_flight, replica.info, replica.load
    is_trusted = load.prompt_tokens_computed_total >= TRUSTED_AFTER_TOKENS
    computed_share = replica.computed_share.ratio
    return ReplicaView(
        replica_id=replica.replica_id,
        in_flight_requests=in_flight.num_requests,
        in_flight_tokens=in_flight.num_tokens,
        num_kv_blocks=info.num_kv_blocks if info else 0,
        num_kv_blocks_used=load.num_kv_blocks_used,
        queued_tokens=in_flight.num_queued_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s if is_trusted else 0.0,
        computed_share=1.0 if computed_share is None else computed_share,
        slot_s=replica.slot_s.ratio or 0.0,
        max_num_seqs=info.max_num_seqs if info else 0,
        block_size_tokens=info.block_size_tokens if info else 0,
        cached_tokens=num_cached_blocks * info.block_size_tokens if info else 0,
    )
