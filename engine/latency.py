"""Owns the word simulated engines ask the time in: what a step computes, and how long a model says that it takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes. A sequence that computes more than one token counts as prefill, otherwise as decode.

    `num_kv_tokens` is the tokens of all its sequences whose KV is there after the step: what attention reads.
    `num_attended_tokens` is summed over the tokens it computes: those up to each, itself included.
    """

    num_prefill_tokens: int
    num_decode_requests: int
    num_kv_tokens: int = 0
    num_attended_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode_requests

    @classmethod
    def of(cls, batch: Iterable[tuple[int, int]]) -> "StepWork":
        """From each sequence's tokens to compute and its tokens before them."""
        prefill = decodes = kv = attended = 0
        for num_tokens, num_before in batch:
            if num_tokens > 1:
                prefill += num_tokens
            else:
                decodes += num_tokens
            kv += num_before + num_tokens
            attended += num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
        return cls(prefill, decodes, kv, attended)

    def after(self, num_steps: int) -> "StepWork":
        """What so many steps later is computed by a step that only decodes, when nothing ends or comes in between."""
        grown = num_steps * self.num_decode_requests
        return StepWork(0, self.num_decode_requests, self.num_kv_tokens + grown, self.num_attended_tokens + grown)


class Latency(Protocol):
    """How long steps and hand-offs take.

    Between two of its tokens a sequence rests until `decode_interval_s` is over: many streams then share the steps
    evenly, and each is as slow as a client sees it at a large engine. 0: it never rests.
    """

    @property
    def decode_interval_s(self) -> float: ...

    def step_s(self, work: StepWork) -> float: ...

    def handoff_s(self, num_blocks: int) -> float: ...


@dataclass(frozen=True)
class LatencyModel:
    """Straight lines. It is a model and not a measurement."""

    prefill_s_per_token: float
    prefill_fixed_s: float
    decode_step_s: float
    decode_s_per_request: float
    handoff_fixed_s: float
    handoff_s_per_block: float
    decode_interval_s: float = 0.0

    def step_s(self, work: StepWork) -> float:
        tokens, decodes = work.num_prefill_tokens, work.num_decode_requests
        prefill_s = self.prefill_fixed_s + self.prefill_s_per_token * tokens if tokens else 0.0
        decode_s = self.decode_step_s + self.decode_s_per_request * decodes if decodes else 0.0
        return prefill_s + decode_s

    def handoff_s(self, num_blocks: int) -> float:
        return self.handoff_fixed_s + self.handoff_s_per_block * num_blocks
