"""What the seam to vLLM's front end makes of requests: sampling that can be repeated, and nothing of the client's."""

import asyncio
from typing import Any, cast

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from engine.vllm_codec import decode_sampling
from gateway.agents.tenants import Entry, Limiter, Tenant
from gateway.api import context
from gateway.api.engine_client import ClusterCoreClient
from gateway.orchestrator import Group, Orchestrator, PlacementRejected, SequenceRequest
from gateway.routing.receipts import TraceContext
from gateway.routing.types import Cause, Hints, Priority, Rejection
from gateway.tracing import Tracer
from tests.collector import collecting


class Recorder:
    """Stands for the orchestrator: keeps what it is asked for."""

    def __init__(self) -> None:
        self.added: list[SequenceRequest] = []
        self.hints: list[Hints] = []
        self.refused_hints: list[Hints] = []
        self.rejection: Rejection | None = None
        self.traces: list[TraceContext | None] = []

    def new_group(
        self,
        receipt_id: str,
        num_choices: int,
        received_s: float | None,
        hints: Hints | None,
        trace: TraceContext | None,
    ) -> Group:
        return Group(receipt_id, num_choices, 0.0, hints or Hints(), trace)

    def await_response(self, group: Group) -> None:
        """What its response says is of no interest here."""

    def add(self, request: SequenceRequest, group: Group) -> None:
        if self.rejection:
            raise PlacementRejected(self.rejection)
        self.added.append(request)
        self.hints.append(group.hints)
        self.traces.append(group.trace)

    def refused(self, group: Group) -> None:
        self.refused_hints.append(group.hints)


def core_request(params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], mm_features=None, sampling_params=params, pooling_params=None,
        arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip


def taken(**arguments: Any) -> tuple[SequenceRequest, SamplingParams]:
    """What the orchestrator is asked for, and the sampling that engines will read."""
    recorder = Recorder()
    client = ClusterCoreClient(cast(Orchestrator, recorder))
    with client.group(1):
        asyncio.run(client.add_request_async(core_request(SamplingParams(max_tokens=5, **arguments))))
    (request,) = recorder.added
    return request, decode_sampling(request.sampling).params


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"temperature": 0.7}])
def test_what_can_go_on_elsewhere_is_left_as_it_is(arguments: dict[str, Any]) -> None:
    request, params = taken(**arguments)
    assert (request.resumable, params.seed) == (True, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"presence_penalty": 0.5},
        {"structured_outputs": StructuredOutputsParams(regex="[a-z]+")},
        {"prompt_logprobs": 1},
    ],
)
def test_what_must_be_begun_again_gets_a_seed(arguments: dict[str, Any]) -> None:
    request, params = taken(temperature=0.7, **arguments)
    assert not request.resumable
    assert params.seed is not None
    assert taken(temperature=0.7, **arguments)[1].seed != params.seed


@pytest.mark.parametrize("arguments", [{"temperature": 0.7, "seed": 5}, {"temperature": 0.0, "presence_penalty": 0.5}])
def test_a_clients_seed_and_greedy_sampling_are_kept(arguments: dict[str, Any]) -> None:
    request, params = taken(**arguments)
    assert (request.resumable, params.seed) == (False, arguments.get("seed"))


def test_nothing_of_the_client_reaches_the_kv_transfer_layer() -> None:
    _, params = taken(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})
    assert params.extra_args is None


ALICE = Tenant("alice", (), max_concurrent_requests=2)


async def asked(entry: Entry | None, num_choices: int = 1, recorder: Recorder | None = None) -> Recorder:
    """What the orchestrator is asked for by a request of a tenant, or of nobody in particular."""
    recorder = recorder or Recorder()
    client = ClusterCoreClient(cast(Orchestrator, recorder))
    http = context.RequestContext("r", 0.0, Hints(Priority.HIGH, session="s"), entry=entry)
    token = context.current.set(http)
    try:
        with client.group(num_choices):
            await client.add_request_async(core_request(SamplingParams(max_tokens=5)))
    finally:
        context.current.reset(token)
    return recorder


def test_a_tenants_salt_and_what_its_limits_leave_of_hints_reach_the_orchestrator() -> None:
    entry = Limiter().enter(ALICE)
    assert isinstance(entry, Entry)
    recorder = asyncio.run(asked(entry))
    assert [request.cache_salt for request in recorder.added] == [ALICE.cache_salt]
    assert recorder.hints == [ALICE.cap(Hints(Priority.HIGH, session="s"))]


def test_without_tenants_there_is_no_salt_and_hints_are_as_they_were() -> None:
    recorder = asyncio.run(asked(None))
    assert [request.cache_salt for request in recorder.added] == [None]
    assert recorder.hints == [Hints(Priority.HIGH, session="s")]


def test_more_choices_than_the_tenant_may_have_reach_nobody_but_the_session_is_back() -> None:
    recorder, entry = Recorder(), Limiter().enter(ALICE)
    assert isinstance(entry, Entry)
    with pytest.raises(GracefulHTTPError, match=r"tenant alice may have 2 requests at once here.* this is 2 more"):
        asyncio.run(asked(entry, num_choices=3, recorder=recorder))
    assert recorder.added == []
    assert recorder.refused_hints == [ALICE.cap(Hints(Priority.HIGH, session="s"))]


TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def traced(recorder: Recorder, tracer: Tracer | None, num_prompts: int = 1) -> None:
    """One HTTP request in its client's trace."""
    client = ClusterCoreClient(cast(Orchestrator, recorder), tracer)
    http = context.RequestContext("r", 0.0, trace_headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    token = context.current.set(http)
    try:
        for _ in range(num_prompts):
            with client.group(1):
                await client.add_request_async(core_request(SamplingParams(max_tokens=5)))
    finally:
        context.current.reset(token)


def test_each_prompt_of_a_request_has_a_span_of_its_own_in_the_clients_trace() -> None:
    recorder = Recorder()
    tracer = Tracer("http://127.0.0.1:9", 1.0, "gateway-1", lambda cause, num_spans: None)
    asyncio.run(traced(recorder, tracer, num_prompts=2))
    tracer.close()
    assert [(trace.trace_id, trace.parent_id) for trace in recorder.traces if trace] == [(TRACE_ID, PARENT_ID)] * 2
    assert len({trace.span_id for trace in recorder.traces if trace}) == 2


def test_without_a_tracer_a_clients_trace_goes_no_further() -> None:
    recorder = Recorder()
    asyncio.run(traced(recorder, None))
    assert recorder.traces == [None]


def test_a_refusal_ends_the_trace_of_its_request() -> None:
    recorder = Recorder()
    recorder.rejection = Rejection(503, "full", 1, Cause.GATEWAY_FULL)
    with collecting() as collector:
        tracer = Tracer(collector.url, 1.0, "gateway-1", lambda cause, num_spans: None)
        with pytest.raises(GracefulHTTPError):
            asyncio.run(traced(recorder, tracer))
        tracer.close()
        (received,) = collector.trace(TRACE_ID)
        assert received.attributes["baton.refusal"] == Cause.GATEWAY_FULL.value
        assert received.span.parent_span_id.hex() == PARENT_ID
