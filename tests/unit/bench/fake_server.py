"""A tiny completions server on plain asyncio: streams an answer, counts requests in flight, misbehaves on demand."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(body: Body, token_ids: list[int], first: bool) -> bytes:
    choice: Body = {"index": 0, "text": "x", "token_ids": token_ids}
    if first:
        choice["prompt_token_ids"] = body["prompt"]
    return b"data: " + json.dumps({"id": "a", "choices": [choice]}).encode() + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


PACE_S = 0.01


async def answer_well(body: Body, writer: asyncio.StreamWriter, first_token: int = 0) -> None:
    """One token a message, counting up, with a pause between them: a busy machine delivers two that follow at once as
    one."""
    writer.write(STREAM)
    for place in range(body["max_tokens"]):
        writer.write(http_chunk(event(body, [first_token + place], first=place == 0)))
        await writer.drain()
        await asyncio.sleep(PACE_S)
    writer.write(http_chunk(b"data: [DONE]\n\n") + http_chunk(b""))
    await writer.drain()


@dataclass
class FakeServer:
    """Answers each question with `answer`, and every GET with `page`; keeps what it was sent."""

    answer: Callable[[Body, asyncio.StreamWriter], Awaitable[None]] = answer_well
    page: str = ""
    bodies: list[Body] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    num_pages: int = 0
    url: str = ""
    _in_flight: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    self.num_pages += 1
                    page = self.page.encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page)
                    await writer.drain()
                    continue
                length = next(
                    int(line.partition(b":")[2])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                )
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.heads.append(head.decode())
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                await self.answer(body, writer)
                self._in_flight -= 1
        writer.close()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeServer"]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    @contextlib.contextmanager
    def serving_in_a_thread(self) -> Iterator["FakeServer"]:
        loop = asyncio.new_event_loop()
        ready = threading.Event()
        stopped = asyncio.Event()

        async def serve() -> None:
            async with self.serving():
                ready.set()
                await stopped.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(10)
            yield self
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(10)
            loop.close()
