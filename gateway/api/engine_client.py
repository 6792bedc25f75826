"""Owns the seam to vLLM's front end: to its AsyncLLM, the whole cluster looks like one engine core (docs/adr/0001)."""

import contextvars
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from unittest import mock

from vllm.config import VllmConfig
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingType
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    async_llm,
)
from vllm.v1.engine import FinishReason as VllmFinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefillStats

from engine.protocol import FinishReason, TokenDelta
from engine.vllm_codec import SamplingPayload, decode_logprobs, encode_sampling, is_resumable
from gateway import metrics
from gateway.api import context
from gateway.orchestrator import Group, Orchestrator, PlacementRejected, SequenceRequest
from gateway.refusals import RefusalLog
from gateway.tracing import Tracer

FINISH_REASONS = {reason: VllmFinishReason[reason.name] for reason in FinishReason}

SEED_BITS = 31
FAILED = "the answer could not be completed: {}"
FAILED_KIND = "RecoveryFailedError"

_group: contextvars.ContextVar[Group | None] = contextvars.ContextVar("baton_group", default=None)
_client_left: contextvars.ContextVar[bool] = contextvars.ContextVar("baton_client_left", default=False)


class _Resources:
    """What AsyncLLM reads of a core client's resources. A cluster is not dead because one engine is."""

    engine_dead = False


class ClusterCoreClient(EngineCoreClient):
    """An EngineCoreClient whose engine core is the cluster: requests go to the orchestrator, deltas come back."""

    def __init__(self, orchestrator: Orchestrator, tracer: Tracer | None = None):
        self._orchestrator = orchestrator
        self._tracer = tracer
        self._queued_s: dict[str, float] = {}
        self._http: dict[str, context.RequestContext] = {}
        self._refusals = RefusalLog()
        self.resources = _Resources()
        self.engine_ranks_managed = [0]
        self.forget: Callable[[str], object] = lambda request_id: None
        """Called with the id of a request that was not taken: the front end has it on its books already."""

    @contextmanager
    def group(self, num_choices: int) -> Iterator[None]:
        """Requests added in this context are the choices of one prompt."""
        http = context.current.get()
        receipt_id = http.next_receipt_id() if http else uuid.uuid4().hex
        received_s, hints = (http.received_s, http.capped_hints) if http else (None, None)
        trace = self._tracer.begin(http.trace_headers if http else {}) if self._tracer else None
        group = self._orchestrator.new_group(receipt_id, num_choices, received_s, hints, trace)
        if http:
            self._orchestrator.await_response(group)
            http.on_end.append(lambda tool: self._orchestrator.response_over(group, tool))
        token = _group.set(group)
        try:
            yield
        finally:
            _group.reset(token)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        try:
            self._add(request)
        except BaseException:
            self.forget(request.request_id)
            raise

    def _add(self, request: EngineCoreRequest) -> None:
        group = _group.get()
        params = request.sampling_params
        if group is None or params is None or request.prompt_token_ids is None:
            raise TypeError("Baton serves token prompts for generation only")
        params = params.clone()
        # Invariant I5: whatever a client managed to put here stops here.
        params.extra_args = None
        assert params.max_tokens is not None
        # What comes with the prompt's logprobs is not told twice.
        resumable = is_resumable(params) and params.prompt_logprobs is None
        if not resumable and params.sampling_type is SamplingType.RANDOM:
            # An answer that must be begun again after a loss comes out the same only from a seed.
            params.seed = secrets.randbits(SEED_BITS)
        payload = SamplingPayload(params, request.reasoning_ended, request.reasoning_parser_kwargs)
        try:
            sampling = encode_sampling(payload)
        except (OverflowError, TypeError, ValueError) as error:
            raise VLLMValidationError(f"a sampling parameter cannot be used: {error}") from error
        http = context.current.get()
        sequence = SequenceRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            max_tokens=params.max_tokens,
            sampling=sampling,
            cache_salt=http.cache_salt if http else None,
            needs_whole_prompt=params.prompt_logprobs is not None,
            resumable=resumable,
        )
        try:
            if http and not group.sequences and (refused := http.take_prompt(group.num_choices)):
                self._orchestrator.refused(group)
                raise PlacementRejected(refused)
            self._orchestrator.add(sequence, group)
        except PlacementRejected as error:
            metrics.count_rejection(error.rejection, group.hints.priority, group.hints.tenant)
            self._refusals.note(group.receipt_id, error.rejection, group.hints.priority)
            if self._tracer and group.trace:
                self._tracer.refused(group.receipt_id, group.trace, group.received_s, error.rejection)
            if http:
                http.rejection = error.rejection
            raise GracefulHTTPError(error.rejection.reason, HTTPStatus(error.rejection.status)) from error
        self._queued_s[request.request_id] = time.monotonic()
        if http:
            self._http[request.request_id] = http

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._queued_s.pop(request_id, None)
            self._http.pop(request_id, None)
        # vLLM's output loop calls this for texts that a stop string has completed, `abort` for clients that left.
        self._orchestrator.abort(request_ids, FinishReason.ABORT if _client_left.get() else FinishReason.STOP)

    async def get_output_async(self) -> EngineCoreOutputs:
        deltas = await self._orchestrator.next_deltas()
        return EngineCoreOutputs(outputs=[self._output(delta) for delta in deltas])

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def dp_engines_running(self) -> bool:
        return self._orchestrator.num_in_flight > 0

    def shutdown(self, timeout: float | None = None) -> None:
        """The composition root owns the orchestrator and closes it."""

    def _output(self, delta: TokenDelta) -> EngineCoreOutput:
        output = EngineCoreOutput(
            request_id=delta.request_id,
            new_token_ids=delta.token_ids,
            finish_reason=None if delta.finish_reason is None else FINISH_REASONS[delta.finish_reason],
            stop_reason=delta.stop_reason,
        )
        if delta.logprobs is not None:
            logprobs = decode_logprobs(delta.logprobs)
            output.new_logprobs = logprobs.new
            output.new_prompt_logprobs_tensors = logprobs.prompt
        if delta.prefill is not None:
            stats = PrefillStats()
            stats.set(delta.prefill.num_prompt_tokens, delta.prefill.num_local_cached_tokens, 0)
            output.prefill_stats = stats
        http = self._http.get(delta.request_id)
        if http and delta.finish_reason is FinishReason.ERROR:
            http.failure = context.Failure(500, FAILED.format(delta.error or "no reason given"), kind=FAILED_KIND)
        if delta.finish_reason is not None:
            self._http.pop(delta.request_id, None)
        queued_s = self._queued_s.pop(delta.request_id, None)
        if queued_s is not None:
            if http and delta.finish_reason is not FinishReason.ERROR:
                http.answering = True
            # vLLM's metrics take a request's queue and prefill times from these.
            output.events = [
                EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, queued_s),
                EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, queued_s),
            ]
        return output


class SplitEngineClient(async_llm.AsyncLLM):
    """vLLM's AsyncLLM, unchanged but for its engine core, which is the cluster."""

    def __init__(self, vllm_config: VllmConfig, orchestrator: Orchestrator, tracer: Tracer | None = None):
        core = ClusterCoreClient(orchestrator, tracer)
        with mock.patch.object(async_llm, "EngineCoreClient") as factory:
            factory.make_async_mp_client.return_value = core
            super().__init__(vllm_config, Executor, log_stats=True, log_requests=False)
        core.forget = lambda request_id: self.output_processor.abort_requests((request_id,), internal=True)
        self._cluster_core = core

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._cluster_core.group(getattr(params, "n", 1)):
                return await super().add_request(request_id, prompt, params, *args, **kwargs)
        except Exception as error:
            if http := context.current.get():
                answer = create_error_response(error).error
                http.failure = context.Failure(answer.code, answer.message, answer.param, answer.type)
            raise

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        token = _client_left.set(True)
        try:
            await super().abort(request_id, internal)
        finally:
            _client_left.reset(token)
