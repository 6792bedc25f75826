"""The layers around vLLM's application, alone: when a response may start, how an error looks, how a client leaves."""

import asyncio
import json
from typing import Any

import pytest

from gateway.api import context
from gateway.api.middleware import Departure, Intake, ResponseStart
from gateway.routing.types import Rejection
from tests.api.live import is_anthropic_error, is_openai_error

STREAM_START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def scope(path: str = "/v1/chat/completions", method: str = "POST") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": []}


def piece(text: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


class Client:
    """The far end of one request: what it has been sent, and whether it still reads."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


async def run(app: Any, path: str = "/v1/chat/completions") -> Client:
    client = Client()
    await ResponseStart(app)(scope(path), client.receive, client.send)
    return client


def current() -> context.RequestContext:
    request = context.current.get()
    assert request is not None
    return request


async def test_a_stream_is_held_until_an_engine_answers():
    client = Client()

    async def app(scope, receive, send):
        await send(STREAM_START)
        await send(piece(b"created\n"))
        assert client.sent == []
        current().answering = True
        await send(piece(b"token\n"))
        assert client.status == 200
        await send(piece(b"", more=False))

    await ResponseStart(app)(scope(), client.receive, client.send)
    assert client.body == b"created\ntoken\n"


@pytest.mark.parametrize(("path", "is_error"), [
    ("/v1/chat/completions", lambda status, body: is_openai_error(status, body)),
    ("/v1/messages", lambda status, body: is_anthropic_error(body)),
])  # fmt: skip
async def test_a_stream_that_fails_before_an_engine_answers_has_the_failures_status(path, is_error):
    async def app(scope, receive, send):
        await send(STREAM_START)
        current().failure = context.Failure(400, "a bad schema", "response_format")
        await send(piece(b'data: {"error": {}}\n\n'))
        await send(piece(b"data: [DONE]\n\n", more=False))

    client = await run(app, path)
    assert client.status == 400
    assert is_error(400, json.loads(client.body))
    assert b"a bad schema" in client.body


async def test_a_rejection_of_a_stream_says_when_to_try_again():
    async def app(scope, receive, send):
        current().rejection = Rejection(503, "no decode replica", 7)
        await send(STREAM_START)
        await send(piece(b"", more=False))

    client = await run(app)
    assert client.status == 503
    assert dict(client.sent[0]["headers"])[b"retry-after"] == b"7"


async def test_a_stream_that_breaks_before_it_starts_is_an_error_and_after_ends_with_one():
    async def app(scope, receive, send):
        await send(STREAM_START)
        if scope["path"] == "/v1/responses":
            current().answering = True
        await send(piece(b"token\n"))
        raise RuntimeError("broken")

    early = await run(app)
    assert early.status == 500
    assert is_openai_error(500, json.loads(early.body))
    late = await run(app, "/v1/responses")
    assert late.status == 200
    assert late.body.startswith(b"token\nevent: error\ndata: {")
    assert not late.sent[-1].get("more_body")


async def test_a_client_that_does_not_read_is_given_up():
    client = Client()

    async def app(scope, receive, send):
        current().answering = True
        await send(STREAM_START)
        await send(piece(b"token\n"))
        client.reads.clear()
        await send(piece(b"token\n"))

    with pytest.raises(OSError, match="read nothing"):
        await Departure(ResponseStart(app), 0.05)(scope(), client.receive, client.send)


async def test_a_request_that_is_cancelled_reaches_the_application_as_a_disconnect_and_may_finish():
    events: list[str] = []

    async def app(scope, receive, send):
        events.append((await receive())["type"])
        await send(piece(b"nobody reads this"))
        events.append("finished")

    client = Client()
    request = asyncio.create_task(Departure(app, 5.0)(scope(), client.receive, client.send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert events == ["http.disconnect", "finished"]
    assert client.sent == []


async def test_the_body_is_replayed_without_unknown_fields_and_with_its_length():
    seen: dict[str, Any] = {}

    async def app(scope, receive, send):
        seen["length"] = dict(scope["headers"])[b"content-length"]
        seen["body"] = (await receive())["body"]

    body = json.dumps({"model": "m", "unknown": 1}).encode()
    halves = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:], "more_body": False},
    ]

    async def receive() -> dict[str, Any]:
        return halves.pop(0)

    await Intake(app, 1000, 4)(scope(), receive, Client().send)
    assert json.loads(seen["body"]) == {"model": "m"}
    assert int(seen["length"]) == len(seen["body"])
