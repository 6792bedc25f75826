"""Owns one run of a replay: recorded trajectories as clients of the orchestrator and workers that ship, over simulated
engines in virtual time.

A client asks its session's next turn when it has had the answer to the last one and its recorded pause is over;
children run beside their parents as recorded. One that is refused asks again after Retry-After. When the run starts,
trajectories are under way already, as if they had come at the same rate before and found idle engines.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import math
import random
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.oracle import Limits, prefill_s, session_spans
from bench.replay_plan import RunFigures, RunPlan, TrajectoryResult, TurnResult, figures
from bench.replay_text import SessionText, Texts
from bench.replay_tuning import TUNABLE
from bench.traces import Child, Session, Trace, Trajectory, Turn, arrivals, cut_trace
from bench.virtual_time import VirtualTimeLoop
from decode.worker import DecodeWorker
from engine.protocol import FinishReason, Phase, TokenDelta
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric
from engine.worker import Worker
from gateway.orchestrator import Orchestrator, OrchestratorConfig, PlacementRejected, SequenceRequest
from gateway.routing.admission import AdmissionConfig
from gateway.routing.joint import NAME, Joint
from gateway.routing.order import rank_ms
from gateway.routing.policies import POLICIES, Policy
from gateway.routing.receipts import Receipt, ReceiptStore
from gateway.routing.types import Hints, RequestView
from gateway.transport import InProcessTransport
from prefill.worker import PrefillWorker

START_TIMEOUT_S = 60.0
LONGEST_WAIT_S = 7200.0
"""In virtual time, for a hand-off and for a first token: a replay shows how late turns are, so none is given up."""
MAX_IN_FLIGHT = 100_000


WITHOUT_ORDER = f"{NAME}-without-order"
ABLATIONS = (
    Joint(affinity=False, name=f"{NAME}-without-affinity"),
    Joint(joint=False, name=f"{NAME}-without-joint-choice"),
    Joint(conditional_split=False, name=f"{NAME}-without-conditional-split"),
    Joint(keeps_promised=False, name=f"{NAME}-without-pauses"),
    Joint(name=WITHOUT_ORDER),
)
"""The policy without one of its parts each, to show what the part is worth."""

REPLAYED: Mapping[str, Policy] = {**POLICIES, **{policy.name: policy for policy in ABLATIONS}}


def first_come(request: RequestView, arrived_s: float, read_s: float, usual_deadline_s: float) -> int:
    """The order of arrival, in place of `gateway.routing.order.rank_ms`."""
    return round(arrived_s * 1000)


def run(plan: RunPlan, trace: Trace) -> RunFigures:
    """Takes no time of its own but computing. `trace` is cut to what the model's context holds. Raises RuntimeError
    when nothing is left that could ever happen."""
    began_s = time.process_time()
    with undisturbed() as runner:
        replay = runner.run(_replay(plan, cut_trace(trace, plan.roofline.model.max_model_len)))
    return figures(
        plan,
        replay.measured_turns(),
        replay.trajectories,
        replay.num_turns,
        replay.window_s,
        replay.gpu_s,
        time.process_time() - began_s,
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[asyncio.Runner]:
    """Runs in virtual time, without logs and garbage collections."""
    logger = logging.getLogger("baton")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    # Millions of small objects live as long as the run: looking through them for garbage takes as long as the rest.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            yield runner
    finally:
        logger.setLevel(before)
        gc.enable()
        gc.collect()


async def _replay(plan: RunPlan, trace: Trace) -> "Replay":
    replay = Replay(plan, trace)
    await replay.run()
    return replay


def hints(session: str, parent: str | None, turn: Turn) -> Hints:
    """What a client says of its turn. Not how long its answer will be: agents do not know."""
    return Hints(session=session, parent=parent, tool=turn.tool)


@dataclass
class _Open:
    """A turn under way."""

    done: "asyncio.Future[None]"
    first_s: float | None = None
    answer: list[int] = field(default_factory=list[int])
    failed: bool = False


@dataclass
class _Span:
    """When a session ended, in loop time, and how much of its critical path was pauses."""

    end_s: float
    pause_s: float


@dataclass
class _Client:
    """One trajectory that arrived, and what its sessions share."""

    trajectory: Trajectory
    name: str
    first_name: int


class Replay:
    def __init__(self, plan: RunPlan, trace: Trace):
        self.trajectories: list[TrajectoryResult] = []
        self.window_s = 0.0
        self.gpu_s = (0.0, 0.0)
        self._plan = plan
        self._trace = trace
        self._roofline = plan.roofline
        self._limits = Limits(self._roofline, plan.max_num_batched_tokens, plan.max_pause_s)
        self._loop = asyncio.get_running_loop()
        self._texts = Texts(trace.block_size_tokens)
        self._numbers = itertools.count()
        self._open: dict[str, _Open] = {}
        self._turns: list[TurnResult] = []
        self._receipts: dict[str, Receipt] = {}
        self._seen_shared: set[int] = set()
        self._window = (math.inf, math.inf)
        self._engines: dict[Phase, list[SimulatedEngine]] = {Phase.PREFILL: [], Phase.DECODE: []}
        self._workers: dict[str, Worker] = {}
        self._fabric = SimulatedFabric()
        shape = plan.shape
        phases = [Phase.PREFILL] * shape.prefill + [Phase.DECODE] * shape.decode
        self._transport = InProcessTransport("gateway", [self._new_worker(phase) for phase in phases])
        seeds = random.Random(plan.seed)
        self._orchestrator = Orchestrator(
            self._transport,
            TUNABLE[plan.policy][plan.constants] if plan.constants else REPLAYED[plan.policy],
            ReceiptStore(1),
            OrchestratorConfig(
                handoff_timeout_s=LONGEST_WAIT_S,
                max_in_flight_requests=MAX_IN_FLIGHT,
                warm_up_sampling=b"warm-up",
                has_prefill_pool=plan.shape.prefill > 0,
                can_ask=plan.reverse,
                admission=AdmissionConfig(ttft_deadline_s=LONGEST_WAIT_S),
                rank=first_come if plan.policy == WITHOUT_ORDER else rank_ms,
            ),
            closed=self._on_closed,
            clock=self._loop.time,
            wall_clock=self._loop.time,
            new_seed=lambda: seeds.getrandbits(32),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._measured: set[asyncio.Task[None]] = set()

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    def measured_turns(self) -> list[TurnResult]:
        begin_s, end_s = self._window
        return [turn for turn in self._turns if begin_s <= turn.began_s <= end_s]

    def _new_worker(self, phase: Phase) -> Worker:
        plan, roofline, engines = self._plan, self._roofline, self._engines[phase]
        config = SimulatedEngineConfig(
            model=plan.model,
            max_model_len=roofline.model.max_model_len,
            block_size_tokens=roofline.block_size_tokens,
            num_kv_blocks=roofline.num_kv_blocks,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            seed=plan.seed,
            latency=roofline,
            kv_block_bytes=roofline.kv_block_bytes,
            max_leap_steps=plan.max_leap_steps,
            keeps_content=False,
        )
        # Of equal length, so that their order is that of their numbers.
        engine = SimulatedEngine(f"{phase}-{len(engines):03}", config, self._fabric)
        engines.append(engine)
        worker = (PrefillWorker if phase is Phase.PREFILL else DecodeWorker)(engine.replica_id, engine)
        self._workers[worker.replica_id] = worker
        return worker

    # -- the run

    async def run(self) -> None:
        shape = self._plan.shape
        reader = asyncio.create_task(self._read())
        await self._orchestrator.start({Phase.PREFILL: shape.prefill, Phase.DECODE: shape.decode}, START_TIMEOUT_S)
        await self._arrive()
        await self._ended(self._tasks if self._plan.drains else self._measured)
        for task in [*self._tasks, reader]:
            task.cancel()
        await asyncio.gather(*self._tasks, reader, return_exceptions=True)
        await self._orchestrator.close()
        for worker in self._workers.values():
            await worker.shutdown()

    async def _ended(self, tasks: "set[asyncio.Task[None]]") -> None:
        """Waits until none is left. Raises what any client raises."""
        while tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._tasks | tasks if task.done()]:
                task.result()
                self._tasks.discard(task)
                tasks.discard(task)

    async def _arrive(self) -> None:
        """All trajectories, from those that are under way already to the last one of the cohort."""
        plan, now_s = self._plan, self._loop.time()
        self._start_residents(self._drawn("residents"), now_s)
        window_s = now_s + plan.warm_up_s
        for at_s, trajectory in self._drawn("warm-up"):
            if (at_s := now_s + at_s) >= window_s:
                break
            await asyncio.sleep(at_s - self._loop.time())
            self._spawn(self._trajectory(trajectory, is_cohort=False))
        await asyncio.sleep(window_s - self._loop.time())
        self._window, busy_before_s = (window_s, math.inf), self._busy_s()
        at_s = 0.0
        for at_s, trajectory in itertools.islice(self._drawn("cohort"), plan.num_trajectories):
            await asyncio.sleep(window_s + at_s - self._loop.time())
            self._spawn(self._trajectory(trajectory, is_cohort=True))
        self._window, self.window_s = (window_s, window_s + at_s), at_s
        prefill_s, decode_s = self._busy_s()
        self.gpu_s = prefill_s - busy_before_s[0], decode_s - busy_before_s[1]

    def _drawn(self, purpose: str) -> Iterator[tuple[float, Trajectory]]:
        """Those of one purpose do not depend on any other's."""
        return arrivals(self._trace, self._plan.rate_per_s, f"{purpose} {self._plan.seed}")

    def _start_residents(self, drawn: Iterator[tuple[float, Trajectory]], now_s: float) -> None:
        """Those that would be under way if trajectories had come before at the same rate to idle engines."""
        size = self._trace.block_size_tokens
        starts = {one.name: session_spans(self._limits, one.root, size) for one in self._trace.trajectories}
        longest_s = max(span.total_s for _, span, _ in starts.values())
        for ago_s, trajectory in itertools.takewhile(lambda one: one[0] < longest_s, drawn):
            starts_s, _, _ = starts[trajectory.name]
            first = next((i for i, start_s in enumerate(starts_s) if start_s > ago_s), None)
            if first is not None:
                self._spawn(self._resident(trajectory, first, now_s + starts_s[first] - ago_s))

    def _busy_s(self) -> tuple[float, float]:
        prefill, decode = (sum(e.busy_s for e in self._engines[phase]) for phase in (Phase.PREFILL, Phase.DECODE))
        return prefill, decode

    def _spawn(self, client: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(client))

    # -- clients

    def _client(self, trajectory: Trajectory) -> _Client:
        return _Client(trajectory, f"t{next(self._numbers)}", self._texts.copy_of(trajectory.num_own_ids))

    async def _trajectory(self, trajectory: Trajectory, is_cohort: bool) -> None:
        client, began_s = self._client(trajectory), self._loop.time()
        span, children = await self._session(client, trajectory.root, client.name, None)
        await asyncio.gather(*children)
        if is_cohort:
            _, least, least_all_s = session_spans(self._limits, trajectory.root, self._trace.block_size_tokens)
            session_s = span.end_s - began_s
            self.trajectories.append(
                TrajectoryResult(
                    trajectory.name,
                    session_s,
                    session_s - span.pause_s,
                    self._loop.time() - began_s,
                    least.total_s,
                    least.busy_s,
                    least_all_s,
                )
            )

    async def _resident(self, trajectory: Trajectory, first: int, start_s: float) -> None:
        await asyncio.sleep(start_s - self._loop.time())
        client = self._client(trajectory)
        _, children = await self._session(client, trajectory.root, client.name, None, first)
        await asyncio.gather(*children)

    async def _session(
        self, client: _Client, session: Session, name: str, parent: str | None, first: int = 0
    ) -> "tuple[_Span, list[asyncio.Task[_Span]]]":
        """Its turns from `first` on, which is asked at once; returns also the children nobody waits for."""
        text = SessionText(session, self._texts, client.first_name)
        joined: dict[int | None, list[tuple[Child, asyncio.Task[_Span]]]] = {}
        began_s = now_s = self._loop.time()
        pause_s = 0.0
        for index, turn in enumerate(session.turns):
            if index < first:
                continue
            ended = [(await task, child) for child, task in joined.get(index, [])]
            if ended and (last := max(ended, key=lambda one: one[0].end_s))[0].end_s > now_s:
                now_s, pause_s = last[0].end_s, pause_s + last[1].delay_s + last[0].pause_s
            if index > first or not first:
                wait_s = min(turn.pause_s, self._plan.max_pause_s)
                if turn.arrives_s is not None:
                    since_s = session.turns[first].arrives_s or 0.0
                    wait_s = max(began_s + turn.arrives_s - since_s - now_s, 0.0)
                pause_s += wait_s
                await asyncio.sleep(now_s + wait_s - self._loop.time())
            ask = self._turn(text, index, name, parent)
            if not self._plan.drains and self._window[0] <= self._loop.time() <= self._window[1]:
                task = asyncio.create_task(ask)
                self._measured.add(task)
                await task
            else:
                await ask
            now_s = self._loop.time()
            for number, child in enumerate(session.children):
                if child.after_turn == index:
                    task = asyncio.create_task(self._child(client, child, f"{name}.{number}", name))
                    joined.setdefault(child.joined_by, []).append((child, task))
        return _Span(now_s, pause_s), [task for _, task in joined.get(None, [])]

    async def _child(self, client: _Client, child: Child, name: str, parent: str) -> _Span:
        await asyncio.sleep(child.delay_s)
        span, children = await self._session(client, child.session, name, parent)
        await asyncio.gather(*children)
        return span

    async def _turn(self, text: SessionText, index: int, name: str, parent: str | None) -> None:
        turn, began_s = text.session.turns[index], self._loop.time()
        prompt = text.prompt(index)
        cacheable = self._num_cacheable(turn)
        request_id = f"{name}-{index}"
        one = self._open[request_id] = _Open(self._loop.create_future())
        request = SequenceRequest(request_id, prompt, turn.num_output_tokens, b"replay", resumable=True)
        num_refusals = 0
        while True:
            group = self._orchestrator.new_group(request_id, 1, began_s, hints(name, parent, turn))
            try:
                self._orchestrator.add(request, group)
                break
            except PlacementRejected as refusal:
                num_refusals += 1
                await asyncio.sleep(max(refusal.rejection.retry_after_s, 1))
        await one.done
        now_s = self._loop.time()
        outcome = self._receipts.pop(request_id).outcome
        result = TurnResult(
            began_s,
            (now_s if one.first_s is None else one.first_s) - began_s,
            now_s - began_s,
            turn.num_prompt_tokens,
            turn.num_output_tokens,
            cacheable,
            outcome.reused_tokens,
            outcome.prefill_computed_tokens + outcome.decode_computed_tokens,
            outcome.kv_bytes_moved,
            prefill_s(self._limits, turn.num_prompt_tokens, 0),
            num_refusals,
            one.failed,
            outcome.kv_bytes_asked,
        )
        self._turns.append(result)
        text.answered(index, prompt, one.answer)

    def _num_cacheable(self, turn: Turn) -> int:
        """Of its prompt, in an infinite cache of all: what it keeps, or shared blocks that were asked before."""
        size, num_shared = self._trace.block_size_tokens, 0
        for block in turn.block_ids:
            if block >= 0:
                break
            num_shared += block in self._seen_shared
            self._seen_shared.add(block)
        num_kept = turn.num_kept_tokens - turn.num_kept_tokens % self._roofline.block_size_tokens
        return min(max(num_kept, num_shared * size), turn.num_prompt_tokens - 1)

    # -- what the gateway says

    async def _read(self) -> None:
        while True:
            for delta in await self._orchestrator.next_deltas():
                self._take(delta)

    def _take(self, delta: TokenDelta) -> None:
        if (one := self._open.get(delta.request_id)) is None:
            return
        if delta.token_ids and one.first_s is None:
            one.first_s = self._loop.time()
        one.answer += delta.token_ids
        if delta.finish_reason is not None:
            one.failed = delta.finish_reason is FinishReason.ERROR
            del self._open[delta.request_id]
            # The receipt is closed after the last delta is told, in the same turn of the loop.
            self._loop.call_soon(one.done.set_result, None)

    def _on_closed(self, receipt: Receipt) -> None:
        self._receipts[receipt.request_id] = receipt
