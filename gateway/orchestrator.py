"""Owns the requests in flight: it places them, performs the life cycle's actions, and folds what workers report."""

import asyncio
import dataclasses
import logging
import secrets
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine import logs
from engine.protocol import (
    EngineRequest,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    TokenDelta,
    WorkerReport,
)
from gateway import lifecycle
from gateway.agents.pauses import Calibration
from gateway.agents.sessions import Arrival, Sessions
from gateway.cluster import Cluster, Replica
from gateway.lifecycle import SequenceState, Stage
from gateway.membership import Loss, Membership, MembershipConfig
from gateway.outcome import Attempt, GroupTimes, History, blocks_moved, facts_for_client, has_fetched, outcome
from gateway.routing.admission import AdmissionConfig, admit
from gateway.routing.costs import Costs
from gateway.routing.order import rank_ms
from gateway.routing.policies import Policy, place
from gateway.routing.predict import predict
from gateway.routing.receipts import Decision, Outcome, Receipt, ReceiptStore, TraceContext
from gateway.routing.types import Cause, ClusterSnapshot, Hints, Placement, Rejection, RequestView
from gateway.scaling.demand import Demand, DemandMeter, ServiceLevel
from gateway.transport import ReplicaGoneError, WorkerTransport

log = logging.getLogger("baton.orchestrator")

PLACE_AGAIN_PAUSE_S = (0.0, 0.5, 1.0, 2.0)
"""After the first loss, the second and so on. More replicas may be lost with one, and are not all noticed at once: a
request must not use up its placements on those."""

MAX_SESSIONS = 10_000
MAX_SESSION_TOKENS = 32_000_000
"""Of all sessions' last prompts: about 200 MB with their blocks' hashes."""


class PlacementRejected(Exception):
    """The cluster does not take this request now; `rejection` is what the client is told."""

    def __init__(self, rejection: Rejection):
        super().__init__(rejection.reason)
        self.rejection = rejection


@dataclass(frozen=True)
class SequenceRequest:
    """One choice of one prompt, as the front end asks for it.

    `resumable`: an engine that is given the prompt and the tokens written so far goes on exactly as the engine that
    wrote them would have. Then prefill writes the first token of an only choice (docs/adr/0010), and an answer whose
    decode replica is lost goes on elsewhere; any other is begun again there and compared.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: bytes
    cache_salt: str | None = None
    needs_whole_prompt: bool = False
    resumable: bool = False


@dataclass
class Group:
    """The choices of one prompt: they share a placement, a hand-off and a receipt.

    `session` is the one that it is a turn of; `tool` the one that its answer has called. With `awaits_response` its
    turn ends when the response is over as well: only then it is known which tool that is.
    """

    receipt_id: str
    num_choices: int
    received_s: float
    hints: Hints = field(default_factory=Hints)
    trace: TraceContext | None = None
    decide_s: float = 0.0
    rank_ms: int = 0
    session: str | None = None
    awaits_response: bool = False
    tool: str | None = None
    placement: Placement | None = None
    receipt: Receipt | None = None
    leader_started: bool = False
    sequences: list["Sequence"] = field(default_factory=list)


@dataclass
class Sequence:
    """The mutable record around one sequence's immutable state. `read_s` is how long its prompt will be read, as
    predicted at its last placement, and `asked_tokens` the beginning of it that the replica that is asked had cached
    then. `written` is what the client has of the answer."""

    request: SequenceRequest
    group: Group
    state: SequenceState
    history: History
    read_s: float = 0.0
    asked_tokens: int = 0
    written: "array[int]" = field(default_factory=lambda: array("I"))
    deadline: asyncio.TimerHandle | None = None

    @property
    def attempt(self) -> Attempt:
        return self.history.attempt

    @property
    def carried(self) -> "array[int]":
        """What of the answer an attempt is given as the end of its prompt; the rest it writes anew."""
        return self.written if self.request.resumable else self.written[:0]

    @property
    def prefill_writes(self) -> bool:
        """Whether the token that ends a prefill is the answer's next one."""
        return self.request.resumable and self.group.num_choices == 1


@dataclass(frozen=True)
class OrchestratorConfig:
    """`has_prefill_pool`: a request that is not split is then degraded. `can_ask`: decode may be asked for what it has
    cached, and has `ask_timeout_s` to hand it over (docs/adr/0017). `recovery_timeout_s`: how long a request that a
    fault has displaced waits for a replica.
    `rank` orders what waits for an engine (`gateway.routing.order`).
    `slo` is what turns are held against when the demand is measured (`gateway.scaling`).
    `drop_logprobs(logprobs, n)` leaves out the first n tokens of a delta's logprobs and those of the prompt. For the
    rest see `MembershipConfig`."""

    handoff_timeout_s: float
    max_in_flight_requests: int
    warm_up_sampling: bytes
    has_prefill_pool: bool = False
    can_ask: bool = False
    ask_timeout_s: float = 2.0
    report_timeout_s: float = 5.0
    engine_timeout_s: float = 20.0
    recovery_timeout_s: float = 120.0
    drop_logprobs: Callable[[bytes, int], bytes] = lambda logprobs, num_tokens: logprobs
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    rank: Callable[[RequestView, float, float, float], int] = rank_ms
    slo: ServiceLevel = field(default_factory=ServiceLevel)


@dataclass(frozen=True)
class Learnt:
    """What the gateway knows by experience: what work costs, how well pauses are predicted, how many sessions."""

    costs: Costs
    pauses: Calibration
    num_sessions: int


@dataclass(frozen=True)
class Waiting:
    """A prompt that was taken and has no token yet. `waited_s` counts from its HTTP request's arrival."""

    hints: Hints
    waited_s: float


class Orchestrator:
    """Performs what `lifecycle` decides. Everything runs on one event loop; no method but `start` and `close` waits."""

    def __init__(
        self,
        transport: WorkerTransport,
        policy: Policy,
        receipts: ReceiptStore,
        config: OrchestratorConfig,
        *,
        shadow: Policy | None = None,
        closed: Callable[[Receipt], None] = lambda receipt: None,
        replica_lost: Callable[[Phase, Loss], None] = lambda phase, loss: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        new_seed: Callable[[], int] = lambda: secrets.randbits(32),
    ):
        self._sessions = Sessions(MAX_SESSIONS, MAX_SESSION_TOKENS)
        self.cluster = Cluster(clock, self._sessions.promised_tokens)
        self.cluster.expects_prefill = config.has_prefill_pool
        self.cluster.can_ask = config.can_ask
        self.receipts = receipts
        self._transport = transport
        self._policy = policy
        self._shadow = shadow
        self._config = config
        self._on_closed = closed
        self._clock = clock
        self._wall_clock = wall_clock
        self._new_seed = new_seed
        self._demand = DemandMeter(config.slo, clock())
        self._num_placed = 0
        self._sequences: dict[str, Sequence] = {}
        self._by_engine_id: dict[str, Sequence] = {}
        self._asking: dict[str, Sequence] = {}
        self._displaced: dict[str, Sequence] = {}
        self._unsent: set[KVHandoff] = set()
        self._submitting: set[tuple[str, str]] = set()
        self._abort_after_submit: set[tuple[str, str]] = set()
        self._unreleased: list[tuple[KVHandoff, Phase]] = []
        self._batches: asyncio.Queue[list[TokenDelta]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._membership = Membership(
            self.cluster,
            transport,
            MembershipConfig(config.warm_up_sampling, config.report_timeout_s, config.engine_timeout_s, config.can_ask),
            self._spawn,
            on_report=self._on_report,
            on_lost=self._on_replica_lost,
            on_ready=self._on_replica_ready,
            is_needed=self._is_needed,
            count_loss=replica_lost,
        )

    # -- life of the orchestrator

    async def start(self, expected: Mapping[Phase, int], timeout_s: float) -> None:
        """Waits until every pool has its expected replicas ready, and all present ones are. Raises TimeoutError."""
        await self._membership.start(expected, timeout_s)

    async def close(self) -> None:
        self._closed = True
        for sequence in self._sequences.values():
            _cancel_deadline(sequence)
        await self._membership.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def use(self, policy: Policy, shadow: Policy | None) -> None:
        """From the next placement on these decide; what has been placed stays where it is."""
        self._policy, self._shadow = policy, shadow

    # -- requests

    def new_group(
        self,
        receipt_id: str,
        num_choices: int,
        received_s: float | None = None,
        hints: Hints | None = None,
        trace: TraceContext | None = None,
    ) -> Group:
        """`received_s` is when the prompt's HTTP request arrived, on the orchestrator's clock."""
        received_s = self._clock() if received_s is None else received_s
        return Group(receipt_id, num_choices, received_s, hints or Hints(), trace)

    def await_response(self, group: Group) -> None:
        """`response_over` will be told of this group."""
        group.awaits_response = True

    def response_over(self, group: Group, tool: str | None) -> None:
        """The client has its answer, or has left; `tool`: what the answer has called."""
        group.awaits_response, group.tool = False, tool
        if group.receipt is not None and self._has_ended(group):
            self._end_turn(group)

    def refused(self, group: Group) -> None:
        """Its prompt was refused, and is not added."""
        self._sessions.refused(group.hints, self._clock())

    def add(self, request: SequenceRequest, group: Group) -> None:
        """Places a sequence and sets it going. Raises PlacementRejected; then nothing has been reserved."""
        arrived_s = self._clock()
        limit = self._config.max_in_flight_requests
        # All choices of a prompt are taken, or none.
        if not group.sequences and len(self._sequences) + group.num_choices > limit:
            self.refused(group)
            reason = f"this gateway already holds {limit} sequences"
            raise PlacementRejected(Rejection(503, reason, 1, Cause.GATEWAY_FULL))
        if group.placement is None:
            self._place_group(request, group, arrived_s)
        assert group.placement is not None
        state = SequenceState(
            request.request_id,
            group.placement.prefill,
            group.placement.decode,
            leads=not group.sequences,
            resumable=request.resumable,
            ask=None if group.sequences else group.placement.ask,
        )
        sequence = Sequence(request, group, state, History(len(request.prompt_token_ids), arrived_s))
        if state.leads and group.receipt is not None and group.receipt.predicted is not None:
            sequence.read_s = group.receipt.predicted.read_s
            snapshot, num_tokens = group.receipt.snapshot, group.receipt.request.num_prompt_tokens
            sequence.asked_tokens = snapshot.askable_tokens(state.ask, num_tokens)
        group.sequences.append(sequence)
        self._sequences[request.request_id] = self._by_engine_id[request.request_id] = sequence
        self.cluster.sent(state.decode, request.request_id, len(request.prompt_token_ids))
        self._advance(sequence, lifecycle.Start())
        if not state.leads and group.leader_started:
            self._advance(sequence, lifecycle.LeaderStarted())

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """Stops sequences wherever they are; unknown ids are ignored. STOP: the front end has all the text it needs."""
        for request_id in request_ids:
            if sequence := self._sequences.get(request_id):
                sequence.history.finish_reason = reason
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

    def waiting(self) -> Iterator[Waiting]:
        now_s = self._clock()
        for sequence in self._sequences.values():
            if sequence.state.leads and sequence.history.first_token_s is None:
                yield Waiting(sequence.group.hints, max(now_s - sequence.group.received_s, 0.0))

    @property
    def learnt(self) -> Learnt:
        return Learnt(self.cluster.costs, self._sessions.pauses.calibration, len(self._sessions))

    @property
    def demand(self) -> Demand:
        """What the requests of this gateway ask of the pools."""
        return self._demand.demand(self._clock(), self.cluster.costs, self.cluster.own_views(Phase.DECODE))

    # -- placements

    def _place_group(self, request: SequenceRequest, group: Group, arrived_s: float) -> None:
        began_s = self._clock()
        arrival = self._sessions.arrives(
            group.hints, request.prompt_token_ids, self.cluster.block_size_tokens, request.cache_salt, began_s
        )
        group.session = arrival.name
        try:
            self._place_turn(request, group, arrival, began_s, arrived_s)
        except BaseException:
            self._sessions.dropped(arrival.name, self._clock())
            raise

    def _place_turn(
        self, request: SequenceRequest, group: Group, arrival: Arrival, began_s: float, arrived_s: float
    ) -> None:
        view = RequestView(
            request_id=group.receipt_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            num_choices=group.num_choices,
            needs_whole_prompt=request.needs_whole_prompt,
            prefill_writes=request.resumable and group.num_choices == 1,
            hints=group.hints,
            waited_s=max(arrived_s - group.received_s, 0.0),
            number=self._num_placed,
            session=arrival.view,
        )
        snapshot, seed = self.cluster.snapshot(arrival.hashes), self._new_seed()
        placement = place(self._policy, view, snapshot, seed)
        if isinstance(placement, Rejection):
            raise PlacementRejected(placement)
        self._num_placed += 1
        admission = admit(view, placement, snapshot, self._config.admission)
        prediction = predict(view, placement, snapshot)
        group.decide_s = self._clock() - began_s
        self._demand.asked(
            began_s,
            prediction.read_s,
            placement.prefill is None,
            prediction.output_tokens * view.num_choices,
            view.num_prompt_tokens,
        )
        if isinstance(admission, Rejection):
            raise PlacementRejected(admission)
        self._sessions.placed(arrival.name, placement)
        # From now on: a client that takes its time to send a request must not come before those that have waited here.
        usual_s = self._config.admission.ttft_deadline_s
        group.rank_ms = self._config.rank(view, self._wall_clock(), prediction.read_s, usual_s)
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
            shadow=self._shadow_placement(view, snapshot, seed),
            predicted=prediction,
            rank_ms=group.rank_ms,
            trace=group.trace,
        )
        self.receipts.put(group.receipt)

    def _shadow_placement(self, view: RequestView, snapshot: ClusterSnapshot, seed: int) -> Placement | None:
        """What the shadow policy would have decided. Whatever becomes of it, the request goes on."""
        if self._shadow is None:
            return None
        try:
            placement = place(self._shadow, view, snapshot, seed)
        except Exception:
            log.exception("the shadow policy failed on %s", view.request_id)
            return None
        return placement if isinstance(placement, Placement) else None

    def _place_again(self, sequence: Sequence) -> bool:
        """Places a displaced sequence, on replicas that have not failed it if there are any; whether it could."""
        request, group = sequence.request, sequence.group
        if not self.cluster.pool(Phase.DECODE, ready_only=True):
            return False
        session = group.session
        carried = sequence.carried
        prompt_token_ids = request.prompt_token_ids + carried.tolist()
        view = RequestView(
            request_id=request.request_id,
            num_prompt_tokens=len(prompt_token_ids),
            max_tokens=request.max_tokens - len(carried),
            needs_whole_prompt=request.needs_whole_prompt,
            prefill_writes=sequence.prefill_writes,
            hints=group.hints,
            number=self._num_placed,
            session=self._sessions.view(session),
        )
        hashes: list[bytes] = []
        if block_size_tokens := self.cluster.block_size_tokens:
            hashes = self._sessions.hashes(session, prompt_token_ids, block_size_tokens, request.cache_salt)
        everyone = self.cluster.snapshot(hashes)
        for snapshot in (everyone.without(sequence.state.lost), everyone):
            seed = self._new_seed()
            placement = place(self._policy, view, snapshot, seed)
            if isinstance(placement, Placement):
                self._num_placed += 1
                if sequence.state.leads:
                    self._sessions.placed(session, placement)
                sequence.read_s = predict(view, placement, snapshot).read_s
                sequence.asked_tokens = snapshot.askable_tokens(placement.ask, view.num_prompt_tokens)
                self._note(group, Decision(request.request_id, seed, view, snapshot, placement))
                del self._displaced[request.request_id]
                _cancel_deadline(sequence)
                sequence.history.attempts.append(Attempt())
                self._advance(sequence, lifecycle.Placed(placement.prefill, placement.decode, placement.ask))
                return True
        return False

    def _note(self, group: Group, decision: Decision) -> None:
        assert group.receipt is not None
        group.receipt = dataclasses.replace(group.receipt, later=(*group.receipt.later, decision))
        self.receipts.put(group.receipt)

    def _place_displaced(self) -> None:
        for sequence in list(self._displaced.values()):
            self._place_again(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        reason = f"no replica could take it within {self._config.recovery_timeout_s:.0f} s after a fault"
        self._advance(sequence, lifecycle.Unplaceable(reason))

    # -- events

    def _advance(self, sequence: Sequence, event: lifecycle.Event) -> None:
        before = sequence.state
        sequence.state, actions = lifecycle.advance(before, event)
        if sequence.state is not before or actions:
            with logs.about(sequence.group.receipt_id):
                self._follow(sequence, before, actions)

    def _follow(self, sequence: Sequence, before: SequenceState, actions: tuple[lifecycle.Action, ...]) -> None:
        """Does what a transition asks for."""
        if num_faults := len(sequence.state.faults) - len(before.faults):
            sequence.history.faults_s += [self._clock()] * num_faults
        if sequence.state.engine_request_id != before.engine_request_id:
            self._by_engine_id[sequence.state.engine_request_id] = sequence
            self.cluster.sent(sequence.state.decode, sequence.state.engine_request_id, self._num_tokens(sequence))
        if before.stage is Stage.ASKING and sequence.state.stage is not Stage.ASKING and before.ask is not None:
            self._asking.pop(before.ask_request_id, None)
            self.cluster.ended(before.ask, before.ask_request_id)
        for action in actions:
            self._perform(sequence, action)
        if sequence.state.stage not in (Stage.ASKING, Stage.PREFILLING, Stage.PLACING):
            _cancel_deadline(sequence)
        if before.stage is not Stage.DONE and sequence.state.stage is Stage.DONE:
            self._finish(sequence)

    def _perform(self, sequence: Sequence, action: lifecycle.Action) -> None:
        engine_id = sequence.state.engine_request_id
        match action:
            case lifecycle.SubmitAsk(replica_id):
                ask = self._ask_request(sequence)
                self._asking[ask.request_id] = sequence
                self.cluster.sent(replica_id, ask.request_id, len(ask.prompt_token_ids))
                if sequence.state.prefill is not None:
                    self.cluster.sent(sequence.state.prefill, engine_id, self._num_tokens(sequence), sequence.read_s)
                self._set_deadline(sequence, self._config.ask_timeout_s, self._advance, lifecycle.Deadline())
                self._spawn(self._submit(sequence, replica_id, ask))
            case lifecycle.SubmitPrefill(replica_id, source):
                self.cluster.sent(replica_id, engine_id, self._num_tokens(sequence), sequence.read_s)
                self._set_deadline(sequence, self._config.handoff_timeout_s, self._advance, lifecycle.Deadline())
                sequence.attempt.source = source
                if source is not None:
                    self._unsent.add(source)
                self._spawn(self._submit(sequence, replica_id, self._engine_request(sequence, Phase.PREFILL, source)))
            case lifecycle.SubmitDecode(replica_id, handoff):
                if sequence.state.prefill is not None:
                    self.cluster.ended(sequence.state.prefill, engine_id)
                self.cluster.queued(replica_id, engine_id, 0.0 if handoff else sequence.read_s)
                attempt = sequence.attempt
                attempt.handoff_blocks = handoff.num_blocks if handoff else 0
                attempt.num_told_tokens = len(sequence.carried)
                if handoff is not None:
                    self._unsent.add(handoff)
                self._spawn(self._submit(sequence, replica_id, self._engine_request(sequence, Phase.DECODE, handoff)))
            case lifecycle.AbortAsk(replica_id):
                self._abort(replica_id, sequence.state.ask_request_id)
            case lifecycle.AbortOn(replica_id):
                self.cluster.ended(replica_id, engine_id)
                self._abort(replica_id, engine_id)
            case lifecycle.Release(handoff):
                # One that waits to be sent is given back by its submission, which finds that it has come too late.
                if handoff not in self._unsent:
                    self._spawn(self._release(handoff, Phase.DECODE))
            case lifecycle.ReleaseSource(source):
                if source not in self._unsent:
                    self._spawn(self._release(source, Phase.PREFILL))
            case lifecycle.Place():
                self._leave_placement(sequence)
                self._displaced[sequence.request.request_id] = sequence
                _cancel_deadline(sequence)
                log.warning("request %s is placed again: %s", sequence.request.request_id, sequence.state.faults[-1])
                pause_s = PLACE_AGAIN_PAUSE_S[min(sequence.state.num_placements, len(PLACE_AGAIN_PAUSE_S)) - 1]
                self._set_deadline(sequence, pause_s, self._place_if_displaced)
            case lifecycle.Fail(error):
                log.error("request %s failed: %s", sequence.request.request_id, error)
                sequence.history.finish_reason = FinishReason.ERROR
                self._batches.put_nowait([TokenDelta(sequence.request.request_id, [], FinishReason.ERROR, error=error)])

    def _abort(self, replica_id: str, engine_request_id: str) -> None:
        if (replica_id, engine_request_id) in self._submitting:
            self._abort_after_submit.add((replica_id, engine_request_id))
        else:
            self._spawn(self._abort_on(replica_id, engine_request_id))

    def _place_if_displaced(self, sequence: Sequence) -> None:
        if self._closed or sequence.request.request_id not in self._displaced or self._place_again(sequence):
            return
        self._set_deadline(sequence, self._config.recovery_timeout_s, self._give_up)

    def _leave_placement(self, sequence: Sequence) -> None:
        """Ends what the present attempt has reserved."""
        engine_id = sequence.state.engine_request_id
        self._by_engine_id.pop(engine_id, None)
        for replica_id in (sequence.state.prefill, sequence.state.decode):
            if replica_id is not None:
                self.cluster.ended(replica_id, engine_id)

    def _finish(self, sequence: Sequence) -> None:
        request_id, group = sequence.request.request_id, sequence.group
        self._sequences.pop(request_id, None)
        self._displaced.pop(request_id, None)
        self._leave_placement(sequence)
        if sequence.state.leads:
            self._start_others(group)
        if self._has_ended(group):
            assert group.receipt is not None
            receipt = dataclasses.replace(group.receipt, outcome=self._outcome(group))
            if receipt.outcome.status == "finished":
                self.cluster.answered(receipt.outcome.output_tokens // len(group.sequences))
                self._measure(receipt)
            group.receipt = receipt
            self.receipts.put(receipt)
            try:
                if not group.awaits_response:
                    self._end_turn(group)
                self._on_closed(receipt)
            except Exception:
                # What is only told of a request must not cost the replica whose report has ended it.
                log.exception("the end of %s could not be told", receipt.request_id)
        self._membership.let_go_of_leavers()

    def _measure(self, receipt: Receipt) -> None:
        """Whether a turn was in time."""
        outcome = receipt.outcome
        if outcome.ttft_ms is None:
            return
        costs = self.cluster.costs
        read = (costs.prefill if self.cluster.expects_prefill else costs.decode).read
        cold_read_s = read.seconds(outcome.prompt_tokens, outcome.prompt_tokens)
        self._demand.ended(self._clock(), outcome.ttft_ms / 1000, cold_read_s, receipt.tpot_s or 0.0)

    @staticmethod
    def _has_ended(group: Group) -> bool:
        return bool(group.sequences) and all(sequence.state.stage is Stage.DONE for sequence in group.sequences)

    def _end_turn(self, group: Group) -> None:
        assert group.receipt is not None
        outcome = group.receipt.outcome
        times = outcome.times_ms
        service_ms = (times.prefill_compute or 0.0) + (times.decode_compute or 0.0) + (times.decode or 0.0)
        written = group.sequences[0].written
        is_whole = outcome.status == "finished"
        self._sessions.ended(group.session, self._clock(), written, service_ms / 1000, group.tool, is_whole=is_whole)

    def _start_others(self, group: Group) -> None:
        if group.leader_started:
            return
        group.leader_started = True
        for sequence in group.sequences[1:]:
            self._advance(sequence, lifecycle.LeaderStarted())

    def _on_report(self, report: WorkerReport) -> None:
        batch: list[TokenDelta] = []
        for delta in report.deltas:
            sequence = self._by_engine_id.get(delta.request_id)
            if report.phase is Phase.PREFILL:
                told = self._on_prefill_delta(report.replica_id, sequence, delta)
            elif delta.handoff is not None or delta.request_id in self._asking:
                self._on_ask_delta(report.replica_id, delta)
                continue
            elif sequence is not None and sequence.state.stage is Stage.DECODING:
                told = self._on_decode_delta(sequence, delta)
            else:
                continue
            if told is not None:
                batch.append(told)
        if batch:
            self._batches.put_nowait(batch)

    def _on_ask_delta(self, replica_id: str, delta: TokenDelta) -> None:
        if delta.finish_reason is None:
            return
        sequence = self._asking.get(delta.request_id)
        if sequence is None or sequence.state.ask != replica_id:
            # It came too late: nobody is going to fetch it.
            if delta.handoff is not None and not self._membership.is_probe(delta.request_id):
                self._spawn(self._release(delta.handoff, Phase.PREFILL))
            return
        sequence.attempt.ask_facts = delta.prefill
        self._advance(sequence, lifecycle.AskFinished(delta.handoff, delta.error))

    def _on_prefill_delta(self, replica_id: str, sequence: Sequence | None, delta: TokenDelta) -> TokenDelta | None:
        """What the client gets of it: the next token, if prefill writes it."""
        if delta.finish_reason is None:
            return None
        if sequence is None or sequence.state.prefill != replica_id:
            # The attempt ended while its prefill was finishing: give the blocks back now, not when the lease ends.
            if delta.handoff is not None and not self._membership.is_probe(delta.request_id):
                self._spawn(self._release(delta.handoff, Phase.DECODE))
            return None
        self.cluster.ended(replica_id, delta.request_id)
        sequence.attempt.prefill_facts, sequence.attempt.prefill_times = delta.prefill, delta.times
        sequence.attempt.prefill = replica_id
        source, pull_failed = sequence.attempt.source, False
        if source is not None and delta.prefill is not None:
            pull_failed = not has_fetched(source, delta.prefill)
        told: TokenDelta | None = None
        if sequence.prefill_writes and sequence.state.stage is Stage.PREFILLING and delta.error is None:
            told = self._token_of_prefill(sequence, delta)
        answered = told is not None and told.finish_reason is not None
        finished = lifecycle.PrefillFinished(delta.handoff, delta.error, told is not None, answered, pull_failed)
        self._advance(sequence, finished)
        if source is not None:
            self._membership.let_go_of_leavers()
        return told

    def _token_of_prefill(self, sequence: Sequence, delta: TokenDelta) -> TokenDelta | None:
        """The next token as prefill has written it. LENGTH means prefill's one token, not yet the client's limit."""
        if len(delta.token_ids) != 1:
            return None
        finish = delta.finish_reason
        if finish is FinishReason.LENGTH and sequence.request.max_tokens > len(sequence.written) + 1:
            finish = None
        sequence.history.finish_reason = finish
        sequence.attempt.prefill_has_written = True
        self.cluster.produced(sequence.state.decode, delta.request_id, 1)
        return self._told(sequence, delta, delta.token_ids, finish)

    def _on_decode_delta(self, sequence: Sequence, delta: TokenDelta) -> TokenDelta | None:
        """What the client gets of it."""
        attempt, state = sequence.attempt, sequence.state
        if delta.finish_reason is FinishReason.ERROR:
            self._advance(sequence, lifecycle.DecodeFailed(delta.error or "no reason given"))
            return None
        self.cluster.produced(state.decode, delta.request_id, len(delta.token_ids))
        if delta.prefill is not None and attempt.decode_facts is None:
            attempt.decode_facts, attempt.decode_times = delta.prefill, delta.times
            attempt.decode = state.decode
            replica = self.cluster.get(state.decode)
            if replica and replica.info:
                attempt.blocks_moved = blocks_moved(
                    attempt.handoff_blocks, delta.prefill, replica.info.block_size_tokens
                )
            if attempt.handoff_blocks and delta.prefill.num_computed_tokens > 1:
                self._advance(sequence, lifecycle.PullFailed())
        new = _new_tokens(sequence, delta)
        if new is None:
            self._advance(sequence, lifecycle.Mismatch())
            return None
        if delta.finish_reason is not None:
            sequence.history.finish_reason = delta.finish_reason
        is_news = bool(new) or delta.finish_reason is not None or not delta.token_ids
        told = self._told(sequence, delta, new, delta.finish_reason) if is_news else None
        self._advance(sequence, lifecycle.Delta(delta.finish_reason is not None, has_written=bool(delta.token_ids)))
        if delta.prefill is not None:
            self._membership.let_go_of_leavers()
        return told

    def _told(
        self, sequence: Sequence, delta: TokenDelta, new: list[int], finish_reason: FinishReason | None
    ) -> TokenDelta:
        """The delta as the client gets it: only `new` of its tokens, and once the facts of the whole placement."""
        history, num_known = sequence.history, len(delta.token_ids) - len(new)
        sequence.written.extend(new)
        history.output_tokens += len(new)
        facts = None
        if history.facts_told is None:
            facts = history.facts_told = facts_for_client(sequence.attempt, sequence.group.sequences[0].attempt)
        if history.first_token_s is None and new:
            history.first_token_s, history.first = self._clock(), sequence.attempt
            if sequence.state.leads:
                self._start_others(sequence.group)
        logprobs = delta.logprobs
        if logprobs is not None and num_known:
            logprobs = self._config.drop_logprobs(logprobs, num_known)
        return msgspec.structs.replace(
            delta,
            request_id=sequence.request.request_id,
            token_ids=new,
            finish_reason=finish_reason,
            logprobs=logprobs,
            prefill=facts,
            handoff=None,
        )

    def _outcome(self, group: Group) -> Outcome:
        leader = group.sequences[0]
        replica = self.cluster.get(leader.state.decode)
        return outcome(
            [sequence.history for sequence in group.sequences],
            [fault for sequence in group.sequences for fault in sequence.state.faults],
            GroupTimes(group.received_s, group.decide_s, self._clock()),
            self.cluster.block_size_tokens,
            replica.info.kv_block_bytes if replica and replica.info else 0,
        )

    def _on_replica_lost(self, replica_id: str, is_dead: bool) -> None:
        for sequence in list(self._sequences.values()):
            if replica_id in (sequence.state.prefill, sequence.state.decode, sequence.state.ask):
                self._advance(sequence, lifecycle.ReplicaLost(replica_id, is_dead))

    def _on_replica_ready(self) -> None:
        self._place_displaced()
        unreleased, self._unreleased = self._unreleased, []
        for handoff, through_pool in unreleased:
            self._spawn(self._release(handoff, through_pool))

    def _is_needed(self, replica: Replica) -> bool:
        """Whether a request runs on a replica, or another one may still be fetching a hand-off from it."""
        states = (sequence.state for sequence in self._sequences.values())
        handoffs = (handoff for state in states for handoff in (state.handoff, state.source))
        return bool(replica.in_flight) or any(h and h.source_replica == replica.replica_id for h in handoffs)

    # -- calls to workers

    @staticmethod
    def _num_tokens(sequence: Sequence) -> int:
        """What the present attempt starts from."""
        return len(sequence.request.prompt_token_ids) + len(sequence.carried)

    @staticmethod
    def _engine_request(sequence: Sequence, phase: Phase, handoff: KVHandoff | None) -> EngineRequest:
        request = sequence.request
        carried = sequence.carried.tolist()
        samples = phase is Phase.DECODE or sequence.prefill_writes
        return EngineRequest(
            request_id=sequence.state.engine_request_id,
            phase=phase,
            prompt_token_ids=request.prompt_token_ids + carried,
            max_tokens=request.max_tokens - len(carried) if phase is Phase.DECODE else 1,
            sampling=request.sampling if samples else b"",
            handoff=handoff,
            cache_salt=request.cache_salt,
            priority=sequence.group.rank_ms,
            trace_headers=_trace_headers(sequence),
            num_written_tokens=len(carried),
        )

    @staticmethod
    def _ask_request(sequence: Sequence) -> EngineRequest:
        """For a hand-off of what the replica had cached of the prompt when it was placed."""
        request = sequence.request
        known = (request.prompt_token_ids + sequence.carried.tolist())[: sequence.asked_tokens]
        return EngineRequest(
            request_id=sequence.state.ask_request_id,
            phase=Phase.PREFILL,
            prompt_token_ids=known,
            max_tokens=1,
            cache_salt=request.cache_salt,
            priority=sequence.group.rank_ms,
            trace_headers=_trace_headers(sequence),
        )

    async def _submit(self, sequence: Sequence, replica_id: str, request: EngineRequest) -> None:
        if request.handoff is not None:
            self._unsent.discard(request.handoff)
        if not self._is_current(sequence, request):
            # It ended before this task ran: nothing was sent, but a hand-off still has to be given back.
            if request.handoff is not None:
                await self._release(request.handoff, request.phase)
            return
        key = replica_id, request.request_id
        self._submitting.add(key)
        error: ReplicaGoneError | InvalidEngineRequestError | None = None
        try:
            await self._transport.submit(replica_id, request)
        except (ReplicaGoneError, InvalidEngineRequestError) as caught:
            error = caught
        self._submitting.discard(key)
        refused = isinstance(error, InvalidEngineRequestError)
        if error is not None and self._is_current(sequence, request):
            is_dead = isinstance(error, ReplicaGoneError) and error.is_dead
            self._advance(sequence, lifecycle.SubmitFailed(replica_id, str(error), refused, is_dead))
        abort = key in self._abort_after_submit
        self._abort_after_submit.discard(key)
        if refused:
            if request.handoff is not None:
                # Only the replica that refused knows that it does not fetch the blocks. One that is gone may have
                # begun to, and blocks must not be freed under a pull: then their lease ends.
                await self._release(request.handoff, request.phase, through=replica_id)
        elif error is not None or abort:
            await self._abort_on(replica_id, request.request_id)

    @staticmethod
    def _is_current(sequence: Sequence, request: EngineRequest) -> bool:
        """Whether this is what the present attempt has asked for."""
        state = sequence.state
        if state.stage is Stage.ASKING:
            return state.ask_request_id == request.request_id
        return state.stage in (Stage.PREFILLING, Stage.DECODING) and state.engine_request_id == request.request_id

    async def _abort_on(self, replica_id: str, engine_request_id: str) -> None:
        try:
            await self._transport.abort(replica_id, [engine_request_id])
        except ReplicaGoneError as error:
            log.warning("could not abort %s on %s: %s", engine_request_id, replica_id, error)

    async def _release(self, handoff: KVHandoff, through_pool: Phase, through: str | None = None) -> None:
        """Gives a hand-off back through the first replica that can of the pool that it was for, or through one and no
        other. While none can it waits for the next one that is ready, but not beyond its lease."""
        source = self.cluster.get(handoff.source_replica)
        for replica in self.cluster.pool(through_pool):
            if not replica.attached or through not in (None, replica.replica_id):
                continue
            if source and source.attached and not source.hands_over_to(replica):
                continue
            try:
                await self._transport.release(replica.replica_id, f"release-{handoff.source_request_id}", handoff)
                return
            except (ReplicaGoneError, InvalidEngineRequestError) as error:
                log.warning("could not release a hand-off through %s: %s", replica.replica_id, error)
        if through is None and self._wall_clock() < handoff.expires_s:
            log.warning(
                "no %s replica can release %s now; the next one that is ready is to",
                through_pool,
                handoff.source_request_id,
            )
            now_s = self._wall_clock()
            kept = [one for one in self._unreleased if one[0].expires_s > now_s]
            self._unreleased = [*kept, (handoff, through_pool)]
        else:
            log.error("%s could not be released; its blocks stay until the lease ends", handoff.source_request_id)

    # -- tasks and timers

    def _set_deadline(self, sequence: Sequence, delay_s: float, callback: Callable[..., None], *more: Any) -> None:
        _cancel_deadline(sequence)
        sequence.deadline = asyncio.get_running_loop().call_later(delay_s, callback, sequence, *more)

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


def _trace_headers(sequence: Sequence) -> dict[str, str] | None:
    trace = sequence.group.trace
    return trace.headers if trace else None


def _cancel_deadline(sequence: Sequence) -> None:
    if sequence.deadline:
        sequence.deadline.cancel()
        sequence.deadline = None


def _new_tokens(sequence: Sequence, delta: TokenDelta) -> list[int] | None:
    """Those the client does not have yet; None if the others are not what it has."""
    attempt = sequence.attempt
    begin, num_told = attempt.num_told_tokens, len(delta.token_ids)
    attempt.num_told_tokens += num_told
    num_known = len(sequence.written) - begin
    if not num_known:
        return delta.token_ids
    known = sequence.written[begin : begin + num_told].tolist()
    ends_early = delta.finish_reason is not None and num_told < num_known
    if ends_early or known != delta.token_ids[: len(known)]:
        return None
    return delta.token_ids[len(known) :]
