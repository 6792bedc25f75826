"""A link between a gateway and a worker, over real sockets: who gets one, what crosses it, and what its end means."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
import pytest

from decode.worker import DecodeWorker
from engine import link
from engine.link import (
    HEADER,
    Abort,
    Answer,
    Call,
    Farewell,
    Frames,
    FromWorker,
    Hello,
    LinkBroken,
    LinkServer,
    Report,
    Submit,
    Ticket,
    connect,
    messages,
)
from engine.protocol import EngineGoneError, EngineRequest, FinishReason, Phase, TokenDelta
from tests.unit.engine.test_worker import ScriptedEngine

T = TypeVar("T", Answer, Report, Farewell)
HOST = "127.0.0.1"
PATIENCE_S = 10.0


def request(request_id: str, phase: Phase = Phase.DECODE) -> EngineRequest:
    return EngineRequest(request_id, phase, [1, 2, 3], 4)


class Stage:
    """A worker over a scripted engine, with its links open to whoever has a ticket."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()

    async def start(self) -> None:
        self.worker = DecodeWorker("decode-0", self.engine)
        self.server = await LinkServer.start(self.worker, HOST)

    async def close(self) -> None:
        await self.server.close()
        await self.worker.shutdown()

    async def gateway(self, gateway_id: str) -> "Gateway":
        gateway = Gateway(await connect(self.server.ticket(gateway_id)))
        report = await gateway.next(Report)
        assert report.report.info == self.engine.info
        return gateway


class Gateway:
    def __init__(self, frames: Frames):
        self.frames = frames
        self._messages = messages(frames)

    async def send(self, call: Call) -> None:
        await self.frames.send(msgspec.msgpack.encode(call))

    async def next(self, kind: type[T]) -> T:
        async with asyncio.timeout(PATIENCE_S):
            async for message in self._messages:
                if isinstance(message, kind):
                    return message
        raise AssertionError("the link has ended")

    async def ended(self) -> LinkBroken:
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for message in self._messages:
                    if isinstance(message, Farewell):
                        self.frames.close()
                        return LinkBroken(message.reason, peer_ended=message.is_dead)
        except LinkBroken as broken:
            return broken
        raise AssertionError("the link has ended without an error")


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    await stage.start()
    yield stage
    await stage.close()


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  the sockets between the two offer no event
            await asyncio.sleep(0.001)


async def test_calls_are_answered_and_deltas_reported(stage: Stage):
    gateway = await stage.gateway("a")
    await gateway.send(Submit(7, request("r")))
    assert await gateway.next(Answer) == Answer(7)
    await stage.engine.step(TokenDelta("r", [5], FinishReason.LENGTH))
    report = await gateway.next(Report)
    assert [delta.token_ids for delta in report.report.deltas] == [[5]]


async def test_a_refusal_is_answered_with_its_reason(stage: Stage):
    gateway = await stage.gateway("a")
    await gateway.send(Submit(1, request("r")))
    assert await gateway.next(Answer) == Answer(1)
    await gateway.send(Submit(2, request("r")))
    assert "request r is already on decode-0" in ((await gateway.next(Answer)).refusal or "")


async def test_an_abort_never_overtakes_its_submission(stage: Stage):
    gateway = await stage.gateway("a")
    gate = stage.engine.gate = asyncio.Event()
    await gateway.send(Submit(1, request("r")))
    await gateway.send(Abort(2, ["r"]))
    gate.set()
    assert [await gateway.next(Answer), await gateway.next(Answer)] == [Answer(1), Answer(2)]
    assert (stage.engine.submitted, stage.engine.aborted) == (["r"], ["r"])


async def test_requests_of_a_gateway_whose_connection_ends_are_aborted(stage: Stage):
    gateway, other = await stage.gateway("a"), await stage.gateway("b")
    await gateway.send(Submit(1, request("of-a")))
    await other.send(Submit(1, request("of-b")))
    await gateway.next(Answer)
    await other.next(Answer)
    gateway.frames.close()
    await until(lambda: stage.engine.aborted == ["of-a"])
    assert stage.server.gateway_ids == ["b"]


async def test_a_gateway_that_vanishes_is_noticed_although_a_call_is_stuck(stage: Stage):
    gateway = await stage.gateway("a")
    await gateway.send(Submit(1, request("r1")))
    await gateway.next(Answer)
    gate = stage.engine.gate = asyncio.Event()
    await gateway.send(Submit(2, request("r2")))
    await gateway.send(Submit(3, request("r3")))
    await until(lambda: stage.worker.num_requests == 2)
    gateway.frames.close()
    await until(lambda: stage.worker.num_requests == 0)
    gate.set()
    await until(lambda: set(stage.engine.aborted) == {"r1", "r2"})
    assert stage.engine.submitted == ["r1"]
    await until(lambda: stage.server.gateway_ids == [])


async def test_a_gateway_that_reads_nothing_for_long_is_gone(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "UNACKNOWLEDGED_MS", 100)
    gateway = await stage.gateway("a")
    await gateway.send(Submit(1, request("r")))
    await gateway.next(Answer)
    gateway.frames._reader._transport.pause_reading()
    for _ in range(32):
        await stage.engine.step(TokenDelta("r", [1_000_000] * 100_000))
    await until(lambda: stage.engine.aborted == ["r"])
    await until(lambda: stage.server.gateway_ids == [])


async def test_calls_that_a_dead_engine_cannot_answer_do_not_overtake_its_farewell(stage: Stage):
    gateway = await stage.gateway("a")
    gate = stage.engine.gate = asyncio.Event()
    stage.engine.refusal = EngineGoneError("not taken")
    refused: list[str] = []
    submit = stage.worker.submit

    async def noted_submit(gateway_id: str, request: EngineRequest) -> None:
        try:
            await submit(gateway_id, request)
        finally:
            refused.append(request.request_id)

    stage.worker.submit = noted_submit
    await gateway.send(Submit(1, request("r1")))
    await gateway.send(Submit(2, request("r2")))
    await until(lambda: stage.worker.num_requests == 1)
    await stage.engine.fail(EngineGoneError("the engine is dead"))
    gate.set()
    await until(lambda: refused == ["r1", "r2"])
    assert stage.server.gateway_ids == ["a"]
    assert await gateway.next(Farewell) == Farewell("the engine is dead", is_dead=True)


async def test_a_worker_that_ends_a_link_but_lives_says_so(stage: Stage):
    gateway = await stage.gateway("a")
    stage.engine.refusal = EngineGoneError("the engine did not take a call")
    await gateway.send(Submit(1, request("r")))
    broken = await gateway.ended()
    assert (str(broken), broken.peer_ended) == ("the engine did not take a call", False)
    stage.engine.refusal = None
    await stage.gateway("a")


async def test_the_death_of_the_engine_is_told_with_its_reason(stage: Stage):
    gateway = await stage.gateway("a")
    await stage.engine.fail(EngineGoneError("the engine is dead"))
    assert await gateway.next(Farewell) == Farewell("the engine is dead", is_dead=True)


async def test_a_worker_that_stops_ends_its_links_without_noise(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "HELLO_TIMEOUT_S", 3600.0)
    gateway = await stage.gateway("a")
    noise: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: noise.append(context))
    try:
        stranger, mute = await asyncio.open_connection(HOST, stage.server.ticket("b").port)
        await until(lambda: stage.server.num_strangers == 1)
        async with asyncio.timeout(PATIENCE_S):
            await stage.server.close()
            with contextlib.suppress(ConnectionResetError):
                assert await stranger.read() == b""
        await gateway.ended()
        mute.close()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert noise == []


async def test_a_worker_has_drained_when_the_last_gateway_has_let_go(stage: Stage):
    first, second = await stage.gateway("a"), await stage.gateway("b")
    drained = asyncio.create_task(stage.server.drained())
    first.frames.close()
    await until(lambda: stage.server.gateway_ids == ["b"])
    assert not drained.done()
    second.frames.close()
    async with asyncio.timeout(PATIENCE_S):
        await drained


async def test_a_gateway_that_attaches_again_replaces_its_first_link(stage: Stage):
    first = await stage.gateway("a")
    await stage.gateway("a")
    await first.ended()
    assert stage.server.gateway_ids == ["a"]


async def refused(ticket: Ticket) -> bool:
    gateway = Gateway(await connect(ticket))
    await gateway.ended()
    return True


async def test_a_ticket_opens_one_link(stage: Stage):
    ticket = stage.server.ticket("a")
    gateway = Gateway(await connect(ticket))
    await gateway.next(Report)
    assert await refused(ticket)


async def test_a_secret_that_was_never_given_out_opens_nothing(stage: Stage):
    assert await refused(msgspec.structs.replace(stage.server.ticket("a"), secret=b"x" * 32))


async def test_a_ticket_grows_old(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "TICKET_LIFE_S", 0.0)
    assert await refused(stage.server.ticket("a"))


async def test_tickets_that_nobody_uses_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "MAX_TICKETS", 2)
    oldest, *others = [stage.server.ticket(name) for name in "abc"]
    assert await refused(oldest)
    for ticket in others:
        await Gateway(await connect(ticket)).next(Report)


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(3) + b"\xff\xff\xff",
        HEADER.pack(2**31),
        HEADER.pack(len(msgspec.msgpack.encode(Abort(1, [])))) + msgspec.msgpack.encode(Abort(1, [])),
    ],
    ids=["not MessagePack", "too long", "a call before the hello"],
)
async def test_a_stranger_that_says_anything_else_is_cut_off(stage: Stage, data: bytes):
    port = stage.server.ticket("a").port
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(data)
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_a_stranger_that_says_nothing_is_cut_off(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "HELLO_TIMEOUT_S", 0.01)
    reader, writer = await asyncio.open_connection(HOST, stage.server.ticket("a").port)
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_mute_strangers_are_bounded_and_do_not_lock_gateways_out_for_long(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(link, "MAX_STRANGERS", 2)
    port = stage.server.ticket("a").port
    strangers = [await asyncio.open_connection(HOST, port) for _ in range(3)]
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionResetError):
            assert await strangers[2][0].read() == b""
    for _, writer in strangers:
        writer.close()
    await until(lambda: stage.server.num_strangers == 0)
    await stage.gateway("a")


async def test_a_gateway_that_sends_something_unreadable_loses_its_link_and_no_other(stage: Stage):
    bad, good = await stage.gateway("bad"), await stage.gateway("good")
    await bad.frames.send(b"\xff")
    assert not (await bad.ended()).peer_ended
    await good.send(Submit(1, request("r")))
    assert await good.next(Answer) == Answer(1)


async def test_nobody_who_listens_is_a_broken_link():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with pytest.raises(LinkBroken, match=str(port)):
        await connect(Ticket(HOST, port, b""))


async def test_a_worker_that_says_something_unreadable_is_a_broken_link():
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEADER.pack(1) + b"\xc1")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        gateway = Gateway(await connect(Ticket(HOST, port, b"")))
        assert "unreadable" in str(await gateway.ended())


def test_messages_are_told_apart():
    for message in (Answer(1, None), Farewell("why", is_dead=False)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromWorker) == message
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Hello(b"")), type=FromWorker)
