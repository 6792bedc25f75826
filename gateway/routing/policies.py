"""Owns the placement policies: pure functions from a request and a snapshot to a placement or a rejection."""

import random
from collections.abc import Callable, Sequence

from gateway.routing.types import Cause, ClusterSnapshot, Placement, Rejection, ReplicaView, RequestView

Policy = Callable[[RequestView, ClusterSnapshot, random.Random], Placement | Rejection]

NO_DECODE_RETRY_AFTER_S = 5


def least_tokens(request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> Placement | Rejection:
    """The replica with the fewest tokens in flight in each pool; ties are drawn.

    Decode is chosen first. Prefill is left out when there is no prefill replica or the request needs the whole
    prompt on the engine that answers (prompt logprobs).
    """
    if not snapshot.decode:
        return Rejection(503, "no decode replica is available", NO_DECODE_RETRY_AFTER_S, Cause.NO_DECODE)
    decode = _fewest_tokens(snapshot.decode, rng)
    scores = {view.replica_id: float(view.in_flight_tokens) for view in (*snapshot.prefill, *snapshot.decode)}
    if request.needs_whole_prompt:
        reason = "decode reads the prompt itself: prompt logprobs need it whole on the engine that answers"
        return Placement(None, decode.replica_id, "least-tokens", reason, scores)
    if not snapshot.prefill:
        reason = "decode reads the prompt itself: no prefill replica is available"
        return Placement(None, decode.replica_id, "least-tokens", reason, scores, degraded=snapshot.expects_prefill)
    prefill = _fewest_tokens(snapshot.prefill, rng)
    reason = (
        f"fewest tokens in flight: {prefill.in_flight_tokens} on {prefill.replica_id}, "
        f"{decode.in_flight_tokens} on {decode.replica_id}"
    )
    return Placement(prefill.replica_id, decode.replica_id, "least-tokens", reason, scores)


def place(policy: Policy, request: RequestView, snapshot: ClusterSnapshot, seed: int) -> Placement | Rejection:
    """Decides one placement. The same arguments give the same answer, bit for bit (invariant I6)."""
    return policy(request, snapshot, random.Random(seed))


def _fewest_tokens(views: Sequence[ReplicaView], rng: random.Random) -> ReplicaView:
    fewest = min(view.in_flight_tokens for view in views)
    return rng.choice([view for view in views if view.in_flight_tokens == fewest])
