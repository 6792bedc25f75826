"""Owns what the Ray Serve deployments of both pools share: how a replica starts its engine and answers calls."""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray import serve

from engine import cores, logs
from engine.link import LinkServer
from engine.protocol import Engine, Phase
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric
from engine.termination import end_at_sigterm
from engine.vocabulary import read_vocabulary
from engine.worker import Worker

if TYPE_CHECKING:
    from engine.vllm_engine import VllmEngineConfig


@dataclass(frozen=True)
class EngineSpec:
    """What the replicas of one pool are started with; each replica adds its own id, node address and cores.

    `leaves_within_s`: how long a replica may take to leave, whose cores another one waits for. An engine that is silent
    for longer than `replace_after_s` (`Worker.check_engine`) is given up. With `simulation`
    the engines are simulated, and of what vLLM's take only `model` counts: its tokenizer.
    """

    model: str
    phase: Phase | None
    engine_args: dict[str, Any]
    device: str
    cpu_cores: list[list[int]] = field(default_factory=list)
    lease_s: int = 30
    progress_thread_delay_us: int = 100
    ucx_tls: str | None = None
    kv_format: str = ""
    reverse: bool = False
    env: dict[str, str] = field(default_factory=dict)
    simulation: SimulatedEngineConfig | None = None
    replace_after_s: float = 120.0
    leaves_within_s: float = 630.0

    def simulated_config(self) -> SimulatedEngineConfig:
        """With the vocabulary of the model's tokenizer. Raises ValueError when that cannot be used."""
        assert self.simulation is not None
        rule = replace(self.simulation.token_rule, vocabulary=read_vocabulary(self.model).plain)
        return replace(self.simulation, token_rule=rule)

    def simulated_engine(self, replica_id: str) -> SimulatedEngine:
        """Starts one replica's simulated engine. Raises ValueError as `simulated_config` does."""
        # Hand-offs stay within a fabric, and a fabric within a process: `gateway.settings` refuses split pools.
        return SimulatedEngine(replica_id, self.simulated_config(), SimulatedFabric())

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
            kv_format=self.kv_format,
            reverse=self.reverse,
            env=self.env,
        )


GC_THRESHOLDS = (10_000, 10, 50)
"""Python's are 700, 10, 10. With 10,000 streams open a whole collection stops every stream for seconds."""


def calm_garbage_collector() -> None:
    """Leaves what has been loaded so far out of garbage collections, which else take a fifth of the CPU of a token, and
    makes them rarer; references free nearly everything."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


LAST_WORDS_S = 1.0
"""How long a replica whose engine has died stays for gateways to read its farewell."""


class WorkerReplica:
    """A Ray Serve replica around one worker. Subclasses name the worker's class.

    Serve starts it, tells gateways of it and stops it; what gateways and worker have to say to each other goes over
    links of their own (`engine.link`). When the engine dies or is given up, the replica's process ends itself.
    """

    worker_class: type[Worker]

    async def __init__(self, spec: EngineSpec) -> None:
        end_at_sigterm()
        logs.begin()
        context = serve.get_replica_context()
        self._replica_id = context.replica_tag
        self._replace_after_s = spec.replace_after_s
        host = ray.util.get_node_ip_address()
        engine = await self._start_engine(spec, f"{context.app_name} {context.deployment}", host)
        self._worker = self.worker_class(self._replica_id, engine)
        self._links = await LinkServer.start(self._worker, host)
        self._ending = asyncio.create_task(self._end_with_engine())
        calm_garbage_collector()

    async def _start_engine(self, spec: EngineSpec, pool: str, host: str) -> Engine:
        """Raises TimeoutError when no cores get free."""
        log = logging.getLogger("ray.serve")
        if spec.simulation is not None:
            log.warning("the engine of %s is simulated: it computes nothing", self._replica_id)
            return spec.simulated_engine(self._replica_id)
        from engine.vllm_engine import VllmEngine

        numbers: tuple[int, ...] = ()
        if spec.cpu_cores:
            node = ray.get_runtime_context().get_node_id()
            self._cores = await cores.take(f"{node} {pool}", spec.cpu_cores, spec.leaves_within_s)
            numbers = self._cores.numbers
        log.info("starting the engine of %s on cores %s", self._replica_id, numbers or "any")
        engine = await VllmEngine.start(spec.engine_config(self._replica_id, numbers, host))
        logs.adopt("vllm")
        return engine

    async def hello(self) -> str:
        """Any replica's id: makes a caller's router learn the pool."""
        return self._replica_id

    async def ticket(self, gateway_id: str, target: str) -> bytes:
        """A `Ticket`, MessagePack: it lets this gateway open its link. Raises RuntimeError if `target` is another."""
        if target != self._replica_id:
            raise RuntimeError(f"this is {self._replica_id}, not {target}")
        return msgspec.msgpack.encode(self._links.ticket(gateway_id))

    async def check_health(self) -> None:
        """Raises EngineGoneError."""
        self._worker.check_engine(self._replace_after_s)

    async def _end_with_engine(self) -> None:
        """Ends this process once the gateways know that its engine has died.

        Serve replaces a process that is gone at its next health check, but a replica that fails them only at the
        third; and it would let that one drain, though nothing can come from it, before it took back its resources.
        Ray ends the processes that this one has started.
        """
        failure = await self._worker.failed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._links.drained()
        logging.getLogger("ray.serve").error("%s ends its process: %s", self._replica_id, failure)
        logging.shutdown()
        os._exit(1)

    async def __del__(self) -> None:
        # Serve waits for calls only, and bounds this with the drain's limit.
        if (links := getattr(self, "_links", None)) is not None and not self._worker.failure:
            await links.drained()
        if worker := getattr(self, "_worker", None):
            await asyncio.shield(worker.shutdown())
