"""Owns admission: whether a placed request is taken, by the time to its first token that is predicted for it. Pure.

What is predicted is when the chosen replicas can go on with the request: its prompt read, behind those that were sent
there before it (their tokens, less the share that is usually cached, over the measured prefill rate), and a place in
decode's batch (Little's law: while all places are taken, one becomes free every `slot_s / slots`). Both go on at the
same time, so the later one counts. What was not measured yet delays nobody.

A class of priority may use its share of the deadline. Whatever refuses a class would refuse a lower one with the same
deadline in its place: shares only grow with the class, and everything that is compared with them does not know it.
"""

import math
from dataclasses import dataclass

from gateway.routing.predict import decode_slots, room_s
from gateway.routing.types import Cause, ClusterSnapshot, Placement, Priority, Rejection, ReplicaView, RequestView

TOO_MANY_REQUESTS = 429
STRANDED = 0.5
"""Requests that free KV blocks would hold, were they not too few for the next one: on average, while some wait."""


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """`ttft_deadline_s` is for requests whose client names none. `shares` say how much of a deadline each class may be
    predicted to use, and must not fall from one class to the next higher one: ValueError."""

    ttft_deadline_s: float = 30.0
    low_share: float = 0.5
    normal_share: float = 0.75
    high_share: float = 0.9
    max_queued_requests_per_replica: int = 1024
    max_retry_after_s: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.low_share <= self.normal_share <= self.high_share <= 1:
            raise ValueError(
                f"the shares of the deadline are low {self.low_share}, normal {self.normal_share}, high "
                f"{self.high_share}; they must lie above 0, grow from low to high, and be at most 1"
            )

    def share(self, priority: Priority) -> float:
        match priority:
            case Priority.LOW:
                return self.low_share
            case Priority.NORMAL:
                return self.normal_share
            case Priority.HIGH:
                return self.high_share


@dataclass(frozen=True, slots=True)
class Admitted:
    """The prediction a request was taken with, in seconds from its HTTP request's arrival, and what it is made of: the
    prompts before it, its own, and until it has a place in decode's batch. `budget_s` is what its class may use."""

    predicted_ttft_s: float
    queue_s: float
    read_s: float
    slot_wait_s: float
    budget_s: float


def admit(
    request: RequestView, placement: Placement, snapshot: ClusterSnapshot, config: AdmissionConfig
) -> Admitted | Rejection:
    """Takes a request where it is placed, or says why not and when to try again. 429 in any case: there is too much
    before it. The same arguments give the same answer, bit for bit.

    With a deadline of the client's own, what is predicted must fit its budget. With the configuration's, the prompt's
    own reading counts for at most half of it: no prompt is too long to be taken while there is little before it.
    """
    decode = snapshot.decode_view(placement.decode)
    reader = snapshot.prefill_view(placement.prefill) if placement.prefill is not None else decode
    if (queued := _longest_queue(request, reader, decode)) >= config.max_queued_requests_per_replica:
        reason = f"{queued} requests wait for their replica already"
        return Rejection(TOO_MANY_REQUESTS, reason, config.max_retry_after_s, Cause.QUEUE_FULL)

    deadline_s = request.hints.ttft_deadline_s
    budget_s = (deadline_s or config.ttft_deadline_s) * config.share(request.hints.priority)
    queue_s, read_s = _read_s(reader, reader.queued_tokens), _read_s(reader, request.num_prompt_tokens)
    slot_wait_s = room_s(decode, request.num_choices, request.num_prompt_tokens, STRANDED, decode.slot_s)
    # Compared so, and not as one sum, because each side is then monotonous in the budget, rounding included.
    allowed_queue_s = budget_s - read_s
    if deadline_s is None:
        allowed_queue_s = max(allowed_queue_s, budget_s / 2)
    predicted_s = request.waited_s + max(queue_s + read_s, slot_wait_s)
    if request.waited_s + queue_s <= allowed_queue_s and request.waited_s + slot_wait_s <= budget_s:
        return Admitted(predicted_s, queue_s, read_s, slot_wait_s, budget_s)
    reason = (
        f"the predicted time to the first token, {predicted_s:.3g} s, is above {budget_s:.3g} s: priority "
        f"{request.hints.priority} may use {config.share(request.hints.priority):.0%} of the deadline of "
        f"{deadline_s or config.ttft_deadline_s:g} s"
    )
    retry_after_s = _retry_after_s(queue_s - allowed_queue_s, slot_wait_s - budget_s, queue_s, config)
    return Rejection(TOO_MANY_REQUESTS, reason, retry_after_s, Cause.DEADLINE)


def _longest_queue(request: RequestView, reader: ReplicaView, decode: ReplicaView) -> int:
    """Requests that wait for either replica: all that prefill has, and those beyond decode's places."""
    slots = decode_slots(decode, request.num_choices, request.num_prompt_tokens, STRANDED)
    beyond = max(decode.in_flight_requests - math.floor(slots), 0) if slots < math.inf else 0
    return beyond if reader is decode else max(reader.in_flight_requests, beyond)


def _read_s(reader: ReplicaView, num_tokens: int) -> float:
    rate = reader.prefill_tokens_per_s
    return num_tokens * reader.computed_share / rate if rate > 0 else 0.0


def _retry_after_s(queue_over_s: float, slot_over_s: float, queue_s: float, config: AdmissionConfig) -> int:
    """Queues become shorter by a second each second. A prompt that does not fit an empty queue waits the longest."""
    if queue_over_s > queue_s:
        return config.max_retry_after_s
    over_s = min(max(queue_over_s, slot_over_s), config.max_retry_after_s)
    return max(math.ceil(over_s), 1)
