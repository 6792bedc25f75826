"""Owns the words gateway and workers exchange: requests, deltas, hand-offs, reports; and the Engine port.

Everything here crosses processes as MessagePack (msgspec, positional structs). Nothing here knows vLLM or Ray.
"""

import enum
import math
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
    """The right to fetch one prompt's KV blocks from one engine, once (invariant I1).

    `params` is the connector's own description of the blocks, MessagePack, passed on verbatim. From `expires_s` on
    (seconds since the epoch, so that clocks of different machines compare) the blocks may hold another prompt.
    """

    source_replica: str
    source_request_id: str
    num_tokens: int
    num_blocks: int
    params: bytes
    expires_s: float = math.inf


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence for one engine: tokens in, tokens out, n=1, no text.

    `sampling` is the front end's sampling parameters, encoded by the engine family that reads them; the engine
    itself trims them to what its phase needs. A PREFILL request without them is only read: the token that ends it
    means nothing; with a hand-off, which covers the beginning of its prompt, it fetches what it has not cached
    (docs/adr/0017). `max_tokens` counts what this engine may write; the last `num_written_tokens` of the prompt are
    part of the answer already, written by another engine, and a hand-off covers the prompt without them.
    `trace_headers` are W3C Trace Context as the gateway writes it, for requests that are traced.
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
    num_written_tokens: int = 0


class PrefillFacts(msgspec.Struct, frozen=True, array_like=True):
    """How an engine came by the KV of a prompt; the three last fields add up to the first."""

    num_prompt_tokens: int
    num_computed_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int


class EngineTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's time in an engine went, up to its first token there, in seconds.

    `waited_s`: until it was first scheduled, the fetch of its hand-off included; `computed_s`: from then on.
    """

    waited_s: float
    computed_s: float


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step produced for one request.

    `logprobs` is the engine family's own encoding of raw logprobs; only the front end of that family reads it.
    `prefill` and `times` come with the first delta. `error` explains `FinishReason.ERROR` to an operator.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: bytes | None = None
    prefill: PrefillFacts | None = None
    handoff: KVHandoff | None = None
    error: str | None = None
    times: EngineTimes | None = None


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """An engine's state after a step. Counters named `*_total` only grow while the engine lives.

    Tokens are counted from what was submitted and produced: queued are the prompts of requests without a token yet,
    also while their prompt is read or their hand-off fetched; running are prompt and answer of the others. Blocks that
    are only cached count as free, for they are given to whoever needs them. `step_duration_s` is the last step that
    computed anything, and `step_prefill_tokens` how many tokens of prompts it read (-1: the engine does not tell).
    `prefill_tokens_per_s` is prompt tokens computed per second of step time, over the last steps that read prompts
    (`engine.load.Pace`); 0 until there was one. `kv_event_gaps_total` counts how often changes of the cache were lost
    for good and the engine's blocks had to be forgotten (`Engine.block_changes`).
    """

    num_running_requests: int = 0
    num_waiting_requests: int = 0
    num_running_tokens: int = 0
    num_queued_tokens: int = 0
    num_kv_blocks_used: int = 0
    num_kv_blocks_free: int = 0
    step_duration_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    kv_bytes_received_total: int = 0
    kv_transfers_total: int = 0
    kv_transfer_failures_total: int = 0
    kv_leases_expired_total: int = 0
    kv_event_gaps_total: int = 0
    prompt_tokens_computed_total: int = 0
    step_prefill_tokens: int = -1


class InFlight(msgspec.Struct, frozen=True, array_like=True):
    """Requests sent and not ended, and their tokens: prompts and what they have written so far.

    `num_queued_tokens` is the part of the tokens that belongs to requests which have not written yet.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_queued_tokens: int = 0


class BlockChanges(msgspec.Struct, frozen=True, array_like=True):
    """What has changed in a set of cached blocks, by Baton's hashes (`engine.blocks.block_hashes`).

    To apply: if `cleared`, forget everything; then drop `removed` and add `stored`, which share no hash. So a snapshot
    is `cleared` with all blocks stored.
    """

    stored: list[bytes]
    removed: list[bytes]
    cleared: bool = False


class EngineInfo(msgspec.Struct, frozen=True, array_like=True):
    """What does not change while an engine lives.

    `max_num_seqs` is how many requests it computes at once; 0 where nobody knows. Engines hand KV blocks to each other
    only if their `kv_format` is the same.
    """

    kind: str
    model: str
    max_model_len: int
    block_size_tokens: int
    num_kv_blocks: int
    kv_block_bytes: int
    pids: list[int]
    max_num_seqs: int = 0
    kv_format: str = ""


class EngineStep(msgspec.Struct, frozen=True):
    """The outcome of one engine step: deltas in order, and the load after it."""

    deltas: list[TokenDelta]
    load: EngineLoad


class WorkerReport(msgspec.Struct, frozen=True, array_like=True):
    """One message of a worker's report stream to one gateway. `sequence` counts from 0 on each stream.

    A stream that lives brings one at least every `engine.reports.HEARTBEAT_S`, with or without news.

    `others_in_flight` is what the other gateways have on this worker. `blocks` are the changes of the engine's cached
    blocks since the report before: a snapshot in the first report, and whenever one is shorter than the changes.
    `engine_silent_s` is for how long the engine has told nothing (`Engine.steps`) although it was to: since its last
    step, or since it was given a request when it had none, whichever is later. 0.0 while it has nothing to tell. An
    abort does not end a silence: an engine that hangs stays silent when its requests have been taken elsewhere.
    """

    replica_id: str
    phase: Phase
    sequence: int
    deltas: list[TokenDelta]
    load: EngineLoad
    info: EngineInfo | None = None
    others_in_flight: InFlight = InFlight()
    blocks: BlockChanges | None = None
    engine_silent_s: float = 0.0


class EngineGoneError(RuntimeError):
    """The engine's processes are gone; whoever holds requests on it must place them elsewhere."""


class InvalidEngineRequestError(ValueError):
    """The engine cannot take this request; the message says which field and why."""


class Engine(Protocol):
    """The port both engines stand behind (`engine.vllm_engine`, `engine.simulated`); one contract suite tests both.

    One consumer reads `steps()`, one `block_changes()`. A submitted request ends with exactly one delta that has a
    finish reason, unless it was aborted first. A PREFILL request ends with a `KVHandoff` (none if it failed), on a
    decode engine too where the pools hand over in both directions. A request with a hand-off fetches the blocks and
    computes only what the hand-off does not cover; without one the engine reads the prompt itself.
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
        """Gives back the blocks of another engine's hand-off nobody will fetch."""
        ...

    def steps(self) -> AsyncIterator[EngineStep]:
        """Endless; raises EngineGoneError when the engine dies.

        While the engine holds requests it tells a step at least every second, unless one takes longer to compute: if
        nothing else, its load. At least one follows the abort of a request that it holds.
        """
        ...

    def block_changes(self) -> AsyncIterator[BlockChanges]:
        """How the engine's cached blocks change, told with the step that changed them or soon after.

        A stream of its own, because engines publish these events beside their outputs, and because getting lost ones
        again must not hold up tokens. What is lost for good is told as `cleared` and counted in
        `EngineLoad.kv_event_gaps_total`. It starts from an empty cache and is endless; when the engine dies it may end
        or fall silent: `steps()` tells of the end.
        """
        ...

    async def shutdown(self) -> None: ...
