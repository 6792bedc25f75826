"""Owns the simulated engine: continuous batching, prefix cache and hand-off behind the Engine port, without a model.

What it schedules, caches and hands over is real; what it computes is a hash, and how long that takes is a formula.
"""

import asyncio
import hashlib
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.blocks import block_hashes
from engine.latency import Latency, StepWork
from engine.load import Ledger, Pace
from engine.protocol import (
    BlockChanges,
    EngineGoneError,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStep,
    EngineTimes,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
)
from engine.simulated_blocks import Block, BlockPool

LONGEST_SILENCE_S = 0.5
"""While it holds requests it tells a step at least this often, as vLLM's engine does; one computes longer than that."""

REMEMBERED_HASHES = 256
"""Prompts that were hashed by one engine and not yet taken by another."""

CLOCK_TOLERANCE_S = 1e-6  # timers may fire a rounding error early; a deadline this near has passed


@dataclass(frozen=True)
class TokenRule:
    """A hash of the context picks the next token from `vocabulary`; a token of `stop_token_ids` ends the answer.

    With `clock_tick_s` the loop's clock picks it instead, so that a token tells when it was written: the answer then
    says nothing about the blocks.
    """

    vocabulary: Sequence[int] = range(32_000)
    stop_token_ids: frozenset[int] = frozenset()
    clock_tick_s: float | None = None

    def pick(self, digest: bytes, now_s: float) -> int:
        number = int.from_bytes(digest, "big") if self.clock_tick_s is None else int(now_s / self.clock_tick_s)
        return self.vocabulary[number % len(self.vocabulary)]


@dataclass(frozen=True)
class SimulatedEngineConfig:
    """`seed` and `token_rule` stand for the weights: engines that hand over to each other share them.

    `max_leap_steps`: while a batch only decodes, up to so many steps are waited for at once and told as one. What
    happens when does not change by it, only that tokens are told up to LONGEST_SILENCE_S after they were written; a
    call ends a leap with the step under way. One whose prompt waits for free blocks finds only at the end of a leap
    that the batch has cached some of it. `keeps_content`: without, blocks hold nothing and an answer's tokens follow
    from their positions alone, which costs less for long prompts. Both need a token rule that no token stops or times.
    """

    model: str
    max_model_len: int
    block_size_tokens: int
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seed: int
    latency: Latency
    token_rule: TokenRule = TokenRule()
    lease_s: float = 30.0
    kv_block_bytes: int = 65_536
    max_leap_steps: int = 1
    keeps_content: bool = True
    kv_format: str = ""

    def __post_init__(self) -> None:
        if min(self.block_size_tokens, self.max_num_seqs, self.max_num_batched_tokens) < 1:
            raise ValueError("block_size_tokens, max_num_seqs and max_num_batched_tokens must be at least 1")
        if self.num_kv_blocks * self.block_size_tokens < self.max_model_len:
            raise ValueError(
                f"{self.num_kv_blocks} KV blocks of {self.block_size_tokens} tokens cannot hold one request of "
                f"max_model_len {self.max_model_len}; raise num_kv_blocks"
            )
        rule = self.token_rule
        is_plain = not rule.stop_token_ids and rule.clock_tick_s is None and not self.latency.decode_interval_s
        if (self.max_leap_steps > 1 or not self.keeps_content) and not is_plain:
            raise ValueError(
                "max_leap_steps above 1 and keeps_content=False need a token rule without stop tokens and clock, and a "
                "latency without decode_interval_s"
            )


def expected_answer(config: SimulatedEngineConfig, prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What every simulated engine with this seed and rule writes after a prompt, stop tokens and clocks aside."""
    context = _new_context(config.seed, [array("I", prompt_token_ids).tobytes()])
    answer: list[int] = []
    for _ in range(num_tokens):
        answer.append(config.token_rule.pick(context.digest(), now_s=0.0))
        context.update(array("I", answer[-1:]).tobytes())
    return answer


class SimulatedFabric:
    """Where the engines of one simulation find each other, by replica id: the network between their KV caches."""

    def __init__(self) -> None:
        self._engines: dict[str, SimulatedEngine] = {}
        self._num_joined = 0
        self._hashed: OrderedDict[str, tuple[array[int], str | None, list[bytes]]] = OrderedDict()

    def join(self, engine: "SimulatedEngine") -> bytes:
        """Registers an engine; returns the hand-off parameters that tell it from an earlier one of the same id."""
        if engine.replica_id in self._engines:
            raise ValueError(f"an engine of replica {engine.replica_id} is alive already")
        if any(e.info.block_size_tokens != engine.info.block_size_tokens for e in self._engines.values()):
            raise ValueError(f"{engine.replica_id} has another block_size_tokens than the engines it hands over to")
        self._engines[engine.replica_id] = engine
        self._num_joined += 1
        return msgspec.msgpack.encode({"engine_id": f"{engine.replica_id}#{self._num_joined}"})

    def leave(self, engine: "SimulatedEngine") -> None:
        self._engines.pop(engine.replica_id, None)

    def source(self, handoff: KVHandoff) -> "SimulatedEngine | None":
        """The living engine that still keeps the blocks of this hand-off."""
        engine = self._engines.get(handoff.source_replica)
        return engine if engine and engine.keeps(handoff) else None

    def remember_hashes(self, request: EngineRequest, tokens: "array[int]", hashes: list[bytes]) -> None:
        """Saves the engine that goes on with this prompt the time to hash it again."""
        self._hashed[request.request_id] = tokens, request.cache_salt, hashes
        while len(self._hashed) > REMEMBERED_HASHES:
            self._hashed.popitem(last=False)

    def take_hashes(self, request: EngineRequest, tokens: "array[int]") -> list[bytes]:
        """Those of the prompt's first blocks, if another engine has hashed it under the same id."""
        known, salt, hashes = self._hashed.pop(request.request_id, (None, None, []))
        return list(hashes) if known and salt == request.cache_salt and tokens[: len(known)] == known else []


@dataclass(eq=False, slots=True)
class _Sequence:
    """One live request. `tokens` is the prompt, then the output; `handoff` is set until its blocks are fetched."""

    request: EngineRequest
    tokens: "array[int]"
    handoff: KVHandoff | None
    hashes: list[bytes] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    num_computed: int = 0
    num_output: int = 0
    num_local_cached: int = 0
    num_external_cached: int = 0
    submitted_s: float = 0.0
    scheduled_s: float | None = None
    pull_end_s: float = 0.0
    due_s: float = 0.0
    context: Any = None

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def block_hashes(self, block_size_tokens: int) -> list[bytes]:
        """Hashes of the full blocks so far."""
        if len(self.tokens) - len(self.hashes) * block_size_tokens >= block_size_tokens:
            new_tokens, parent = self.tokens[len(self.hashes) * block_size_tokens :], self.hashes[-1:]
            salt = self.request.cache_salt
            self.hashes += block_hashes(new_tokens, block_size_tokens, salt, parent[0] if parent else None)
        return self.hashes


@dataclass(slots=True)
class _Leap:
    """Steps under way that only decode. `ends_s` is when each one ends, in loop time; `num_done` are computed."""

    batch: list[_Sequence]
    began_s: float
    ends_s: list[float]
    num_done: int = 0


@dataclass
class _Pinned:
    """The blocks of a hand-off; `lease_end_s` is loop time."""

    blocks: list[Block]
    lease_end_s: float


class SimulatedEngine:
    """Steps like vLLM's V1 scheduler with its priority policy: running sequences first, chunked prefill, admission of
    prompts whose blocks fit in the order of `priority` (lower first) and arrival, preemption of the youngest sequence
    of the highest `priority` when blocks run out. `sampling` is ignored.

    It needs a running event loop and lives on its clock, which may be a virtual one.
    """

    def __init__(self, replica_id: str, config: SimulatedEngineConfig, fabric: SimulatedFabric):
        self.replica_id = replica_id
        self._config = config
        self._fabric = fabric
        self._info = EngineInfo(
            kind="simulated",
            model=config.model,
            max_model_len=config.max_model_len,
            block_size_tokens=config.block_size_tokens,
            num_kv_blocks=config.num_kv_blocks,
            kv_block_bytes=config.kv_block_bytes,
            pids=[],
            max_num_seqs=config.max_num_seqs,
            kv_format=config.kv_format,
        )
        self._pool = BlockPool(config.num_kv_blocks)
        self._live: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._pulling: list[_Sequence] = []
        self._pulled: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._pinned: dict[str, _Pinned] = {}
        self._num_transfers = self._num_transfer_failures = self._num_bytes_received = 0
        self._num_leases_expired = self._num_prompt_tokens_computed = 0
        self._deltas: list[TokenDelta] = []
        self._mergeable: dict[str, int] = {}
        self._ledger = Ledger()
        self._pace = Pace()
        self._num_event_gaps = 0
        self._load_read = self._load()
        self._is_step_due = False
        self._leap: _Leap | None = None
        self._busy_s = 0.0
        self._gone: str | None = None
        self._wake = asyncio.Event()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._news = asyncio.Event()
        self._block_news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._handoff_params = fabric.join(self)
        self._task = self._loop.create_task(self._run(), name=f"simulated-engine-{replica_id}")

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def cached_blocks(self) -> Set[bytes]:
        """What the engine really has cached, for whoever checks what it tells."""
        return self._pool.cached

    @property
    def load(self) -> EngineLoad:
        """What the load really is, for whoever checks what it tells."""
        return self._load()

    @property
    def busy_s(self) -> float:
        """For how long it has computed so far."""
        return self._busy_s

    async def submit(self, request: EngineRequest) -> None:
        self._check_alive()
        sequence = _Sequence(request, self._checked_tokens(request), request.handoff)
        sequence.submitted_s = self._loop.time()
        if request.handoff and (source := self._source(request.handoff)):
            source.renew_lease(request.handoff, held=True)
        self._live[request.request_id] = sequence
        self._ledger.began(request.request_id, len(request.prompt_token_ids))
        sequence.hashes = self._fabric.take_hashes(request, sequence.tokens)
        self._queue(sequence, before_equals=False)
        self._wake.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._catch_up()
        for request_id in request_ids:
            if sequence := self._live.pop(request_id, None):
                self._ledger.ended(request_id)
                for queue in (self._waiting, self._pulling, self._pulled, self._running):
                    if sequence in queue:
                        queue.remove(sequence)
                self._pool.give_back(sequence.blocks)
                if sequence.handoff and (source := self._source(sequence.handoff)):
                    source.unpin(sequence.handoff)
                self._is_step_due = True
                self._wake.set()

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        """A hand-off that was fetched, given back or expired, or whose engine is dead, is ignored."""
        self._check_alive()
        if source := self._source(handoff):
            source.unpin(handoff)

    async def steps(self) -> AsyncIterator[EngineStep]:
        """To a slow reader the deltas of several steps come as one."""
        while True:
            await self._news.wait()
            if self._deltas or self._is_step_due or self._load() != self._load_read:
                step = EngineStep(self._deltas, self._load())
                self._deltas, self._mergeable, self._load_read = [], {}, step.load
                self._is_step_due = False
                yield step
            elif self._gone is not None:
                raise EngineGoneError(self._gone)
            else:
                self._news.clear()

    async def block_changes(self) -> AsyncIterator[BlockChanges]:
        while self._gone is None:
            await self._block_news.wait()
            self._block_news.clear()
            if changes := self._pool.take_changes():
                yield changes

    async def shutdown(self) -> None:
        self._end("was shut down")
        await asyncio.gather(self._task, return_exceptions=True)

    def die(self) -> None:
        """Simulates the death of the engine's processes, in the middle of whatever it does."""
        self._end("died")

    def hang(self) -> None:
        """Simulates an engine that takes calls, and does and tells nothing until `go_on`."""
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    def lose_block_changes(self) -> None:
        """Simulates cache events that are lost for good: whatever was told of blocks does not hold any more."""
        self._pool.forget_told()
        self._num_event_gaps += 1
        self._tell_news()

    # -- what the other engines of the fabric ask of the one that keeps the blocks

    def keeps(self, handoff: KVHandoff) -> bool:
        pinned = self._pinned.get(handoff.source_request_id)
        return handoff.params == self._handoff_params and pinned is not None and not self._is_over(pinned.lease_end_s)

    def renew_lease(self, handoff: KVHandoff, held: bool) -> None:
        """While an engine that wants the blocks lives, its heartbeats hold the lease; it runs again from its death."""
        end_s = math.inf if held else self._loop.time() + self._config.lease_s
        self._pinned[handoff.source_request_id].lease_end_s = end_s
        self._wake.set()

    def unpin(self, handoff: KVHandoff) -> list[bytes]:
        """Frees the blocks of a hand-off; returns what they held."""
        blocks = self._pinned.pop(handoff.source_request_id).blocks
        contents = [block.content for block in blocks]
        self._pool.give_back(blocks)
        self._wake.set()
        return contents

    # -- one step after the other

    async def _run(self) -> None:
        try:
            while True:
                await self._goes_on.wait()
                self._wake.clear()
                self._expire_leases()
                self._finish_pulls()
                if batch := self._schedule():
                    work = StepWork.of([(num_tokens, sequence.num_computed) for sequence, num_tokens in batch])
                    if (num_steps := self._num_leap_steps(batch)) > 1:
                        await self._run_leap([sequence for sequence, _ in batch], work, num_steps)
                    else:
                        duration_s = self._config.latency.step_s(work)
                        await asyncio.sleep(duration_s)
                        await self._goes_on.wait()
                        self._stepped(duration_s, work.num_prefill_tokens)
                        for sequence, num_tokens in batch:
                            if self._live.get(sequence.request.request_id) is sequence:
                                self._compute(sequence, num_tokens)
                    self._tell_news()
                else:
                    self._tell_news()
                    await self._rest()
        except Exception as error:
            self._end(f"failed: {error!r}")
            raise

    def _stepped(self, duration_s: float, num_prefill_tokens: int) -> None:
        self._busy_s += duration_s
        self._pace.stepped(duration_s, num_prefill_tokens)

    def _num_leap_steps(self, batch: Sequence[tuple[_Sequence, int]]) -> int:
        """How many steps are sure to compute just what this one does: one more token for each of the batch."""
        num_steps = self._config.max_leap_steps
        if num_steps == 1 or len(batch) < len(self._running):
            return 1
        for sequence, num_tokens in batch:
            if num_tokens > 1 or sequence.num_uncomputed > 1 or not sequence.num_output:
                return 1
            left = sequence.request.max_tokens - sequence.num_output
            num_steps = min(num_steps, left, self._config.max_model_len - len(sequence.tokens))
        while num_steps > 1 and not self._pool.has_room(
            sum(self._num_blocks(s.num_computed + num_steps) - len(s.blocks) for s, _ in batch)
        ):
            num_steps //= 2
        return num_steps

    async def _run_leap(self, batch: list[_Sequence], work: StepWork, max_steps: int) -> None:
        """Computes up to so many steps; fewer when one ends after LONGEST_SILENCE_S, an arriving pull or a lease, or a
        call comes."""
        end_s = self._loop.time()
        last_s = min((end_s + LONGEST_SILENCE_S, *self._next_ends_s()))
        leap = _Leap(batch, end_s, [])
        while len(leap.ends_s) < max_steps and end_s < last_s:
            end_s += self._config.latency.step_s(work.after(len(leap.ends_s)))
            leap.ends_s.append(end_s)
        self._leap = leap
        try:
            async with asyncio.timeout_at(end_s):
                await self._wake.wait()
            now_s = self._loop.time()
            await asyncio.sleep(next(s for s in leap.ends_s if s >= now_s - CLOCK_TOLERANCE_S) - now_s)
        except TimeoutError:
            pass
        await self._goes_on.wait()
        self._catch_up(is_last=True)
        self._leap = None

    def _catch_up(self, *, is_last: bool = False) -> None:
        """Computes the steps of a leap whose time is over. `is_last`: none is under way."""
        if (leap := self._leap) is None:
            return
        num_steps = 0
        for index in range(leap.num_done, len(leap.ends_s)):
            if not self._is_over(leap.ends_s[index]):
                break
            num_steps += 1
        if not num_steps:
            return
        first, leap.num_done = leap.num_done, leap.num_done + num_steps
        starts_s = [leap.began_s, *leap.ends_s]
        self._busy_s += starts_s[leap.num_done] - starts_s[first]
        self._pace.stepped(starts_s[leap.num_done] - starts_s[leap.num_done - 1], 0)
        alive = [sequence for sequence in leap.batch if self._live.get(sequence.request.request_id) is sequence]
        # The step under way has its blocks already; what ends with these steps has none to give to them.
        num_begun = num_steps + (not is_last and leap.num_done < len(leap.ends_s))
        for sequence in alive:
            num_new = self._num_blocks(sequence.num_computed + num_begun) - len(sequence.blocks)
            new = self._pool.take([], max(num_new, 0))
            assert new is not None, "the leap was longer than its blocks"
            sequence.blocks += new
        for sequence in alive:
            self._write(sequence, num_steps)

    def _tell_news(self) -> None:
        self._block_news.set()
        self._news.set()

    async def _rest(self) -> None:
        """Waits for a call, an arriving pull, the end of a lease, a sequence that is due again, or long enough."""
        next_s = min((*self._next_ends_s(), *(s.due_s for s in self._running[:1])), default=math.inf)
        silence_end_s = self._loop.time() + LONGEST_SILENCE_S if self._live else math.inf
        wake_s = min(next_s, silence_end_s)
        try:
            async with asyncio.timeout_at(wake_s if wake_s < math.inf else None):
                await self._wake.wait()
        except TimeoutError:
            self._is_step_due = self._is_step_due or silence_end_s < next_s

    def _next_ends_s(self) -> list[float]:
        return [s.pull_end_s for s in self._pulling] + [p.lease_end_s for p in self._pinned.values()]

    def _is_over(self, end_s: float) -> bool:
        return end_s <= self._loop.time() + CLOCK_TOLERANCE_S

    def _expire_leases(self) -> None:
        for request_id in [key for key, pinned in self._pinned.items() if self._is_over(pinned.lease_end_s)]:
            self._pool.give_back(self._pinned.pop(request_id).blocks)
            self._num_leases_expired += 1

    def _queue(self, sequence: _Sequence, before_equals: bool) -> None:
        """Lets a sequence wait for admission, before or behind those of its own priority."""
        priority, queue = sequence.request.priority, self._waiting
        index = len(queue)
        if before_equals:
            while index and queue[index - 1].request.priority >= priority:
                index -= 1
        else:
            while index and queue[index - 1].request.priority > priority:
                index -= 1
        queue.insert(index, sequence)

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """The step's batch: which sequences compute how many tokens."""
        batch: list[tuple[_Sequence, int]] = []
        budget = self._config.max_num_batched_tokens
        index = 0
        while budget and index < len(self._running):
            sequence = self._running[index]
            if not self._is_over(sequence.due_s):
                break
            num_tokens = min(budget, sequence.num_uncomputed)
            has_room, dropped = self._make_room(sequence, num_tokens)
            for victim in dropped:
                if scheduled := next((entry for entry in batch if entry[0] is victim), None):
                    batch.remove(scheduled)
                    budget += scheduled[1]
                    index -= 1
            if not has_room:
                break
            batch.append((sequence, num_tokens))
            budget -= num_tokens
            index += 1
        while budget and len(self._running) < self._config.max_num_seqs and (sequence := self._next_admitted()):
            num_tokens = min(budget, sequence.num_uncomputed)
            if sequence.scheduled_s is None:
                sequence.scheduled_s = self._loop.time()
            self._running.append(sequence)
            batch.append((sequence, num_tokens))
            budget -= num_tokens
        return batch

    def _make_room(self, sequence: _Sequence, num_tokens: int) -> tuple[bool, list[_Sequence]]:
        """Blocks for the next tokens, taken from the last sequences of the highest priority if need be: those are told.
        False if that comes to be this one."""
        dropped: list[_Sequence] = []
        num_new = self._num_blocks(sequence.num_computed + num_tokens) - len(sequence.blocks)
        if num_new <= 0:
            return True, dropped
        while (new := self._pool.take([], num_new)) is None:
            # Of equals, max() finds the first.
            victim = max(reversed(self._running), key=lambda running: running.request.priority)
            self._running.remove(victim)
            self._pool.give_back(victim.blocks)
            victim.blocks, victim.num_computed, victim.context = [], 0, None
            self._queue(victim, before_equals=True)
            dropped.append(victim)
            if victim is sequence:
                return False, dropped
        sequence.blocks += new
        return True, dropped

    def _next_admitted(self) -> _Sequence | None:
        """The next sequence that may run; of equal priority first of all one whose blocks have arrived. Starts pulls on
        the way."""
        while self._waiting:
            head = self._waiting[0]
            if self._pulled and self._pulled[0].request.priority <= head.request.priority:
                break
            if not self._allocate(head):
                break
            self._waiting.popleft()
            if head.handoff is None or not self._start_pull(head, head.handoff):
                return head
        return self._pulled.popleft() if self._pulled else None

    def _allocate(self, sequence: _Sequence) -> bool:
        """Blocks for all its tokens, cached ones first. The last token is always computed: the next comes from it."""
        block_size, num_tokens = self._config.block_size_tokens, len(sequence.tokens)
        hits = self._pool.match(sequence.block_hashes(block_size)[: (num_tokens - 1) // block_size])
        blocks = self._pool.take(hits, self._num_blocks(num_tokens) - len(hits))
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.num_computed = sequence.num_local_cached = len(hits) * block_size
        sequence.num_external_cached = 0
        return True

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size_tokens)

    # -- fetching a hand-off

    def _source(self, handoff: KVHandoff) -> "SimulatedEngine | None":
        """The engine that keeps its blocks, if this one can hear it and read them."""
        source = self._fabric.source(handoff)
        return source if source and source.info.kv_format == self._info.kv_format else None

    def _start_pull(self, sequence: _Sequence, handoff: KVHandoff) -> bool:
        if self._source(handoff) is None:
            self._fail_pull(sequence)
            return False
        num_moved = max(handoff.num_blocks - self._num_blocks(sequence.num_local_cached), 0)
        sequence.pull_end_s = self._loop.time() + self._config.latency.handoff_s(num_moved)
        self._pulling.append(sequence)
        return True

    def _finish_pulls(self) -> None:
        for sequence in [s for s in self._pulling if self._is_over(s.pull_end_s)]:
            self._pulling.remove(sequence)
            index = len(self._pulled)
            while index and self._pulled[index - 1].request.priority > sequence.request.priority:
                index -= 1
            self._pulled.insert(index, sequence)
            if sequence.handoff and (source := self._source(sequence.handoff)):
                self._receive(sequence, sequence.handoff, source.unpin(sequence.handoff))
            else:
                self._fail_pull(sequence)

    def _fail_pull(self, sequence: _Sequence) -> None:
        """What should have come is computed here instead."""
        sequence.handoff = None
        self._num_transfer_failures += 1

    def _receive(self, sequence: _Sequence, handoff: KVHandoff, contents: list[bytes]) -> None:
        num_local_blocks = self._num_blocks(sequence.num_local_cached)
        moved = contents[num_local_blocks:]
        for block, content in zip(sequence.blocks[num_local_blocks:], moved, strict=False):
            block.content = content
        self._num_transfers += 1
        self._num_bytes_received += len(moved) * self._config.kv_block_bytes
        covered = min(handoff.num_tokens, len(sequence.tokens) - 1)
        sequence.num_external_cached = max(covered - sequence.num_computed, 0)
        sequence.handoff = None
        self._advance(sequence, sequence.num_external_cached)

    # -- computing

    def _advance(self, sequence: _Sequence, num_tokens: int) -> None:
        """The KV of `num_tokens` more tokens is there: full blocks can be found from now on."""
        block_size, start = self._config.block_size_tokens, sequence.num_computed
        sequence.num_computed += num_tokens
        hashes = sequence.block_hashes(block_size)
        for index in range(start // block_size, sequence.num_computed // block_size):
            self._pool.cache(sequence.blocks[index], hashes[index])

    def _compute(self, sequence: _Sequence, num_tokens: int) -> None:
        """Writes the KV of the next tokens, and the token after them if they are the last."""
        block_size, start = self._config.block_size_tokens, sequence.num_computed
        end, num_prompt_tokens = start + num_tokens, len(sequence.request.prompt_token_ids)
        for position in range(start - start % block_size, end, block_size) if self._config.keeps_content else ():
            block, first = sequence.blocks[position // block_size], max(position, start)
            new = sequence.tokens[first : min(position + block_size, end)].tobytes()
            block.content = block.content[: (first - position) * sequence.tokens.itemsize] + new
        self._num_prompt_tokens_computed += max(min(end, num_prompt_tokens) - start, 0)
        self._advance(sequence, num_tokens)
        if sequence.num_uncomputed:
            return
        if not self._config.keeps_content:
            token = self._answer_tokens(sequence, 1)[0]
            sequence.tokens.append(token)
            self._tell(sequence, [token])
            return
        # The answer follows from what the blocks hold, not from the request: another prompt's KV gives its answer.
        if sequence.context is None:
            sequence.context = _new_context(self._config.seed, [block.content for block in sequence.blocks])
        else:
            sequence.context.update(sequence.tokens[start:].tobytes())
        token = self._config.token_rule.pick(sequence.context.digest(), self._loop.time())
        sequence.tokens.append(token)
        self._tell(sequence, [token])

    def _write(self, sequence: _Sequence, num_steps: int) -> None:
        """As many steps of decode at once; its blocks are there."""
        if self._config.keeps_content:
            for _ in range(num_steps):
                self._compute(sequence, 1)
            return
        new = self._answer_tokens(sequence, num_steps)
        sequence.tokens.extend(new)
        self._advance(sequence, num_steps)
        self._tell(sequence, new)

    def _answer_tokens(self, sequence: _Sequence, num_tokens: int) -> list[int]:
        vocabulary, first = self._config.token_rule.vocabulary, len(sequence.tokens)
        return [vocabulary[position % len(vocabulary)] for position in range(first, first + num_tokens)]

    def _tell(self, sequence: _Sequence, new: list[int]) -> None:
        """Tells tokens that were written, and ends the sequence with them if they are its last. Several only of a rule
        that no token stops."""
        request, facts, handoff, finish, times = sequence.request, None, None, None, None
        if not sequence.num_output:
            assert sequence.scheduled_s is not None
            waited_s = sequence.scheduled_s - sequence.submitted_s
            times = EngineTimes(waited_s, self._loop.time() - sequence.scheduled_s)
            num_prompt, local = len(request.prompt_token_ids), sequence.num_local_cached
            external = sequence.num_external_cached
            facts = PrefillFacts(num_prompt, num_prompt - local - external, local, external)
        token = new[-1]
        sequence.num_output += len(new)
        self._ledger.wrote(request.request_id, len(new))
        reads_only = request.phase is Phase.PREFILL and not request.sampling
        is_stop = not reads_only and token in self._config.token_rule.stop_token_ids
        if is_stop:
            finish = FinishReason.STOP
        elif sequence.num_output >= request.max_tokens or len(sequence.tokens) >= self._config.max_model_len:
            finish = FinishReason.LENGTH
        if finish is not None and request.phase is Phase.PREFILL:
            handoff = self._pin(sequence)
            self._fabric.remember_hashes(request, sequence.tokens[: handoff.num_tokens], sequence.hashes)
        if finish is not None:
            self._running.remove(sequence)
            del self._live[request.request_id]
            self._ledger.ended(request.request_id)
            if handoff is None:
                self._pool.give_back(sequence.blocks)
        elif interval_s := self._config.latency.decode_interval_s:
            # The running sequences stay in the order they are due: this one is now the last.
            sequence.due_s = (sequence.due_s or self._loop.time()) + interval_s
            self._running.remove(sequence)
            self._running.append(sequence)
        stop_reason = token if is_stop else None
        self._emit(TokenDelta(request.request_id, new, finish, stop_reason, None, facts, handoff, times=times))

    def _pin(self, sequence: _Sequence) -> KVHandoff:
        request_id, num_tokens = sequence.request.request_id, len(sequence.request.prompt_token_ids)
        self._pinned[request_id] = _Pinned(sequence.blocks, self._loop.time() + self._config.lease_s)
        return KVHandoff(self.replica_id, request_id, num_tokens, len(sequence.blocks), self._handoff_params)

    def _emit(self, delta: TokenDelta) -> None:
        """Appends a delta, or merges it into the one of the same request that nobody has read yet."""
        index = self._mergeable.get(delta.request_id)
        if index is None:
            self._mergeable[delta.request_id] = len(self._deltas)
            self._deltas.append(delta)
        else:
            unread = self._deltas[index]
            unread.token_ids.extend(delta.token_ids)
            self._deltas[index] = msgspec.structs.replace(delta, token_ids=unread.token_ids, prefill=unread.prefill)
        if delta.finish_reason is not None:
            del self._mergeable[delta.request_id]

    # -- state

    def _load(self) -> EngineLoad:
        return EngineLoad(
            num_running_requests=len(self._running),
            num_waiting_requests=len(self._waiting) + len(self._pulling) + len(self._pulled),
            num_queued_tokens=self._ledger.num_queued_tokens,
            num_running_tokens=self._ledger.num_running_tokens,
            num_kv_blocks_used=self._pool.num_used,
            num_kv_blocks_free=self._config.num_kv_blocks - self._pool.num_used,
            step_duration_s=self._pace.step_duration_s,
            prefill_tokens_per_s=self._pace.prefill_tokens_per_s,
            step_prefill_tokens=self._pace.step_prefill_tokens,
            kv_bytes_received_total=self._num_bytes_received,
            kv_transfers_total=self._num_transfers,
            kv_transfer_failures_total=self._num_transfer_failures,
            kv_leases_expired_total=self._num_leases_expired,
            kv_event_gaps_total=self._num_event_gaps,
            prompt_tokens_computed_total=self._num_prompt_tokens_computed,
        )

    def _check_alive(self) -> None:
        if self._gone is not None:
            raise EngineGoneError(self._gone)

    def _checked_tokens(self, request: EngineRequest) -> "array[int]":
        num_tokens, limit, handoff = len(request.prompt_token_ids), self._config.max_model_len, request.handoff
        wrong = None
        if not 0 < num_tokens < limit:
            wrong = f"prompt_token_ids holds {num_tokens} tokens; 1 to {limit - 1} fit"
        elif request.max_tokens < 1:
            wrong = f"max_tokens is {request.max_tokens}; at least 1 is needed"
        elif request.request_id in self._live or request.request_id in self._pinned:
            wrong = f"request_id {request.request_id} is already on {self.replica_id}"
        elif handoff is not None and handoff.num_tokens > num_tokens:
            wrong = f"handoff covers {handoff.num_tokens} tokens, the prompt has only {num_tokens}"
        if wrong is not None:
            raise InvalidEngineRequestError(wrong)
        try:
            return array("I", request.prompt_token_ids)
        except (OverflowError, TypeError) as error:
            raise InvalidEngineRequestError(f"prompt_token_ids holds what is no token id: {error}") from error

    def _end(self, why: str) -> None:
        if self._gone is not None:
            return
        self._catch_up()
        self._gone = f"the simulated engine of replica {self.replica_id} {why}"
        self._fabric.leave(self)
        for sequence in self._live.values():
            if sequence.handoff and (source := self._source(sequence.handoff)):
                source.renew_lease(sequence.handoff, held=False)
        self._task.cancel()
        self._tell_news()


def _new_context(seed: int, contents: Iterable[bytes]) -> Any:
    context = hashlib.blake2b(f"{seed}:".encode(), digest_size=8)
    context.update(b"".join(contents))
    return context
