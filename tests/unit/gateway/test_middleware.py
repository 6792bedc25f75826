"""The ASGI layers around the application: what is let in, when a response starts, in which shape it fails."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import context
from gateway.api.hints import read_hints
from gateway.api.middleware import (
    DEPARTURE_S,
    REQUEST_ID_HEADER,
    ClientTooSlow,
    Departure,
    Intake,
    Patience,
    ResponseStart,
)
from gateway.routing.types import Hints, Priority, Rejection
from tests.unit.virtual_time import now_s, simulate

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
MAX_BODY_BYTES = 200
SEND_TIMEOUT_S = 5.0
DISCONNECT: Message = {"type": "http.disconnect"}


@dataclass
class Exchange:
    """One request by hand, and everything that was sent in answer to it."""

    path: str = CHAT
    method: str = "POST"
    incoming: Sequence[Message] = ()
    headers: dict[str, str] = field(default_factory=dict)
    send: Callable[[Message], Awaitable[None]] | None = None
    stays: bool = False
    sent: list[Message] = field(default_factory=list)

    async def run(self, app: ASGIApp) -> "Exchange":
        rest = list(self.incoming)

        async def receive() -> Message:
            if self.stays and not rest:
                await asyncio.get_running_loop().create_future()
            return rest.pop(0) if rest else DISCONNECT

        async def send(message: Message) -> None:
            if self.send:
                await self.send(message)
            self.sent.append(message)

        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        scope: Scope = {"type": "http", "method": self.method, "path": self.path, "headers": headers}
        await app(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        starts = [message for message in self.sent if message["type"] == "http.response.start"]
        assert starts == self.sent[:1], "a response starts once, and first"
        return starts[0]["status"]

    @property
    def response_headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        assert [message.get("more_body", False) for message in self.sent[1:]][-1] is False, "the response has no end"
        return b"".join(message["body"] for message in self.sent[1:])

    def json(self) -> Any:
        assert int(self.response_headers["content-length"]) == len(self.body)
        return json.loads(self.body)


def body_of(data: Any) -> list[Message]:
    return [{"type": "http.request", "body": data if isinstance(data, bytes) else json.dumps(data).encode()}]


def start_of(status: int = 200, content_type: str = "text/event-stream") -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode())]}


def chunk(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


# -- what is let in


class Echo:
    """An application that notes the request it was given and answers 200."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.body: bytes | None = None
        self.next_message: Message | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, body, more = scope, b"", True
        if scope["type"] != "http":
            return
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.body = body
        self.next_message = await receive()
        await send(start_of(200, "text/plain"))
        await send(chunk(b"ok", more=False))

    @property
    def content_length(self) -> list[bytes]:
        assert self.scope is not None
        return [value for name, value in self.scope["headers"] if name == b"content-length"]


def intake(app: ASGIApp) -> Intake:
    return Intake(app, max_body_bytes=MAX_BODY_BYTES, max_choices=4)


async def through_intake(**exchange: Any) -> tuple[Echo, Exchange]:
    echo = Echo()
    return echo, await Exchange(**exchange).run(intake(echo))


def test_a_body_that_needs_no_change_arrives_byte_for_byte() -> None:
    async def main() -> None:
        body = b'{ "model":"m",\n "messages" : [ {"role":"user","content":"\\u00e9 \xc3\xa9"} ], "temperature":1e0 }'
        echo, exchange = await through_intake(incoming=body_of(body), headers={"content-length": str(len(body))})
        assert echo.body == body
        assert echo.content_length == [str(len(body)).encode()]
        assert exchange.status == 200

    simulate(main)


def test_unknown_fields_are_dropped_and_the_length_follows() -> None:
    async def main() -> None:
        body = json.dumps({"model": "m", "surprise": {"n": 1}, "store": False, "n": 2}).encode()
        headers = {"content-length": str(len(body)), "transfer-encoding": "chunked", "x-other": "kept"}
        echo, _ = await through_intake(incoming=body_of(body), headers=headers)
        assert echo.body is not None
        assert json.loads(echo.body) == {"model": "m", "n": 2}
        assert echo.content_length == [str(len(echo.body)).encode()]
        assert echo.scope is not None
        names = [name for name, _ in echo.scope["headers"]]
        assert (b"transfer-encoding" in names, b"x-other" in names) == (False, True)

    simulate(main)


def test_a_body_in_pieces_arrives_whole_and_then_comes_what_the_client_does() -> None:
    async def main() -> None:
        body = b'{"model": "m", "messages": []}'
        pieces = [{"type": "http.request", "body": body[i : i + 7], "more_body": True} for i in range(0, len(body), 7)]
        echo, _ = await through_intake(incoming=[*pieces, {"type": "http.request"}, DISCONNECT])
        assert echo.body == body
        assert echo.next_message == DISCONNECT

    simulate(main)


def test_a_body_of_exactly_the_limit_is_let_in() -> None:
    async def main() -> None:
        body = b'{"model": "m"}'.ljust(MAX_BODY_BYTES)
        echo, _ = await through_intake(incoming=body_of(body), headers={"content-length": str(MAX_BODY_BYTES)})
        assert echo.body == body

    simulate(main)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("how", ["declared", "chunked", "declared too small"])
def test_a_body_that_is_too_large_is_answered_413_unread(path: str, how: str) -> None:
    async def main() -> None:
        reads = 0

        async def endless() -> Message:
            nonlocal reads
            reads += 1
            return {"type": "http.request", "body": b" " * 50, "more_body": True}

        headers = {"declared": str(MAX_BODY_BYTES + 1), "chunked": None, "declared too small": "10"}[how]
        raw = [] if headers is None else [(b"content-length", headers.encode())]
        exchange, echo = Exchange(path), Echo()

        async def send(message: Message) -> None:
            exchange.sent.append(message)

        await intake(echo)({"type": "http", "method": "POST", "path": path, "headers": raw}, endless, send)
        assert exchange.status == 413
        assert echo.scope is None
        assert reads == (0 if how == "declared" else MAX_BODY_BYTES // 50 + 1)
        message = f"the request body is larger than {MAX_BODY_BYTES} bytes"
        if path == CHAT:
            error = {"message": message, "type": "RequestEntityTooLargeError", "param": None, "code": 413}
            assert exchange.json() == {"error": error}
        else:
            assert exchange.json() == {"type": "error", "error": {"type": "request_too_large", "message": message}}

    simulate(main)


def test_a_refused_field_is_answered_400_in_openais_shape() -> None:
    async def main() -> None:
        echo, exchange = await through_intake(incoming=body_of({"kv_transfer_params": {"do_remote_prefill": True}}))
        assert (exchange.status, echo.scope) == (400, None)
        assert exchange.response_headers["content-type"] == "application/json"
        assert exchange.json() == {
            "error": {
                "message": "kv_transfer_params is set by the gateway; clients cannot reach the KV-transfer layer",
                "type": "BadRequestError",
                "param": "kv_transfer_params",
                "code": 400,
            }
        }

    simulate(main)


@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages/count_tokens"])
def test_a_refused_field_is_answered_400_in_anthropics_shape(path: str) -> None:
    async def main() -> None:
        echo, exchange = await through_intake(path=path, incoming=body_of({"cache_salt": "x"}))
        assert (exchange.status, echo.scope) == (400, None)
        error = {"type": "invalid_request_error", "message": "cache_salt is set by the gateway"}
        assert exchange.json() == {"type": "error", "error": error}

    simulate(main)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request body is not valid JSON"),
        (b"{", "the request body is not valid JSON"),
        (b"\xff\xfe", "the request body is not valid JSON"),
        (b"[" * 100, "the request body is not valid JSON"),
        (b'{"n": 1}{"n": 99}', "the request body is not valid JSON"),
        (b"[]", "the request body must be a JSON object"),
        (b'"text"', "the request body must be a JSON object"),
        (b"null", "the request body must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_answered_400(body: bytes, message: str) -> None:
    async def main() -> None:
        echo, exchange = await through_intake(incoming=body_of(body))
        assert (exchange.status, echo.scope) == (400, None)
        assert exchange.json()["error"]["message"].startswith(message)

    simulate(main)


def test_deeply_nested_json_is_answered_400() -> None:
    async def main() -> None:
        body = b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        echo = Echo()
        exchange = await Exchange(incoming=body_of(body)).run(Intake(echo, max_body_bytes=10**6, max_choices=4))
        assert (exchange.status, echo.scope) == (400, None)

    simulate(main)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_refused_header_is_answered_400_whatever_the_method(method: str) -> None:
    async def main() -> None:
        headers = {"x-data-parallel-rank": "1"}
        echo, exchange = await through_intake(method=method, headers=headers, incoming=body_of({}))
        assert (exchange.status, echo.scope) == (400, None)

    simulate(main)


async def hints_of(headers: dict[str, str], body: dict[str, Any] | None = None) -> tuple[list[Hints], Exchange]:
    noted: list[Hints] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = context.current.get()
        assert request is not None
        noted.append(request.hints)
        await send(start_of(200, "text/plain"))
        await send(chunk(b"ok", more=False))

    return noted, await Exchange(headers=headers, incoming=body_of(body or {})).run(ResponseStart(intake(app)))


def test_a_session_comes_from_a_header_or_else_from_the_body() -> None:
    async def main() -> None:
        for headers, body, expected in (
            ({"x-session-id": "a"}, {"session_id": "b"}, {"x-session-id": "a"}),
            ({}, {"session_id": "b"}, {"x-session-id": "b"}),
            ({}, {"vllm_xargs": {"agentic_context": {"program_id": "b"}}}, {"x-session-id": "b"}),
            ({}, {}, {}),
        ):
            (hints,), _ = await hints_of(headers, body)
            assert hints == read_hints(expected)

    simulate(main)


def test_what_agents_say_in_the_body_is_read_and_goes_no_further() -> None:
    async def main() -> None:
        body = {"model": "m", "nvext": {"agent_hints": {"osl": 9}}, "vllm_xargs": {"agentic_context": {"priority": 1}}}
        assert (await hints_of({}, body))[0] == [Hints(Priority.HIGH, output_tokens=9)]
        echo, _ = await through_intake(incoming=body_of(body))
        assert echo.body == b'{"model":"m"}'

    simulate(main)


def test_of_a_header_that_is_sent_twice_the_first_counts() -> None:
    async def main() -> None:
        noted: list[Hints] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = context.current.get()
            assert request is not None
            noted.append(request.hints)

        headers = [(b"x-baton-priority", b"low"), (b"x-baton-priority", b"high")]
        scope: Scope = {"type": "http", "method": "GET", "path": "/health", "headers": headers}
        await ResponseStart(intake(app))(scope, never, never)
        assert noted == [Hints(Priority.LOW)]

    simulate(main)


def test_a_requests_trace_is_noted_and_goes_no_further() -> None:
    async def main() -> None:
        noted: list[dict[str, str]] = []
        echo = Echo()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = context.current.get()
            assert request is not None
            noted.append(request.trace_headers)
            await echo(scope, receive, send)

        headers = {"traceparent": "00-1-2-01", "tracestate": "a=1", "accept": "*/*"}
        await Exchange(incoming=body_of({"model": "m"}), headers=headers).run(ResponseStart(intake(app)))
        assert noted == [{"traceparent": "00-1-2-01", "tracestate": "a=1"}]
        assert echo.scope is not None
        assert {name for name, _ in echo.scope["headers"]} == {b"accept", b"content-length"}

    simulate(main)


def test_what_the_headers_say_of_a_request_is_noted() -> None:
    async def main() -> None:
        noted, _ = await hints_of({"x-baton-priority": "low", "x-baton-ttft-deadline-ms": "1500"})
        assert noted == [Hints(Priority.LOW, 1.5)]
        assert (await hints_of({}))[0] == [Hints()]

    simulate(main)


@pytest.mark.parametrize(("name", "value"), [("x-baton-priority", "urgent"), ("x-baton-ttft-deadline-ms", "soon")])
def test_a_hint_that_cannot_be_read_is_answered_400(name: str, value: str) -> None:
    async def main() -> None:
        noted, exchange = await hints_of({name: value})
        assert (noted, exchange.status) == ([], 400)
        assert name in exchange.json()["error"]["message"]

    simulate(main)


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("POST", "/elsewhere"), ("GET", "/health")])
def test_what_has_no_body_to_check_passes_as_it_is(method: str, path: str) -> None:
    async def main() -> None:
        echo, _ = await through_intake(method=method, path=path, incoming=body_of(b"not json"))
        assert echo.body == b"not json"

    simulate(main)


@pytest.mark.parametrize("read_before", [0, 1])
def test_a_client_that_leaves_while_its_body_is_read_reaches_no_application(read_before: int) -> None:
    async def main() -> None:
        piece = {"type": "http.request", "body": b'{"model": "m"}', "more_body": True}
        echo, exchange = await through_intake(incoming=[piece] * read_before)
        assert echo.scope is None
        assert exchange.status == 400

    simulate(main)


@pytest.mark.parametrize("layer", [intake, ResponseStart, lambda app: Departure(app, SEND_TIMEOUT_S)])
def test_what_is_not_http_passes(layer: Callable[[ASGIApp], ASGIApp]) -> None:
    async def main() -> None:
        echo = Echo()
        scope: Scope = {"type": "lifespan"}

        async def nothing(*_: Any) -> Any:
            raise AssertionError("nothing is said")

        await layer(echo)(scope, nothing, nothing)
        assert echo.scope is scope

    simulate(main)


# -- what an answer calls, and that it is over

CALL = b'{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"look"}}]}}]}'


@pytest.mark.parametrize(
    ("steps", "tool"),
    [
        (
            [
                start_of(),
                chunk(b"data: {}\n\n"),
                chunk(b"data: " + CALL + b"\n\n"),
                chunk(b"data: " + CALL.replace(b"look", b"other") + b"\n\n", more=False),
            ],
            "look",
        ),
        ([start_of(200, "application/json"), chunk(CALL, more=False)], "look"),
        ([start_of(), chunk(b"data: {}\n\n"), chunk(b"data: [DONE]\n\n", more=False)], None),
        ([ValueError("a crash")], None),
    ],
    ids=["stream", "json", "no-call", "crash"],
)
def test_when_a_response_is_over_the_tool_that_it_calls_is_told_once(steps: list[Any], tool: str | None) -> None:
    async def main() -> None:
        told: list[str | None] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = context.current.get()
            assert request is not None
            request.answering, request.on_end = True, [told.append]
            for step in steps:
                assert told == []
                if isinstance(step, Exception):
                    raise step
                await send(step)

        await Exchange().run(ResponseStart(app))
        assert told == [tool]

    simulate(main)


# -- when a response starts


@dataclass
class Script:
    """An application that sends what it is told to. A step that is not a message is called with the request."""

    steps: Sequence[Message | Callable[[context.RequestContext], Any]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = context.current.get()
        assert request is not None
        for step in self.steps:
            if callable(step):
                step(request)
            else:
                await send(step)


def answering(request: context.RequestContext) -> None:
    request.answering = True


REJECTIONS = {
    429: Rejection(429, "the predicted time to the first token is above the deadline", 7),
    503: Rejection(503, "no decode replica is available", 5),
}
KINDS = {429: ("RateLimitError", "rate_limit_error"), 503: ("ServiceUnavailableError", "overloaded_error")}


def failed(request: context.RequestContext) -> None:
    request.failure = context.Failure(500, "decode-0 was lost")


def crash(request: context.RequestContext) -> None:
    raise ZeroDivisionError("a bug")


async def respond(*steps: Any, path: str = CHAT, send: Any = None) -> Exchange:
    return await Exchange(path=path, send=send).run(ResponseStart(Script(steps)))


def test_an_ordinary_response_passes_with_its_receipts_header() -> None:
    async def main() -> None:
        ids: list[str] = []
        exchange = await respond(
            lambda request: ids.append(request.request_id),
            start_of(200, "application/json"),
            chunk(b"{}", more=False),
        )
        assert (exchange.status, exchange.body) == (200, b"{}")
        assert exchange.response_headers[REQUEST_ID_HEADER] == ids[0]
        assert exchange.response_headers["content-type"] == "application/json"

    simulate(main)


def test_a_start_is_held_until_the_first_body_message() -> None:
    async def main() -> None:
        exchange = Exchange()
        steps = [
            start_of(200, "application/json"),
            lambda request: seen.append(len(exchange.sent)),
            chunk(b"{", more=True),
            lambda request: seen.append(len(exchange.sent)),
            chunk(b"}", more=False),
        ]
        seen: list[int] = []
        await exchange.run(ResponseStart(Script(steps)))
        assert seen == [0, 2]
        assert (exchange.status, exchange.body) == (200, b"{}")

    simulate(main)


def test_a_stream_is_held_until_an_engine_answers_and_loses_nothing() -> None:
    async def main() -> None:
        exchange = Exchange()
        seen: list[int] = []

        def look(request: context.RequestContext) -> None:
            seen.append(len(exchange.sent))

        steps = [
            start_of(),
            chunk(b"1"),
            look,
            chunk(b"2"),
            look,
            answering,
            chunk(b"3"),
            look,
            chunk(b"4", more=False),
        ]
        await exchange.run(ResponseStart(Script(steps)))
        assert seen == [0, 0, 4]
        assert (exchange.status, exchange.body) == (200, b"1234")
        assert REQUEST_ID_HEADER in exchange.response_headers

    simulate(main)


@pytest.mark.parametrize("content_type", ["text/event-stream; charset=utf-8", "application/json"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("status", [429, 503])
def test_a_rejection_replaces_the_response_with_its_own(status: int, path: str, content_type: str) -> None:
    async def main() -> None:
        ids: list[str] = []
        streams = content_type.startswith("text")
        rejection = REJECTIONS[status]

        def rejected(request: context.RequestContext) -> None:
            request.rejection = rejection

        exchange = await respond(
            lambda request: ids.append(request.request_id),
            start_of(200 if streams else status, content_type),
            rejected,
            *([chunk(b"data: {error}\n\n"), chunk(b"data: [DONE]\n\n")] if streams else []),
            chunk(b"" if streams else b"{}", more=False),
            path=path,
        )
        assert exchange.status == status
        headers = exchange.response_headers
        assert (headers["retry-after"], headers[REQUEST_ID_HEADER]) == (str(rejection.retry_after_s), ids[0])
        assert headers["content-type"] == "application/json"
        kind, anthropic_kind = KINDS[status]
        if path == CHAT:
            error = {"message": rejection.reason, "type": kind, "param": None, "code": status}
            assert exchange.json() == {"error": error}
        else:
            error = {"type": anthropic_kind, "message": rejection.reason}
            assert exchange.json() == {"type": "error", "error": error}

    simulate(main)


@pytest.mark.parametrize("begun", [True, False])
def test_a_rejection_that_the_application_raises_says_when_to_try_again(begun: bool) -> None:
    async def main() -> None:
        def rejected(request: context.RequestContext) -> None:
            request.next_receipt_id()
            request.rejection = REJECTIONS[429]
            raise RuntimeError("as vLLM's stream of responses does")

        exchange = await respond(*([start_of(), chunk(b"event: created")] if begun else []), rejected)
        assert (exchange.status, exchange.response_headers["retry-after"]) == (429, "7")
        assert exchange.json()["error"]["message"] == REJECTIONS[429].reason

    simulate(main)


def test_a_failure_before_the_first_token_gives_a_stream_its_own_status() -> None:
    async def main() -> None:
        exchange = await respond(start_of(), failed, chunk(b"data: {error}\n\n"), chunk(b"", more=False))
        assert exchange.status == 500
        error = {"message": "decode-0 was lost", "type": "InternalServerError", "param": None, "code": 500}
        assert exchange.json() == {"error": error}
        assert REQUEST_ID_HEADER in exchange.response_headers

    simulate(main)


def test_a_failure_after_the_first_token_stays_in_the_stream() -> None:
    async def main() -> None:
        exchange = await respond(start_of(), answering, chunk(b"1"), failed, chunk(b"error", more=False))
        assert (exchange.status, exchange.body) == (200, b"1error")

    simulate(main)


@pytest.mark.parametrize(
    ("path", "general", "told"),
    [
        (CHAT, b'data: {"error": {"message": "Internal server error"}}\n\n', b"data: "),
        (MESSAGES, b'event: error\ndata: {"type": "error"}\n\n', b"event: error\ndata: "),
    ],
)
def test_a_failure_after_the_first_token_is_told_with_its_reason(path: str, general: bytes, told: bytes) -> None:
    async def main() -> None:
        end = chunk(general + b"data: [DONE]\n\n", more=False)
        exchange = await respond(start_of(), answering, chunk(b"1"), failed, chunk(b"2"), end, path=path)
        body = exchange.body.removeprefix(b"12" + told)
        error, end_of_stream = body.split(b"\n\n", 1)
        assert json.loads(error)["error"]["message"] == "decode-0 was lost"
        assert end_of_stream == b"data: [DONE]\n\n"

    simulate(main)


def test_an_error_of_the_application_takes_anthropics_shape_under_its_path() -> None:
    async def main() -> None:
        openai = b'{"error": {"message": "too long", "type": "BadRequestError", "code": 400}}'
        steps = [start_of(400, "application/json"), chunk(openai[:20]), chunk(openai[20:], more=False)]
        exchange = await respond(*steps, path=MESSAGES)
        assert exchange.status == 400
        assert exchange.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
        assert (await respond(*steps)).body == openai

    simulate(main)


def test_an_application_that_crashes_is_answered_500() -> None:
    async def main() -> None:
        exchange = await respond(start_of(), chunk(b"1"), crash)
        assert exchange.status == 500
        assert exchange.json()["error"]["message"] == "Internal server error"
        assert "a bug" not in exchange.body.decode()

    simulate(main)


def test_a_stream_that_crashes_ends_with_an_error_event() -> None:
    async def main() -> None:
        exchange = await respond(start_of(), answering, chunk(b"1"), crash)
        assert exchange.status == 200
        first, event = exchange.body.split(b"event: error\ndata: ")
        assert first == b"1"
        assert json.loads(event)["error"]["code"] == 500

    simulate(main)


def place(request: context.RequestContext) -> None:
    request.next_receipt_id()


@pytest.mark.parametrize("before", [[place], [start_of(200, "application/json"), chunk(b"{")]])
def test_a_crash_that_cannot_be_told_is_the_servers(before: list[Any]) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await respond(*before, crash)

    simulate(main)


def test_a_crash_before_anything_is_placed_is_the_clients_to_mend() -> None:
    async def main() -> None:
        exchange = await respond(crash)
        assert exchange.status == 400
        assert "cannot be read" in json.loads(exchange.body)["error"]["message"]

    simulate(main)


# -- how long a send may take


async def never(message: Message) -> None:
    await asyncio.get_running_loop().create_future()


@dataclass
class Timers:
    """Counts the timers of `patience` on the running loop, which none of these tests cancels."""

    patience: Patience
    num_started: int = 0
    num_running: int = 0

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._call_later = loop.call_later
        loop.call_later = self._noted

    def _noted(self, delay_s: float, callback: Any, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        if getattr(callback, "__self__", None) is not self.patience:
            return self._call_later(delay_s, callback, *args, **kwargs)
        self.num_started += 1
        self.num_running += 1

        def fired() -> None:
            self.num_running -= 1
            callback(*args)

        return self._call_later(delay_s, fired, **kwargs)


@pytest.mark.parametrize("begins_s", [0.0, 0.1, 1.0, 1.3, 4.99])
def test_a_send_is_given_up_between_one_and_one_and_a_quarter_limits(begins_s: float) -> None:
    async def main() -> None:
        patience = Patience(SEND_TIMEOUT_S)
        other = asyncio.create_task(patience.send(never, {}))  # its timer is running already
        await asyncio.sleep(begins_s)
        with pytest.raises(ClientTooSlow, match="the client read nothing for 5 s"):
            await patience.send(never, {})
        assert SEND_TIMEOUT_S <= now_s() - begins_s <= SEND_TIMEOUT_S * 1.25 + 1e-6
        with pytest.raises(ClientTooSlow):
            await other

    simulate(main)


def test_a_send_that_is_given_up_leaves_its_task_uncancelled() -> None:
    async def main() -> None:
        with pytest.raises(ClientTooSlow):
            await Patience(SEND_TIMEOUT_S).send(never, {})
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(1)

    simulate(main)


@pytest.mark.parametrize("after_s", [0.0, SEND_TIMEOUT_S / 2, SEND_TIMEOUT_S])
def test_a_cancellation_from_outside_during_a_send_stays_one(after_s: float) -> None:
    """Also one that comes at the moment the send is given up."""

    async def main() -> None:
        patience = Patience(SEND_TIMEOUT_S)
        sending = asyncio.create_task(patience.send(never, {}))
        await asyncio.sleep(0)
        # Behind the timer of the send, where both are due at once.
        asyncio.get_running_loop().call_at(now_s() + after_s, sending.cancel)
        await asyncio.wait([sending])
        assert sending.cancelled()

    simulate(main)


def test_many_sends_share_one_timer_and_each_is_given_up_alone() -> None:
    async def main() -> None:
        patience = Patience(SEND_TIMEOUT_S)
        timers = Timers(patience)

        async def short(message: Message) -> None:
            await asyncio.sleep(SEND_TIMEOUT_S * 0.9)

        sends = [asyncio.create_task(patience.send(short if i % 2 else never, {})) for i in range(100)]
        while not all(send.done() for send in sends):
            await asyncio.sleep(0.1)
            assert timers.num_running <= 1
        assert all((send.exception() is None) == (i % 2 == 1) for i, send in enumerate(sends))
        # Four in a limit, one that may come a quarter late, and the one that finds nothing left to do.
        assert timers.num_started <= 6

    simulate(main)


def test_no_timer_is_left_when_nothing_is_being_sent() -> None:
    async def main() -> None:
        patience = Patience(SEND_TIMEOUT_S)
        timers = Timers(patience)

        async def at_once(message: Message) -> None: ...

        for _ in range(1000):
            await patience.send(at_once, {})
        assert timers.num_started == 1
        await asyncio.sleep(SEND_TIMEOUT_S / 4)
        assert (timers.num_started, timers.num_running) == (1, 0)
        await asyncio.sleep(SEND_TIMEOUT_S * 10)
        assert timers.num_started == 1
        with pytest.raises(ClientTooSlow):
            await patience.send(never, {})

    simulate(main)


def stall_after(num_messages: int) -> Callable[[Message], Awaitable[None]]:
    """A client that reads so many messages, and then nothing."""
    number = 0

    async def stall(message: Message) -> None:
        nonlocal number
        number += 1
        if number > num_messages:
            await never(message)

    return stall


async def respond_patiently(*steps: Any, send: Any) -> Exchange:
    return await Exchange(send=send).run(Departure(ResponseStart(Script(steps)), SEND_TIMEOUT_S))


@pytest.mark.parametrize("stalls_at", [0, 1, 3])
def test_a_client_that_does_not_read_is_given_up(stalls_at: int) -> None:
    async def main() -> None:
        number = 0

        async def stall(message: Message) -> None:
            nonlocal number
            number += 1
            if number > stalls_at:
                await never(message)

        start_s = now_s()
        with pytest.raises(ClientTooSlow, match="the client read nothing for 5 s"):
            await respond_patiently(start_of(), answering, *[chunk(b"x")] * 10, chunk(b"", more=False), send=stall)
        assert now_s() - start_s == pytest.approx(SEND_TIMEOUT_S)
        assert number == stalls_at + 1, "nothing more is sent"

    simulate(main)


def test_a_client_that_reads_slowly_but_steadily_is_served() -> None:
    async def main() -> None:
        async def slow(message: Message) -> None:
            await asyncio.sleep(SEND_TIMEOUT_S * 0.9)

        exchange = await respond_patiently(
            start_of(), answering, *[chunk(b"x")] * 10, chunk(b"", more=False), send=slow
        )
        assert exchange.body == b"x" * 10

    simulate(main)


def test_the_generation_for_a_client_that_does_not_read_is_ended_before_the_error_is_raised() -> None:
    """By starlette, which vLLM answers with: an error of a send alone would leave the generator suspended."""

    async def main() -> None:
        ended_s: list[float] = []

        async def generate() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                ended_s.append(now_s())

        app = StreamingResponse(generate())
        exchange = Exchange(send=stall_after(5), stays=True)
        with pytest.raises(ClientTooSlow) as raised:
            await exchange.run(Departure(app, SEND_TIMEOUT_S))
        assert len(ended_s) == 1, f"the generator is left to the garbage collector: {raised}"
        assert len(exchange.sent) == 5

    simulate(main)


def test_an_application_that_does_not_stop_for_a_client_that_does_not_read_is_cancelled() -> None:
    async def main() -> None:
        async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start_of())
            await asyncio.get_running_loop().create_future()

        with pytest.raises(ClientTooSlow):
            await Exchange(send=never).run(Departure(deaf, SEND_TIMEOUT_S))
        assert now_s() == pytest.approx(SEND_TIMEOUT_S + DEPARTURE_S)

    simulate(main)


def test_a_request_that_is_cancelled_while_its_client_does_not_read_is_cancelled() -> None:
    async def main() -> None:
        async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start_of())
            await asyncio.get_running_loop().create_future()

        request = asyncio.create_task(Exchange(send=never).run(Departure(deaf, SEND_TIMEOUT_S)))
        await asyncio.sleep(SEND_TIMEOUT_S + DEPARTURE_S / 2)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()

    simulate(main)


def test_a_client_that_is_gone_is_not_told_anything_more() -> None:
    async def main() -> None:
        async def broken(message: Message) -> None:
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            await respond(start_of(), answering, chunk(b"x"), chunk(b"", more=False), send=broken)

    simulate(main)


# -- the request's context


def test_each_request_has_a_context_of_its_own_which_ends_with_it() -> None:
    async def main() -> None:
        ids: list[str] = []

        def note(request: context.RequestContext) -> None:
            ids.append(request.request_id)

        for _ in range(2):
            await respond(note, start_of(200, "application/json"), chunk(b"{}", more=False))
            assert context.current.get() is None
        assert len(set(ids)) == 2

    simulate(main)


def test_receipts_of_further_prompts_are_numbered() -> None:
    request = context.RequestContext("abc", received_s=0.0)
    assert [request.next_receipt_id() for _ in range(3)] == ["abc", "abc-1", "abc-2"]
