"""Owns the experiment `decisions`: what the gateway's own work on a request costs in CPU, at any number of both.

The orchestrator is the one that ships. The replicas here are none: what takes a request answers it at once, with the
reports that an engine would send. So whatever is measured is the gateway's. Garbage is collected as in one that has
started.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from bench.decisions_report import Decision, DecisionsPlan, Load
from bench.garbage import collected_at
from bench.stats import percentiles
from bench.virtual_time import VirtualTimeLoop
from engine.blocks import block_hashes
from engine.deployment import GC_THRESHOLDS
from engine.protocol import (
    BlockChanges,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineTimes,
    FinishReason,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
    WorkerReport,
)
from gateway.cluster import Cluster
from gateway.orchestrator import Orchestrator, OrchestratorConfig, SequenceRequest
from gateway.routing.admission import AdmissionConfig, admit
from gateway.routing.order import rank_ms
from gateway.routing.policies import POLICIES, place
from gateway.routing.predict import predict
from gateway.routing.receipts import ReceiptStore
from gateway.routing.types import Hints, Placement, RequestView, SessionView
from gateway.transport import Members

VOCABULARY = 32_000
BLOCK_TOKENS = 64
NUM_KV_BLOCKS = 6_000
INFO = EngineInfo("none", "none", 200_000, BLOCK_TOKENS, NUM_KV_BLOCKS, 1, [], 256)
SHORT_PROMPT_TOKENS = 1_000
TURNS = 10
"""Of a session, in the load."""
AT_ONCE = 60
"""A multiple of TURNS: then the requests that are put at once have as many of each turn."""
NUM_WARM_UP = AT_ONCE * TURNS
"""Requests before those that are measured: until each session has been there from its first turn on."""
ADMISSION = AdmissionConfig(ttft_deadline_s=3600.0)


# -- one decision


def decide(plan: DecisionsPlan, replicas: int, policy: str, seed: int) -> Decision:
    """Decides `plan.decisions` times for a prompt of `plan.prompt_tokens`, each after reports of half the replicas."""
    draw = random.Random(seed)
    now_s = 0.0
    cluster = Cluster(lambda: now_s)
    prompt = [draw.randrange(VOCABULARY) for _ in range(plan.prompt_tokens)]
    hashes = block_hashes(prompt, BLOCK_TOKENS)
    names = _replicas(replicas)
    for replica_id, phase in names.items():
        cluster.add(replica_id, phase).ready = True
        # Each has a part of the prompt; most only what all agents share.
        held = hashes[: draw.choice((100, 100, 100, len(hashes) // 2, len(hashes)))]
        cluster.fold(WorkerReport(replica_id, phase, 0, [], EngineLoad(), INFO, blocks=BlockChanges(held, [], True)))
    chosen = POLICIES[policy]
    took_s: list[float] = []
    with collected_at(*GC_THRESHOLDS):
        for number in range(plan.decisions):
            now_s += 0.01
            for replica_id in draw.sample(sorted(names), len(names) // 2):
                running = draw.randint(0, 20)
                load = EngineLoad(running, 0, running * 20_000, num_kv_blocks_used=draw.randrange(NUM_KV_BLOCKS))
                cluster.fold(WorkerReport(replica_id, names[replica_id], number, [], load))
            request = RequestView(
                f"r{number}", plan.prompt_tokens, 500, number=number, session=SessionView(3, None, None)
            )
            began_s = time.thread_time()
            snapshot = cluster.snapshot(hashes)
            placement = place(chosen, request, snapshot, number)
            assert isinstance(placement, Placement)
            admit(request, placement, snapshot, ADMISSION)
            rank_ms(request, now_s, predict(request, placement, snapshot).read_s, ADMISSION.ttft_deadline_s)
            took_s.append(time.thread_time() - began_s)
    return Decision(policy, replicas, percentiles([seconds * 1000 for seconds in took_s]))


# -- many requests


class _AnsweringTransport:
    """Replicas that answer whatever they are sent at once (`gateway.transport.WorkerTransport`)."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._reports: dict[str, asyncio.Queue[WorkerReport]] = {}

    def watch(self, changed: Callable[[Members], None]) -> None:
        changed(self._members)

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        queue = self._reports[replica_id] = asyncio.Queue[WorkerReport]()
        yield WorkerReport(replica_id, self._members[replica_id], 0, [], EngineLoad(), INFO)
        while True:
            try:
                async with asyncio.timeout(1.0):
                    yield await queue.get()
            except TimeoutError:
                yield WorkerReport(replica_id, self._members[replica_id], 1, [], EngineLoad())

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        phase, length = self._members[replica_id], len(request.prompt_token_ids)
        handoff: KVHandoff | None = None
        facts = PrefillFacts(length, length, 0, 0)
        if phase is Phase.PREFILL:
            handoff = KVHandoff(replica_id, request.request_id, length, length // BLOCK_TOKENS + 1, b"")
        elif request.handoff is not None:
            facts = PrefillFacts(length, 1, 0, length - 1)
        delta = TokenDelta(
            request.request_id,
            [1] * request.max_tokens,
            FinishReason.LENGTH,
            prefill=facts,
            handoff=handoff,
            times=EngineTimes(0.0, length * 1e-5),
        )
        self._reports[replica_id].put_nowait(WorkerReport(replica_id, phase, 1, [delta], EngineLoad(1)))

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None:
        pass

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        pass

    async def close(self) -> None:
        pass


def load(plan: DecisionsPlan, replicas: int, requests: int, policy: str, seed: int) -> Load:
    """Puts requests through an orchestrator, AT_ONCE at a time, each a turn of another session."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_load(plan, replicas, requests, policy, seed))


async def _load(plan: DecisionsPlan, replicas: int, requests: int, policy: str, seed: int) -> Load:
    draw, loop = random.Random(seed), asyncio.get_running_loop()
    members = _replicas(replicas)
    orchestrator = Orchestrator(
        _AnsweringTransport(members),
        POLICIES[policy],
        ReceiptStore(1000),
        OrchestratorConfig(60.0, 100_000, b"", has_prefill_pool=True, admission=ADMISSION),
        clock=loop.time,
        wall_clock=loop.time,
        new_seed=lambda: draw.getrandbits(32),
    )
    each = {phase: list(members.values()).count(phase) for phase in Phase}
    await orchestrator.start(each, 1e6)
    shared = [draw.randrange(VOCABULARY) for _ in range(SHORT_PROMPT_TOKENS)]
    took_s: list[float] = []
    with collected_at(*GC_THRESHOLDS):
        began_s = time.process_time()
        for first in range(0, NUM_WARM_UP + requests, AT_ONCE):
            for number in range(first, first + AT_ONCE):
                session, turn = turn_of(number)
                # A prompt of its own for each session, which goes on in every turn.
                own = [session] * (BLOCK_TOKENS * (1 + turn))
                group = orchestrator.new_group(f"r{number}", 1, hints=Hints(session=f"s{session}"))
                orchestrator.add(SequenceRequest(f"r{number}", shared + own, 8, b"", resumable=True), group)
            while orchestrator.num_in_flight:
                await orchestrator.next_deltas()
            await asyncio.sleep(0.01)
            now_s = time.process_time()
            if first >= NUM_WARM_UP:
                took_s.append((now_s - began_s) / AT_ONCE)
            began_s = now_s
    await orchestrator.close()
    tenth = max(len(took_s) // 10, 1)
    return Load(
        policy,
        replicas,
        requests,
        request_ms=sum(took_s) / len(took_s) * 1000,
        first_tenth_ms=sum(took_s[:tenth]) / tenth * 1000,
        last_tenth_ms=sum(took_s[-tenth:]) / tenth * 1000,
    )


def turn_of(number: int) -> tuple[int, int]:
    """Whose turn a request is, and which one, from 0. AT_ONCE sessions are at work, each begun at another time; after
    TURNS a new one takes its place. So after NUM_WARM_UP requests each AT_ONCE are the same work: as many first turns,
    as many of sessions with any number of turns before, and as long prompts."""
    place, turns = number % AT_ONCE, number // AT_ONCE + number % AT_ONCE
    return turns // TURNS * AT_ONCE + place, turns % TURNS


def _replicas(number: int) -> Mapping[str, Phase]:
    """Half of them prefill."""
    phases = [Phase.PREFILL] * (number // 2) + [Phase.DECODE] * (number - number // 2)
    return {f"{phase}-{index:03}": phase for index, phase in enumerate(phases)}
