"""Owns the policy `baton`: prefill and decode are chosen together, by the predicted seconds they cost everyone. Pure.

A placement costs, in seconds of all requests' time:

- the read: until the prompts before it are read, and its own uncached rest. Where decode has more of the prompt cached
  than prefill, it can be asked for that: a short read there, and a hand-off in the place of reading it again. Who is
  delayed: itself, and those that come while the reading replica is busy; by Little's law these are about as many as are
  there now.
- the hand-off of the blocks that decode does not have, or, where decode reads the prompt itself, none; but every answer
  that is being written there then pauses for as long.
- the answer: its steps, each of which grows by what this request adds to it, for everyone in the batch. Of two answers
  of unknown length, the time that both are written is half of one, on average.
- what it displaces on the decode replica: of its cache, what sessions that are expected back want is to be read again.
  What a prefill replica has cached, decode has too, so there nothing counts as lost.

All but the read depends on decode only, and the read on prefill only, so the best pair is the best of each pool: the
work grows with the sum of the pools, not with their product. Whether splitting pays falls out: decode reads the prompt
itself where that costs less than the best pair.

Of each pool only the least loaded replicas and those with the most of the prompt cached are scored.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from gateway.routing.costs import ReadCost
from gateway.routing.predict import room_s
from gateway.routing.types import (
    NO_DECODE,
    ClusterSnapshot,
    Placement,
    Rejection,
    ReplicaView,
    RequestView,
)

NAME = "baton"

_NO_TIES = random.Random(0)
"""For what replicas that are given cost: nothing is drawn."""

CANDIDATES = 8
"""How many of a pool's least loaded replicas are scored, and how many of those that have the most cached."""


class Cost(msgspec.Struct, frozen=True):
    """What one replica's part of a placement costs, in seconds. `own_s` is this request's, until its part is done;
    `others_s` the other requests', `lost_s` what has to be read again because its blocks are displaced. `ask` is the
    decode replica that is asked for the first `asked_tokens` of the prompt."""

    replica_id: str
    own_s: float
    others_s: float
    lost_s: float
    ask: str | None = None
    asked_tokens: int = 0

    @property
    def total_s(self) -> float:
        return self.own_s + self.others_s + self.lost_s


@dataclass(frozen=True, slots=True)
class Joint:
    """The policy. Its parts can be left out, to see what each is worth: `conditional_split`, that decode may read a
    prompt itself; `joint`, that decode is chosen by cost (else it is the one with the fewest tokens); `affinity`, what
    is cached; `keeps_promised`, what the sessions that are expected back would lose."""

    conditional_split: bool = True
    joint: bool = True
    affinity: bool = True
    keeps_promised: bool = True
    name: str = NAME

    def __call__(self, request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> Placement | Rejection:
        if not snapshot.decode:
            return NO_DECODE
        return _Decision(self, request, snapshot, rng).placement()


def split_gain_s(request: RequestView, placement: Placement, snapshot: ClusterSnapshot) -> float | None:
    """By how many seconds of everyone's time a split placement, of whatever policy, was predicted to cost less than its
    decode replica's reading the prompt itself; below 0 if it costs more. None for one that is not split."""
    if placement.prefill is None:
        return None
    decision = _Decision(Joint(), request, snapshot, _NO_TIES)
    prefill, decode = snapshot.prefill_view(placement.prefill), snapshot.decode_view(placement.decode)
    asked = snapshot.decode_view(placement.ask) if placement.ask is not None else None
    written = decision.writing(decode)
    split_s = decision.reading(prefill, asked).total_s + decision.fetching(decode, written).total_s
    return decision.reading_itself(decode, written).total_s - split_s


class _Decision:
    """One placement."""

    def __init__(self, policy: Joint, request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> None:
        self._policy = policy
        self._request = request
        self._snapshot = snapshot
        self._rng = rng
        self._output_tokens = request.expected_output_tokens(snapshot.costs.output_tokens)
        self._output_tokens *= request.num_choices

    def placement(self) -> Placement:
        request, snapshot, policy = self._request, self._snapshot, self._policy
        if policy.joint:
            decodes = self._candidates(snapshot.decode, _tokens_in_flight)
        else:
            decodes = [min(snapshot.decode, key=_tokens_in_flight)]
        written = {view.replica_id: self.writing(view) for view in decodes}
        local = [self.reading_itself(view, written[view.replica_id]) for view in decodes]
        scores = {f"{cost.replica_id} alone": cost.total_s for cost in local}
        alone = self._lowest(local)
        if request.needs_whole_prompt:
            reason = "decode reads the prompt itself: prompt logprobs need it whole on the engine that answers"
            return Placement(None, alone.replica_id, policy.name, reason, scores)
        if not snapshot.prefill:
            reason = f"decode reads the prompt itself: no prefill replica is available; {_words(alone)}"
            degraded = snapshot.expects_prefill
            return Placement(None, alone.replica_id, policy.name, reason, scores, degraded=degraded)
        prefills = self._candidates(snapshot.prefill, lambda view: view.read_until_s)
        asked = self._asked()
        read = self._lowest([self.reading(view, asked) for view in prefills], scores)
        fetched = self._lowest([self.fetching(view, written[view.replica_id]) for view in decodes], scores)
        split_s = read.total_s + fetched.total_s
        if policy.conditional_split and alone.total_s < split_s:
            reason = f"decode reads the prompt itself: {_words(alone)}, against {split_s:.3g} s in all when split"
            return Placement(None, alone.replica_id, policy.name, reason, scores)
        reason = f"split: {_words(read)} and {_words(fetched)}, against {alone.total_s:.3g} s in all on one"
        return Placement(read.replica_id, fetched.replica_id, policy.name, reason, scores, ask=read.ask)

    # -- the parts of the cost

    def reading(self, view: ReplicaView, asked: ReplicaView | None) -> Cost:
        """On a prefill replica, which fetches from the one that is asked what it has not cached if that costs less."""
        costs, num_tokens = self._snapshot.costs, self._request.num_prompt_tokens
        wait_s = self._snapshot.read_wait_s(view)
        read_s = self._read_s(costs.prefill.read, view)
        alone = Cost(view.replica_id, wait_s + read_s, read_s * view.in_flight_requests, lost_s=0.0)
        if asked is None or (num_asked := self._askable(asked)) <= (num_cached := self._cached(view)):
            return alone
        num_blocks = asked.blocks_of(num_asked - num_cached)
        # An engine computes the last block of what it is asked for, although it has it cached.
        ask_s = costs.decode.read.seconds(asked.block_size_tokens, num_asked)
        asked_wait_s = self._snapshot.read_wait_s(asked) + self._room_s(asked, num_asked, 1)
        rest_s = costs.prefill.read.seconds(num_tokens - num_asked, num_tokens)
        own_s = asked_wait_s + ask_s + wait_s + costs.handoff.seconds(num_blocks) + rest_s
        others_s = rest_s * view.in_flight_requests + ask_s * asked.in_flight_requests
        asking = Cost(view.replica_id, own_s, others_s, 0.0, asked.replica_id, num_asked)
        return min(alone, asking, key=lambda cost: cost.total_s)

    def reading_itself(self, view: ReplicaView, written: Cost) -> Cost:
        """On a decode replica that answers too."""
        wait_s = self._snapshot.read_wait_s(view)
        read_s = self._read_s(self._snapshot.costs.decode.read, view)
        return Cost(
            view.replica_id,
            written.own_s + wait_s + read_s,
            written.others_s + read_s * view.in_flight_requests,
            written.lost_s,
        )

    def fetching(self, view: ReplicaView, written: Cost) -> Cost:
        """On a decode replica that fetches the hand-off."""
        num_blocks = view.blocks_of(self._request.num_prompt_tokens - self._cached(view))
        fetch_s = self._snapshot.costs.handoff.seconds(num_blocks)
        return Cost(view.replica_id, written.own_s + fetch_s, written.others_s, written.lost_s)

    def writing(self, view: ReplicaView) -> Cost:
        """The answer, on a decode replica."""
        step, steps = self._snapshot.costs.decode.step, self._output_tokens
        others, tokens = view.in_flight_requests, view.in_flight_tokens
        own_tokens = self._request.num_prompt_tokens + steps / 2
        now_s = step.seconds(others, tokens)
        then_s = step.seconds(others + self._request.num_choices, tokens + own_tokens)
        lost_s = self._lost_s(view, self._request.num_prompt_tokens + steps)
        wait_s = self._room_s(view, own_tokens, self._request.num_choices)
        return Cost(view.replica_id, wait_s + steps * then_s, others * steps / 2 * (then_s - now_s), lost_s)

    def _room_s(self, view: ReplicaView, num_tokens: float, num_sequences: int) -> float:
        """Until there is room for so much more in the batch and in the KV cache. Before it was measured for how long a
        request holds its place, that is what writing an answer takes."""
        costs, num_requests = self._snapshot.costs, view.in_flight_requests + num_sequences
        slot_s = view.slot_s or costs.output_tokens * costs.decode.step.seconds(num_requests, view.in_flight_tokens)
        return room_s(view, num_sequences, num_tokens, 0.0, slot_s)

    def _read_s(self, cost: ReadCost, view: ReplicaView) -> float:
        num_tokens = self._request.num_prompt_tokens
        # An engine computes a prompt's last token in any case.
        return cost.seconds(max(num_tokens - self._cached(view), 1), num_tokens)

    def _lost_s(self, view: ReplicaView, num_tokens: float) -> float:
        """To read again what sessions that are expected back lose to this request's new blocks, on a decode replica.

        Engines evict what was used the longest ago. So a new block displaces one that is wanted back as likely as such
        are in the cache: the share of it that is promised. Where more is promised than it can hold, the share that it
        holds comes back in time.
        """
        capacity_tokens = view.num_kv_blocks * view.block_size_tokens
        if not self._policy.keeps_promised or not capacity_tokens or not view.promised_tokens:
            return 0.0
        promised = view.promised_tokens / capacity_tokens
        lost_tokens = max(num_tokens - self._cached(view), 0.0) * min(promised, capacity_tokens / view.promised_tokens)
        # Whose they are is not known: they are taken to be of prompts as long as this one.
        cost = self._snapshot.costs.decode.read
        return lost_tokens * (cost.token_s + cost.pair_s * self._request.num_prompt_tokens / 2)

    # -- which replicas

    def _asked(self) -> ReplicaView | None:
        """The decode replica that has most of the prompt cached; None where nobody can be asked."""
        if not self._snapshot.can_ask or not self._policy.affinity:
            return None
        most = max(self._snapshot.decode, key=self._askable)
        return most if self._askable(most) else None

    def _askable(self, view: ReplicaView) -> int:
        return self._snapshot.askable_tokens(view.replica_id, self._request.num_prompt_tokens)

    def _cached(self, view: ReplicaView) -> int:
        return self._snapshot.cached(view.replica_id) if self._policy.affinity else 0

    def _candidates(self, pool: Sequence[ReplicaView], load: Callable[[ReplicaView], float]) -> Sequence[ReplicaView]:
        if len(pool) <= 2 * CANDIDATES:
            return pool
        cached = self._snapshot.cached_tokens
        most = heapq.nlargest(CANDIDATES, pool, key=lambda view: cached.get(view.replica_id, 0))
        least = heapq.nsmallest(CANDIDATES, pool, key=load)
        return list({view.replica_id: view for view in (*most, *least)}.values())

    def _lowest(self, costs: Sequence[Cost], scores: dict[str, float] | None = None) -> Cost:
        """The replica whose part costs least; ties are drawn."""
        if scores is not None:
            scores.update((cost.replica_id, cost.total_s) for cost in costs)
        lowest_s = min(cost.total_s for cost in costs)
        return self._rng.choice([cost for cost in costs if cost.total_s == lowest_s])


def _tokens_in_flight(view: ReplicaView) -> float:
    return view.in_flight_tokens


def _words(cost: Cost) -> str:
    words = f"{cost.own_s:.3g} s and {cost.others_s:.3g} s of others' on {cost.replica_id}"
    return f"{words}, which fetches {cost.asked_tokens} tokens of {cost.ask}," if cost.ask else words
