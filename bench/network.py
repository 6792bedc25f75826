"""Owns the network of a simulated world: calls and reports take time, links break, workers hang.

A worker that hangs does nothing until it wakes up, then everything that has reached it meanwhile, in order, also calls
whose callers have given up. Its engine, another process, goes on. A gateway that hangs gets everything that was sent to
it when it goes on, except that a worker ends a stream that has not been read for too long.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from bench.process import Process
from engine.protocol import EngineGoneError, EngineRequest, InvalidEngineRequestError, KVHandoff, Phase, WorkerReport
from engine.simulated import SimulatedEngine
from engine.worker import Worker
from gateway.transport import Members, ReplicaGoneError

CALL_TIMEOUT_S = 10.0
MAX_DELAY_S = 0.004
SLOW_SHARE = 0.03
MAX_SLOW_DELAY_S = 0.6
"""Longer than an engine's step: what belongs together is then torn apart."""
ORDER_S = 1e-9
"""Reports of one link arrive at least so far apart: timers that are due at once run in no order."""

UNREAD_S = 3.0
"""A stream without room for further reports is ended by its worker's side after so long."""
ROOM_LOOK_S = 0.1


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Node:
    """One replica. `awake` is cleared while its worker hangs; `is_member`: the gateways are told of it."""

    replica_id: str
    phase: Phase
    engine: SimulatedEngine
    worker: Worker
    is_member: bool = True
    num_links: int = 0
    awake: asyncio.Event = field(default_factory=_set_event)


class Network:
    """The replicas that gateways can reach, and everything that is on its way."""

    def __init__(self, draw: random.Random):
        self.nodes: dict[str, Node] = {}
        self.num_reports = 0
        self.loop = asyncio.get_running_loop()
        self._draw = draw
        self._transports: list[SimulatedTransport] = []
        # A dictionary, because a set has no order, and what is cancelled first must not depend on addresses.
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._errors: list[BaseException] = []

    @property
    def members(self) -> Members:
        return {node.replica_id: node.phase for node in self.nodes.values() if node.is_member}

    def add(self, node: Node) -> None:
        self.nodes[node.replica_id] = node
        self._tell()

    def leave_pool(self, node: Node) -> None:
        """No gateway is to send it anything new; what it holds goes on, and it stays within reach."""
        node.is_member = False
        self._tell()

    def connect(self, transport: "SimulatedTransport") -> None:
        self._transports.append(transport)

    def disconnect(self, transport: "SimulatedTransport") -> None:
        if transport in self._transports:
            self._transports.remove(transport)

    def delay_s(self) -> float:
        slow = self._draw.random() < SLOW_SHARE
        return self._draw.random() * (MAX_SLOW_DELAY_S if slow else MAX_DELAY_S)

    def draw_bool(self) -> bool:
        return self._draw.random() < 0.5

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work of the network or of a worker, whoever asks for it."""
        task = self.loop.create_task(work, context=Context())
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def take_errors(self) -> list[BaseException]:
        """What nobody has caught since the last call."""
        errors, self._errors = self._errors, []
        return errors

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tell(self) -> None:
        for transport in self._transports:
            transport.tell(self.members)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()):
            self._errors.append(error)


class _Link:
    """The gateway's end of one report stream."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop):
        self.node = node
        self.pump: asyncio.Task[None] | None = None
        self.is_cut = False
        self._loop = loop
        self._arrived: deque[WorkerReport | ReplicaGoneError] = deque()
        self._arrival_s = 0.0
        self._waiter: asyncio.Future[None] | None = None

    def send(self, item: WorkerReport | ReplicaGoneError, delay_s: float) -> None:
        self._arrival_s = max(self._loop.time() + delay_s, self._arrival_s + ORDER_S)
        self._loop.call_at(self._arrival_s, self._arrive, item)

    def cut(self, error: ReplicaGoneError) -> None:
        """The gateway sees the stream break now; what is on its way is lost."""
        self._arrived.clear()
        self._arrive(error)
        self.is_cut = True

    @property
    def num_unread(self) -> int:
        return len(self._arrived)

    async def next(self) -> WorkerReport:
        """Raises ReplicaGoneError at the end of the stream."""
        if not self._arrived:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._arrived.popleft()
        if isinstance(item, ReplicaGoneError):
            raise item
        return item

    def _arrive(self, item: WorkerReport | ReplicaGoneError) -> None:
        if self.is_cut:
            return
        self._arrived.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SimulatedTransport:
    """One gateway's way to the workers (`gateway.transport.WorkerTransport`)."""

    def __init__(self, gateway_id: str, network: Network, process: Process):
        self.detach_delay_s = 0.0
        """How long workers take to notice that a stream has ended, beside the way there."""
        self.room_reports: int | None = None
        """How many reports a stream holds that the gateway has not read; None: any number."""
        self.num_unread = 0
        """Streams that have ended because they were not read."""
        self._gateway_id = gateway_id
        self._network = network
        self._process = process
        self._changed: Callable[[Members], None] = lambda members: None
        self._links: dict[str, _Link] = {}
        self._broken_until_s: dict[str, float] = {}
        network.connect(self)

    def watch(self, changed: Callable[[Members], None]) -> None:
        self._changed = changed
        changed(self._network.members)

    def tell(self, members: Members) -> None:
        self._process.call(self._changed, members)

    async def reports(self, replica_id: str) -> AsyncIterator[WorkerReport]:
        node = self._node(replica_id)
        link = self._links[replica_id] = _Link(node, self._network.loop)
        link.pump = self._network.spawn(self._pump(link))
        node.num_links += 1
        try:
            while True:
                yield await link.next()
        finally:
            if self._links.get(replica_id) is link:
                del self._links[replica_id]
            self._network.spawn(self._detach(link))

    async def submit(self, replica_id: str, request: EngineRequest) -> None:
        await self._call(replica_id, lambda worker: worker.submit(self._gateway_id, request))

    async def abort(self, replica_id: str, request_ids: Sequence[str]) -> None:
        await self._call(replica_id, lambda worker: worker.abort(self._gateway_id, request_ids))

    async def release(self, replica_id: str, request_id: str, handoff: KVHandoff) -> None:
        await self._call(replica_id, lambda worker: worker.release(request_id, handoff))

    async def close(self) -> None:
        self._network.disconnect(self)

    def break_link(self, replica_id: str, for_s: float, noticed_after_s: float) -> bool:
        """Breaks the way to a replica for a while, with what is on it; the worker notices when it is told to. False if
        there was no stream."""
        link = self._links.get(replica_id)
        if link is None:
            return False
        self._broken_until_s[replica_id] = self._network.loop.time() + for_s
        self.detach_delay_s = noticed_after_s
        link.cut(ReplicaGoneError(f"the link to {replica_id} broke"))
        return True

    # -- ways there and back

    def _node(self, replica_id: str) -> Node:
        node = self._network.nodes.get(replica_id)
        if node is None:
            raise ReplicaGoneError(f"{replica_id} is not in its pool any more")
        if self._is_broken(replica_id):
            raise ReplicaGoneError(f"there is no way to {replica_id}")
        return node

    def _is_broken(self, replica_id: str) -> bool:
        return self._broken_until_s.get(replica_id, 0.0) > self._network.loop.time()

    async def _call(self, replica_id: str, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        """The call goes its way, also when the gateway hangs or has given it up meanwhile."""
        network, node = self._network, self._node(replica_id)
        answer: asyncio.Future[None] = network.loop.create_future()

        async def carry() -> None:
            error: Exception | None = None
            try:
                await self._carry(node, work)
            except (ReplicaGoneError, InvalidEngineRequestError) as caught:
                error = caught
            if answer.done():
                return
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

        network.spawn(carry())
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await answer
        except TimeoutError:
            raise ReplicaGoneError(f"{replica_id} does not answer") from None

    async def _carry(self, node: Node, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        network, replica_id = self._network, node.replica_id
        await asyncio.sleep(network.delay_s())
        if self._is_broken(replica_id) and network.draw_bool():
            raise ReplicaGoneError(f"the call to {replica_id} was lost")
        await node.awake.wait()
        await _carried_out(node, work)
        await asyncio.sleep(network.delay_s())
        if self._is_broken(replica_id):
            raise ReplicaGoneError(f"the answer of {replica_id} was lost")

    async def _pump(self, link: _Link) -> None:
        """The worker's end of a stream."""
        network, node = self._network, link.node
        await asyncio.sleep(network.delay_s())
        await node.awake.wait()
        try:
            end = ReplicaGoneError(f"{node.replica_id} ended its stream")
            async with aclosing(node.worker.attach(self._gateway_id)) as reports:
                async for report in reports:
                    if not node.awake.is_set():
                        await node.awake.wait()
                    if not await self._has_room(link):
                        self.num_unread += 1
                        # As a reset connection looks to a gateway: the process at its other end may have gone.
                        end = ReplicaGoneError(f"{node.replica_id} reset its stream", is_dead=True)
                        break
                    network.num_reports += 1
                    link.send(report, network.delay_s())
        except EngineGoneError as error:
            end = ReplicaGoneError(str(error), is_dead=True)
        link.send(end, network.delay_s())

    async def _has_room(self, link: _Link) -> bool:
        num_looks = 0
        while self.room_reports is not None and link.num_unread >= self.room_reports:
            if num_looks == int(UNREAD_S / ROOM_LOOK_S):
                return False
            num_looks += 1
            await asyncio.sleep(ROOM_LOOK_S)
        return True

    async def _detach(self, link: _Link) -> None:
        await asyncio.sleep(self.detach_delay_s + self._network.delay_s())
        await link.node.awake.wait()
        assert link.pump is not None
        link.pump.cancel()
        await asyncio.gather(link.pump, return_exceptions=True)
        link.node.num_links -= 1


async def _carried_out(node: Node, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    try:
        await work(node.worker)
    except EngineGoneError as error:
        raise ReplicaGoneError(str(error), is_dead=True) from error
