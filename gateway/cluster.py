"""Owns the gateway's view of the cluster: it folds reports and its own sendings into a ClusterSnapshot."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from engine.blocks import BlockMirror
from engine.load import Recent
from engine.protocol import (
    BlockChanges,
    EngineInfo,
    EngineLoad,
    InFlight,
    Phase,
    PrefillFacts,
    TokenDelta,
    WorkerReport,
)
from gateway.routing.costs import Costs
from gateway.routing.fit import CostLearner
from gateway.routing.prefix_index import PrefixIndex
from gateway.routing.types import ClusterSnapshot, ReplicaView

RECENT_REQUESTS = 64
"""Over how many requests what is measured of a replica is averaged."""
TRUSTED_AFTER_TOKENS = 1024
"""So many tokens an engine must have computed before its prefill rate says something: warm-ups are short and slow."""
LONGEST_STRETCH = 8
"""So many prompts are learnt from together at the most."""
LEARNS_STEPS_EVERY_S = 0.25
"""Steps of one engine are alike; so often the cost of one is learnt."""


@dataclass
class Stretch:
    """Prompts that an engine has read without a break: of each, how many tokens were computed and how many it has."""

    began_s: float
    ended_s: float = -math.inf
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@dataclass
class Replica:
    """One member of a pool. `ready`: its stream is attached and every hand-off pair it is part of is warm.

    `in_flight` is what this gateway has sent there: tokens by request id, their sum in `in_flight_tokens`; it is exact
    and counts before the replica knows of it. `others_in_flight` is what the other gateways have there, as reported.
    `queued` are those of its own that have no token yet, with their tokens; `writing_since_s` those that run in decode.
    `blocks` are the engine's cached blocks, as reported. `computed_share` and `slot_s` are measured on this gateway's
    own requests (`gateway.routing.types.ReplicaView`).

    `reads` are the predicted seconds of this gateway's prompts that wait here to be read, and `read_until_s` when that
    will be done. `stretch` is the reading without a break that was seen last. `stepped_s` says when a step was learnt
    from last. `view` is what a snapshot shows; None after a change.
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
    reads: dict[str, float] = field(default_factory=dict)
    read_until_s: float = 0.0
    stretch: "Stretch" = field(default_factory=lambda: Stretch(-math.inf))
    stepped_s: float = -math.inf
    view: ReplicaView | None = None

    @property
    def attached(self) -> bool:
        return self.info is not None

    def hands_over_to(self, other: "Replica") -> bool:
        """Whether blocks can go from one to the other; False while one of them is not known."""
        return self.info is not None and other.info is not None and self.info.kv_format == other.info.kv_format

    @property
    def all_in_flight(self) -> InFlight:
        """What all gateways have in flight here."""
        return InFlight(
            len(self.in_flight) + self.others_in_flight.num_requests,
            self.in_flight_tokens + self.others_in_flight.num_tokens,
            self.queued_tokens + self.others_in_flight.num_queued_tokens,
        )


class Cluster:
    """The replicas of both pools, as reported, with what is in flight on each, and what their work costs.
    `expects_prefill`: whether there should be prefill replicas; `can_ask`: whether decode can be asked for what it has
    cached. `promised_tokens(replica_id)`: of sessions that are
    expected to come back there."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        promised_tokens: Callable[[str], float] = lambda replica_id: 0.0,
    ) -> None:
        self.expects_prefill = False
        self.can_ask = False
        self._clock = clock
        self._promised_tokens = promised_tokens
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[Phase, list[Replica]] = {phase: [] for phase in Phase}
        self._cached = PrefixIndex()
        self._learner = CostLearner()

    def add(self, replica_id: str, phase: Phase) -> Replica:
        replica = self._replicas[replica_id] = Replica(replica_id, phase)
        self._sort()
        return replica

    def remove(self, replica_id: str) -> None:
        if replica := self._replicas.pop(replica_id, None):
            self._cached.forget(replica_id, replica.blocks)
            self._sort()

    def detach(self, replica_id: str) -> None:
        """Forgets what a replica reported: nobody knows what has become of it since. Its next stream tells it anew."""
        replica = self._replicas[replica_id]
        self._cached.forget(replica_id, replica.blocks)
        replica.ready, replica.info = False, None
        replica.others_in_flight, replica.blocks = InFlight(), BlockMirror(0)
        replica.queued.clear()
        replica.reads.clear()
        replica.read_until_s = 0.0
        replica.queued_tokens = 0
        replica.writing_since_s.clear()
        replica.view = None

    def get(self, replica_id: str) -> Replica | None:
        return self._replicas.get(replica_id)

    def pool(self, phase: Phase, *, ready_only: bool = False) -> list[Replica]:
        """The replicas of one pool in the order of their ids."""
        return [r for r in self._pools[phase] if r.ready or not ready_only]

    def fold(self, report: WorkerReport) -> None:
        replica = self._replicas.get(report.replica_id)
        if replica is None:
            return
        replica.load = report.load
        replica.others_in_flight = report.others_in_flight
        replica.view = None
        if report.info is not None:
            self._cached.forget(replica.replica_id, replica.blocks)
            replica.info = report.info
            replica.blocks = BlockMirror(report.info.num_kv_blocks)
        if report.blocks is not None:
            self._take_blocks(replica, report.blocks)
        self._learn_costs(replica, report)
        for delta in report.deltas:
            self._learn(replica, delta)

    def sent(self, replica_id: str, request_id: str, tokens: int, read_s: float = 0.0) -> None:
        """Counts a request's tokens as in flight on a replica until `ended`. `read_s`: how long a prefill replica will
        take to read its prompt, as predicted."""
        self.ended(replica_id, request_id)
        if replica := self._replicas.get(replica_id):
            replica.in_flight[request_id] = tokens
            replica.in_flight_tokens += tokens
            replica.view = None
            if replica.phase is Phase.PREFILL:
                self.queued(replica_id, request_id, read_s)

    def queued(self, replica_id: str, request_id: str, read_s: float = 0.0) -> None:
        """Says that a request in flight is under way to its engine, where it waits until its first token, and for how
        long the engine will read its prompt, as predicted."""
        replica = self._replicas.get(replica_id)
        if replica and request_id in replica.in_flight:
            self._has_token(replica, request_id)
            replica.queued[request_id] = replica.in_flight[request_id]
            replica.queued_tokens += replica.in_flight[request_id]
            replica.reads[request_id] = read_s
            replica.read_until_s = max(self._clock(), replica.read_until_s) + read_s
            replica.view = None

    def produced(self, replica_id: str, request_id: str, tokens: int) -> None:
        """Adds tokens a running request has written: its KV, and so each further step, has grown by them."""
        replica = self._replicas.get(replica_id)
        if replica and request_id in replica.in_flight:
            replica.in_flight[request_id] += tokens
            replica.in_flight_tokens += tokens
            replica.view = None

    def ended(self, replica_id: str, request_id: str) -> None:
        if replica := self._replicas.get(replica_id):
            replica.in_flight_tokens -= replica.in_flight.pop(request_id, 0)
            self._has_token(replica, request_id)
            began_s = replica.writing_since_s.pop(request_id, None)
            if began_s is not None:
                replica.slot_s.add(self._clock() - began_s)
            replica.view = None

    def answered(self, num_output_tokens: int) -> None:
        """Says how long an answer has become."""
        self._learner.answered(num_output_tokens)

    @property
    def block_size_tokens(self) -> int:
        """Of every engine's blocks, for what is handed over; 0 while no engine is known."""
        return next((r.info.block_size_tokens for r in self._replicas.values() if r.info), 0)

    @property
    def costs(self) -> Costs:
        return self._learner.costs

    def snapshot(self, hashes: Sequence[bytes] = ()) -> ClusterSnapshot:
        """The replicas a request may be placed on now. `hashes`: of the full blocks of its prompt."""
        # Engines that hand over to each other have blocks of one size.
        block_size_tokens = self.block_size_tokens
        cached = {name: number * block_size_tokens for name, number in self._cached.num_leading(hashes).items()}
        return ClusterSnapshot(
            self._views(Phase.PREFILL),
            self._views(Phase.DECODE),
            self.expects_prefill,
            cached,
            self._learner.costs,
            self._clock(),
            self.can_ask,
        )

    def own_views(self, phase: Phase) -> Iterator[ReplicaView]:
        """The ready replicas of a pool, with only this gateway's own requests in flight there."""
        for view, replica in zip(self._views(phase), self.pool(phase, ready_only=True), strict=True):
            own, tokens = len(replica.in_flight), replica.in_flight_tokens
            yield msgspec.structs.replace(view, in_flight_requests=own, in_flight_tokens=tokens)

    def _views(self, phase: Phase) -> tuple[ReplicaView, ...]:
        views: list[ReplicaView] = []
        for replica in self._pools[phase]:
            if replica.ready:
                if replica.view is None:
                    replica.view = self._view(replica)
                views.append(replica.view)
        return tuple(views)

    def _view(self, replica: Replica) -> ReplicaView:
        others, info, load = replica.others_in_flight, replica.info, replica.load
        computed_share = replica.computed_share.ratio
        computed_share = 1.0 if computed_share is None else computed_share
        rate = load.prefill_tokens_per_s if load.prompt_tokens_computed_total >= TRUSTED_AFTER_TOKENS else 0.0
        others_read_s = 0.0
        # On decode, what others have waiting there is read by prefill, but for what nobody can tell from here.
        if rate > 0 and (replica.phase is Phase.PREFILL or not self.expects_prefill):
            others_read_s = others.num_queued_tokens * computed_share / rate
        return ReplicaView(
            replica.replica_id,
            len(replica.in_flight) + others.num_requests,
            replica.in_flight_tokens + others.num_tokens,
            info.num_kv_blocks if info else 0,
            load.num_kv_blocks_used,
            replica.queued_tokens + others.num_queued_tokens,
            rate,
            computed_share,
            replica.slot_s.ratio or 0.0,
            info.max_num_seqs if info else 0,
            info.block_size_tokens if info else 0,
            max(replica.read_until_s, self._clock()) + others_read_s if others_read_s else replica.read_until_s,
            self._promised_tokens(replica.replica_id),
            info.kv_format if info else "",
        )

    def _sort(self) -> None:
        for phase in Phase:
            members = [r for r in self._replicas.values() if r.phase is phase]
            self._pools[phase] = sorted(members, key=lambda replica: replica.replica_id)

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
        is_asked = replica.phase is Phase.DECODE and delta.handoff is not None
        if (facts := delta.prefill) is None or is_asked:
            # What it was asked for was cached there, and is no answer: it says nothing of the next prompt.
            return
        if not facts.num_external_cached_tokens:
            replica.computed_share.add(facts.num_computed_tokens, facts.num_prompt_tokens)
        if replica.phase is Phase.DECODE and delta.request_id in replica.in_flight:
            computed_s = delta.times.computed_s if delta.times else 0.0
            replica.writing_since_s[delta.request_id] = self._clock() - computed_s

    def _learn_costs(self, replica: Replica, report: WorkerReport) -> None:
        """What a report shows of the costs of work.

        An engine may read the end of one prompt and the beginning of the next in one step, so what each has taken is
        not known. What all have taken is, from the first one's beginning on, while there is no break between them.
        """
        now_s, learner, load = self._clock(), self._learner, report.load
        reads: list[PrefillFacts] = []
        longest_s = 0.0
        for delta in report.deltas:
            facts, times = delta.prefill, delta.times
            if facts is None or times is None or delta.request_id not in replica.in_flight:
                continue
            if facts.num_external_cached_tokens and facts.num_computed_tokens <= 1:
                if not load.num_waiting_requests and replica.info:
                    num_blocks = facts.num_external_cached_tokens // replica.info.block_size_tokens
                    learner.handed_over(num_blocks, times.waited_s)
            elif facts.num_computed_tokens > 1:
                reads.append(facts)
                longest_s = max(longest_s, times.computed_s)
        if reads:
            began_s, stretch = now_s - longest_s, replica.stretch
            if began_s >= stretch.ended_s or len(stretch.sizes) >= LONGEST_STRETCH:
                stretch = replica.stretch = Stretch(began_s)
            stretch.began_s, stretch.ended_s = min(stretch.began_s, began_s), now_s
            stretch.sizes += [(facts.num_computed_tokens, facts.num_prompt_tokens) for facts in reads]
            learner.read(report.phase, stretch.sizes, now_s - stretch.began_s)
        elif (
            report.phase is Phase.DECODE
            and load.num_running_requests
            and load.step_prefill_tokens == 0
            and load.step_duration_s > 0
            and now_s - replica.stepped_s >= LEARNS_STEPS_EVERY_S
        ):
            learner.stepped(load.num_running_requests, load.num_running_tokens, load.step_duration_s)
            replica.stepped_s = now_s

    def _has_token(self, replica: Replica, request_id: str) -> None:
        replica.queued_tokens -= replica.queued.pop(request_id, 0)
        if replica.reads.pop(request_id, None) is not None:
            # The next one begins now.
            replica.read_until_s = self._clock() + sum(replica.reads.values())
