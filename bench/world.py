"""Owns a simulated world: pools of simulated engines, gateways, sessions that ask them, and what must hold of it all.

Workers and orchestrators are those that ship. Whatever happens is drawn from one seed and takes virtual time, so the
same seed gives the same log of events. Faults come from `bench.world_faults`.
"""

import asyncio
import hashlib
import itertools
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, field

from bench.asking import asks_when_it_can
from bench.network import Network, Node, SimulatedTransport
from bench.process import Process
from decode.worker import DecodeWorker
from engine.latency import LatencyModel
from engine.protocol import FinishReason, Phase, TokenDelta
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric, expected_answer
from gateway.lifecycle import Stage
from gateway.orchestrator import Group, Orchestrator, OrchestratorConfig, PlacementRejected, SequenceRequest
from gateway.orchestrator import Sequence as GatewaySequence
from gateway.routing.admission import AdmissionConfig
from gateway.routing.policies import least_tokens
from gateway.routing.receipts import Outcome, Receipt, ReceiptStore
from gateway.routing.types import Cause, Rejection
from gateway.transport import Members
from prefill.worker import PrefillWorker

VOCABULARY = 32_000
FIRST_TOKEN = 100
"""Below it are the tokens of warm-ups: what those leave in a cache is of no use to a prompt."""
ENGINE = SimulatedEngineConfig(
    model="simulated-model",
    max_model_len=512,
    block_size_tokens=16,
    num_kv_blocks=1536,
    max_num_seqs=128,
    max_num_batched_tokens=2048,
    seed=1,
    latency=LatencyModel(
        prefill_s_per_token=0.0003,
        prefill_fixed_s=0.3,
        decode_step_s=0.4,
        decode_s_per_request=0.0,
        handoff_fixed_s=0.2,
        handoff_s_per_block=0.005,
    ),
)
RECEIPTS = 64
START_TIMEOUT_S = 120.0
REQUEST_LIMIT_S = 300.0
"""A request that is open for so long hangs: no answer takes 45 s, no loss 25 s to be noticed."""
WHOLE_LIMIT_S = 300.0
GATEWAY_FREED_S = 2.0
"""Within so long workers free what a dead gateway has left there."""
SETTLE_S = 2.0
SWEEP_S = 10.0
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class WorldPlan:
    """What a world is made of and asked for. Answers and prompts are in tokens, pauses in seconds."""

    requests: int
    prefill: int = 4
    decode: int = 4
    gateways: int = 2
    sessions: int = 240
    turns: tuple[int, int] = (2, 7)
    first_prompt: tuple[int, int] = (8, 64)
    further_prompt: tuple[int, int] = (2, 16)
    short_answer: tuple[int, int] = (16, 56)
    long_answer: tuple[int, int] = (57, 100)
    long_share: float = 0.12
    pause_s: float = 1.0
    resumable_share: float = 0.5
    choices_share: float = 0.04
    leaving_share: float = 0.04
    kinds: frozenset[str] | None = None
    """Which faults there are (`bench.world_faults.Kind`); None: all."""
    asks: bool = False
    """Whether decode is asked for what it has cached (docs/adr/0017)."""


@dataclass
class Counts:
    """What has become of the requests. `met` had a fault in their receipt; `hit` were, when a fault began, on the
    replica or at the gateway that it hit; `hit_by` says by which. `lost_with_gateway` are those of gateways that died;
    nobody could have kept them, and they are not among `requests`. `degraded` were served without a prefill replica
    because there was none. `turned_away` counts the answers 503 with Retry-After while there was no decode replica:
    the client asks again, and only what is taken is among `requests`. `unread` are report streams that workers ended
    because a gateway that hung did not read them. `leases_ended` are hand-offs whose blocks came back only when their
    lease ended. `asked` are requests whose prefill has fetched from decode."""

    requests: int = 0
    answered: int = 0
    left: int = 0
    further_turns: int = 0
    sequences: int = 0
    deltas: int = 0
    report_messages: int = 0
    met: int = 0
    hit: int = 0
    touched: int = 0
    lost_with_gateway: int = 0
    degraded: int = 0
    turned_away: int = 0
    unread: int = 0
    rejected: int = 0
    wrong: int = 0
    failed: int = 0
    duplicated: int = 0
    hung: int = 0
    left_behind: int = 0
    leases_ended: int = 0
    asked: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict[str, int])
    hit_by: dict[str, int] = field(default_factory=dict[str, int])
    fault_kinds: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def bad(self) -> int:
        return self.wrong + self.failed + self.duplicated + self.hung + self.left_behind + self.rejected


@dataclass(frozen=True)
class WorldResult:
    """`problems` are the first few in words, each with its virtual time; `digest` is of the whole log of events."""

    seed: int
    counts: Counts
    digest: str
    problems: tuple[str, ...]


@dataclass(eq=False, slots=True)
class Session:
    """A conversation: each turn's prompt is everything before it and some new tokens."""

    number: int
    turns_left: int
    context: list[int]
    is_further: bool = False


@dataclass(eq=False, slots=True)
class Answer:
    """What a client has of one choice."""

    ask: "Ask"
    tokens: list[int] = field(default_factory=list[int])
    num_deltas: int = 0


@dataclass(eq=False, slots=True)
class Ask:
    """One request, with all its choices."""

    request_id: str
    session: Session
    gateway: "Gateway"
    group: Group
    prompt: list[int]
    length: int
    asked_s: float
    resumable: bool
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    num_ended: int = 0
    has_left: bool = False
    is_hit: bool = False
    is_degraded: bool = False
    outcome: Outcome | None = None

    @property
    def open_sequences(self) -> Iterator[GatewaySequence]:
        return (s for s in self.group.sequences if s.state.stage is not Stage.DONE)


class Gateway:
    """A real orchestrator and the clients that have asked it. All of it runs in `process`, also what its clients do:
    while that hangs, what they send waits in its sockets."""

    def __init__(self, gateway_id: str, world: "World"):
        self.gateway_id = gateway_id
        self.process = Process()
        self.transport = SimulatedTransport(gateway_id, world.network, self.process)
        self.asks: dict[str, Ask] = {}
        self.answers: dict[str, Answer] = {}
        self.is_started = False
        self._world = world
        self._left: dict[str, None] = {}
        draw = random.Random(f"{world.seed}:{gateway_id}")
        self.orchestrator = Orchestrator(
            self.transport,
            asks_when_it_can if world.plan.asks else least_tokens,
            ReceiptStore(RECEIPTS),
            OrchestratorConfig(
                handoff_timeout_s=20.0,
                max_in_flight_requests=100_000,
                warm_up_sampling=b"warm-up",
                has_prefill_pool=True,
                can_ask=world.plan.asks,
                report_timeout_s=5.0,
                engine_timeout_s=20.0,
                recovery_timeout_s=120.0,
                admission=AdmissionConfig(ttft_deadline_s=3600.0),
            ),
            closed=self._on_closed,
            clock=world.network.loop.time,
            wall_clock=world.network.loop.time,
            new_seed=lambda: draw.getrandbits(32),
        )
        self._reader = self.process.spawn(self._read())

    async def start(self, expected: dict[Phase, int]) -> None:
        """Raises TimeoutError."""
        await self.process.spawn(self.orchestrator.start(expected, START_TIMEOUT_S))
        self.is_started = True

    async def end(self) -> None:
        """Ends it in the middle of whatever it does."""
        self.is_started = False
        self._world.counts.unread += self.transport.num_unread
        await self.orchestrator.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    def is_whole(self, members: Members) -> bool:
        """Whether it knows these replicas and no others, and all are ready."""
        replicas = [replica for phase in Phase for replica in self.orchestrator.cluster.pool(phase)]
        ids = {replica.replica_id for replica in replicas}
        return self.is_started and ids == members.keys() and all(r.ready for r in replicas)

    def leave(self, ask: Ask, reason: FinishReason) -> None:
        """The client of a request leaves, or has all it needs (STOP)."""
        ask.has_left = True
        self._left.update(dict.fromkeys(ask.answers))
        self.orchestrator.abort(list(ask.answers), reason)

    def _on_closed(self, receipt: Receipt) -> None:
        ask = self.asks.get(receipt.request_id)
        if ask is None or ask.outcome is not None:
            self._world.problem("duplicated", f"the receipt of {receipt.request_id} was closed twice")
            return
        ask.outcome = receipt.outcome
        placements = (receipt.placement, *(decision.placement for decision in receipt.later))
        ask.is_degraded = any(placement.degraded for placement in placements)
        if ask.has_left or not self._is_waited_for(ask):
            self._world.ended(ask)

    def _is_waited_for(self, ask: Ask) -> bool:
        return ask.num_ended < len(ask.answers)

    async def _read(self) -> None:
        while True:
            for delta in await self.orchestrator.next_deltas():
                self._take(delta)

    def _take(self, delta: TokenDelta) -> None:
        answer = self.answers.get(delta.request_id)
        if answer is None:
            if delta.request_id not in self._left:
                self._world.problem("duplicated", f"{delta.request_id} was told something after its end")
            return
        answer.tokens += delta.token_ids
        answer.num_deltas += 1
        if delta.finish_reason is None:
            return
        del self.answers[delta.request_id]
        ask, world = answer.ask, self._world
        if delta.finish_reason is not FinishReason.LENGTH:
            world.problem("failed", f"{delta.request_id} ended with {delta.finish_reason}: {delta.error}")
        elif answer.tokens != expected_answer(ENGINE, ask.prompt, ask.length):
            world.problem("wrong", f"{delta.request_id} was answered wrongly: {len(answer.tokens)} of {ask.length}")
        ask.num_ended += 1
        if not self._is_waited_for(ask) and ask.outcome is not None and not ask.has_left:
            world.ended(ask)

    def forget(self, ask: Ask) -> None:
        del self.asks[ask.request_id]
        for sequence_id in ask.answers:
            self.answers.pop(sequence_id, None)


class World:
    """Everything of one seed. `run` it once, on a loop of virtual time."""

    def __init__(self, plan: WorldPlan, seed: int):
        self.plan = plan
        self.seed = seed
        self.counts = Counts()
        self.network = Network(random.Random(f"{seed}:network"))
        self.gateways: list[Gateway] = []
        self.is_stopping = False
        self._loop = self.network.loop
        self._load_draw = random.Random(f"{seed}:load")
        self._fabric = SimulatedFabric()
        self._numbers = {phase: itertools.count() for phase in Phase}
        self._gateway_numbers = itertools.count()
        self._request_numbers = itertools.count()
        self._session_numbers = itertools.count()
        self._kinds: Counter[str] = Counter()
        self._digest = hashlib.blake2b(digest_size=16)
        self._problems: list[str] = []
        self._num_asking = 0
        self._ended = asyncio.Event()
        self._context = Context()
        self._outages_end_s: dict[tuple[Gateway, Phase], float] = {}

    # -- what faults are made of

    @property
    def nodes(self) -> list[Node]:
        """The members of both pools."""
        return [node for node in self.network.nodes.values() if node.is_member]

    def new_node(self, phase: Phase) -> Node:
        replica_id = f"{phase}-{next(self._numbers[phase])}"
        engine = SimulatedEngine(replica_id, ENGINE, self._fabric)
        worker = (PrefillWorker if phase is Phase.PREFILL else DecodeWorker)(replica_id, engine)
        node = Node(replica_id, phase, engine, worker)
        self.network.add(node)
        self.log("joins", replica_id)
        return node

    async def new_gateway(self) -> None:
        gateway = Gateway(f"gateway-{next(self._gateway_numbers)}", self)
        self.gateways.append(gateway)
        await gateway.start({Phase.PREFILL: self.plan.prefill, Phase.DECODE: self.plan.decode})
        self.log("serves", gateway.gateway_id)

    async def gateway_dies(self, gateway: Gateway, noticed_after_s: float) -> None:
        """Its requests are gone with it. Workers free what it has left there, or that is a problem."""
        gateway.transport.detach_delay_s = noticed_after_s
        self.gateways.remove(gateway)
        await gateway.end()
        for ask in list(gateway.asks.values()):
            self.counts.requests -= 1
            self.counts.lost_with_gateway += 1
            gateway.forget(ask)
            self._over(ask.session, goes_on=False)
        await asyncio.sleep(GATEWAY_FREED_S)
        for survivor in self.gateways:
            for replica in (r for phase in Phase for r in survivor.orchestrator.cluster.pool(phase)):
                if self.plan.gateways == 2 and replica.others_in_flight.num_requests:
                    self.problem("left_behind", f"{replica.replica_id} holds requests of {gateway.gateway_id}")

    def sequences(self) -> Iterator[tuple[Ask, GatewaySequence]]:
        """All that are open."""
        for gateway in self.gateways:
            for ask in gateway.asks.values():
                for sequence in ask.open_sequences:
                    yield ask, sequence

    def hits(self, kind: str, nodes: Sequence[Node], gateway: Gateway | None = None) -> None:
        """Notes that a fault begins on some replicas, for one gateway or for all."""
        ids = {node.replica_id for node in nodes}
        hit: dict[Ask, None] = {}
        for ask, sequence in self.sequences():
            state = sequence.state
            reads = state.stage in (Stage.ASKING, Stage.PREFILLING)
            holds = state.prefill in ids and (reads or state.handoff is not None)
            is_asked = state.ask in ids and (state.stage is Stage.ASKING or state.source is not None)
            if (state.decode in ids or holds or is_asked) and gateway in (None, ask.gateway):
                hit[ask] = None
        self.begins(kind, [node.replica_id for node in nodes], list(hit))

    def begins(self, kind: str, where: Sequence[str], hit: Sequence[Ask] = ()) -> None:
        """Notes that a fault begins, and on which requests."""
        for ask in hit:
            ask.is_hit = True
        self.counts.faults[kind] = self.counts.faults.get(kind, 0) + 1
        self.counts.hit_by[kind] = self.counts.hit_by.get(kind, 0) + len(hit)
        self.log("fault", kind, *where, len(hit))

    def outage_begins(self, gateways: Sequence[Gateway], *phases: Phase) -> None:
        """Some gateways have no replica of a phase. Until the outage ends it is right to be turned away (decode), or to
        be served degraded (prefill); the latter also later for those that were asked before."""
        for gateway in gateways:
            self._outages_end_s.update(dict.fromkeys(((gateway, phase) for phase in phases), math.inf))

    def outages_end(self) -> None:
        for outage, end_s in self._outages_end_s.items():
            self._outages_end_s[outage] = min(end_s, self._loop.time())

    def is_whole(self) -> bool:
        """Whether every replica and gateway there should be is there and ready, and no others are."""
        members = dict(self.network.members)
        num_wanted = self.plan.prefill + self.plan.decode
        return (
            len(members) == num_wanted
            and len(self.gateways) == self.plan.gateways
            and all(gateway.is_whole(members) for gateway in self.gateways)
        )

    async def until_whole(self) -> None:
        """Raises TimeoutError when it does not become whole."""
        async with asyncio.timeout(WHOLE_LIMIT_S):
            while not self.is_whole():  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(0.25)

    async def ends(self, node: Node) -> None:
        """The worker's process ends, and with it whatever is left on it."""
        self.counts.leases_ended += node.engine.load.kv_leases_expired_total
        await node.worker.shutdown()

    # -- what is known of it

    def log(self, *event: object) -> None:
        self._digest.update(repr((round(self._loop.time(), 6), *event)).encode())

    def problem(self, kind: str, words: str) -> None:
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        self.log("problem", kind, words)
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(f"seed {self.seed}, at {self._loop.time():.3f} s: {kind}: {words}")

    # -- from its beginning to its end

    async def run(self) -> WorldResult:
        from bench.world_faults import Faults

        began_cpu_s, errors = time.process_time(), _Errors(self)
        logging.getLogger("baton").addHandler(errors)
        self._loop.set_exception_handler(lambda _, context: self.problem("failed", f"unnoticed: {context}"))
        try:
            for phase, number in ((Phase.PREFILL, self.plan.prefill), (Phase.DECODE, self.plan.decode)):
                for _ in range(number):
                    self.new_node(phase)
            for _ in range(self.plan.gateways):
                await self.new_gateway()
            faults = self.network.spawn(Faults(self, random.Random(f"{self.seed}:faults")).run())
            sweep = self.network.spawn(self._sweep())
            for _ in range(self.plan.sessions):
                self._later(self._load_draw.random() * 10.0, self._new_session())
            await self._ended.wait()
            self.is_stopping = True
            await asyncio.gather(faults, return_exceptions=True)
            sweep.cancel()
            await self._check_the_end()
            await self._close()
        finally:
            logging.getLogger("baton").removeHandler(errors)
        counts = self.counts
        counts.virtual_s = self._loop.time()
        counts.cpu_s = time.process_time() - began_cpu_s
        counts.report_messages = self.network.num_reports
        counts.fault_kinds = dict(sorted(self._kinds.items()))
        return WorldResult(self.seed, counts, self._digest.hexdigest(), tuple(self._problems))

    # -- sessions

    def _new_session(self) -> Session:
        draw, plan = self._load_draw, self.plan
        return Session(next(self._session_numbers), draw.randint(*plan.turns), self._tokens(plan.first_prompt))

    def _tokens(self, length: tuple[int, int]) -> list[int]:
        return self._load_draw.choices(range(FIRST_TOKEN, VOCABULARY), k=self._load_draw.randint(*length))

    def _later(self, delay_s: float, session: Session) -> None:
        self._loop.call_later(delay_s, self._turn, session, context=self._context)

    def _turn(self, session: Session) -> None:
        if self.counts.requests >= self.plan.requests:
            if not self._num_asking:
                self._ended.set()
            return
        serving = [gateway for gateway in self.gateways if gateway.is_started]
        if not serving:
            self._later(1.0, session)
            return
        self._ask(session, self._load_draw.choice(serving))

    def _ask(self, session: Session, gateway: Gateway) -> None:
        draw, plan, counts = self._load_draw, self.plan, self.counts
        length = draw.randint(*(plan.long_answer if draw.random() < plan.long_share else plan.short_answer))
        num_choices = draw.randint(2, 3) if draw.random() < plan.choices_share else 1
        resumable = draw.random() < plan.resumable_share
        request_id = f"r{next(self._request_numbers)}"
        group = gateway.orchestrator.new_group(request_id, num_choices)
        prompt = list(session.context)
        ask = Ask(request_id, session, gateway, group, prompt, length, self._loop.time(), resumable)
        counts.requests += 1
        counts.further_turns += session.is_further
        counts.sequences += num_choices
        self._num_asking += 1
        gateway.asks[request_id] = ask
        gateway.process.call(self._arrive, ask)
        if draw.random() < plan.leaving_share:
            # Some leave at once, before anything was sent; some when the answer is complete already.
            delay_s = draw.random() * (length * 0.45 + 2.0) if draw.random() < 0.9 else 0.0
            reason = FinishReason.ABORT if draw.random() < 0.7 else FinishReason.STOP
            self._loop.call_later(delay_s, gateway.process.call, self._leave, ask, reason, context=self._context)

    def _arrive(self, ask: Ask) -> None:
        """A request reaches its gateway."""
        gateway, num_choices = ask.gateway, ask.group.num_choices
        for index in range(num_choices):
            sequence_id = f"{ask.request_id}.{index}" if num_choices > 1 else ask.request_id
            ask.answers[sequence_id] = gateway.answers[sequence_id] = Answer(ask)
            request = SequenceRequest(sequence_id, ask.prompt, ask.length, b"sampling", resumable=ask.resumable)
            try:
                gateway.orchestrator.add(request, ask.group)
            except PlacementRejected as refusal:
                gateway.forget(ask)
                self._refused(ask, refusal.rejection)
                return

    def _refused(self, ask: Ask, rejection: Rejection) -> None:
        """Rightly so only while there is no decode replica; then the client asks again when it was told to."""
        nobody = not ask.gateway.orchestrator.cluster.pool(Phase.DECODE, ready_only=True)
        is_told_when = rejection.status == 503 and rejection.retry_after_s > 0
        if not (
            self._is_outage(ask.gateway, Phase.DECODE)
            and nobody
            and is_told_when
            and rejection.cause is Cause.NO_DECODE
        ):
            self.problem("rejected", f"{ask.request_id} was refused: {rejection}")
            self._over(ask.session, goes_on=False)
            return
        counts = self.counts
        counts.turned_away += 1
        counts.requests -= 1
        counts.further_turns -= ask.session.is_further
        counts.sequences -= ask.group.num_choices
        self._num_asking -= 1
        self.log("turned away", ask.request_id)
        self._later(rejection.retry_after_s + self._load_draw.random(), ask.session)

    def _is_outage(self, gateway: Gateway, phase: Phase, since_s: float = math.inf) -> bool:
        """Whether there is an outage now, or has been since."""
        return self._outages_end_s.get((gateway, phase), -math.inf) >= since_s

    def _leave(self, ask: Ask, reason: FinishReason) -> None:
        if ask.gateway.asks.get(ask.request_id) is not ask or ask.num_ended or ask.outcome is not None:
            # It is answered, although its client may not have read that yet.
            return
        self.counts.left += 1
        ask.gateway.leave(ask, reason)
        if ask.outcome is None:
            self.problem("hung", f"{ask.request_id} goes on although its client has left")
            self.ended(ask)

    def ended(self, ask: Ask) -> None:
        """A request has its receipt, and its client the last token of each choice, or has left."""
        counts, outcome = self.counts, ask.outcome
        num_deltas = sum(answer.num_deltas for answer in ask.answers.values())
        kinds = outcome.fault_kinds if outcome else ()
        status = outcome.status if outcome else "none"
        counts.deltas += num_deltas
        self._kinds.update(kinds)
        counts.met += bool(kinds)
        counts.hit += ask.is_hit
        counts.touched += bool(kinds) or ask.is_hit
        counts.degraded += ask.is_degraded
        counts.asked += bool(outcome and outcome.kv_blocks_asked)
        if ask.is_degraded and not self._is_outage(ask.gateway, Phase.PREFILL, ask.asked_s):
            self.problem("wrong", f"{ask.request_id} was served degraded although there were prefill replicas")
        self.log(ask.request_id, status, num_deltas, kinds)
        if ask.has_left:
            whole = expected_answer(ENGINE, ask.prompt, ask.length)
            if any(answer.tokens != whole[: len(answer.tokens)] for answer in ask.answers.values()):
                self.problem("wrong", f"{ask.request_id} was answered wrongly before its client left")
        else:
            counts.answered += 1
            if status != "finished" or (outcome and outcome.output_tokens != ask.length * len(ask.answers)):
                self.problem("wrong", f"the receipt of {ask.request_id} says {outcome}")
        if ask.gateway.asks.get(ask.request_id) is ask:
            ask.gateway.forget(ask)
        self._over(ask.session, goes_on=True, ask=ask)

    def _over(self, session: Session, *, goes_on: bool, ask: Ask | None = None) -> None:
        self._num_asking -= 1
        session.turns_left -= 1
        if ask is not None:
            new = self._tokens(self.plan.further_prompt)
            session.context = ask.prompt + next(iter(ask.answers.values())).tokens + new
            session.is_further = True
        room = ENGINE.max_model_len - self.plan.long_answer[1] - 1
        if not goes_on or session.turns_left <= 0 or len(session.context) >= room:
            session = self._new_session()
        self._later(self._load_draw.random() * 2 * self.plan.pause_s, session)

    async def _sweep(self) -> None:
        """Ends what hangs, so that the rest can be judged."""
        while True:
            await asyncio.sleep(SWEEP_S)
            late_s = self._loop.time() - REQUEST_LIMIT_S
            for gateway in self.gateways:
                for ask in [ask for ask in gateway.asks.values() if ask.asked_s < late_s]:
                    stages = [str(sequence.state.stage) for sequence in ask.group.sequences]
                    self.problem("hung", f"{ask.request_id} is open after {REQUEST_LIMIT_S:g} s: {stages}")
                    gateway.forget(ask)
                    self._over(ask.session, goes_on=False)
            for error in self.network.take_errors():
                self.problem("failed", f"a task of the simulation failed: {error!r}")

    # -- the end

    async def _check_the_end(self) -> None:
        """Nothing is in flight, and every KV block is back, some only when a lease has ended."""
        try:
            await self.until_whole()
        except TimeoutError:
            self.problem("left_behind", "the pools did not become whole again")
        await asyncio.sleep(ENGINE.lease_s + SETTLE_S)
        for error in self.network.take_errors():
            self.problem("failed", f"a task of the simulation failed: {error!r}")
        for node in self.nodes:
            load = node.engine.load
            if load.num_kv_blocks_used or load.num_running_requests or load.num_waiting_requests:
                self.problem("left_behind", f"{node.replica_id} still has {load}")
        for gateway in self.gateways:
            if gateway.orchestrator.num_in_flight or gateway.asks or gateway.answers:
                self.problem("left_behind", f"{gateway.gateway_id} still has requests")
            for replica in (r for phase in Phase for r in gateway.orchestrator.cluster.pool(phase)):
                of_all = replica.all_in_flight
                if of_all.num_requests or of_all.num_tokens or of_all.num_queued_tokens or replica.writing_since_s:
                    self.problem("left_behind", f"{gateway.gateway_id} counts {of_all} on {replica.replica_id}")
                engine = self.network.nodes[replica.replica_id].engine
                known, cached = set(replica.blocks), engine.cached_blocks
                has_gaps = engine.load.kv_event_gaps_total > 0
                if not known <= cached or (known != cached and not has_gaps):
                    self.problem(
                        "wrong", f"{gateway.gateway_id} knows other blocks of {replica.replica_id} than it has"
                    )

    async def _close(self) -> None:
        for gateway in list(self.gateways):
            await gateway.end()
        await asyncio.sleep(SETTLE_S)
        for node in self.network.nodes.values():
            if node.num_links:
                self.problem("left_behind", f"{node.num_links} report streams of {node.replica_id}")
            await self.ends(node)
        await self.network.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            self.problem("left_behind", f"tasks: {sorted(task.get_name() for task in left)}")


class _Errors(logging.Handler):
    """What the product takes for an error of its own is a problem. A request that failed is one by its answer."""

    def __init__(self, world: World):
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            self._world.problem("failed", f"{record.getMessage()}: {record.exc_info[1]!r}")
        else:
            self._world.log("error", record.getMessage())
