"""Owns the requests in flight: it places them, performs the life cycle's actions, and folds what workers report."""

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.protocol import (
    EngineRequest,
    EngineTimes,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
    WorkerReport,
)
from gateway import lifecycle
from gateway.cluster import Cluster, Replica
from gateway.lifecycle import SequenceState, Stage
from gateway.routing.admission import AdmissionConfig, admit
from gateway.routing.policies import Policy, place
from gateway.routing.receipts import Outcome, Receipt, ReceiptStore, Times
from gateway.routing.types import Cause, Hints, Placement, Rejection, RequestView
from gateway.transport import Members, ReplicaGoneError, WorkerTransport

log = logging.getLogger("baton.orchestrator")

REATTACH_PAUSE_S = (0.1, 0.5, 1.0, 2.0, 5.0)
WARM_UP_PAUSE_S = (0.1, 0.5, 1.0)
WARM_UP_TIMEOUT_S = 60.0


class PlacementRejected(Exception):
    """The cluster does not take this request now; `rejection` is what the client is told."""

    def __init__(self, rejection: Rejection):
        super().__init__(rejection.reason)
        self.rejection = rejection


@dataclass(frozen=True)
class SequenceRequest:
    """One choice of one prompt, as the front end asks for it.

    `resumable`: an engine that is given the prompt and the tokens written so far goes on exactly as the engine that
    wrote them would have. Then prefill writes the first token (docs/adr/0010).
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: bytes
    cache_salt: str | None = None
    priority: int = 0
    needs_whole_prompt: bool = False
    resumable: bool = False


@dataclass
class Group:
    """The choices of one prompt: they share a placement, a hand-off and a receipt."""

    receipt_id: str
    num_choices: int
    received_s: float
    hints: Hints = field(default_factory=Hints)
    decide_s: float = 0.0
    placement: Placement | None = None
    receipt: Receipt | None = None
    leader_started: bool = False
    sequences: list["Sequence"] = field(default_factory=list)


@dataclass
class Sequence:
    """The mutable record around one sequence's immutable state."""

    request: SequenceRequest
    group: Group
    state: SequenceState
    arrived_s: float
    first_token_s: float | None = None
    written: list[int] = field(default_factory=list)
    output_tokens: int = 0
    finish_reason: FinishReason | None = None
    prefill_facts: PrefillFacts | None = None
    decode_facts: PrefillFacts | None = None
    prefill_times: EngineTimes | None = None
    decode_times: EngineTimes | None = None
    blocks_moved: int = 0
    handoff_blocks: int = 0
    submitting_to: set[str] = field(default_factory=set)
    abort_after_submit: set[str] = field(default_factory=set)
    deadline: asyncio.TimerHandle | None = None


@dataclass(frozen=True)
class OrchestratorConfig:
    handoff_timeout_s: float
    max_in_flight_requests: int
    warm_up_sampling: bytes
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)


class Orchestrator:
    """Performs what `lifecycle` decides. Everything runs on one event loop; no method but `start` and `close` waits."""

    def __init__(
        self,
        transport: WorkerTransport,
        policy: Policy,
        receipts: ReceiptStore,
        config: OrchestratorConfig,
        *,
        closed: Callable[[Receipt], None] = lambda receipt: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        new_seed: Callable[[], int] = lambda: secrets.randbits(32),
    ):
        self.cluster = Cluster(clock)
        self.receipts = receipts
        self._transport = transport
        self._policy = policy
        self._config = config
        self._on_closed = closed
        self._clock = clock
        self._wall_clock = wall_clock
        self._new_seed = new_seed
        self._sequences: dict[str, Sequence] = {}
        self._batches: asyncio.Queue[list[TokenDelta]] = asyncio.Queue()
        self._probes: dict[str, tuple[str, asyncio.Future[TokenDelta]]] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._members: Members = {}
        self._warming = asyncio.Lock()
        self._readiness = asyncio.Condition()
        self._closed = False

    # -- life of the orchestrator

    async def start(self, expected: Mapping[Phase, int], timeout_s: float) -> None:
        """Waits until every pool has its expected replicas, attached and warm. Raises TimeoutError."""
        self.cluster.expects_prefill = expected.get(Phase.PREFILL, 0) > 0
        self._transport.watch(self._on_members)

        def ready() -> bool:
            return all(len(self.cluster.pool(phase, ready_only=True)) >= n for phase, n in expected.items())

        try:
            async with asyncio.timeout(timeout_s), self._readiness:
                await self._readiness.wait_for(ready)
        except TimeoutError as error:
            have = (f"{len(self.cluster.pool(p, ready_only=True))} of {n} {p}" for p, n in expected.items())
            raise TimeoutError(f"after {timeout_s:.0f} s only {' and '.join(have)} replicas are ready") from error

    async def close(self) -> None:
        self._closed = True
        for sequence in self._sequences.values():
            if sequence.deadline:
                sequence.deadline.cancel()
        tasks = [*self._followers.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    # -- requests

    def new_group(
        self, receipt_id: str, num_choices: int, received_s: float | None = None, hints: Hints | None = None
    ) -> Group:
        """`received_s` is when the prompt's HTTP request arrived, on the orchestrator's clock."""
        return Group(receipt_id, num_choices, self._clock() if received_s is None else received_s, hints or Hints())

    def add(self, request: SequenceRequest, group: Group) -> None:
        """Places a sequence and sets it going. Raises PlacementRejected; then nothing has been reserved."""
        arrived_s = self._clock()
        limit = self._config.max_in_flight_requests
        # All choices of a prompt are taken, or none.
        if not group.sequences and len(self._sequences) + group.num_choices > limit:
            reason = f"this gateway already holds {limit} sequences"
            raise PlacementRejected(Rejection(503, reason, 1, Cause.GATEWAY_FULL))
        if group.placement is None:
            self._place(request, group, arrived_s)
        assert group.placement is not None
        state = SequenceState(
            request.request_id, group.placement.prefill, group.placement.decode, leads=not group.sequences
        )
        sequence = Sequence(request, group, state, arrived_s)
        group.sequences.append(sequence)
        self._sequences[request.request_id] = sequence
        self.cluster.sent(state.decode, request.request_id, len(request.prompt_token_ids))
        self._advance(sequence, lifecycle.Start())
        if not state.leads and group.leader_started:
            self._advance(sequence, lifecycle.LeaderStarted())

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """Stops sequences wherever they are; unknown ids are ignored. STOP: the front end has all the text it needs."""
        for request_id in request_ids:
            if sequence := self._sequences.get(request_id):
                sequence.finish_reason = reason
                self._advance(sequence, lifecycle.AbortAsked())

    async def next_deltas(self) -> list[TokenDelta]:
        """The deltas that have been reported, for the front end, in order; a front end that lags gets several
        reports' at once."""
        deltas = await self._batches.get()
        while not self._batches.empty():
            deltas = deltas + self._batches.get_nowait()
        return deltas

    @property
    def num_in_flight(self) -> int:
        return len(self._sequences)

    def _place(self, request: SequenceRequest, group: Group, arrived_s: float) -> None:
        view = RequestView(
            request_id=group.receipt_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            num_choices=group.num_choices,
            needs_whole_prompt=request.needs_whole_prompt,
            hints=group.hints,
            waited_s=max(arrived_s - group.received_s, 0.0),
        )
        snapshot, seed = self.cluster.snapshot(), self._new_seed()
        began_s = self._clock()
        placement = place(self._policy, view, snapshot, seed)
        if isinstance(placement, Rejection):
            raise PlacementRejected(placement)
        admission = admit(view, placement, snapshot, self._config.admission)
        group.decide_s = self._clock() - began_s
        if isinstance(admission, Rejection):
            raise PlacementRejected(admission)
        group.placement = placement
        group.receipt = Receipt(
            group.receipt_id,
            self._wall_clock(),
            placement.policy,
            seed,
            view,
            snapshot,
            placement,
            Outcome("running", prompt_tokens=view.num_prompt_tokens),
            admission=admission,
            admission_config=self._config.admission,
        )
        self.receipts.put(group.receipt)

    # -- events

    def _advance(self, sequence: Sequence, event: lifecycle.Event) -> None:
        was_open = sequence.state.stage is not Stage.DONE
        sequence.state, actions = lifecycle.advance(sequence.state, event)
        for action in actions:
            self._perform(sequence, action)
        if sequence.state.stage is not Stage.PREFILLING and sequence.deadline:
            sequence.deadline.cancel()
            sequence.deadline = None
        if was_open and sequence.state.stage is Stage.DONE:
            self._finish(sequence)

    def _perform(self, sequence: Sequence, action: lifecycle.Action) -> None:
        request = sequence.request
        match action:
            case lifecycle.SubmitPrefill(replica_id):
                self.cluster.sent(replica_id, request.request_id, len(request.prompt_token_ids))
                sequence.deadline = asyncio.get_running_loop().call_later(
                    self._config.handoff_timeout_s, self._advance, sequence, lifecycle.Deadline()
                )
                self._spawn(self._submit(sequence, replica_id, self._engine_request(sequence, Phase.PREFILL, None)))
            case lifecycle.SubmitDecode(replica_id, handoff):
                if sequence.state.prefill is not None:
                    self.cluster.ended(sequence.state.prefill, request.request_id)
                self.cluster.queued(replica_id, request.request_id)
                sequence.handoff_blocks = handoff.num_blocks if handoff else 0
                self._spawn(self._submit(sequence, replica_id, self._engine_request(sequence, Phase.DECODE, handoff)))
            case lifecycle.AbortOn(replica_id):
                self.cluster.ended(replica_id, request.request_id)
                if replica_id in sequence.submitting_to:
                    sequence.abort_after_submit.add(replica_id)
                else:
                    self._spawn(self._abort_on(replica_id, request.request_id))
            case lifecycle.Release(handoff):
                self._spawn(self._release(handoff))
            case lifecycle.Fail(error):
                log.error("request %s failed: %s", request.request_id, error)
                sequence.finish_reason = FinishReason.ERROR
                self._batches.put_nowait([TokenDelta(request.request_id, [], FinishReason.ERROR, error=error)])

    def _finish(self, sequence: Sequence) -> None:
        request_id, group = sequence.request.request_id, sequence.group
        self._sequences.pop(request_id, None)
        for replica_id in (sequence.state.prefill, sequence.state.decode):
            if replica_id is not None:
                self.cluster.ended(replica_id, request_id)
        if sequence.state.leads:
            self._start_others(group)
        if all(s.state.stage is Stage.DONE for s in group.sequences):
            assert group.receipt is not None
            receipt = dataclasses.replace(group.receipt, outcome=self._outcome(group))
            self.receipts.put(receipt)
            self._on_closed(receipt)
        self._let_go_of_leavers()

    def _start_others(self, group: Group) -> None:
        if group.leader_started:
            return
        group.leader_started = True
        for sequence in group.sequences[1:]:
            self._advance(sequence, lifecycle.LeaderStarted())

    def _on_report(self, report: WorkerReport) -> None:
        self.cluster.fold(report)
        batch: list[TokenDelta] = []
        for delta in report.deltas:
            if probe := self._probes.get(delta.request_id):
                if delta.finish_reason is not None:
                    _answer(probe[1], delta)
                continue
            sequence = self._sequences.get(delta.request_id)
            if report.phase is Phase.PREFILL:
                batch += self._on_prefill_delta(report.replica_id, sequence, delta)
            elif sequence is not None and sequence.state.stage is Stage.DECODING:
                batch.append(self._on_decode_delta(sequence, delta))
        if batch:
            self._batches.put_nowait(batch)

    def _on_prefill_delta(self, replica_id: str, sequence: Sequence | None, delta: TokenDelta) -> list[TokenDelta]:
        """What the client gets of it: the first token, if prefill writes it."""
        if delta.finish_reason is None:
            return []
        if sequence is None:
            # The request ended while its prefill was finishing: give the blocks back now, not when the lease ends.
            if delta.handoff is not None:
                self._spawn(self._release(delta.handoff))
            return []
        self.cluster.ended(replica_id, delta.request_id)
        sequence.prefill_facts, sequence.prefill_times = delta.prefill, delta.times
        first: TokenDelta | None = None
        if sequence.request.resumable and sequence.state.stage is Stage.PREFILLING and delta.error is None:
            first = self._first_token(sequence, delta)
        answered = first is not None and first.finish_reason is not None
        self._advance(sequence, lifecycle.PrefillFinished(delta.handoff, delta.error, answered))
        return [] if first is None else [first]

    def _first_token(self, sequence: Sequence, delta: TokenDelta) -> TokenDelta | None:
        """The first token as prefill has written it. LENGTH means prefill's one token, not yet the client's limit."""
        if len(delta.token_ids) != 1:
            return None
        finish = delta.finish_reason
        if finish is FinishReason.LENGTH and sequence.request.max_tokens > 1:
            finish = None
        sequence.written = list(delta.token_ids)
        sequence.output_tokens = 1
        sequence.finish_reason = finish
        sequence.first_token_s = self._clock()
        self.cluster.produced(sequence.state.decode, delta.request_id, 1)
        return msgspec.structs.replace(
            delta, finish_reason=finish, handoff=None, prefill=self._facts_for_client(sequence)
        )

    def _on_decode_delta(self, sequence: Sequence, delta: TokenDelta) -> TokenDelta:
        sequence.output_tokens += len(delta.token_ids)
        self.cluster.produced(sequence.state.decode, delta.request_id, len(delta.token_ids))
        if delta.prefill is not None and sequence.decode_facts is None:
            sequence.decode_facts, sequence.decode_times = delta.prefill, delta.times
            sequence.blocks_moved = self._blocks_moved(sequence, delta.prefill)
            # An engine computes the last prompt token in any case; more than that means that the pull failed.
            if sequence.handoff_blocks and delta.prefill.num_computed_tokens > 1:
                self._advance(sequence, lifecycle.PullFailed())
            self._let_go_of_leavers()
            # The front end takes the facts of the first token's delta.
            facts = None if sequence.written else self._facts_for_client(sequence)
            delta = msgspec.structs.replace(delta, prefill=facts)
        if sequence.first_token_s is None and delta.token_ids:
            sequence.first_token_s = self._clock()
            if sequence.state.leads:
                self._start_others(sequence.group)
        if delta.finish_reason is not None:
            sequence.finish_reason = delta.finish_reason
        self._advance(sequence, lifecycle.Delta(last=delta.finish_reason is not None))
        return delta

    def _blocks_moved(self, sequence: Sequence, facts: PrefillFacts) -> int:
        replica = self.cluster.get(sequence.state.decode)
        if not sequence.handoff_blocks or facts.num_computed_tokens > 1 or replica is None or replica.info is None:
            return 0
        return sequence.handoff_blocks - facts.num_local_cached_tokens // replica.info.block_size_tokens

    @staticmethod
    def _facts_for_client(sequence: Sequence) -> PrefillFacts:
        """What the placement really reused: tokens that no engine computed for this prompt."""
        leader = sequence.group.sequences[0]
        by_prefill = leader.prefill_facts and (leader.handoff_blocks or leader.written)
        facts = (leader.prefill_facts if by_prefill else leader.decode_facts) or sequence.decode_facts
        assert facts is not None
        cached = facts.num_local_cached_tokens
        return PrefillFacts(facts.num_prompt_tokens, facts.num_prompt_tokens - cached, cached, 0)

    def _outcome(self, group: Group) -> Outcome:
        leader, now_s = group.sequences[0], self._clock()
        reasons = [s.finish_reason for s in group.sequences]
        status = "finished"
        if FinishReason.ERROR in reasons:
            status = "failed"
        elif None in reasons or FinishReason.ABORT in reasons:
            status = "aborted"
        replica = self.cluster.get(leader.state.decode)
        block_bytes = replica.info.kv_block_bytes if replica and replica.info else 0
        blocks_moved = sum(s.blocks_moved for s in group.sequences)
        prefill, decode = leader.prefill_facts, leader.decode_facts
        first_s = leader.first_token_s
        return Outcome(
            status=status,
            finish_reason=str(reasons[0]) if reasons[0] else None,
            ttft_ms=_ms(first_s - group.received_s) if first_s is not None else None,
            duration_ms=_ms(now_s - group.received_s),
            prompt_tokens=len(leader.request.prompt_token_ids),
            output_tokens=sum(s.output_tokens for s in group.sequences),
            reused_tokens=self._facts_for_client(leader).num_local_cached_tokens if prefill or decode else 0,
            prefill_computed_tokens=prefill.num_computed_tokens if prefill else 0,
            decode_computed_tokens=sum(s.decode_facts.num_computed_tokens for s in group.sequences if s.decode_facts),
            kv_blocks_moved=blocks_moved,
            kv_bytes_moved=blocks_moved * block_bytes,
            faults=tuple(fault for s in group.sequences for fault in s.state.faults),
            times_ms=_times(leader, now_s),
        )

    # -- calls to workers

    @staticmethod
    def _engine_request(sequence: Sequence, phase: Phase, handoff: KVHandoff | None) -> EngineRequest:
        request, written = sequence.request, sequence.written
        return EngineRequest(
            request_id=request.request_id,
            phase=phase,
            prompt_token_ids=request.prompt_token_ids + written,
            max_tokens=request.max_tokens - len(written) if phase is Phase.DECODE else 1,
            sampling=request.sampling if phase is Phase.DECODE or request.resumable else b"",
            handoff=handoff,
            cache_salt=request.cache_salt,
            priority=request.priority,
            num_written_tokens=len(written),
        )

    async def _submit(self, sequence: Sequence, replica_id: str, request: EngineRequest) -> None:
        if sequence.state.stage is Stage.DONE:
            # Aborted before this task ran: nothing was sent, but a hand-off still has to be given back.
            if request.handoff is not None:
                await self._release(request.handoff)
            return
        sequence.submitting_to.add(replica_id)
        error: Exception | None = None
        try:
            await self._transport.submit(replica_id, request)
        except (ReplicaGoneError, InvalidEngineRequestError) as caught:
            error = caught
        sequence.submitting_to.discard(replica_id)
        if error is not None:
            self._advance(sequence, lifecycle.SubmitFailed(replica_id, str(error)))
        if isinstance(error, InvalidEngineRequestError):
            if request.handoff is not None:
                # Only the replica that refused knows that it does not fetch the blocks. One that is gone may have
                # begun to, and blocks must not be freed under a pull: then their lease ends.
                await self._release(request.handoff, through=replica_id)
        elif error is not None or replica_id in sequence.abort_after_submit:
            await self._abort_on(replica_id, request.request_id)

    async def _abort_on(self, replica_id: str, request_id: str) -> None:
        try:
            await self._transport.abort(replica_id, [request_id])
        except ReplicaGoneError as error:
            log.warning("could not abort %s on %s: %s", request_id, replica_id, error)

    async def _release(self, handoff: KVHandoff, through: str | None = None) -> None:
        """Gives a hand-off back through the first decode replica that can, or through one and no other."""
        for replica in self.cluster.pool(Phase.DECODE):
            if not replica.attached or through not in (None, replica.replica_id):
                continue
            try:
                await self._transport.release(replica.replica_id, f"release-{handoff.source_request_id}", handoff)
                return
            except (ReplicaGoneError, InvalidEngineRequestError) as error:
                log.warning("could not release a hand-off through %s: %s", replica.replica_id, error)
        log.error("no decode replica could release %s; its blocks stay until the lease ends", handoff.source_request_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a background task failed", exc_info=error)

    # -- members of the pools

    def _on_members(self, members: Members) -> None:
        if self._closed:
            return
        before, self._members = self._members, dict(members)
        for replica_id, phase in members.items():
            replica = self.cluster.get(replica_id)
            if replica is None:
                log.info("%s replica %s joined", phase, replica_id)
                replica = self.cluster.add(replica_id, phase)
                self._followers[replica_id] = asyncio.create_task(self._follow(replica))
            elif replica_id not in before and replica.attached:
                log.info("%s came back before its last request had ended", replica_id)
                self._spawn(self._make_ready(replica))
        for replica_id in self._followers:
            if replica_id not in members and (replica := self.cluster.get(replica_id)):
                replica.ready = False
        self._let_go_of_leavers()

    def _let_go_of_leavers(self) -> None:
        """Closes the stream of a replica that left its pool once its last request here has ended: then it can drain."""
        for replica_id in [r for r in self._followers if r not in self._members]:
            replica = self.cluster.get(replica_id)
            if replica is None or not (replica.in_flight or self._has_blocks_to_fetch(replica_id)):
                follower = self._followers.pop(replica_id)
                follower.cancel()
                self._tasks.add(follower)
                follower.add_done_callback(self._on_task_done)
                self.cluster.remove(replica_id)
                log.info("let go of %s", replica_id)

    def _has_blocks_to_fetch(self, replica_id: str) -> bool:
        """Whether a decode replica may still be pulling a hand-off of this prefill replica."""
        return any(
            sequence.state.prefill == replica_id and sequence.handoff_blocks and sequence.decode_facts is None
            for sequence in self._sequences.values()
        )

    async def _follow(self, replica: Replica) -> None:
        """Keeps one replica's report stream attached for as long as it is a member."""
        failures = 0
        while True:
            try:
                async for report in self._transport.reports(replica.replica_id):
                    self._on_report(report)
                    if report.sequence == 0:
                        failures = 0
                        self._spawn(self._make_ready(replica))
            except ReplicaGoneError as error:
                log.warning("report stream of %s broke: %s", replica.replica_id, error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.warning("the transport cancelled the report stream of %s", replica.replica_id)
            except Exception:
                # Nobody else would notice: the requests on this replica would wait without end.
                log.exception("the reports of %s cannot be read", replica.replica_id)
            self._on_replica_lost(replica)
            if replica.replica_id not in self._members:
                self._let_go_of_leavers()
                return
            await asyncio.sleep(REATTACH_PAUSE_S[min(failures, len(REATTACH_PAUSE_S) - 1)])
            failures += 1

    def _on_replica_lost(self, replica: Replica) -> None:
        replica.detach()
        for key, (replica_id, probe) in self._probes.items():
            if replica_id == replica.replica_id:
                _answer(probe, TokenDelta(key, [], FinishReason.ERROR, error=f"{replica_id} was lost"))
        for sequence in list(self._sequences.values()):
            if replica.replica_id in (sequence.state.prefill, sequence.state.decode):
                self._advance(sequence, lifecycle.ReplicaLost(replica.replica_id))
        replica.in_flight.clear()
        replica.in_flight_tokens = 0

    async def _make_ready(self, replica: Replica) -> None:
        """Warms every pair this replica is part of: the first hand-off of a pair pays a handshake."""
        async with self._warming:
            for pause_s in WARM_UP_PAUSE_S:
                if not self._takes_requests(replica):
                    break
                try:
                    await self._warm_up(replica)
                except (ReplicaGoneError, InvalidEngineRequestError, TimeoutError) as error:
                    log.warning("a warm-up of %s failed: %r", replica.replica_id, error)
                    await asyncio.sleep(pause_s)
                    continue
                if self._takes_requests(replica):
                    replica.ready = True
                    log.info("%s is ready", replica.replica_id)
                break
            else:
                log.error("%s stays out of its pool: %d warm-ups failed", replica.replica_id, len(WARM_UP_PAUSE_S))
        async with self._readiness:
            self._readiness.notify_all()

    def _takes_requests(self, replica: Replica) -> bool:
        return replica.attached and replica.replica_id in self._members

    async def _warm_up(self, replica: Replica) -> None:
        decode = replica.phase is Phase.DECODE
        pool = self.cluster.pool(Phase.PREFILL if decode else Phase.DECODE)
        others = [other for other in pool if self._takes_requests(other)]
        if decode and not others:
            await self._probe(replica, None)
        for other in others:
            prefill, decoder = (other, replica) if decode else (replica, other)
            handoff = (await self._probe(prefill, None)).handoff
            if handoff is None:
                raise ReplicaGoneError(f"{prefill.replica_id} gave no hand-off")
            await self._probe(decoder, handoff)

    async def _probe(self, replica: Replica, handoff: KVHandoff | None) -> TokenDelta:
        """Runs one small request on a replica. A prompt is unique to its hand-off, so nothing is cached beforehand."""
        if replica.info is None:
            raise ReplicaGoneError(f"{replica.replica_id} was lost")
        key = handoff.source_request_id if handoff else f"warm-up-{secrets.token_hex(8)}"
        length = min(replica.info.block_size_tokens + 1, replica.info.max_model_len - 2)
        prompt = [int(digit, 16) + 1 for digit in (key.removeprefix("warm-up-") * length)[:length]]
        request = EngineRequest(key, replica.phase, prompt, 1, self._config.warm_up_sampling, handoff)
        future: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
        self._probes[key] = (replica.replica_id, future)
        try:
            async with asyncio.timeout(WARM_UP_TIMEOUT_S):
                await self._transport.submit(replica.replica_id, request)
                delta = await future
        finally:
            del self._probes[key]
        if delta.finish_reason is FinishReason.ERROR:
            raise ReplicaGoneError(f"{replica.replica_id} failed a warm-up: {delta.error}")
        return delta


def _times(leader: Sequence, now_s: float) -> Times:
    """The leader's times. An engine that never answered leaves its stages open, and with them the transit."""
    group, first_s = leader.group, leader.first_token_s
    front_end_s = leader.arrived_s - group.received_s
    prefill, decode = leader.prefill_times, leader.decode_times
    on_the_way = [prefill] if leader.written else [prefill, decode]
    engines_s = sum(times.waited_s + times.computed_s for times in on_the_way if times)
    gateway_s = None if first_s is None else max(first_s - group.received_s - engines_s, 0.0)
    transit_s = None if gateway_s is None else max(gateway_s - front_end_s - group.decide_s, 0.0)
    return Times(
        front_end=_ms(front_end_s),
        decide=_ms(group.decide_s),
        prefill_wait=_ms(prefill.waited_s) if prefill else None,
        prefill_compute=_ms(prefill.computed_s) if prefill else None,
        decode_wait=_ms(decode.waited_s) if decode else None,
        decode_compute=_ms(decode.computed_s) if decode else None,
        transit=_ms(transit_s) if transit_s is not None else None,
        decode=_ms(now_s - first_s) if first_s is not None else None,
        gateway=_ms(gateway_s) if gateway_s is not None else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _answer(probe: asyncio.Future[TokenDelta], delta: TokenDelta) -> None:
    if not probe.done():
        probe.set_result(delta)
