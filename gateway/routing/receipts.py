"""Owns receipts: the record of each placement's inputs, choice and outcome, the last N in memory."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.routing.admission import AdmissionConfig, Admitted
from gateway.routing.predict import Prediction
from gateway.routing.types import ClusterSnapshot, Placement, RequestView
from gateway.shares import Shares


@dataclass(frozen=True, slots=True)
class Times:
    """Where a request's time went, in milliseconds; None for what it did not pass through or has not reached.

    Up to the first token: `front_end` from the HTTP request's arrival to a prompt of tokens (template, tokenizer, and
    waiting for the event loop), `decide` the placement, `prefill_wait` and `prefill_compute` in the prefill engine,
    `decode_wait` and `decode_compute` in the decode engine (`decode_wait` includes the fetch of the hand-off), and
    `transit` everything else: calls and reports between gateway and workers. `decode` is from the first token to the
    last. `gateway` is the gateway's own share of the time to the first token: front_end, decide and transit.
    When prefill has written the first token, what decode does before its own first is not part of that time.
    """

    front_end: float | None = None
    decide: float | None = None
    prefill_wait: float | None = None
    prefill_compute: float | None = None
    decode_wait: float | None = None
    decode_compute: float | None = None
    transit: float | None = None
    decode: float | None = None
    gateway: float | None = None


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A request's place in a trace, in hex digits as W3C Trace Context writes them. `span_id` is the request's own
    span, `parent_id` its client's (None: the trace begins here), `state` the client's tracestate."""

    trace_id: str
    span_id: str
    parent_id: str | None = None
    state: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What tells others that the request is their parent. Only traces that are kept have a context."""
        headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-01"}
        return {**headers, "tracestate": self.state} if self.state else headers


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a placement. Times are from the request's arrival at the gateway.

    `reused_tokens` were in a prefix cache and computed by nobody; `kv_blocks_moved` travelled from prefill to decode,
    `kv_blocks_asked` from decode to prefill.
    `faults` says in words what went wrong and what was done, `fault_kinds` in the same order what metrics count, and
    `fault_times_ms` when. `prefill_replica` and `decode_replica` are those whose times `times_ms` tells, None for one
    that has told none; `prefill_has_written` the first token.
    """

    status: str
    finish_reason: str | None = None
    ttft_ms: float | None = None
    duration_ms: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    reused_tokens: int = 0
    prefill_computed_tokens: int = 0
    decode_computed_tokens: int = 0
    kv_blocks_moved: int = 0
    kv_bytes_moved: int = 0
    kv_blocks_asked: int = 0
    kv_bytes_asked: int = 0
    faults: tuple[str, ...] = ()
    fault_kinds: tuple[str, ...] = ()
    fault_times_ms: tuple[float, ...] = ()
    times_ms: Times = Times()
    prefill_replica: str | None = None
    decode_replica: str | None = None
    prefill_has_written: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """A placement after a fault, replayable like the first; `sequence_id` is the choice that was placed anew."""

    sequence_id: str
    seed: int
    request: RequestView
    snapshot: ClusterSnapshot
    placement: Placement


@dataclass(frozen=True, slots=True)
class Receipt:
    """One placement, replayable: `place(policy, request, snapshot, seed)` gives `placement` again, and
    `admit(request, placement, snapshot, admission_config)` gives `admission`. `later` are the placements that faults
    have made necessary. `shadow` is what the shadow policy would have decided from the same inputs; None if there is no
    such policy, or it decided on nothing. `predicted` is to be held against `outcome`. `rank_ms` is what engines take
    waiting requests by, the lowest first (`gateway.routing.order`): milliseconds since the epoch, so beyond `created_s`
    it is by how much others may come before this one. All its placements and choices have it; None: not recorded.
    `trace`: where it is traced."""

    request_id: str
    created_s: float
    policy: str
    seed: int
    request: RequestView
    snapshot: ClusterSnapshot
    placement: Placement
    outcome: Outcome
    admission: Admitted | None = None
    admission_config: AdmissionConfig | None = None
    later: tuple[Decision, ...] = ()
    shadow: Placement | None = None
    predicted: Prediction | None = None
    rank_ms: int | None = None
    trace: TraceContext | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds from one token of an answer to its next, on average. None for an answer that is not whole, or has one
        token for each choice."""
        outcome, num_choices = self.outcome, self.request.num_choices
        if outcome.status != "finished" or outcome.times_ms.decode is None or outcome.output_tokens <= num_choices:
            return None
        return outcome.times_ms.decode / 1000 / (outcome.output_tokens / num_choices - 1)

    def as_json(self) -> dict[str, Any]:
        data = msgspec.to_builtins(self)
        data["reason"] = self.placement.reason
        data["scores"] = self.placement.scores
        return data


class ReceiptStore:
    """The last `capacity` receipts by request id. When it is full, the tenant that has the most loses its oldest: one
    that asks for much takes nothing from the others."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._receipts: dict[str, Receipt] = {}
        self._by_use: Shares[str] = Shares()

    def put(self, receipt: Receipt) -> None:
        self._receipts[receipt.request_id] = receipt
        self._by_use.use(receipt.request_id, receipt.request.hints.tenant)
        while len(self._receipts) > self._capacity:
            oldest = self._by_use.first
            self._by_use.discard(oldest)
            del self._receipts[oldest]

    def get(self, request_id: str) -> Receipt | None:
        return self._receipts.get(request_id)

    def __len__(self) -> int:
        return len(self._receipts)
