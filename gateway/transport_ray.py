"""Owns the worker transport of a Ray Serve application: Serve tells who is in each pool and introduces this gateway to
a worker; everything else goes over the link between the two (`engine.link`, docs/adr/0012).

Which replica a handle takes is decided in `gateway.request_router`.
"""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from engine.link import (
    Abort,
    Answer,
    Call,
    Farewell,
    Frames,
    LinkBroken,
    Release,
    Report,
    Submit,
    Ticket,
    connect,
    messages,
)
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


class _Link:
    """This gateway's end of one link: calls that wait for their answers."""

    def __init__(self, replica_id: str, frames: Frames):
        self._replica_id = replica_id
        self._frames = frames
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[str | None]] = {}
        self._encode = msgspec.msgpack.Encoder().encode

    async def call(self, make: Callable[[int], Call]) -> None:
        """Raises ReplicaGoneError, InvalidEngineRequestError."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._frames.send(self._encode(make(number)))
                refusal = await answer
        except TimeoutError as error:
            raise ReplicaGoneError(f"{self._replica_id} did not answer for {CALL_TIMEOUT_S:.0f} s") from error
        except LinkBroken as error:
            raise ReplicaGoneError(
                f"the link to {self._replica_id} broke: {error}", is_dead=error.peer_ended
            ) from error
        finally:
            del self._waiting[number]
        if refusal is not None:
            raise InvalidEngineRequestError(refusal)

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        """Until the link breaks; calls that wait then fail. Raises LinkBroken."""
        broken = LinkBroken("the gateway let go of it")
        try:
            async for message in messages(self._frames):
                match message:
                    case Report(report):
                        yield report
                    case Answer(number, refusal):
                        if (waiting := self._waiting.get(number)) and not waiting.done():
                            waiting.set_result(refusal)
                    case Farewell(reason, is_dead):
                        raise LinkBroken(reason, peer_ended=is_dead)
        except LinkBroken as error:
            broken = error
            raise
        finally:
            self._frames.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(broken)


class RayTransport:
    """Workers that are Ray Serve replicas. The handles' deployments are named after their phase."""

    def __init__(self, gateway_id: str, handles: Mapping[Phase, DeploymentHandle]):
        self._gateway_id = gateway_id
        self._handles = dict(handles)
        self._links: dict[str, _Link] = {}
        self._loop = asyncio.get_running_loop()

    def watch(self, changed: Callable[[Members], None]) -> None:
        def tell() -> None:
            self._loop.call_soon_threadsafe(lambda: changed(self._members()))

        POOLS.listen(tell)
        tell()

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                frames = await connect(await self._ticket(replica_id))
            link = self._links[replica_id] = _Link(replica_id, frames)
            try:
                async with contextlib.aclosing(link.reports()) as reports:
                    async for report in reports:
                        yield report
            finally:
                if self._links.get(replica_id) is link:
                    del self._links[replica_id]
        except TimeoutError as error:
            raise ReplicaGoneError(f"{replica_id} gave no link within {CALL_TIMEOUT_S:.0f} s") from error
        except LinkBroken as error:
            raise ReplicaGoneError(f"the link to {replica_id} broke: {error}", is_dead=error.peer_ended) from error
        except (RayError, RayServeException) as error:
            raise ReplicaGoneError(f"{replica_id} failed: {_brief(error)}") from error

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        await self._link(replica_id).call(lambda number: Submit(number, request))

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None:
        await self._link(replica_id).call(lambda number: Abort(number, list(request_ids)))

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        await self._link(replica_id).call(lambda number: Release(number, request_id, handoff))

    async def close(self) -> None:
        """Links end when their readers are cancelled; handles need no closing."""

    def _link(self, replica_id: str) -> _Link:
        if link := self._links.get(replica_id):
            return link
        raise ReplicaGoneError(f"there is no link to {replica_id}: it has left, or its link is being made anew")

    async def _ticket(self, replica_id: str) -> Ticket:
        handle = self._handles[self._phase(replica_id)]
        data: bytes = await handle.ticket.remote(self._gateway_id, **{TARGET: replica_id})
        return msgspec.msgpack.decode(data, type=Ticket)

    def _members(self) -> Members:
        return {replica_id: phase for phase in self._handles for replica_id in POOLS.members(phase.value)}

    def _phase(self, replica_id: str) -> Phase:
        for phase in self._handles:
            if replica_id in POOLS.members(phase.value):
                return phase
        raise ReplicaGoneError(f"{replica_id} is not in its pool any more")


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
