"""The clients of an overload over HTTP: what counts as an answer, as a refusal with its type, and as a failure."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from bench.overload_live import LiveOverload
from bench.overload_report import Asked, OverloadPlan
from bench.results import EngineKind
from bench.systems import LocalSystem, Recipe
from gateway.routing.types import Priority
from tests.unit.bench.fake_server import Body, FakeServer, answer_well

PLAN = OverloadPlan(EngineKind.VLLM, 3.0, 2.0, 60.0, 20.0)
ERROR = {"error": {"message": "too late", "type": "RateLimitError", "param": None, "code": 429}}


def answering(status: int, body: bytes, headers: str = "") -> Callable[[Body, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(_body: Body, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body)
        await writer.drain()

    return answer


def asked(server: FakeServer, streams: bool = True) -> tuple[Asked, list[str]]:
    async def scenario() -> tuple[Asked, list[str]]:
        async with server.serving(), aiohttp.ClientSession() as session:
            system = LocalSystem("baton", lambda _: Recipe("", ()), 1.0, url=server.url)
            overload = LiveOverload(PLAN, "m", system, print)
            one = await overload._ask(session, random.Random(0), Priority.LOW, streams)
            return one, list(overload._errors)

    return asyncio.run(scenario())


def test_an_answer_has_the_time_of_its_first_token_if_it_streams() -> None:
    server = FakeServer(answer_well)
    one, errors = asked(server)
    assert (one.is_answered, one.is_refused, one.priority, errors) == (True, False, Priority.LOW, [])
    assert one.ttft_s is not None
    assert server.bodies[0]["stream"] is True
    one, _ = asked(FakeServer(answering(200, b'{"choices": [{"text": "error"}]}')), streams=False)
    assert (one.is_answered, one.ttft_s) == (True, None)


@pytest.mark.parametrize(
    ("body", "headers", "is_typed"),
    [
        (json.dumps(ERROR).encode(), "retry-after: 7\r\n", True),
        (json.dumps(ERROR).encode(), "", False),
        (json.dumps(ERROR).encode(), "retry-after: 0\r\n", False),
        (json.dumps(ERROR).encode(), "retry-after: soon\r\n", False),
        (json.dumps(ERROR).replace("429", "500").encode(), "retry-after: 7\r\n", False),
        (b"too late", "retry-after: 7\r\n", False),
    ],
)
def test_a_refusal_is_typed_if_it_says_what_why_and_when(body: bytes, headers: str, is_typed: bool) -> None:
    one, errors = asked(FakeServer(answering(429, body, headers)))
    assert (one.is_refused, one.is_answered, one.is_typed, errors) == (True, False, is_typed, [])


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b"{}"), (200, b"data: 1\n\n"), (200, b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n'), (0, b"")],
)
def test_anything_else_is_a_failure_with_its_reason(status: int, body: bytes) -> None:
    body = body.replace(b'"error": ', b'"error":')
    one, errors = asked(FakeServer(answering(status, body)))
    assert (one.is_answered, one.is_refused, len(errors)) == (False, False, 1)
