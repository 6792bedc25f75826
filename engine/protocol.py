"""Owns the words gateway and workers exchange: requests, deltas, hand-offs, reports; and the Engine port.

Everything here crosses processes as MessagePack (msgspec, positional structs). Nothing here knows vLLM or Ray.
"""

import enum
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec


class Phase(enum.StrEnum):
    """What an engine is asked to do with a request, and which pool it belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.StrEnum):
    """Why a request produces no more tokens."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


class KVHandoff(msgspec.Struct, frozen=True, array_like=True):
    """The right to fetch one prompt's KV blocks from one prefill engine, once (invariant I1).

    `params` is the connector's own description of the blocks, MessagePack, passed on verbatim.
    """

    source_replica: str
    source_request_id: str
    num_tokens: int
    num_blocks: int
    params: bytes


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence for one engine: tokens in, tokens out, n=1, no text.

    `sampling` is the front end's sampling parameters, encoded by the engine family that reads them; the engine
    itself trims them to what its phase needs. `max_tokens` repeats what routing and the simulated engine need.
    """

    request_id: str
    phase: Phase
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: bytes = b""
    handoff: KVHandoff | None = None
    cache_salt: str | None = None
    priority: int = 0
    trace_headers: dict[str, str] | None = None


class PrefillFacts(msgspec.Struct, frozen=True, array_like=True):
    """How an engine came by the KV of a prompt; the three last fields add up to the first."""

    num_prompt_tokens: int
    num_computed_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step produced for one request.

    `logprobs` is the engine family's own encoding of raw logprobs; only the front end of that family reads it.
    `prefill` comes with the first delta. `error` explains `FinishReason.ERROR` to an operator.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: bytes | None = None
    prefill: PrefillFacts | None = None
    handoff: KVHandoff | None = None
    error: str | None = None


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """An engine's state after a step. Counters named `*_total` only grow while the engine lives."""

    num_running_requests: int = 0
    num_waiting_requests: int = 0
    num_kv_blocks_used: int = 0
    kv_bytes_received_total: int = 0
    kv_transfers_total: int = 0
    kv_transfer_failures_total: int = 0
    kv_leases_expired_total: int = 0
    prompt_tokens_computed_total: int = 0


class EngineInfo(msgspec.Struct, frozen=True, array_like=True):
    """What does not change while an engine lives."""

    kind: str
    model: str
    max_model_len: int
    block_size_tokens: int
    num_kv_blocks: int
    kv_block_bytes: int
    pids: list[int]


class EngineStep(msgspec.Struct, frozen=True):
    """The outcome of one engine step: deltas in order, and the load after it."""

    deltas: list[TokenDelta]
    load: EngineLoad


class WorkerReport(msgspec.Struct, frozen=True, array_like=True):
    """One message of a worker's report stream to one gateway. `sequence` counts from 0 on each stream."""

    replica_id: str
    phase: Phase
    sequence: int
    deltas: list[TokenDelta]
    load: EngineLoad
    info: EngineInfo | None = None


class EngineGoneError(RuntimeError):
    """The engine's processes are gone; whoever holds requests on it must place them elsewhere."""


class InvalidEngineRequestError(ValueError):
    """The engine cannot take this request; the message says which field and why."""


class Engine(Protocol):
    """The port both engines stand behind (`engine.vllm_engine`, `engine.simulated`); one contract suite tests both.

    One consumer reads `steps()`. A submitted request ends with exactly one delta that has a finish reason, unless
    it was aborted first. A PREFILL request ends with a `KVHandoff` (none if it failed). A DECODE request with a
    hand-off fetches the blocks and computes only what the hand-off does not cover; without one it prefills itself.
    """

    @property
    def info(self) -> EngineInfo: ...

    async def submit(self, request: EngineRequest) -> None:
        """Raises InvalidEngineRequestError, EngineGoneError."""
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stops the requests and frees their KV; unknown ids are ignored, so it may be repeated."""
        ...

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        """Gives back the blocks of a hand-off nobody will fetch (decode engines only)."""
        ...

    def steps(self) -> AsyncIterator[EngineStep]:
        """Endless; raises EngineGoneError when the engine dies."""
        ...

    async def shutdown(self) -> None: ...
