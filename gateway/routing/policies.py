"""Owns the placement policies: pure functions from a request and a snapshot to a placement or a rejection.

A policy chooses a replica in each pool, decode first. Formulas that other systems have published are named after them;
their constants are theirs unless others are given.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.protocol import Phase
from gateway.routing.joint import Joint
from gateway.routing.types import NO_DECODE, ClusterSnapshot, Placement, Rejection, ReplicaView, RequestView

Policy = Callable[[RequestView, ClusterSnapshot, random.Random], Placement | Rejection]


@dataclass(frozen=True, slots=True)
class Choice:
    """One replica of a pool, what each of the pool scored, and the figure that decided, in words."""

    view: ReplicaView
    scores: Mapping[str, float]
    figure: str


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas of one phase, at least one, and how much of the request's prompt each has cached."""

    phase: Phase
    views: Sequence[ReplicaView]
    cached_tokens: Mapping[str, int]

    def cached(self, view: ReplicaView) -> int:
        return self.cached_tokens.get(view.replica_id, 0)


Chooser = Callable[[RequestView, Pool, random.Random], Choice]


@dataclass(frozen=True, slots=True)
class Split:
    """The policy that reads each prompt on a prefill replica and answers it on a decode replica.

    Prefill is left out when there is no prefill replica, or the request needs the whole prompt on the engine that
    answers (prompt logprobs). `words` say what the chosen ones have before all others.
    """

    name: str
    words: str
    choose: Chooser

    def __call__(self, request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> Placement | Rejection:
        if not snapshot.decode:
            return NO_DECODE
        cached = snapshot.cached_tokens
        decode = self.choose(request, Pool(Phase.DECODE, snapshot.decode, cached), rng)
        # What prefill replicas score is in the receipt also where none is needed.
        prefill = self.choose(request, Pool(Phase.PREFILL, snapshot.prefill, cached), rng) if snapshot.prefill else None
        scores = {**(prefill.scores if prefill else {}), **decode.scores}
        if request.needs_whole_prompt:
            reason = "decode reads the prompt itself: prompt logprobs need it whole on the engine that answers"
            return Placement(None, decode.view.replica_id, self.name, reason, scores)
        if prefill is None:
            reason = "decode reads the prompt itself: no prefill replica is available"
            degraded = snapshot.expects_prefill
            return Placement(None, decode.view.replica_id, self.name, reason, scores, degraded=degraded)
        reason = (
            f"{self.words}: {prefill.figure} on {prefill.view.replica_id}, {decode.figure} on {decode.view.replica_id}"
        )
        return Placement(prefill.view.replica_id, decode.view.replica_id, self.name, reason, scores)


def place(policy: Policy, request: RequestView, snapshot: ClusterSnapshot, seed: int) -> Placement | Rejection:
    """Decides one placement. The same arguments give the same answer, bit for bit (invariant I6).

    Where some replicas cannot hand over to each other, the policy decides twice: who decodes, of all, and then the
    whole placement among those that can hand over to that one.
    """
    placement = policy(request, snapshot, random.Random(seed))
    if isinstance(placement, Rejection) or not snapshot.has_several_formats:
        return placement
    kv_format = snapshot.decode_view(placement.decode).kv_format
    return policy(request, snapshot.of_format(kv_format), random.Random(seed))


# -- choosers


def _drawn(views: Sequence[ReplicaView], scores: Mapping[str, float], best: float, rng: random.Random) -> ReplicaView:
    """One of those that score best."""
    return rng.choice([view for view in views if scores[view.replica_id] == best])


def _lowest(cost: Callable[[RequestView, Pool, ReplicaView], float]) -> Chooser:
    """The replica with the lowest cost; ties are drawn."""

    def choose(request: RequestView, pool: Pool, rng: random.Random) -> Choice:
        costs = {view.replica_id: cost(request, pool, view) for view in pool.views}
        lowest = min(costs.values())
        return Choice(_drawn(pool.views, costs, lowest, rng), costs, f"{lowest:g}")

    return choose


def _tokens_in_flight(request: RequestView, pool: Pool, view: ReplicaView) -> float:
    return float(view.in_flight_tokens)


def _in_turn(request: RequestView, pool: Pool, rng: random.Random) -> Choice:
    return Choice(pool.views[request.number % len(pool.views)], {}, f"number {request.number}")


def _as_before(request: RequestView, pool: Pool, rng: random.Random) -> Choice:
    """Where the session's last turn went, if that replica is there; else in turn."""
    session = request.session
    before = None if session is None else session.prefill if pool.phase is Phase.PREFILL else session.decode
    for view in pool.views:
        if view.replica_id == before:
            return Choice(view, {}, "the session")
    return _in_turn(request, pool, rng)


@dataclass(frozen=True, slots=True)
class Dynamo:
    """NVIDIA Dynamo's KV router as published: the lowest `prefill_load_scale * max(active_prefill + prompt -
    overlap_credit * overlap, 0) + decode_blocks`, at temperature 0; in the decode pool of a split the credit is 0."""

    prefill_load_scale: float = 1.0
    overlap_credit: float = 1.0

    def __call__(self, request: RequestView, pool: Pool, rng: random.Random) -> Choice:
        return _lowest(self._cost_blocks)(request, pool, rng)

    def _cost_blocks(self, request: RequestView, pool: Pool, view: ReplicaView) -> float:
        """Prefill that is waiting and this prompt's, less what is cached, and the blocks that are in flight."""
        credit_tokens = self.overlap_credit * pool.cached(view) if pool.phase is Phase.PREFILL else 0
        prefill_tokens = max(view.queued_tokens + request.num_prompt_tokens - credit_tokens, 0)
        return (self.prefill_load_scale * prefill_tokens + view.in_flight_tokens) / max(view.block_size_tokens, 1)


@dataclass(frozen=True, slots=True)
class LlmD:
    """llm-d's weighted scorers as published: the highest sum of short queue, free KV cache and cached prefix, each in
    [0, 1]. The queue's score is linear between the longest and the shortest one.

    Where replicas have `affine_share` of the prompt cached, only those are scored, unless the first token would come
    `max_penalty_s` later there, as predicted.
    """

    queue_weight: float = 2.0
    kv_weight: float = 2.0
    prefix_weight: float = 3.0
    affine_share: float = 0.8
    max_penalty_s: float = 5.0

    def __call__(self, request: RequestView, pool: Pool, rng: random.Random) -> Choice:
        candidates = self._affine(request, pool)
        queues = [view.in_flight_requests for view in candidates]
        longest, spread = max(queues), max(queues) - min(queues)

        def score(view: ReplicaView) -> float:
            queue = (longest - view.in_flight_requests) / spread if spread else 1.0
            kv_used = view.num_kv_blocks_used / view.num_kv_blocks if view.num_kv_blocks else 0.0
            prefix = pool.cached(view) / max(request.num_prompt_tokens, 1)
            return self.queue_weight * queue + self.kv_weight * (1 - kv_used) + self.prefix_weight * prefix

        scores = {view.replica_id: score(view) for view in candidates}
        highest = max(scores.values())
        return Choice(_drawn(candidates, scores, highest, rng), scores, f"{highest:.3g}")

    def _affine(self, request: RequestView, pool: Pool) -> Sequence[ReplicaView]:
        needed_tokens = self.affine_share * request.num_prompt_tokens
        affine = [view for view in pool.views if pool.cached(view) >= needed_tokens]
        if not affine:
            return pool.views
        shortest_s = min(_wait_s(request, pool, view) for view in pool.views)
        penalty_s = min(_wait_s(request, pool, view) for view in affine) - shortest_s
        return pool.views if penalty_s > self.max_penalty_s else affine


def _wait_s(request: RequestView, pool: Pool, view: ReplicaView) -> float:
    """Until a replica has read what is queued and this prompt; 0 while its rate is unknown."""
    tokens = view.queued_tokens * view.computed_share + request.num_prompt_tokens - pool.cached(view)
    return tokens / view.prefill_tokens_per_s if view.prefill_tokens_per_s > 0 else 0.0


def dynamo(constants: Dynamo, name: str = "dynamo") -> Split:
    return Split(name, "lowest cost in blocks", constants)


def llm_d(constants: LlmD, name: str = "llm-d") -> Split:
    return Split(name, "highest weighted score", constants)


least_tokens = Split("least-tokens", "fewest tokens in flight", _lowest(_tokens_in_flight))

POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        least_tokens,
        Split("round-robin", "in turn", _in_turn),
        Split("session-affinity", "where the session was before, or in turn", _as_before),
        dynamo(Dynamo()),
        llm_d(LlmD()),
        Joint(),
    )
}
"""By the name that the configuration and receipts give them."""
