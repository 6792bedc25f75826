"""Owns what a trace says of a request: a closed receipt becomes spans, one for each stage (docs/adr/0021). Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gateway.routing.receipts import Outcome, Receipt
from gateway.routing.types import Rejection

TRACE_HEADERS = TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
"""Those of W3C Trace Context, as ASGI names headers."""

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    at_ns: int
    attributes: Attributes = field(default_factory=dict[str, str | int | float | bool])


@dataclass(frozen=True, slots=True)
class Span:
    """One span of a trace. Times are nanoseconds since the epoch. `parent_id` None: of the request's own span, whose
    parent is the client's. `replica` is the engine that spent the time; None: the gateway."""

    name: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    replica: str | None = None
    attributes: Attributes = field(default_factory=dict[str, str | int | float | bool])
    events: tuple[Event, ...] = ()
    failed: bool = False


def trace_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """What a request's headers (lower-case names) say of its trace. Of two parents neither counts; parts of the state
    may come in several headers."""
    found = [(name, value.decode("latin-1")) for name, value in headers if name in TRACE_HEADERS]
    parents = [value for name, value in found if name == TRACEPARENT]
    if len(parents) != 1:
        return {}
    states = [value for name, value in found if name == TRACESTATE]
    return {"traceparent": parents[0]} | ({"tracestate": ",".join(states)} if states else {})


def spans_of(receipt: Receipt, new_id: Callable[[], str]) -> list[Span]:
    """The spans of a closed receipt that has a trace, the request's first. `new_id` makes the others' ids.

    Stages have the times that were measured (`receipts.Times`) and follow one another up to the first token. `transit`
    is one span before the engines' stages, although it is the sum of what lies between all of them and of attempts
    that were lost. `decode` goes from the first token to the last; if prefill has written the first, decode's own
    first two stages lie within it.
    """
    trace, outcome, times = receipt.trace, receipt.outcome, receipt.outcome.times_ms
    assert trace is not None
    before_placement_ms = (times.front_end or 0.0) + (times.decide or 0.0)
    start_ns = round(receipt.created_s * 1e9) - _ns(before_placement_ms)
    end_ns = start_ns + _ns(outcome.duration_ms or 0.0)
    first_ns = end_ns if outcome.ttft_ms is None else min(start_ns + _ns(outcome.ttft_ms), end_ns)
    spans = [Span("request", trace.span_id, None, start_ns, end_ns, None, _attributes(receipt),
                  _events(outcome, start_ns, end_ns), outcome.status == "failed")]  # fmt: skip

    def follow(
        parent_id: str, from_ns: int, to_ns: int, stages: Iterable[tuple[str, float | None, str | None]]
    ) -> None:
        for name, time_ms, replica in stages:
            if time_ms is not None:
                until_ns = min(from_ns + _ns(time_ms), to_ns)
                spans.append(_stage(name, new_id(), parent_id, from_ns, until_ns, replica))
                from_ns = until_ns

    by_decode = [
        ("decode_wait", times.decode_wait, outcome.decode_replica),
        ("decode_compute", times.decode_compute, outcome.decode_replica),
    ]
    to_first_token = [
        ("front_end", times.front_end, None),
        ("decide", times.decide, None),
        ("transit", times.transit, None),
        ("prefill_wait", times.prefill_wait, outcome.prefill_replica),
        ("prefill_compute", times.prefill_compute, outcome.prefill_replica),
        *([] if outcome.prefill_has_written else by_decode),
    ]
    follow(trace.span_id, start_ns, first_ns, to_first_token)
    if times.decode is not None:
        decode = _stage("decode", new_id(), trace.span_id, first_ns, end_ns, None)
        spans.append(decode)
        if outcome.prefill_has_written:
            follow(decode.span_id, first_ns, end_ns, by_decode)
    return spans


def refusal_span(request_id: str, span_id: str, start_ns: int, end_ns: int, rejection: Rejection) -> Span:
    """The span of a request that was not taken."""
    attributes: Attributes = {
        "baton.request_id": request_id,
        "baton.status": "refused",
        "baton.refusal": rejection.cause.value,
        "http.response.status_code": rejection.status,
    }
    return Span("request", span_id, None, start_ns, end_ns, None, attributes, failed=True)


def _stage(name: str, span_id: str, parent_id: str, start_ns: int, end_ns: int, replica: str | None) -> Span:
    attributes: Attributes = {} if replica is None else {"baton.replica": replica}
    return Span(name, span_id, parent_id, start_ns, end_ns, replica, attributes)


def _attributes(receipt: Receipt) -> Attributes:
    """Names are those of the receipt. Nothing of prompts, answers, sessions or keys; engines' own words may repeat
    what a client has sent, so of faults only the kinds are told."""
    placement, outcome = receipt.placement, receipt.outcome
    optional = {
        "baton.prefill_replica": placement.prefill,
        "baton.finish_reason": outcome.finish_reason,
        "baton.ttft_ms": outcome.ttft_ms,
    }
    return {
        "baton.request_id": receipt.request_id,
        "baton.status": outcome.status,
        "baton.policy": receipt.policy,
        "baton.split": placement.prefill is not None,
        "baton.degraded": placement.degraded,
        "baton.decode_replica": placement.decode,
        "baton.num_placements": 1 + len(receipt.later),
        "baton.num_choices": receipt.request.num_choices,
        "baton.prompt_tokens": outcome.prompt_tokens,
        "baton.output_tokens": outcome.output_tokens,
        "baton.reused_tokens": outcome.reused_tokens,
        "baton.prefill_computed_tokens": outcome.prefill_computed_tokens,
        "baton.decode_computed_tokens": outcome.decode_computed_tokens,
        "baton.kv_bytes_moved": outcome.kv_bytes_moved,
        "baton.kv_bytes_asked": outcome.kv_bytes_asked,
    } | {name: value for name, value in optional.items() if value is not None}


def _events(outcome: Outcome, start_ns: int, end_ns: int) -> tuple[Event, ...]:
    events = [
        Event("fault", min(start_ns + _ns(at_ms), end_ns), {"baton.fault": kind})
        for kind, at_ms in zip(outcome.fault_kinds, outcome.fault_times_ms, strict=True)
    ]
    if outcome.ttft_ms is not None:
        events.append(Event("first_token", min(start_ns + _ns(outcome.ttft_ms), end_ns)))
    return tuple(sorted(events, key=lambda event: event.at_ns))


def _ns(time_ms: float) -> int:
    return round(time_ms * 1e6)
