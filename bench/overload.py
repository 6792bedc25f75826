"""Owns the experiment `overload` over simulated engines: far more requests than capacity, in virtual time.

The orchestrator, the workers and the admission are those that ship; engines and clients are simulated. Clients arrive
when they like (Poisson), whatever becomes of those before them, and a refused one does not come again.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.overload_report import (
    Asked,
    OverloadPlan,
    Rate,
    ScenarioFigures,
    drift,
    goodput_per_s,
    recovered_s,
    refused_shares,
    retry_after_range,
    ttft_ms,
)
from bench.stats import percentiles
from bench.virtual_time import VirtualTimeLoop
from decode.worker import DecodeWorker
from engine.latency import LatencyModel
from engine.protocol import Phase
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric
from engine.worker import Worker
from gateway.orchestrator import Orchestrator, OrchestratorConfig, PlacementRejected, SequenceRequest
from gateway.routing.admission import AdmissionConfig
from gateway.routing.policies import least_tokens
from gateway.routing.receipts import Receipt, ReceiptStore
from gateway.routing.types import Cause, Hints, Priority
from gateway.transport import InProcessTransport
from prefill.worker import PrefillWorker

START_TIMEOUT_S = 60.0
DRAIN_S = 30.0
SETTLE_S = 10.0
"""Between the start of a load and the window in which it is measured."""
SAMPLE_S = 1.0
SHARES = {Priority.LOW: 0.3, Priority.NORMAL: 0.6, Priority.HIGH: 0.1}
RESUMABLE_SHARE = 0.5
VOCABULARY = 32_000
LATENCY = LatencyModel(
    prefill_s_per_token=0.0002,
    prefill_fixed_s=0.01,
    decode_step_s=0.02,
    decode_s_per_request=0.001,
    handoff_fixed_s=0.005,
    handoff_s_per_block=0.0002,
)
ENGINE = SimulatedEngineConfig(
    model="simulated-model",
    max_model_len=1024,
    block_size_tokens=32,
    num_kv_blocks=1024,
    max_num_seqs=32,
    max_num_batched_tokens=512,
    seed=1,
    latency=LATENCY,
)


@dataclass(frozen=True)
class Scenario:
    """A cluster, and what is asked of it. The peak is looked for around `about_per_s`."""

    name: str
    prefill: int
    decode: int
    about_per_s: float
    decode_seqs: int = 32
    decode_blocks: int = 1024
    prompt_tokens: tuple[int, int] = (100, 400)
    output_tokens: tuple[int, int] = (4, 20)


SCENARIOS = (
    Scenario("prefill is scarce", prefill=1, decode=2, about_per_s=20.0),
    Scenario("places in decode are scarce", prefill=2, decode=1, about_per_s=25.0, decode_seqs=8),
    Scenario("KV blocks are scarce", prefill=2, decode=1, about_per_s=25.0, decode_blocks=72),
    Scenario("no prefill pool", prefill=0, decode=2, about_per_s=28.0),
)
SWEEP = (0.9, 1.0, 1.2, 1.5, 2.0)


@dataclass
class _Open:
    """A request that was taken and is not closed yet."""

    at_s: float
    priority: Priority
    predicted_s: float


class Cluster:
    """A gateway's orchestrator over simulated engines, and all its clients. An async context manager."""

    def __init__(self, scenario: Scenario, deadline_s: float, seed: int):
        self.asked: list[Asked] = []
        self.sequences: list[tuple[float, int]] = []
        self._scenario = scenario
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._open: dict[str, _Open] = {}
        self._tokens = [self._random.randrange(VOCABULARY) for _ in range(scenario.prompt_tokens[1])]
        self._workers = list(self._make_workers())
        self.orchestrator = Orchestrator(
            InProcessTransport("gateway", self._workers),
            least_tokens,
            ReceiptStore(100),
            OrchestratorConfig(
                handoff_timeout_s=60.0,
                max_in_flight_requests=4096,
                warm_up_sampling=b"warm-up",
                admission=AdmissionConfig(ttft_deadline_s=deadline_s),
            ),
            closed=self._on_closed,
            clock=self._loop.time,
            wall_clock=self._loop.time,
            new_seed=lambda: self._random.getrandbits(32),
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _make_workers(self) -> Sequence[Worker]:
        scenario, fabric = self._scenario, SimulatedFabric()
        decode = replace(ENGINE, max_num_seqs=scenario.decode_seqs, num_kv_blocks=scenario.decode_blocks)
        workers: list[Worker] = []
        for index in range(scenario.prefill):
            replica_id = f"prefill-{index}"
            workers.append(PrefillWorker(replica_id, SimulatedEngine(replica_id, ENGINE, fabric)))
        for index in range(scenario.decode):
            replica_id = f"decode-{index}"
            workers.append(DecodeWorker(replica_id, SimulatedEngine(replica_id, decode, fabric)))
        return workers

    async def __aenter__(self) -> "Cluster":
        self._tasks += [asyncio.create_task(self._read()), asyncio.create_task(self._sample())]
        expected = {Phase.PREFILL: self._scenario.prefill, Phase.DECODE: self._scenario.decode}
        await self.orchestrator.start(expected, START_TIMEOUT_S)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.orchestrator.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            await worker.shutdown()

    async def offer(self, rate_per_s: float, seconds: float) -> None:
        """Clients arrive for so long, at this rate on average."""
        next_s = self._loop.time()
        end_s = next_s + seconds
        while (next_s := next_s + self._random.expovariate(rate_per_s)) < end_s:
            await asyncio.sleep(next_s - self._loop.time())
            self._ask()
        await asyncio.sleep(end_s - self._loop.time())

    async def drained(self) -> int:
        """Waits for what is in flight; returns what is left of sequences, tokens and places."""
        await asyncio.sleep(DRAIN_S)
        self.asked += [Asked(one.at_s, one.priority, status=0) for one in self._open.values()]
        replicas = [r for phase in Phase for r in self.orchestrator.cluster.pool(phase)]
        return self.orchestrator.num_in_flight + sum(
            r.in_flight_tokens + r.queued_tokens + len(r.writing_since_s) for r in replicas
        )

    def between(self, from_s: float, to_s: float) -> list[Asked]:
        return [one for one in self.asked if from_s <= one.at_s < to_s]

    def _ask(self) -> None:
        scenario, number = self._scenario, next(self._numbers)
        (priority,) = self._random.choices(list(SHARES), list(SHARES.values()))
        length = self._random.randint(*scenario.prompt_tokens)
        # Its first token makes each prompt one of its own: no cache helps.
        prompt = [number % VOCABULARY, number // VOCABULARY, *self._tokens[: length - 2]]
        request = SequenceRequest(
            f"r{number}",
            prompt,
            self._random.randint(*scenario.output_tokens),
            b"sampling",
            resumable=self._random.random() < RESUMABLE_SHARE,
        )
        now_s = self._loop.time()
        group = self.orchestrator.new_group(request.request_id, 1, hints=Hints(priority))
        try:
            self.orchestrator.add(request, group)
        except PlacementRejected as refusal:
            rejection = refusal.rejection
            is_typed = bool(rejection.reason) and rejection.retry_after_s >= 1 and rejection.cause is not Cause.OTHER
            self.asked.append(
                Asked(
                    now_s,
                    priority,
                    rejection.status,
                    retry_after_s=rejection.retry_after_s,
                    is_typed=is_typed and rejection.status in (429, 503),
                )
            )
            return
        assert group.receipt is not None
        assert group.receipt.admission is not None
        self._open[request.request_id] = _Open(now_s, priority, group.receipt.admission.predicted_ttft_s)

    def _on_closed(self, receipt: Receipt) -> None:
        one, outcome = self._open.pop(receipt.request_id), receipt.outcome
        is_answered = outcome.status == "finished" and outcome.ttft_ms is not None
        self.asked.append(
            Asked(
                one.at_s,
                one.priority,
                status=200 if is_answered else 500,
                ttft_s=outcome.ttft_ms / 1000 if is_answered and outcome.ttft_ms is not None else None,
                predicted_s=one.predicted_s,
            )
        )

    async def _read(self) -> None:
        while True:
            await self.orchestrator.next_deltas()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.sequences.append((self._loop.time(), self.orchestrator.num_in_flight))


@dataclass
class Overload:
    """One scenario from the search for its peak to the end of its overload."""

    plan: OverloadPlan
    scenario: Scenario
    rates: list[Rate] = field(default_factory=list)

    def run(self) -> ScenarioFigures:
        """Takes no time of its own but computing."""
        began_s = time.process_time()
        for factor in SWEEP:
            with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
                self.rates.append(runner.run(self._measure(self.scenario.about_per_s * factor)))
        peak = max(self.rates, key=lambda rate: rate.goodput_per_s)
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            figures = runner.run(self._overload(peak))
        return replace(figures, took_s=time.process_time() - began_s)

    async def _measure(self, rate_per_s: float) -> Rate:
        plan = self.plan
        async with Cluster(self.scenario, plan.deadline_s, plan.seed) as cluster:
            await cluster.offer(rate_per_s, SETTLE_S)
            from_s = asyncio.get_running_loop().time()
            await cluster.offer(rate_per_s, plan.capacity_s)
            await cluster.drained()
            asked = cluster.between(from_s, from_s + plan.capacity_s)
            return Rate(rate_per_s, goodput_per_s(asked, plan.deadline_s, plan.capacity_s))

    async def _overload(self, peak: Rate) -> ScenarioFigures:
        plan, loop = self.plan, asyncio.get_running_loop()
        normal_per_s = peak.goodput_per_s * plan.normal_share
        async with Cluster(self.scenario, plan.deadline_s, plan.seed + 1) as cluster:
            await cluster.offer(normal_per_s, SETTLE_S)
            before_s = loop.time()
            await cluster.offer(normal_per_s, plan.normal_s)
            from_s = loop.time()
            await cluster.offer(peak.goodput_per_s * plan.factor, plan.overload_s)
            to_s = loop.time()
            await cluster.offer(normal_per_s, plan.normal_s)
            after_s = loop.time()
            left = await cluster.drained()
            before, asked = cluster.between(before_s, from_s), cluster.between(from_s, to_s)
            in_flight = [number for at_s, number in cluster.sequences if from_s <= at_s < to_s]
            normal = ttft_ms(before)
            errors_s = [one.ttft_s - one.predicted_s for one in asked if one.ttft_s is not None and one.predicted_s]
            return ScenarioFigures(
                name=self.scenario.name,
                peak=peak,
                rates=tuple(self.rates),
                overload=Rate(len(asked) / plan.overload_s, goodput_per_s(asked, plan.deadline_s, plan.overload_s)),
                num_asked=len(asked),
                num_refused=sum(one.is_refused for one in asked),
                num_untyped=sum(not one.is_answered and not one.is_typed for one in cluster.asked),
                refused_share=refused_shares(asked),
                retry_after_s=retry_after_range(asked),
                normal_ttft_ms=normal,
                overload_ttft_ms=ttft_ms(asked),
                prediction_error_s=percentiles(errors_s or [0.0]),
                recovered_s=recovered_s(cluster.between(to_s, after_s), to_s, normal.p90),
                sequences_max=max(in_flight),
                sequences_drift=drift(in_flight),
                left_in_flight=left,
                took_s=0.0,
            )
