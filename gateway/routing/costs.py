"""Owns what work costs in seconds: reading a prompt, a decode step, a hand-off, as straight lines in their sizes. Pure.

The lines are fitted online from reports, one set for each pool (`gateway.routing.fit`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Reading `new` tokens of a prompt of `length`: the matrix products grow with the new tokens, attention with the
    tokens before each of them, which are `new * (length - new / 2)` pairs.

    `error` here and below is the mean relative error of the last predictions; None before the first.
    """

    fixed_s: float
    token_s: float
    pair_s: float
    error: float | None = None

    def seconds(self, num_new_tokens: float, num_tokens: float) -> float:
        pairs = num_new_tokens * (num_tokens - num_new_tokens / 2)
        return self.fixed_s + self.token_s * num_new_tokens + self.pair_s * pairs


@dataclass(frozen=True, slots=True)
class StepCost:
    """One decode step: weights are read once, and each request's context."""

    fixed_s: float
    request_s: float
    context_token_s: float
    error: float | None = None

    def seconds(self, num_requests: float, num_context_tokens: float) -> float:
        return self.fixed_s + self.request_s * num_requests + self.context_token_s * num_context_tokens


@dataclass(frozen=True, slots=True)
class HandoffCost:
    """From the arrival of a request with a hand-off at a decode engine until its blocks are there."""

    fixed_s: float
    block_s: float
    error: float | None = None

    def seconds(self, num_blocks: float) -> float:
        return self.fixed_s + self.block_s * num_blocks


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """What the engines of one pool take: `read` for prompts, `step` for answers (nothing in a pool of prefill)."""

    read: ReadCost
    step: StepCost


FIRST_READ = ReadCost(fixed_s=0.005, token_s=5e-5, pair_s=5e-10)
FIRST_STEP = StepCost(fixed_s=0.01, request_s=1e-4, context_token_s=3e-8)
FIRST_HANDOFF = HandoffCost(fixed_s=0.005, block_s=1e-4)
FIRST_OUTPUT_TOKENS = 256.0
"""These four hold before the first sample: a model of some 10 billion active parameters on one data-centre GPU."""


@dataclass(frozen=True, slots=True)
class Costs:
    """All that was learnt when a placement was decided. `output_tokens`: an answer's length, on average."""

    prefill: PoolCosts = PoolCosts(FIRST_READ, FIRST_STEP)
    decode: PoolCosts = PoolCosts(FIRST_READ, FIRST_STEP)
    handoff: HandoffCost = FIRST_HANDOFF
    output_tokens: float = FIRST_OUTPUT_TOKENS
