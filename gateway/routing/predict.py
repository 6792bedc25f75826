"""Owns what is predicted of a placement, to be held against what happens, and of the room on a decode replica. Pure."""

import math
from dataclasses import dataclass

from gateway.routing.types import ClusterSnapshot, Placement, ReplicaView, RequestView


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of a placement, from the costs that were known when it was decided.

    `cached_tokens` of the prompt are in the cache of the replica that reads it, or it fetches them from the one that is
    asked, which takes `ask_s`. `wait_s` is until the prompts before it are read there, `read_s` its own reading.
    `handoff_s` is None where there is none. `ttft_s` counts from the decision. `tpot_s` is the step of the decode
    replica with this request in the batch.
    """

    cached_tokens: int
    wait_s: float
    read_s: float
    handoff_s: float | None
    ttft_s: float
    tpot_s: float
    output_tokens: float
    ask_s: float | None = None


def predict(request: RequestView, placement: Placement, snapshot: ClusterSnapshot) -> Prediction:
    """What the placement of a request will take. The same arguments give the same prediction, bit for bit."""
    costs = snapshot.costs
    decode = snapshot.decode_view(placement.decode)
    reader, read = decode, costs.decode.read
    handoff_s: float | None = None
    if placement.prefill is not None:
        reader, read = snapshot.prefill_view(placement.prefill), costs.prefill.read
        num_missing = request.num_prompt_tokens - snapshot.cached(placement.decode)
        handoff_s = costs.handoff.seconds(decode.blocks_of(num_missing))
    # An engine computes a prompt's last token in any case.
    cached_tokens = min(snapshot.cached(reader.replica_id), max(request.num_prompt_tokens - 1, 0))
    ask_s: float | None = None
    asked_tokens = snapshot.askable_tokens(placement.ask, request.num_prompt_tokens)
    if placement.ask is not None and asked_tokens > cached_tokens:
        ask_s = costs.decode.read.seconds(max(decode.block_size_tokens, 1), asked_tokens)
        ask_s += costs.handoff.seconds(decode.blocks_of(asked_tokens - cached_tokens))
        cached_tokens = asked_tokens
    wait_s = snapshot.read_wait_s(reader)
    read_s = read.seconds(request.num_prompt_tokens - cached_tokens, request.num_prompt_tokens)
    output_tokens = request.expected_output_tokens(costs.output_tokens)
    tpot_s = costs.decode.step.seconds(
        decode.in_flight_requests + request.num_choices,
        decode.in_flight_tokens + request.num_prompt_tokens + output_tokens / 2,
    )
    ttft_s = (ask_s or 0.0) + wait_s + read_s
    if handoff_s is not None and not request.prefill_writes:
        ttft_s += handoff_s + tpot_s
    return Prediction(cached_tokens, wait_s, read_s, handoff_s, ttft_s, tpot_s, output_tokens, ask_s)


def decode_slots(view: ReplicaView, num_sequences: int, num_tokens: float, num_stranded: float) -> float:
    """How many requests like those in flight, and `num_sequences` more with `num_tokens` in all, run in decode at once:
    bounded by `max_num_seqs` and by KV blocks, of which each request leaves half of one empty on average. At least 1;
    infinite where neither bound is known.

    `num_stranded` of the requests that the blocks would hold have no use: what is free in the end is too little for the
    next one. While requests wait that is half of one, on average; whether one more fits now does not ask for it.
    """
    slots = float(view.max_num_seqs or math.inf)
    if view.num_kv_blocks and view.block_size_tokens:
        num_requests = view.in_flight_requests + num_sequences
        num_blocks = (view.in_flight_tokens + num_tokens) / view.block_size_tokens + num_requests / 2
        slots = min(slots, view.num_kv_blocks * num_requests / num_blocks - num_stranded)
    return max(slots, 1.0)


def room_s(view: ReplicaView, num_sequences: int, num_tokens: float, num_stranded: float, slot_s: float) -> float:
    """Seconds until a decode replica has room for `num_sequences` more with `num_tokens` in all: until as many requests
    have ended as are too many, at `slots / slot_s` a second (Little's law), where each holds its place for `slot_s`."""
    slots = decode_slots(view, num_sequences, num_tokens, num_stranded)
    excess = view.in_flight_requests + num_sequences - slots
    return excess * slot_s / slots if excess > 0 else 0.0
