"""Owns what the Ray Serve deployments of both pools share: how a replica starts its engine and answers calls."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray import serve

from engine.protocol import EngineRequest, InvalidEngineRequestError, KVHandoff, Phase
from engine.worker import Worker

if TYPE_CHECKING:
    from engine.vllm_engine import VllmEngineConfig


@dataclass(frozen=True)
class EngineSpec:
    """What the replicas of one pool are started with; each replica adds its own id, node address and cores."""

    model: str
    phase: Phase | None
    engine_args: dict[str, Any]
    device: str
    cpu_cores: list[list[int]] = field(default_factory=list)
    lease_s: int = 30
    progress_thread_delay_us: int = 100
    ucx_tls: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def engine_config(self, replica_id: str, cpu_cores: Sequence[int], host: str) -> "VllmEngineConfig":
        """One replica's engine; `host` is the address of its node."""
        # vLLM takes seconds to import, and whoever only describes a deployment has no use for it.
        from engine.vllm_engine import VllmEngineConfig

        return VllmEngineConfig(
            replica_id=replica_id,
            model=self.model,
            phase=self.phase,
            engine_args=self.engine_args,
            device=self.device,
            cpu_cores=tuple(cpu_cores),
            host=host,
            lease_s=self.lease_s,
            progress_thread_delay_us=self.progress_thread_delay_us,
            ucx_tls=self.ucx_tls,
            env=self.env,
        )


class WorkerReplica:
    """A Ray Serve replica around one worker. Subclasses name the worker's class.

    Requests cross as MessagePack bytes. A refusal is answered, not raised: Ray would wrap an exception.
    """

    worker_class: type[Worker]

    async def __init__(self, spec: EngineSpec) -> None:
        from engine.vllm_engine import VllmEngine

        context = serve.get_replica_context()
        self._replica_id = context.replica_tag
        cores = spec.cpu_cores[context.rank.local_rank] if spec.cpu_cores else []
        logging.getLogger("ray.serve").info("starting the engine of %s on cores %s", self._replica_id, cores or "any")
        host = ray.util.get_node_ip_address()
        engine = await VllmEngine.start(spec.engine_config(self._replica_id, cores, host))
        self._worker = self.worker_class(self._replica_id, engine)

    async def hello(self) -> str:
        """Any replica's id: makes a caller's router learn the pool."""
        return self._replica_id

    async def attach(self, gateway_id: str, target: str) -> AsyncIterator[bytes]:
        encoder = msgspec.msgpack.Encoder()
        async for report in self._worker.attach(gateway_id):
            yield encoder.encode(report)

    async def submit(self, gateway_id: str, request: bytes, target: str) -> str | None:
        if target != self._replica_id:
            return f"this is {self._replica_id}, not {target}"
        try:
            await self._worker.submit(gateway_id, msgspec.msgpack.decode(request, type=EngineRequest))
        except InvalidEngineRequestError as error:
            return str(error)
        return None

    async def abort(self, gateway_id: str, request_ids: list[str], target: str) -> None:
        await self._worker.abort(gateway_id, request_ids)

    async def release(self, request_id: str, handoff: bytes, target: str) -> str | None:
        try:
            await self._worker.release(request_id, msgspec.msgpack.decode(handoff, type=KVHandoff))
        except InvalidEngineRequestError as error:
            return str(error)
        return None

    async def check_health(self) -> None:
        if self._worker.failure:
            raise self._worker.failure

    async def __del__(self) -> None:
        if worker := getattr(self, "_worker", None):
            await asyncio.shield(worker.shutdown())
