"""Owns what a worker does in either phase: it takes requests for its engine and reports to the gateways."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence

from engine.protocol import (
    Engine,
    EngineGoneError,
    EngineLoad,
    EngineRequest,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    WorkerReport,
)
from engine.reports import Outbox

REMEMBERED_ABORTS = 10_000


class Worker:
    """One engine, any number of gateways. Each gateway attaches once and owns the requests it submits.

    A request whose gateway is not attached is refused; when a gateway's stream ends, its requests are aborted.
    """

    phase: Phase

    def __init__(self, replica_id: str, engine: Engine):
        self.replica_id = replica_id
        self._engine = engine
        self._load = EngineLoad()
        self._outboxes: dict[str, Outbox] = {}
        self._owners: dict[str, str] = {}
        self._aborted: OrderedDict[str, str] = OrderedDict()
        self._failure: EngineGoneError | None = None
        self._pump = asyncio.create_task(self._run(), name=f"worker-pump-{replica_id}")

    @property
    def failure(self) -> EngineGoneError | None:
        """Why this worker can serve no more; None while it is well."""
        return self._failure

    async def attach(self, gateway_id: str) -> AsyncIterator[WorkerReport]:
        """The report stream of one gateway. A second attachment of the same gateway replaces the first."""
        if self._failure:
            raise self._failure
        await self._let_go(gateway_id)
        outbox = Outbox(self.replica_id, self.phase, self._engine.info, self._load)
        self._outboxes[gateway_id] = outbox
        try:
            async for report in outbox.reports():
                yield report
        finally:
            if self._outboxes.get(gateway_id) is outbox:
                await self._let_go(gateway_id)

    async def submit(self, gateway_id: str, request: EngineRequest) -> None:
        """Raises InvalidEngineRequestError, EngineGoneError."""
        if self._failure:
            raise self._failure
        if gateway_id not in self._outboxes:
            raise InvalidEngineRequestError(f"gateway {gateway_id} is not attached to {self.replica_id}; attach first")
        if request.phase is not self.phase:
            raise InvalidEngineRequestError(f"{self.replica_id} does {self.phase}, not {request.phase}")
        if request.request_id in self._owners:
            raise InvalidEngineRequestError(f"request {request.request_id} is already on {self.replica_id}")
        self._check(request)
        self._owners[request.request_id] = gateway_id
        try:
            await self._engine.submit(request)
        except BaseException as error:
            if isinstance(error, InvalidEngineRequestError):
                self._refused(request)
            self._owners.pop(request.request_id, None)
            raise

    async def abort(self, gateway_id: str, request_ids: Sequence[str]) -> None:
        """Stops the gateway's own requests among `request_ids`; others are ignored."""
        own = [request_id for request_id in request_ids if self._owners.get(request_id) == gateway_id]
        for request_id in own:
            self._aborted[request_id] = self._owners.pop(request_id)
        while len(self._aborted) > REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)
        if own:
            await self._engine.abort(own)

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        """Gives back a hand-off's blocks that nobody will fetch."""
        await self._engine.release(request_id, handoff)

    async def shutdown(self) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await self._engine.shutdown()

    def _check(self, request: EngineRequest) -> None:
        """The phase's own conditions. Raises InvalidEngineRequestError."""
        raise NotImplementedError

    def _refused(self, request: EngineRequest) -> None:
        """Undoes what `_check` has noted of a request: the engine did not take it."""

    async def _let_go(self, gateway_id: str) -> None:
        if outbox := self._outboxes.pop(gateway_id, None):
            outbox.close()
        await self.abort(gateway_id, [rid for rid, owner in self._owners.items() if owner == gateway_id])

    async def _run(self) -> None:
        try:
            async for step in self._engine.steps():
                self._load = step.load
                deltas: dict[str, list] = {gateway_id: [] for gateway_id in self._outboxes}
                for delta in step.deltas:
                    owner = self._owners.get(delta.request_id)
                    if owner is None and delta.handoff is not None:
                        # Prefill finished while the abort was under way: only a gateway can have the blocks released,
                        # its own or, if that one is gone, any.
                        owner = self._aborted.pop(delta.request_id, None)
                        owner = owner if owner in deltas else next(iter(deltas), None)
                    if delta.finish_reason is not None:
                        self._owners.pop(delta.request_id, None)
                    if owner in deltas:
                        deltas[owner].append(delta)
                for gateway_id, outbox in self._outboxes.items():
                    outbox.put(deltas[gateway_id], step.load)
        except EngineGoneError as error:
            self._end(error)
        except Exception as error:
            self._end(EngineGoneError(f"{self.replica_id} lost its engine: {error!r}"))
            raise

    def _end(self, failure: EngineGoneError) -> None:
        self._failure = failure
        for outbox in self._outboxes.values():
            outbox.fail(failure)
