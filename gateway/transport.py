"""Owns the port from a gateway to its workers, and the adapter for workers in the same process."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from engine.protocol import EngineGoneError, EngineRequest, KVHandoff, Phase, WorkerReport
from engine.worker import Worker

Members = Mapping[str, Phase]


class ReplicaGoneError(RuntimeError):
    """The replica is not in its pool any more, or its process does not answer. `is_dead`: its engine has certainly
    ended; otherwise it may go on unheard."""

    def __init__(self, message: str, *, is_dead: bool = False):
        super().__init__(message)
        self.is_dead = is_dead


class WorkerTransport(Protocol):
    """How a gateway reaches workers. Every call is bounded in time and raises ReplicaGoneError when the replica is
    gone, InvalidEngineRequestError when it refuses the request."""

    def watch(self, changed: Callable[[Members], None]) -> None:
        """Calls `changed` with the members of both pools, now and whenever they change (on the event loop)."""
        ...

    def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        """Attaches; ends with ReplicaGoneError when the stream breaks."""
        ...

    async def submit(self, replica_id: str, request: EngineRequest) -> None: ...

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None: ...

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None: ...

    async def close(self) -> None: ...


class InProcessTransport:
    """Workers in this process: for simulation and tests."""

    def __init__(self, gateway_id: str, workers: Sequence[Worker]):
        self._gateway_id = gateway_id
        self._workers = {worker.replica_id: worker for worker in workers}
        self._leavers: set[str] = set()
        self._changed: list[Callable[[Members], None]] = []

    def watch(self, changed: Callable[[Members], None]) -> None:
        self._changed.append(changed)
        changed(self._members())

    def add(self, worker: Worker) -> None:
        self._workers[worker.replica_id] = worker
        self._tell()

    def leave(self, replica_id: str) -> None:
        """Takes a worker out of its pool; it can be reached until `remove`, to end what it has begun."""
        self._leavers.add(replica_id)
        self._tell()

    def remove(self, replica_id: str) -> None:
        self._workers.pop(replica_id, None)
        self._leavers.discard(replica_id)
        self._tell()

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        with _gone_with_its_engine():
            async for report in self._worker(replica_id).attach(self._gateway_id):
                yield report

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        with _gone_with_its_engine():
            await self._worker(replica_id).submit(self._gateway_id, request)

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None:
        with _gone_with_its_engine():
            await self._worker(replica_id).abort(self._gateway_id, request_ids)

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        with _gone_with_its_engine():
            await self._worker(replica_id).release(request_id, handoff)

    async def close(self) -> None:
        self._workers.clear()

    def _worker(self, replica_id: str) -> Worker:
        worker = self._workers.get(replica_id)
        if worker is None:
            raise ReplicaGoneError(f"{replica_id} is not in its pool any more")
        return worker

    def _members(self) -> Members:
        return {name: worker.phase for name, worker in self._workers.items() if name not in self._leavers}

    def _tell(self) -> None:
        for changed in self._changed:
            changed(self._members())


@contextmanager
def _gone_with_its_engine() -> Iterator[None]:
    try:
        yield
    except EngineGoneError as error:
        raise ReplicaGoneError(str(error), is_dead=True) from error
