"""Owns what a worker does in either phase: it takes requests for its engine and reports to the gateways."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from engine.blocks import BlockMirror
from engine.load import Ledger
from engine.protocol import (
    Engine,
    EngineGoneError,
    EngineLoad,
    EngineRequest,
    InFlight,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    TokenDelta,
    WorkerReport,
)
from engine.reports import Outbox

log = logging.getLogger("baton.worker")

REMEMBERED_ABORTS = 10_000
ENGINE_CALL_TIMEOUT_S = 5.0
"""How long an engine may take to take a call; it takes none to answer one, for the answers are in its steps."""


class Worker:
    """One engine, any number of gateways. Each gateway attaches once and owns the requests it submits.

    A request whose gateway is not attached is refused; when a gateway's stream ends, its requests are aborted. Every
    gateway is told of the engine's load and cached blocks, and of what all the others have in flight here. No call
    waits longer than ENGINE_CALL_TIMEOUT_S for the engine.
    """

    phase: Phase
    takes: tuple[Phase, ...]
    """What it can be asked to do."""

    def __init__(self, replica_id: str, engine: Engine):
        self.replica_id = replica_id
        self._engine = engine
        self._load = EngineLoad(num_kv_blocks_free=engine.info.num_kv_blocks)
        self._outboxes: dict[str, Outbox] = {}
        self._owners: dict[str, str] = {}
        self._in_flight: dict[str, Ledger] = {}
        self._blocks = BlockMirror(engine.info.num_kv_blocks)
        self._aborted: OrderedDict[str, str] = OrderedDict()
        self._failure: EngineGoneError | None = None
        self._failed = asyncio.Event()
        self._silent_since_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._strays: set[asyncio.Task[None]] = set()
        self._tasks = [
            asyncio.create_task(self._run(self._follow_steps), name=f"worker-steps-{replica_id}"),
            asyncio.create_task(self._run(self._follow_blocks), name=f"worker-blocks-{replica_id}"),
        ]

    @property
    def failure(self) -> EngineGoneError | None:
        """Why this worker can serve no more; None while it is well."""
        return self._failure

    async def failed(self) -> EngineGoneError:
        """Waits for the failure."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    @property
    def num_requests(self) -> int:
        """The requests of all gateways that have not ended."""
        return len(self._owners)

    @property
    def engine_silent_s(self) -> float:
        """For how long the engine has told nothing although it was to (`WorkerReport.engine_silent_s`)."""
        return 0.0 if self._silent_since_s is None else self._loop.time() - self._silent_since_s

    def check_engine(self, longest_silence_s: float) -> None:
        """Gives the engine up, like a dead one, when it has been silent for longer. Raises EngineGoneError."""
        if self._failure is None and (silent_s := self.engine_silent_s) > longest_silence_s:
            self._end(
                EngineGoneError(f"the engine of {self.replica_id} hangs: it has told nothing for {silent_s:.0f} s")
            )
        if self._failure is not None:
            raise self._failure

    async def attach(self, gateway_id: str) -> AsyncGenerator[WorkerReport, None]:
        """The report stream of one gateway. A second attachment of the same gateway replaces the first."""
        if self._failure:
            raise self._failure
        await self._let_go(gateway_id)
        outbox = Outbox(
            self.replica_id, self.phase, self._engine.info, self._load, self._blocks, lambda: self.engine_silent_s
        )
        self._outboxes[gateway_id] = outbox
        self._in_flight[gateway_id] = Ledger()
        self._tell()
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
        if request.phase not in self.takes:
            raise InvalidEngineRequestError(f"{self.replica_id} does {', '.join(self.takes)}, not {request.phase}")
        if request.request_id in self._owners:
            raise InvalidEngineRequestError(f"request {request.request_id} is already on {self.replica_id}")
        self._check(request)
        self._owners[request.request_id] = gateway_id
        self._in_flight[gateway_id].began(request.request_id, len(request.prompt_token_ids))
        self._tell()
        try:
            await self._taken(self._engine.submit(request))
        except BaseException as error:
            if isinstance(error, InvalidEngineRequestError):
                self._refused(request)
            elif self._failure is None:
                # It may have reached the engine all the same.
                self._stop_later(gateway_id, request.request_id)
            self._ended(request.request_id)
            self._tell()
            raise
        if self._silent_since_s is None and request.request_id in self._owners:
            self._silent_since_s = self._loop.time()

    async def abort(self, gateway_id: str, request_ids: Sequence[str]) -> None:
        """Stops the gateway's own requests among `request_ids`; others are ignored. Raises EngineGoneError."""
        own = [request_id for request_id in request_ids if self._owners.get(request_id) == gateway_id]
        for request_id in own:
            self._remember_abort(gateway_id, request_id)
            self._ended(request_id)
        self._tell()
        if own:
            await self._taken(self._engine.abort(own))

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        """Gives back a hand-off's blocks that nobody will fetch. Raises InvalidEngineRequestError, EngineGoneError."""
        await self._taken(self._engine.release(request_id, handoff))

    async def shutdown(self) -> None:
        tasks = [*self._tasks, *self._strays]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engine.shutdown()

    async def _taken(self, call: Coroutine[Any, Any, None]) -> None:
        """A call that the engine has taken. Raises EngineGoneError, and what the call raises."""
        try:
            async with asyncio.timeout(ENGINE_CALL_TIMEOUT_S):
                await call
        except TimeoutError as error:
            raise EngineGoneError(
                f"the engine of {self.replica_id} did not take a call within {ENGINE_CALL_TIMEOUT_S:g} s"
            ) from error

    def _stop_later(self, gateway_id: str, request_id: str) -> None:
        """Aborts a request of which nobody knows whether the engine has it, while its submitter goes on."""

        async def stop() -> None:
            try:
                await self._taken(self._engine.abort([request_id]))
            except EngineGoneError as error:
                log.warning("could not abort %s: %s", request_id, error)

        self._remember_abort(gateway_id, request_id)
        task = asyncio.create_task(stop(), name=f"worker-abort-{request_id}")
        self._strays.add(task)
        task.add_done_callback(self._strays.discard)

    def _remember_abort(self, gateway_id: str, request_id: str) -> None:
        self._aborted[request_id] = gateway_id
        while len(self._aborted) > REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)

    def _check(self, request: EngineRequest) -> None:
        """The phase's own conditions. Raises InvalidEngineRequestError."""
        raise NotImplementedError

    def _refused(self, request: EngineRequest) -> None:
        """Undoes what `_check` has noted of a request: the engine did not take it."""

    async def _let_go(self, gateway_id: str) -> None:
        if outbox := self._outboxes.pop(gateway_id, None):
            outbox.close()
        own = [request_id for request_id, owner in self._owners.items() if owner == gateway_id]
        try:
            await self.abort(gateway_id, own)
        except EngineGoneError as error:
            log.warning("could not abort what %s left: %s", gateway_id, error)
        if gateway_id not in self._outboxes:
            self._in_flight.pop(gateway_id, None)

    def _ended(self, request_id: str) -> None:
        if owner := self._owners.pop(request_id, None):
            self._in_flight[owner].ended(request_id)

    def _tell(self, deltas: Mapping[str, list[TokenDelta]] | None = None) -> None:
        """Puts the state of this worker, and each gateway's own deltas, into the outboxes."""
        all_in_flight = [ledger.in_flight for ledger in self._in_flight.values()]
        num_requests = sum(in_flight.num_requests for in_flight in all_in_flight)
        num_tokens = sum(in_flight.num_tokens for in_flight in all_in_flight)
        num_queued = sum(in_flight.num_queued_tokens for in_flight in all_in_flight)
        for gateway_id, outbox in self._outboxes.items():
            own = self._in_flight[gateway_id].in_flight
            others = InFlight(
                num_requests - own.num_requests, num_tokens - own.num_tokens, num_queued - own.num_queued_tokens
            )
            outbox.put(deltas[gateway_id] if deltas else (), self._load, others)

    async def _follow_steps(self) -> None:
        async for step in self._engine.steps():
            self._load = step.load
            deltas: dict[str, list[TokenDelta]] = {gateway_id: [] for gateway_id in self._outboxes}
            for delta in step.deltas:
                owner = self._owners.get(delta.request_id)
                if owner is not None:
                    self._in_flight[owner].wrote(delta.request_id, len(delta.token_ids))
                elif delta.handoff is not None:
                    # Prefill finished while the abort was under way: only a gateway can have the blocks released,
                    # its own or, if that one is gone, any.
                    owner = self._aborted.pop(delta.request_id, None)
                    owner = owner if owner in deltas else next(iter(deltas), None)
                if delta.finish_reason is not None:
                    self._ended(delta.request_id)
                if owner in deltas:
                    deltas[owner].append(delta)
            self._silent_since_s = self._loop.time() if self._owners else None
            self._tell(deltas)

    async def _follow_blocks(self) -> None:
        async for changes in self._engine.block_changes():
            if news := self._blocks.apply(changes):
                for outbox in self._outboxes.values():
                    outbox.put_blocks(news)

    async def _run(self, follow: Callable[[], Awaitable[None]]) -> None:
        try:
            await follow()
        except EngineGoneError as error:
            self._end(error)
        except Exception as error:
            self._end(EngineGoneError(f"{self.replica_id} lost its engine: {error!r}"))
            raise

    def _end(self, failure: EngineGoneError) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._failed.set()
        for outbox in self._outboxes.values():
            outbox.fail(failure)
