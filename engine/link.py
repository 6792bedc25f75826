"""Owns the link between a gateway and a worker: the messages on it, their frames, and the worker's end of it.

One TCP connection per (gateway, worker) carries calls one way, answers and reports the other, each a MessagePack
message behind its length (docs/adr/0012). A gateway gets a ticket for it through the control plane, which knows who it
is; a ticket opens one connection.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from engine.protocol import EngineGoneError, EngineRequest, InvalidEngineRequestError, KVHandoff, WorkerReport
from engine.worker import Worker

log = logging.getLogger("baton.link")

HEADER = struct.Struct("!I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_HELLO_BYTES = 256
MAX_STRANGERS = 64
"""Connections that have not shown their ticket yet; further ones are closed at once."""

HELLO_TIMEOUT_S = 5.0
FAREWELL_S = 5.0
TICKET_LIFE_S = 30.0
MAX_TICKETS = 1024
MAX_WAITING_CALLS = 1024
"""Calls of one link that wait for the one before; while there are more, the link is not read."""

# A peer whose machine has vanished is given up this long after it last answered: 1 s of silence, then a probe a second.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2))
UNACKNOWLEDGED_MS = 3000


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker listens, and the secret that opens one link there within TICKET_LIFE_S."""

    host: str
    port: int
    secret: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message of a connection."""

    secret: bytes


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """`call` numbers what the answer is to; it counts up on each link."""

    call: int
    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    call: int
    request_ids: list[str]


class Release(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    call: int
    request_id: str
    handoff: KVHandoff


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """`refusal` says why the worker refuses the request; None if it has done what the call asks for."""

    call: int
    refusal: str | None = None


class Report(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    report: WorkerReport


class Farewell(msgspec.Struct, frozen=True, array_like=True, tag="farewell"):
    """The worker's last message. `is_dead`: its engine has ended; otherwise it only ends this link, and its engine may
    go on with what it was given."""

    reason: str
    is_dead: bool


Call = Submit | Abort | Release
FromWorker = Answer | Report | Farewell


class LinkBroken(ConnectionError):
    """The connection has ended, or what came over it is not of this protocol. `peer_ended`: the other side's process
    has ended, or says that it can serve no more."""

    def __init__(self, message: str, *, peer_ended: bool = False):
        super().__init__(message)
        self.peer_ended = peer_ended


class Frames:
    """The messages of one connection. Sending waits while the other side does not read: once it has left no room for
    UNACKNOWLEDGED_MS, the kernel breaks the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._writer = writer
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (*KEEPALIVE, (socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    async def receive(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """The next message. Raises LinkBroken."""
        try:
            (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if size > max_bytes:
                raise LinkBroken(f"a message of {size} bytes was announced; {max_bytes} are allowed")
            return await self._reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _broken_by(error) from error

    async def send(self, message: bytes) -> None:
        """Raises LinkBroken."""
        try:
            self._writer.write(HEADER.pack(len(message)) + message)
            await self._writer.drain()
        except OSError as error:
            raise _broken_by(error) from error

    def close(self) -> None:
        """At once: what the other side has not read is dropped."""
        self._writer.transport.abort()


def _broken_by(error: OSError | asyncio.IncompleteReadError) -> LinkBroken:
    peer_ended = isinstance(error, ConnectionResetError | BrokenPipeError | asyncio.IncompleteReadError)
    return LinkBroken(str(error) or type(error).__name__, peer_ended=peer_ended)


@dataclass(frozen=True)
class _Guest:
    gateway_id: str
    expires_s: float


class LinkServer:
    """The worker's end of its links. Make it with `start`."""

    def __init__(self, worker: Worker, host: str):
        self._worker = worker
        self._host = host
        self._guests: dict[bytes, _Guest] = {}
        self.num_strangers = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._links: dict[asyncio.Task[None], str] = {}
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._calls = msgspec.msgpack.Decoder(Call)
        self._encode = msgspec.msgpack.Encoder().encode
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, worker: Worker, host: str) -> "LinkServer":
        """Listens on a free port of `host`, this node's address as gateways reach it. Raises OSError."""
        self = cls(worker, host)
        self._server = await asyncio.start_server(self._welcome, host, 0)
        return self

    def ticket(self, gateway_id: str) -> Ticket:
        """Lets this gateway open one link."""
        assert self._server is not None
        now_s = asyncio.get_running_loop().time()
        self._guests = {secret: guest for secret, guest in self._guests.items() if guest.expires_s > now_s}
        while len(self._guests) >= MAX_TICKETS:
            del self._guests[next(iter(self._guests))]
        secret = secrets.token_bytes(32)
        self._guests[secret] = _Guest(gateway_id, now_s + TICKET_LIFE_S)
        port = self._server.sockets[0].getsockname()[1]
        return Ticket(self._host, port, secret)

    @property
    def gateway_ids(self) -> list[str]:
        """The gateways whose links are open."""
        return list(self._links.values())

    async def drained(self) -> None:
        """Returns when no gateway has a link open: each closes its own after its last request here."""
        await self._all_gone.wait()

    async def close(self) -> None:
        """Ends all links."""
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine: asyncio would run it as a task of its own, and log an error when that is cancelled.
        connection = asyncio.create_task(self._attend(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = Frames(reader, writer)
        try:
            gateway_id = await self._identify(frames)
        except (LinkBroken, TimeoutError, msgspec.DecodeError) as error:
            log.warning("a connection from %s was closed: %s", writer.get_extra_info("peername"), error or "it is mute")
        else:
            await self._serve(gateway_id, frames)
        finally:
            frames.close()

    async def _identify(self, frames: Frames) -> str:
        """The gateway whose ticket the connection shows. Raises LinkBroken, TimeoutError, msgspec.DecodeError."""
        if self.num_strangers >= MAX_STRANGERS:
            raise LinkBroken(f"{self.num_strangers} connections have not shown a ticket yet")
        self.num_strangers += 1
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = msgspec.msgpack.decode(await frames.receive(MAX_HELLO_BYTES), type=Hello)
        finally:
            self.num_strangers -= 1
        guest = self._guests.pop(hello.secret, None)
        if guest is None or guest.expires_s < asyncio.get_running_loop().time():
            raise LinkBroken("its ticket is unknown, used or too old")
        return guest.gateway_id

    async def _serve(self, gateway_id: str, frames: Frames) -> None:
        """Until either direction ends: then the gateway is gone from this worker, and its requests with it."""
        connection = asyncio.current_task()
        assert connection is not None
        calls: asyncio.Queue[Call] = asyncio.Queue(MAX_WAITING_CALLS)
        directions = [
            asyncio.create_task(self._report(gateway_id, frames)),
            asyncio.create_task(self._receive_calls(frames, calls)),
            asyncio.create_task(self._perform_calls(gateway_id, frames, calls)),
        ]
        self._links[connection] = gateway_id
        self._all_gone.clear()
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            results = await asyncio.gather(*directions, return_exceptions=True)
            del self._links[connection]
            if not self._links:
                self._all_gone.set()
        reasons = [result for result in results if isinstance(result, Exception)]
        for reason in reasons:
            if isinstance(reason, LinkBroken | EngineGoneError):
                log.info("the link of %s ended: %s", gateway_id, reason)
            else:
                log.error("the link of %s failed", gateway_id, exc_info=reason)
        if self._worker.failure is None and not any(isinstance(reason, LinkBroken) for reason in reasons):
            # A mere end of the connection would look like the end of this process.
            why = reasons[0] if reasons else "its reports have ended"
            with contextlib.suppress(LinkBroken, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._say_farewell(frames, Farewell(str(why) or repr(why), is_dead=False))

    async def _report(self, gateway_id: str, frames: Frames) -> None:
        try:
            async with contextlib.aclosing(self._worker.attach(gateway_id)) as reports:
                async for report in reports:
                    await frames.send(self._encode(Report(report)))
        except EngineGoneError as error:
            await self._say_farewell(frames, Farewell(str(error), is_dead=True))

    async def _say_farewell(self, frames: Frames, farewell: Farewell) -> None:
        """Then waits: the gateway closes the link; this end's abort could overtake the farewell. Raises LinkBroken."""
        await frames.send(self._encode(farewell))
        await asyncio.sleep(FAREWELL_S)

    async def _receive_calls(self, frames: Frames, calls: asyncio.Queue[Call]) -> None:
        """Reads ahead of what is performed: the end of the link must show although a call is stuck."""
        while True:
            await calls.put(self._calls.decode(await frames.receive()))

    async def _perform_calls(self, gateway_id: str, frames: Frames, calls: asyncio.Queue[Call]) -> None:
        """One call after the other: an abort must not overtake the submission that it is for."""
        while True:
            call = await calls.get()
            refusal: str | None = None
            try:
                match call:
                    case Submit(request=request):
                        await self._worker.submit(gateway_id, request)
                    case Abort(request_ids=request_ids):
                        await self._worker.abort(gateway_id, request_ids)
                    case Release(request_id=request_id, handoff=handoff):
                        await self._worker.release(request_id, handoff)
            except InvalidEngineRequestError as error:
                refusal = str(error)
            except EngineGoneError:
                if self._worker.failure is None:
                    raise
                # The farewell is the answer.
                continue
            await frames.send(self._encode(Answer(call.call, refusal)))


async def connect(ticket: Ticket) -> Frames:
    """The gateway's end of a link. Raises LinkBroken."""
    try:
        frames = Frames(*await asyncio.open_connection(ticket.host, ticket.port))
    except OSError as error:
        raise LinkBroken(f"{ticket.host}:{ticket.port}: {error}") from error
    await frames.send(msgspec.msgpack.encode(Hello(ticket.secret)))
    return frames


async def messages(frames: Frames) -> AsyncIterator[FromWorker]:
    """What the worker sends, until the link breaks. Raises LinkBroken."""
    decoder = msgspec.msgpack.Decoder(FromWorker)
    while True:
        data = await frames.receive()
        try:
            message = decoder.decode(data)
        except msgspec.DecodeError as error:
            raise LinkBroken(f"the worker sent something unreadable: {error}") from error
        yield message
