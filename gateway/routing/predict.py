"""Owns what is predicted of a placement, to be held against what happens. Pure."""

from dataclasses import dataclass

from gateway.routing.types import ClusterSnapshot, Placement, RequestView


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
