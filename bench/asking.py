"""Owns a policy for tests and worlds: least tokens, and decode is asked whenever it has more cached than prefill."""

import random
from dataclasses import replace

from gateway.routing.policies import least_tokens
from gateway.routing.types import ClusterSnapshot, Placement, Rejection, RequestView


def asks_when_it_can(request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> Placement | Rejection:
    placement = least_tokens(request, snapshot, rng)
    if isinstance(placement, Rejection) or placement.prefill is None or not snapshot.can_ask:
        return placement

    def askable(replica_id: str) -> int:
        return snapshot.askable_tokens(replica_id, request.num_prompt_tokens)

    most = max((view.replica_id for view in snapshot.decode), key=askable)
    return replace(placement, ask=most) if askable(most) > snapshot.cached(placement.prefill) else placement
