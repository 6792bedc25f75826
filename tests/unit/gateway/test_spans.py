"""What a trace says of a request: one span for each stage it went through, and nothing that is the client's."""

import asyncio
import dataclasses
import itertools

import msgspec
import pytest

from engine.protocol import FinishReason
from gateway.routing.receipts import Receipt, TraceContext
from gateway.routing.types import Cause, Hints, Rejection
from gateway.spans import Span, refusal_span, spans_of, trace_headers
from tests.unit.gateway.rig import CREATED_S, PROMPT, Rig, until
from tests.unit.virtual_time import now_s, simulate

TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "53995c3f42cd8ad8", "vendor=1")
FRONT_END_S = 0.005
SECRETS = ("a-session-name", "alice")

READ = ["front_end", "decide", "transit", "prefill_wait", "prefill_compute"]
FETCH = ["decode_wait", "decode_compute"]


def spans(receipt: Receipt) -> list[Span]:
    ids = itertools.count(1)
    return spans_of(receipt, lambda: f"{next(ids):016x}")


def traced(rig: Rig, name: str = "traced") -> dict:
    hints = Hints(session=SECRETS[0], tenant=SECRETS[1])
    return {"group": rig.orchestrator.new_group(name, 1, now_s() - FRONT_END_S, hints, TRACE)}


def answered(resumable: bool = False, **more: bool) -> Receipt:
    """The receipt of a traced request to one prefill and one decode engine."""
    closed: list[Receipt] = []

    async def main() -> None:
        async with Rig() as rig:
            await rig.finished(rig.add(PROMPT, 6, resumable=resumable, **traced(rig), **more))
            closed.extend(rig.closed)

    simulate(main)
    (receipt,) = closed
    return receipt


def names(receipt: Receipt, parent_id: str | None) -> list[str]:
    return [span.name for span in spans(receipt) if span.parent_id == parent_id]


def ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6


def test_a_split_request_has_each_stage_once_below_the_request() -> None:
    receipt = answered()
    assert [span.name for span in spans(receipt)] == ["request", *READ, *FETCH, "decode"]
    assert names(receipt, None) == ["request"]
    assert names(receipt, TRACE.span_id) == [*READ, *FETCH, "decode"]
    assert len({span.span_id for span in spans(receipt)}) == 9


def test_a_request_that_is_not_split_has_no_stage_of_prefill() -> None:
    stages = names(answered(needs_whole_prompt=True), TRACE.span_id)
    assert stages == ["front_end", "decide", "transit", *FETCH, "decode"]


def test_what_decode_does_before_its_own_first_token_is_within_decode_if_prefill_wrote_the_first() -> None:
    receipt = answered(resumable=True)
    assert names(receipt, TRACE.span_id) == [*READ, "decode"]
    decode = next(span for span in spans(receipt) if span.name == "decode")
    assert names(receipt, decode.span_id) == FETCH


@pytest.mark.parametrize("resumable", [False, True])
def test_stages_have_their_measured_times_and_follow_one_another_to_the_first_token(resumable: bool) -> None:
    receipt = answered(resumable)
    times, outcome = receipt.outcome.times_ms, receipt.outcome
    request, *rest = spans(receipt)
    assert ms(request.end_ns - request.start_ns) == pytest.approx(outcome.duration_ms)
    assert ms(round(CREATED_S * 1e9) - request.start_ns) == pytest.approx(FRONT_END_S * 1000, abs=0.01)
    for span in rest:
        assert ms(span.end_ns - span.start_ns) == pytest.approx(getattr(times, span.name), abs=0.01), span.name
    to_first = [span for span in rest if span.name in (READ if resumable else READ + FETCH)]
    assert to_first[0].start_ns == request.start_ns
    assert all(before.end_ns == after.start_ns for before, after in itertools.pairwise(to_first))
    assert outcome.ttft_ms is not None
    assert ms(to_first[-1].end_ns - request.start_ns) == pytest.approx(outcome.ttft_ms, abs=0.01)
    (first,) = [event for event in request.events if event.name == "first_token"]
    decode = next(span for span in rest if span.name == "decode")
    assert (decode.start_ns, decode.end_ns) == (first.at_ns, request.end_ns)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_stage_lies_within_its_parent_even_where_clocks_disagree(resumable: bool) -> None:
    receipt = answered(resumable)
    long = {"prefill_compute": 10_000.0, "decode_compute": 10_000.0}
    times = dataclasses.replace(receipt.outcome.times_ms, **long)
    receipt = dataclasses.replace(receipt, outcome=dataclasses.replace(receipt.outcome, times_ms=times))
    by_id = {span.span_id: span for span in spans(receipt)}
    for span in by_id.values():
        parent = by_id.get(span.parent_id or "", span)
        assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, span.name


def test_a_stage_names_the_replica_that_spent_the_time() -> None:
    by_replica = {span.name: span.replica for span in spans(answered())}
    assert {by_replica[name] for name in READ[-2:]} == {"prefill-0"}
    assert {by_replica[name] for name in FETCH} == {"decode-0"}
    assert {by_replica[name] for name in ("request", "front_end", "decide", "transit", "decode")} == {None}


def test_the_request_tells_what_became_of_it() -> None:
    receipt = answered()
    attributes = spans(receipt)[0].attributes
    assert attributes["baton.request_id"] == "traced"
    assert (attributes["baton.status"], attributes["baton.finish_reason"]) == ("finished", "length")
    assert (attributes["baton.policy"], attributes["baton.split"]) == ("least-tokens", True)
    assert (attributes["baton.prompt_tokens"], attributes["baton.output_tokens"]) == (len(PROMPT), 6)
    assert attributes["baton.kv_bytes_moved"] == receipt.outcome.kv_bytes_moved > 0
    assert not spans(receipt)[0].failed


def test_faults_are_events_at_the_time_they_were_met_and_say_no_more_than_their_kind() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            began_s = now_s() - FRONT_END_S
            request_id = rig.add(PROMPT, 60, resumable=True, **traced(rig))
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[rig.receipt("traced").placement.decode].die()
            await until(lambda: rig.receipt("traced").later, "another placement")
            latest_ms = (now_s() - began_s) * 1000
            await rig.finished(request_id)
            (receipt,) = rig.closed
            request, *rest = spans(receipt)
            (fault,) = [event for event in request.events if event.name == "fault"]
            assert fault.attributes == {"baton.fault": "decode_lost_mid_stream"}
            (first,) = [event for event in request.events if event.name == "first_token"]
            assert first.at_ns < fault.at_ns
            assert ms(fault.at_ns - request.start_ns) <= latest_ms < receipt.outcome.duration_ms
            assert request.attributes["baton.num_placements"] == 2
            # The first token's attempt is the one that the stages tell of.
            assert {span.replica for span in rest if span.name in FETCH} == {receipt.placement.decode}

    simulate(main)


def test_a_lost_attempt_is_transit_and_the_stages_are_those_of_the_replica_that_answered() -> None:
    async def main() -> None:
        async with Rig(prefill=2) as rig:
            request_id = rig.add(PROMPT, 6, **traced(rig))
            lost = rig.receipt("traced").placement.prefill
            assert lost is not None
            await rig.placed_on(request_id, lost)
            rig.engines[lost].die()
            await rig.finished(request_id)
            (receipt,) = rig.closed
            assert names(receipt, TRACE.span_id) == [*READ, *FETCH, "decode"]
            (replica,) = {span.replica for span in spans(receipt) if span.name in READ[-2:]}
            assert replica == receipt.later[0].placement.prefill != lost

    simulate(main)


def test_a_request_that_was_stopped_before_its_first_token_has_the_stages_that_it_reached() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6, **traced(rig))
            await rig.placed_on(request_id, "prefill-0")
            await asyncio.sleep(0.05)
            rig.orchestrator.abort([request_id], FinishReason.ABORT)
            await rig.everything_given_back()
            (receipt,) = rig.closed
            assert [span.name for span in spans(receipt)] == ["request", "front_end", "decide"]
            assert spans(receipt)[0].attributes["baton.status"] == "aborted"

    simulate(main)


def test_nothing_of_prompts_answers_sessions_or_tenants_is_in_a_span() -> None:
    receipt = answered()
    said = msgspec.json.encode(spans(receipt)).decode()
    assert SECRETS[0] in msgspec.json.encode(receipt).decode()
    assert not [secret for secret in (*SECRETS, str(PROMPT[:2])[1:-1].replace(" ", "")) if secret in said]
    allowed = {str, int, float, bool}
    for span in spans(receipt):
        assert {type(value) for value in span.attributes.values()} <= allowed
    # What may be told. A further attribute is to be thought about, then added here.
    assert {name.removeprefix("baton.") for span in spans(receipt) for name in span.attributes} == {
        "request_id", "status", "policy", "split", "degraded", "prefill_replica", "decode_replica", "replica",
        "num_placements", "num_choices", "prompt_tokens", "output_tokens", "reused_tokens", "prefill_computed_tokens",
        "decode_computed_tokens", "kv_bytes_moved", "kv_bytes_asked", "finish_reason", "ttft_ms",
    }  # fmt: skip


def test_both_engines_are_told_that_the_request_is_their_parent() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.finished(rig.add(PROMPT, 6, **traced(rig)))
            await rig.finished(rig.add(PROMPT, 6))
            told = [(replica, request.trace_headers) for replica, _, request in rig.transport.submitted]
            expected = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.span_id}-01", "tracestate": "vendor=1"}
            assert [replica for replica, headers in told if headers == expected] == ["prefill-0", "decode-0"]
            assert [headers for _, headers in told if headers not in (expected, None)] == []

    simulate(main)


def test_a_refusal_is_a_failed_request_with_its_cause() -> None:
    span = refusal_span("r", "00f067aa0ba902b7", 1, 5, Rejection(429, "alice waits", 1, Cause.TENANT_RATE))
    assert (span.name, span.parent_id, span.failed) == ("request", None, True)
    assert span.attributes == {
        "baton.request_id": "r",
        "baton.status": "refused",
        "baton.refusal": Cause.TENANT_RATE.value,
        "http.response.status_code": 429,
    }


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], {}),
        ([(b"traceparent", b"p")], {"traceparent": "p"}),
        ([(b"tracestate", b"a=1")], {}),
        ([(b"traceparent", b"p"), (b"host", b"h"), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")],
         {"traceparent": "p", "tracestate": "a=1,b=2"}),
        ([(b"traceparent", b"p"), (b"traceparent", b"q"), (b"tracestate", b"a=1")], {}),
        ([(b"traceparent", b"\xff")], {"traceparent": "\xff"}),
    ],
)  # fmt: skip
def test_of_two_parents_neither_counts_and_parts_of_the_state_are_joined(
    headers: list[tuple[bytes, bytes]], expected: dict[str, str]
) -> None:
    assert trace_headers(headers) == expected
