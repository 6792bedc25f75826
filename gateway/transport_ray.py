"""Owns the Ray Serve adapter of the worker transport: calls pinned to one replica, and who is in each pool.

Which replica a handle takes is decided in `gateway.request_router`.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from engine.protocol import EngineRequest, InvalidEngineRequestError, KVHandoff, Phase, WorkerReport
from gateway.transport import Members, ReplicaGoneError

TARGET = "target"
"""The keyword argument of every worker method that names the replica it is meant for."""

CALL_TIMEOUT_S = 10.0
REQUEST_ROUTER = "gateway.request_router:PinnedRequestRouter"


class Pools:
    """The members of this process's deployments, as Ray's routers learn them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[str, tuple[str, ...]] = {}
        self._listeners: list[Callable[[], None]] = []

    def publish(self, deployment: str, replica_ids: Sequence[str]) -> None:
        with self._lock:
            self._replicas[deployment] = tuple(replica_ids)
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.append(listener)

    def members(self, deployment: str) -> tuple[str, ...]:
        with self._lock:
            return self._replicas.get(deployment, ())


POOLS = Pools()


class RayTransport:
    """Workers that are Ray Serve replicas. The handles' deployments are named after their phase."""

    def __init__(self, gateway_id: str, handles: Mapping[Phase, DeploymentHandle]):
        self._gateway_id = gateway_id
        self._handles = dict(handles)
        self._streams = {phase: handle.options(stream=True) for phase, handle in handles.items()}
        self._loop = asyncio.get_running_loop()

    async def connect(self, timeout_s: float) -> None:
        """Makes Ray's routers learn their pools. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(handle.hello.remote() for handle in self._handles.values()))

    def watch(self, changed: Callable[[Members], None]) -> None:
        def tell() -> None:
            self._loop.call_soon_threadsafe(lambda: changed(self._members()))

        POOLS.listen(tell)
        tell()

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        decoder = msgspec.msgpack.Decoder(WorkerReport)
        handle = self._streams[self._phase(replica_id)]
        stream: Any = handle.attach.remote(self._gateway_id, **{TARGET: replica_id})
        try:
            async for message in stream:
                yield decoder.decode(message)
        except (RayError, RayServeException, ReplicaGoneError) as error:
            raise ReplicaGoneError(f"the report stream of {replica_id} broke: {_brief(error)}") from error
        finally:
            stream.cancel()

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        handle = self._handles[self._phase(replica_id)]
        data = msgspec.msgpack.encode(request)
        await self._call(replica_id, handle.submit.remote(self._gateway_id, data, **{TARGET: replica_id}))

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None:
        handle = self._handles[self._phase(replica_id)]
        await self._call(replica_id, handle.abort.remote(self._gateway_id, list(request_ids), **{TARGET: replica_id}))

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        handle = self._handles[self._phase(replica_id)]
        data = msgspec.msgpack.encode(handoff)
        await self._call(replica_id, handle.release.remote(request_id, data, **{TARGET: replica_id}))

    async def close(self) -> None:
        """Streams end when their readers are cancelled; handles need no closing."""

    async def _call(self, replica_id: str, response: Awaitable[str | None]) -> None:
        """A worker's method answers None, or why it refuses the request."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                refusal = await response
        except TimeoutError as error:
            raise ReplicaGoneError(f"{replica_id} did not answer for {CALL_TIMEOUT_S:.0f} s") from error
        except (RayError, RayServeException) as error:
            raise ReplicaGoneError(f"{replica_id} failed: {_brief(error)}") from error
        if refusal is not None:
            raise InvalidEngineRequestError(refusal)

    def _members(self) -> Members:
        return {replica_id: phase for phase in self._handles for replica_id in POOLS.members(phase.value)}

    def _phase(self, replica_id: str) -> Phase:
        for phase in self._handles:
            if replica_id in POOLS.members(phase.value):
                return phase
        raise ReplicaGoneError(f"{replica_id} is not in its pool any more")


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
