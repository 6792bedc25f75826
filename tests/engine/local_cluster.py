"""Owns a small real cluster inside the test process: vLLM engines, workers and the orchestrator, without Ray."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams

from bench.asking import asks_when_it_can
from decode.worker import DecodeWorker
from engine.protocol import Engine, EngineInfo, FinishReason, Phase, TokenDelta
from engine.vllm_codec import SamplingPayload, decode_logprobs, encode_sampling, is_resumable
from engine.vllm_engine import VllmEngine, VllmEngineConfig
from engine.worker import Worker
from gateway.orchestrator import Orchestrator, OrchestratorConfig, SequenceRequest
from gateway.routing.policies import least_tokens
from gateway.routing.receipts import Receipt, ReceiptStore
from gateway.transport import InProcessTransport
from prefill.worker import PrefillWorker

MODEL = str(Path(__file__).parents[2] / "configs" / "models" / "mini")
BLOCK = 32
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 8192,
    # Small enough that a prompt of 4,000 tokens is prefilled in chunks.
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 30,
    "enforce_eager": True,
}
DEADLINE_S = 180.0
WORKERS: Mapping[Phase, type[Worker]] = {Phase.PREFILL: PrefillWorker, Phase.DECODE: DecodeWorker}


def engine_config(replica_id: str, phase: Phase | None, core: int, **changes: Any) -> VllmEngineConfig:
    return VllmEngineConfig(
        replica_id=replica_id,
        model=MODEL,
        phase=phase,
        engine_args=ENGINE_ARGS | changes,
        device="cpu",
        cpu_cores=(core,),
        ucx_tls="tcp,sm,self",
    )


@dataclass
class Answer:
    """Everything one sequence produced."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    receipt: Receipt | None = None


class LocalCluster:
    def __init__(self, engines: Mapping[str, Engine], phases: Mapping[str, Phase], reverse: bool = False):
        self.engines = dict(engines)
        self._reverse = reverse
        self.phases = dict(phases)
        self._ids = itertools.count()
        self._answers: dict[str, tuple[Answer, asyncio.Future[None]]] = {}

    async def start(self) -> None:
        self.workers = {rid: WORKERS[self.phases[rid]](rid, engine) for rid, engine in self.engines.items()}
        self.transport = InProcessTransport("test-gateway", list(self.workers.values()))
        warm_up = encode_sampling(SamplingPayload(SamplingParams(max_tokens=1, temperature=0.0)))
        self.orchestrator = Orchestrator(
            self.transport,
            asks_when_it_can if self._reverse else least_tokens,
            ReceiptStore(1000),
            OrchestratorConfig(60.0, 1000, warm_up, can_ask=self._reverse),
        )
        expected = {phase: list(self.phases.values()).count(phase) for phase in Phase}
        self._reader = asyncio.create_task(self._read())
        await self.orchestrator.start(expected, DEADLINE_S)

    async def close(self) -> None:
        self._reader.cancel()
        await self.orchestrator.close()
        for worker in self.workers.values():
            await worker.shutdown()

    async def ask(self, prompt: list[int], params: SamplingParams, cache_salt: str | None = None) -> Answer:
        """Runs one request through the cluster and waits for its end."""
        request_id, answer, done = self.submit(prompt, params, cache_salt)
        async with asyncio.timeout(DEADLINE_S):
            await done
        answer.receipt = self.orchestrator.receipts.get(request_id)
        return answer

    def submit(
        self, prompt: list[int], params: SamplingParams, cache_salt: str | None = None
    ) -> tuple[str, Answer, asyncio.Future[None]]:
        request_id = f"request-{next(self._ids)}"
        answer, done = Answer(), asyncio.get_running_loop().create_future()
        self._answers[request_id] = answer, done
        assert params.max_tokens is not None
        self.orchestrator.add(
            SequenceRequest(
                request_id,
                prompt,
                params.max_tokens,
                encode_sampling(SamplingPayload(params)),
                cache_salt=cache_salt,
                needs_whole_prompt=params.prompt_logprobs is not None,
                resumable=is_resumable(params),
            ),
            self.orchestrator.new_group(request_id, 1),
        )
        return request_id, answer, done

    def load(self, replica_id: str) -> Any:
        replica = self.orchestrator.cluster.get(replica_id)
        assert replica is not None
        return replica.load

    def info(self, replica_id: str) -> EngineInfo:
        return self.engines[replica_id].info

    async def until(self, condition: Any, what: str, deadline_s: float = 30.0) -> None:
        """Waits for a condition that reports make true."""
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():  # noqa: ASYNC110  reports offer no event for an arbitrary condition
                    await asyncio.sleep(0.01)
        except TimeoutError:
            loads = {rid: self.load(rid) for rid in self.engines}
            raise AssertionError(f"not within {deadline_s} s: {what}; loads {loads}") from None

    async def quiet(self) -> None:
        """Waits until nothing is in flight and no engine holds a KV block."""

        def is_quiet() -> bool:
            loads = [self.load(rid) for rid in self.engines]
            return self.orchestrator.num_in_flight == 0 and not any(
                load.num_running_requests or load.num_waiting_requests or load.num_kv_blocks_used for load in loads
            )

        # Well below the lease: blocks must be given back, not run out.
        await self.until(is_quiet, "nothing in flight, no KV block used", deadline_s=15.0)

    async def _read(self) -> None:
        while True:
            for delta in await self.orchestrator.next_deltas():
                answer, done = self._answers[delta.request_id]
                self._fold(answer, delta)
                if delta.finish_reason is not None and not done.done():
                    done.set_result(None)

    @staticmethod
    def _fold(answer: Answer, delta: TokenDelta) -> None:
        answer.token_ids += delta.token_ids
        answer.finish_reason = delta.finish_reason or answer.finish_reason
        answer.error = delta.error or answer.error
        if delta.logprobs is not None:
            new = decode_logprobs(delta.logprobs).new
            answer.logprobs += [float(row[0]) for row in new.logprobs] if new is not None else []


@contextlib.asynccontextmanager
async def local_cluster(
    prefill: int, decode: int, *, reverse: bool = False, **engine_args: Any
) -> AsyncIterator[LocalCluster]:
    """Starts `prefill` + `decode` engines on this machine's two cores: prefill on core 0, decode on core 1. With
    `reverse` they hand over in both directions, and decode is asked whenever it has more cached."""
    phases = {f"prefill-{i}": Phase.PREFILL for i in range(prefill)}
    phases |= {f"decode-{i}": Phase.DECODE for i in range(decode)}
    engines: dict[str, VllmEngine] = {}
    try:
        for replica_id, phase in phases.items():
            role = phase if prefill else None
            core = 0 if phase is Phase.PREFILL else 1
            config = replace(engine_config(replica_id, role, core, **engine_args), reverse=reverse)
            engines[replica_id] = await VllmEngine.start(config)
    except BaseException:
        for engine in engines.values():
            await engine.shutdown()
        raise
    cluster = LocalCluster(engines, phases, reverse)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()
