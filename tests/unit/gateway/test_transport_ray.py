"""The Ray transport with a real worker and real links, and a handle that stands in for Serve's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
from ray.exceptions import ActorDiedError

from decode.worker import DecodeWorker
from engine.link import LinkServer, Ticket
from engine.protocol import (
    EngineGoneError,
    EngineRequest,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    TokenDelta,
    WorkerReport,
)
from gateway import transport_ray
from gateway.transport import ReplicaGoneError
from gateway.transport_ray import TARGET, Pools, RayTransport
from tests.unit.engine.test_worker import ScriptedEngine

HOST = "127.0.0.1"
WORKER = "decode-0"
SOON_S = 0.2
PATIENCE_S = 10.0

Tickets = Callable[[str, str], Awaitable[Ticket]]


class Method:
    def __init__(self, tickets: Tickets):
        self._tickets = tickets

    async def remote(self, gateway_id: str, **kwargs: Any) -> bytes:
        return msgspec.msgpack.encode(await self._tickets(gateway_id, kwargs[TARGET]))


class Handle:
    """A deployment handle whose replicas give the tickets of `tickets`."""

    def __init__(self, tickets: Tickets):
        self.ticket = Method(tickets)


class Stage:
    """One worker in the decode pool, and one gateway's transport."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = ScriptedEngine()
        self.reports: list[WorkerReport] = []
        self.pools = Pools()
        monkeypatch.setattr(transport_ray, "POOLS", self.pools)
        self.pools.publish("decode", [WORKER])

    async def start(self) -> None:
        self.worker = DecodeWorker(WORKER, self.engine)
        self.server = await LinkServer.start(self.worker, HOST)
        self.transport = self.transport_with(self.give_ticket)

    async def close(self) -> None:
        await self.server.close()
        await self.worker.shutdown()

    async def give_ticket(self, gateway_id: str, target: str) -> Ticket:
        assert target == WORKER
        return self.server.ticket(gateway_id)

    def transport_with(self, tickets: Tickets) -> RayTransport:
        return RayTransport("gateway-0", {Phase.DECODE: cast(Any, Handle(tickets))})

    async def follow(self) -> None:
        async for report in self.transport.reports(WORKER):
            self.reports.append(report)

    @asynccontextmanager
    async def attached(self) -> AsyncIterator["asyncio.Task[None]"]:
        """The task that reads the reports, once the first has come."""
        task = asyncio.create_task(self.follow())
        try:
            await until(lambda: self.reports)
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def holds_up_submissions(self) -> None:
        async def submit(request: EngineRequest) -> None:
            await asyncio.Event().wait()

        self.engine.submit = submit


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    stage = Stage(monkeypatch)
    await stage.start()
    yield stage
    await stage.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  the sockets between the two offer no event
            await asyncio.sleep(0.001)


def request(request_id: str = "r") -> EngineRequest:
    return EngineRequest(request_id, Phase.DECODE, [1, 2, 3], 4)


async def test_what_is_submitted_is_reported_until_it_ends(stage: Stage):
    async with stage.attached():
        await stage.transport.submit(WORKER, request())
        await stage.engine.step(TokenDelta("r", [5], FinishReason.LENGTH))
        await until(lambda: stage.reports[-1].deltas)
    assert stage.reports[-1].deltas == [TokenDelta("r", [5], FinishReason.LENGTH)]


async def test_aborts_and_releases_return_when_the_worker_has_done_them(stage: Stage):
    handoff = KVHandoff("prefill-0", "p", 3, 1, b"")
    async with stage.attached():
        await stage.transport.submit(WORKER, request())
        await stage.transport.abort(WORKER, ["r"])
        assert stage.engine.aborted == ["r"]
        await stage.transport.release(WORKER, "release-p", handoff)
        assert stage.engine.released == [handoff]


async def test_calls_at_once_get_their_own_answers(stage: Stage):
    async with stage.attached():
        good = [stage.transport.submit(WORKER, request(f"r{number}")) for number in range(20)]
        bad = [stage.transport.submit(WORKER, request(f"r{number}")) for number in range(20)]
        pairs = zip(good, bad, strict=True)
        answers = await asyncio.gather(*(call for pair in pairs for call in pair), return_exceptions=True)
    assert answers[::2] == [None] * 20
    assert all(isinstance(answer, InvalidEngineRequestError) for answer in answers[1::2])


async def test_a_refusal_is_an_invalid_request_with_the_workers_reason(stage: Stage):
    async with stage.attached():
        await stage.transport.submit(WORKER, request())
        with pytest.raises(InvalidEngineRequestError, match=r"request r is already on decode-0"):
            await stage.transport.submit(WORKER, request())


async def test_when_the_link_is_cut_reports_end_and_calls_that_wait_fail(stage: Stage):
    stage.holds_up_submissions()
    async with stage.attached() as reader:
        calls = [asyncio.create_task(stage.transport.submit(WORKER, request(f"r{number}"))) for number in range(3)]
        await until(lambda: stage.worker._owners)
        await stage.server.close()
        async with asyncio.timeout(PATIENCE_S):
            for task in (reader, *calls):
                with pytest.raises(ReplicaGoneError, match=f"the link to {WORKER} broke"):
                    await task


async def test_a_dead_engine_is_a_gone_replica_with_the_reason(stage: Stage):
    async with stage.attached() as reader:
        await stage.engine.fail(EngineGoneError("the engine is dead"))
        with pytest.raises(ReplicaGoneError, match="the engine is dead") as gone:
            await asyncio.wait_for(reader, PATIENCE_S)
        assert gone.value.is_dead


async def test_a_link_that_a_living_worker_ends_is_no_death(stage: Stage):
    async with stage.attached() as reader:
        stage.engine.refusal = EngineGoneError("the engine did not take a call")
        with pytest.raises(ReplicaGoneError, match="did not take a call") as gone:
            await stage.transport.submit(WORKER, request())
        assert not gone.value.is_dead
        with pytest.raises(ReplicaGoneError) as gone:
            await asyncio.wait_for(reader, PATIENCE_S)
        assert not gone.value.is_dead


async def test_when_the_gateway_lets_go_calls_that_wait_fail(stage: Stage):
    stage.holds_up_submissions()
    async with stage.attached() as reader:
        call = asyncio.create_task(stage.transport.submit(WORKER, request()))
        await until(lambda: stage.worker._owners)
        reader.cancel()
        with pytest.raises(ReplicaGoneError, match="let go"):
            await asyncio.wait_for(call, PATIENCE_S)


async def test_a_worker_has_drained_once_the_gateway_has_let_go(stage: Stage):
    async with stage.attached():
        await stage.transport.submit(WORKER, request())
    await asyncio.wait_for(stage.server.drained(), PATIENCE_S)
    assert stage.engine.aborted == ["r"]


async def test_without_a_link_no_call_is_made(stage: Stage):
    with pytest.raises(ReplicaGoneError, match="no link"):
        await stage.transport.submit(WORKER, request())
    async with stage.attached():
        await stage.transport.submit(WORKER, request())
    with pytest.raises(ReplicaGoneError, match="no link"):
        await stage.transport.abort(WORKER, ["r"])


async def test_a_call_that_is_never_answered_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    stage.holds_up_submissions()
    async with stage.attached() as reader:
        monkeypatch.setattr(transport_ray, "CALL_TIMEOUT_S", SOON_S)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ReplicaGoneError, match="did not answer"):
                await stage.transport.submit(WORKER, request())
        assert not reader.done()


async def test_a_worker_that_stops_reading_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    stage.holds_up_submissions()
    async with stage.attached():
        monkeypatch.setattr(transport_ray, "CALL_TIMEOUT_S", SOON_S)
        large = msgspec.structs.replace(request(), sampling=b"x" * 8 * 1024 * 1024)
        calls = [stage.transport.submit(WORKER, large) for _ in range(4)]
        async with asyncio.timeout(PATIENCE_S):
            errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, ReplicaGoneError) for error in errors)


async def test_a_replica_whose_process_is_dead_gives_no_ticket(stage: Stage):
    async def dead(gateway_id: str, target: str) -> Ticket:
        raise ActorDiedError

    stage.transport = stage.transport_with(dead)
    with pytest.raises(ReplicaGoneError, match=f"{WORKER} failed"):
        await asyncio.wait_for(stage.follow(), PATIENCE_S)


async def test_a_replica_that_gives_no_ticket_in_time_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    async def hanging(gateway_id: str, target: str) -> Ticket:
        await asyncio.Event().wait()
        raise AssertionError

    stage.transport = stage.transport_with(hanging)
    monkeypatch.setattr(transport_ray, "CALL_TIMEOUT_S", SOON_S)
    with pytest.raises(ReplicaGoneError, match="gave no link"):
        await asyncio.wait_for(stage.follow(), PATIENCE_S)


async def test_a_ticket_to_where_nobody_listens_is_a_gone_replica(stage: Stage):
    ticket = stage.server.ticket("gateway-0")
    await stage.server.close()

    async def late(gateway_id: str, target: str) -> Ticket:
        return ticket

    stage.transport = stage.transport_with(late)
    with pytest.raises(ReplicaGoneError, match="the link to"):
        await asyncio.wait_for(stage.follow(), PATIENCE_S)


async def test_a_replica_outside_its_pool_is_asked_for_nothing(stage: Stage):
    stage.pools.publish("decode", [])
    with pytest.raises(ReplicaGoneError, match="not in its pool"):
        await asyncio.wait_for(stage.follow(), PATIENCE_S)


async def test_members_are_told_now_and_at_each_change(stage: Stage):
    told: list[dict[str, Phase]] = []
    stage.transport.watch(lambda members: told.append(dict(members)))
    await until(lambda: told)
    stage.pools.publish("decode", [WORKER, "decode-1"])
    await until(lambda: len(told) == 2)
    assert told == [{WORKER: Phase.DECODE}, {WORKER: Phase.DECODE, "decode-1": Phase.DECODE}]
