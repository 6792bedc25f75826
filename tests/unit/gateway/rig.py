"""Owns the stage of the orchestrator's tests: real workers over simulated engines, and a front end that reads all."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from decode.worker import DecodeWorker
from engine.protocol import (
    EngineLoad,
    EngineRequest,
    FinishReason,
    InFlight,
    KVHandoff,
    Phase,
    PrefillFacts,
    WorkerReport,
)
from engine.reports import LOAD_INTERVAL_S
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric, expected_answer
from engine.worker import Worker
from gateway.orchestrator import Group, Orchestrator, OrchestratorConfig, SequenceRequest
from gateway.routing.policies import least_tokens
from gateway.routing.receipts import Receipt, ReceiptStore
from gateway.transport import InProcessTransport, ReplicaGoneError
from prefill.worker import PrefillWorker
from tests.unit.simulated_config import BLOCK, CONFIG
from tests.unit.virtual_time import now_s

PATIENCE_S = 10.0
CALL_TIMEOUT_S = 10.0
HANDOFF_TIMEOUT_S = 3.0
CREATED_S = 1_700_000_000.0
PROMPT = [random.Random(1).randrange(32_000) for _ in range(5 * BLOCK + 3)]
OTHER_PROMPT = [random.Random(2).randrange(32_000) for _ in range(5 * BLOCK + 3)]


def answer_to(prompt: list[int], num_tokens: int) -> list[int]:
    return expected_answer(CONFIG, prompt, num_tokens)


@dataclass
class Answer:
    """What the front end was told about one sequence, and when."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    facts: PrefillFacts | None = None
    first_s: float | None = None
    logprobs: list[bytes] = field(default_factory=list)


class Tapped(InProcessTransport):
    """Keeps what was sent, and holds up calls to a replica for as long as the test wants."""

    def __init__(self, workers: Sequence[Worker]):
        super().__init__("gateway", workers)
        self.submitted: list[tuple[str, float, EngineRequest]] = []
        self.released: list[KVHandoff] = []
        self.released_through: list[str] = []
        self.before_submit: dict[str, asyncio.Event] = {}
        self.after_submit: dict[str, asyncio.Event] = {}
        self._hung: dict[str, asyncio.Event] = {}
        self.on_report: Callable[[WorkerReport], None] = lambda report: None
        self.let_go_of: list[str] = []

    def hang(self, replica_id: str, end: asyncio.Event) -> None:
        """Nothing is heard of a replica, and calls to it time out, until `end`."""
        self._hung[replica_id] = end

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        try:
            async for report in super().reports(replica_id):
                if gate := self._hung.get(replica_id):
                    await gate.wait()
                self.on_report(report)
                yield report
        finally:
            self.let_go_of.append(replica_id)

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        self.submitted.append((replica_id, now_s(), request))
        if gate := self._hung.get(replica_id):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await gate.wait()
            except TimeoutError:
                raise ReplicaGoneError(f"{replica_id} does not answer") from None
        if gate := self.before_submit.get(replica_id):
            await gate.wait()
        await super().submit(replica_id, request)
        if gate := self.after_submit.get(replica_id):
            await gate.wait()

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        self.released.append(handoff)
        self.released_through.append(replica_id)
        await super().release(replica_id, request_id, handoff)

    def sent_to(self, replica_id: str, request_id: str) -> list[EngineRequest]:
        return [r for target, _, r in self.submitted if target == replica_id and r.request_id == request_id]


class Gateway:
    """A gateway's orchestrator, and a front end that reads all its deltas."""

    def __init__(self, transport: InProcessTransport, prefix: str = "r", **config: Any):
        self.closed: list[Receipt] = []
        self.losses: list[tuple[str, str]] = []
        shadow, policy = config.pop("shadow", None), config.pop("policy", least_tokens)
        limits = OrchestratorConfig(HANDOFF_TIMEOUT_S, max_in_flight_requests=100, warm_up_sampling=b"warm-up")
        self.orchestrator = Orchestrator(
            transport,
            policy,
            ReceiptStore(100),
            replace(limits, **config),
            shadow=shadow,
            closed=self.closed.append,
            replica_lost=lambda phase, loss: self.losses.append((phase.value, loss.value)),
            clock=asyncio.get_running_loop().time,
            wall_clock=lambda: CREATED_S,
            new_seed=lambda: 42,
        )
        self.cluster = self.orchestrator.cluster
        self.answers: dict[str, Answer] = {}
        self._prefix = prefix
        self._numbers = itertools.count()

    async def read(self) -> None:
        while True:
            for delta in await self.orchestrator.next_deltas():
                answer = self.answers[delta.request_id]
                assert answer.finish_reason is None, "a delta came after the last one"
                answer.token_ids += delta.token_ids
                answer.finish_reason, answer.error = delta.finish_reason, delta.error
                answer.facts = answer.facts or delta.prefill
                answer.logprobs += [delta.logprobs] if delta.logprobs else []
                if delta.token_ids and answer.first_s is None:
                    answer.first_s = now_s()

    def add(self, prompt: list[int], max_tokens: int = 6, group: Group | None = None, **more: Any) -> str:
        request_id = f"{self._prefix}{next(self._numbers)}"
        self.answers[request_id] = Answer()
        group = group or self.orchestrator.new_group(request_id, 1)
        self.orchestrator.add(SequenceRequest(request_id, prompt, max_tokens, b"sampling", **more), group)
        return request_id

    async def finished(self, request_id: str, patience_s: float = PATIENCE_S) -> Answer:
        answer = self.answers[request_id]
        await until(lambda: answer.finish_reason is not None, f"{request_id} to finish", patience_s)
        return answer

    async def ask(self, prompt: list[int], max_tokens: int = 6, **more: Any) -> tuple[Answer, Receipt]:
        request_id = self.add(prompt, max_tokens, **more)
        answer = await self.finished(request_id)
        return answer, self.receipt(request_id)

    def receipt(self, receipt_id: str) -> Receipt:
        receipt = self.orchestrator.receipts.get(receipt_id)
        assert receipt is not None
        return receipt

    async def writing(self, request_id: str) -> None:
        await until(lambda: self.answers[request_id].token_ids, f"{request_id} to write")


class Rig(Gateway):
    """A gateway over pools of simulated engines. Leaving it checks that everything was given back."""

    def __init__(
        self,
        prefill: int = 1,
        decode: int = 1,
        *,
        engines: dict[str, SimulatedEngineConfig] | None = None,
        **config: Any,
    ):
        self._engine_configs = engines or {}
        self.fabric = SimulatedFabric()
        self.engines: dict[str, SimulatedEngine] = {}
        self.workers: dict[str, Worker] = {}
        self.loads: dict[str, EngineLoad] = {}
        self.leases_may_end = 0
        self.is_over = False
        self._others: list[Gateway] = []
        self._tasks: list[asyncio.Task[None]] = []
        for phase, number in ((Phase.PREFILL, prefill), (Phase.DECODE, decode)):
            for index in range(number):
                self.new_worker(phase, f"{phase}-{index}")
        self.expected = {Phase.PREFILL: prefill, Phase.DECODE: decode}
        self.transport = Tapped(list(self.workers.values()))
        super().__init__(self.transport, **{"has_prefill_pool": prefill > 0} | config)

    def new_worker(self, phase: Phase, replica_id: str) -> Worker:
        engine = self.engines[replica_id] = SimulatedEngine(
            replica_id, self._engine_configs.get(replica_id, CONFIG), self.fabric
        )
        worker_class = PrefillWorker if phase is Phase.PREFILL else DecodeWorker
        worker = self.workers[replica_id] = worker_class(replica_id, engine)
        self._tasks.append(asyncio.create_task(self._observe(worker)))
        return worker

    async def start(self) -> None:
        await self._serve(self)

    async def another_gateway(self, gateway_id: str) -> Gateway:
        """A second gateway over the same workers, ready; the rig ends it."""
        gateway = Gateway(InProcessTransport(gateway_id, list(self.workers.values())), prefix=f"{gateway_id}-")
        self._others.append(gateway)
        await self._serve(gateway)
        return gateway

    async def leave(self, gateway: Gateway) -> None:
        """A second gateway ends in the middle of whatever it does."""
        self._others.remove(gateway)
        await gateway.orchestrator.close()

    async def _serve(self, gateway: Gateway) -> None:
        self._tasks.append(asyncio.create_task(gateway.read()))
        await gateway.orchestrator.start(self.expected, timeout_s=60.0)

    async def close(self) -> None:
        for gateway in (self, *self._others):
            await gateway.orchestrator.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers.values():
            await worker.shutdown()

    async def __aenter__(self) -> "Rig":
        await self.start()
        return self

    async def __aexit__(self, error_type: Any, *_: object) -> None:
        if error_type is None and not self.is_over:
            await self.everything_given_back()
        await self.close()

    async def _observe(self, worker: Worker) -> None:
        """Another gateway: it sees a worker's load although ours may have let go of it."""
        async for report in worker.attach("observer"):
            self.loads[worker.replica_id] = report.load

    async def placed_on(self, request_id: str, replica_id: str) -> None:
        await until(lambda: self.transport.sent_to(replica_id, request_id), f"{request_id} to reach {replica_id}")

    async def ready(self, replica_id: str) -> None:
        def is_ready() -> bool:
            replica = self.cluster.get(replica_id)
            return replica is not None and replica.ready

        await until(is_ready, f"{replica_id} to be ready")

    async def lost(self, replica_id: str) -> None:
        def is_lost() -> bool:
            replica = self.cluster.get(replica_id)
            return replica is None or not replica.attached

        await until(is_lost, f"{replica_id} to be lost")

    async def loads_are_told(self) -> None:
        await asyncio.sleep(2 * LOAD_INTERVAL_S)

    async def everything_given_back(self) -> None:
        """No sequence, no token in flight, no KV block, and none came back only because a lease ended. What is known
        of cached blocks is what the engines have."""
        await self.loads_are_told()
        alive = [replica_id for replica_id, worker in self.workers.items() if worker.failure is None]
        await until(
            lambda: all(self.loads[replica_id].num_kv_blocks_used == 0 for replica_id in alive),
            "all KV blocks to be given back",
            patience_s=1.0,
        )
        for gateway in (self, *self._others):
            assert gateway.orchestrator.num_in_flight == 0
            replicas = (*gateway.cluster.pool(Phase.PREFILL), *gateway.cluster.pool(Phase.DECODE))
            held = {
                block_hash: {r.replica_id for r in replicas if block_hash in r.blocks}
                for r in replicas
                for block_hash in r.blocks
            }
            index = gateway.cluster._cached
            assert {block_hash: set(index.num_leading([block_hash])) for block_hash in held} == held
            assert len(index) == len(held)
            for replica in replicas:
                assert (replica.in_flight, replica.in_flight_tokens) == ({}, 0), replica.replica_id
                assert replica.others_in_flight == InFlight(), replica.replica_id
                engine = self.engines[replica.replica_id]
                assert set(replica.blocks) == (engine.cached_blocks if replica.attached else set()), replica.replica_id
        assert sum(load.kv_leases_expired_total for load in self.loads.values()) <= self.leases_may_end


async def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    try:
        async with asyncio.timeout(patience_s):
            while not condition():  # noqa: ASYNC110 - virtual time, and conditions of any kind
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"waited in vain for {what}") from None
