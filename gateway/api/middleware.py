"""Owns the ASGI layers around vLLM's app: what is let in, when a response may start, how long a send may take."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Mapping

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import logs
from gateway.api import access_log, context, fields, tools
from gateway.api.hints import read_hints
from gateway.routing.types import Hints, Rejection
from gateway.spans import TRACE_HEADERS, trace_headers

log = logging.getLogger("baton.api")

DEPARTURE_S = 5.0
"""How long the application may take to stop what a client has left behind."""

REQUEST_ID_HEADER = "x-baton-request-id"
UNREADABLE = "the request cannot be read: one of its parts is not what its type says"
OPENAI_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
}
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
}


class ClientTooSlow(OSError):
    """The client did not read for longer than the configuration allows; it is treated as gone."""


class Patience:
    """Bounds how long any send of an application may take: one timer looks after all of them.

    A timer for each send would cost more than the send.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._began_s: dict[asyncio.Task[None], float] = {}
        self._exhausted: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None

    async def send(self, send: Send, message: Message) -> None:
        """Raises ClientTooSlow when the send has taken between one and 1.25 limits. A task sends one at a time."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._began_s[task] = loop.time()
        if self._watch is None:
            self._watch = loop.call_later(self._limit_s / 4, self._look)
        try:
            await send(message)
        except asyncio.CancelledError as error:
            if task not in self._exhausted:
                raise
            if task.uncancel() > 0:
                raise
            raise ClientTooSlow(f"the client read nothing for {self._limit_s:.0f} s") from error
        finally:
            del self._began_s[task]
            self._exhausted.discard(task)

    def _look(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        for task, began_s in self._began_s.items():
            if loop.time() - began_s >= self._limit_s and task not in self._exhausted:
                self._exhausted.add(task)
                task.cancel()
        if self._began_s:
            self._watch = loop.call_later(self._limit_s / 4, self._look)


class Departure:
    """Tells the application that its client has left, or has not read for too long. Serve says the former by cancelling
    the request, which vLLM's handlers do not pass on to the generation they wait for, and an error of a send leaves
    that generation to the garbage collector; a disconnect message ends it. The application then has time to stop.
    """

    def __init__(self, app: ASGIApp, send_timeout_s: float):
        self._app = app
        self._patience = Patience(send_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientTooSlow, once the application has stopped."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = asyncio.Event()
        too_slow: ClientTooSlow | None = None
        last_call: asyncio.TimerHandle | None = None

        async def receive_until_left() -> Message:
            tasks = [asyncio.ensure_future(receive()), asyncio.create_task(left.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if left.is_set() else await tasks[0]
            finally:
                for task in tasks:
                    task.cancel()

        async def send_until_left(message: Message) -> None:
            nonlocal too_slow, last_call
            if left.is_set():
                return
            try:
                await self._patience.send(send, message)
            except ClientTooSlow as error:
                too_slow = error
                left.set()
                last_call = asyncio.get_running_loop().call_later(DEPARTURE_S, answering.cancel)

        answering = asyncio.ensure_future(self._app(scope, receive_until_left, send_until_left))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            if too_slow is None or not answering.cancelled():
                left.set()
                await asyncio.wait([answering], timeout=DEPARTURE_S)
                answering.cancel()
                raise
        finally:
            if last_call is not None:
                last_call.cancel()
        if too_slow is not None:
            raise too_slow


class Intake:
    """Lets in bodies of a bounded size that hold nothing but allowed fields; answers 413 or 400 to others. Notes what
    the headers say of the request."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_choices: int):
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_choices = max_choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Of a header that is sent twice the first counts.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        if refused := fields.check_headers(headers):
            await send_error(scope, send, 400, refused.message, refused.param)
            return
        hints = read_hints(headers)
        if isinstance(hints, fields.Refused):
            await send_error(scope, send, 400, hints.message, hints.param)
            return
        if request := context.current.get():
            request.hints = hints
            request.trace_headers = trace_headers(scope["headers"])
        path = scope["path"]
        if scope["method"] != "POST" or path not in fields.ALLOWED:
            await self._app(scope, receive, send)
            return
        body = await self._read(headers, receive)
        if body is None:
            message = f"the request body is larger than {self._max_body_bytes} bytes"
            await send_error(scope, send, 413, message)
            return
        checked = self._check(path, headers, body)
        if isinstance(checked, fields.Refused):
            await send_error(scope, send, 400, checked.message, checked.param)
            return
        kept, hints = checked
        if request is not None:
            request.hints = hints
        await self._app(_as_read(scope, len(kept)), _replay(kept, receive), send)

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            return None
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[bytes, Hints] | fields.Refused:
        """What is let in of a body, and what it says of itself, with the headers."""
        try:
            data = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            return fields.Refused(f"the request body is not valid JSON: {error}")
        if not isinstance(data, dict):
            return fields.Refused("the request body must be a JSON object")
        checked = fields.check_body(path, data, self._max_choices)
        if isinstance(checked, fields.Refused):
            return checked
        hints = read_hints(headers, path, data)
        if isinstance(hints, fields.Refused):
            return hints
        return body if checked == data else msgspec.json.encode(checked), hints


class ResponseStart:
    """Holds a response's start until its first body message, and a stream's until an engine has begun to answer, so
    that a refusal of a streaming request still gets its own status; gives errors the shape their path's clients
    expect; adds the receipt's id. What is logged of a request names it, and each leaves a line."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = context.RequestContext(uuid.uuid4().hex, time.monotonic())
        line = access_log.Line(scope, send, request)
        with logs.about(request.request_id):
            try:
                await self._answer(scope, receive, line.send, request)
            finally:
                line.write()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request: context.RequestContext) -> None:
        token = context.current.set(request)
        held: list[Message] = []
        started = streaming = False
        call_mark = tools.CALL_MARKS.get(scope["path"])

        async def held_send(message: Message) -> None:
            nonlocal started, streaming
            if call_mark and request.tool_called is None and call_mark in message.get("body", b""):
                request.tool_called = tools.called(scope["path"], message["body"])
            if started:
                if streaming and request.failure is not None:
                    message = _with_reason(scope["path"], message, request.failure)
                await send(message)
                return
            held.append(message)
            if not _is_certain(held, request):
                return
            started, streaming = True, _is_stream(held[0])
            for ready in _released(scope["path"], held, request):
                await send(ready)
            held.clear()

        try:
            await self._app(scope, receive, held_send)
        except OSError:
            # The client is gone: there is nobody to tell.
            raise
        except Exception:
            if request.rejection is not None and not started:
                # vLLM's stream of responses tells of an error by raising it.
                for ready in _rejected(scope["path"], request, request.rejection):
                    await send(ready)
                return
            # Nothing was placed: vLLM stumbled over the request while it read it, so it is the client's to mend.
            unread = not (held or started or request.num_groups) and scope["path"] in fields.ALLOWED
            if not held and not (started and streaming) and not unread:
                raise
            log.exception("a response of %s broke off", scope["path"])
            failure = request.failure or context.Failure(500, "Internal server error")
            if unread:
                failure = context.Failure(400, UNREADABLE)
            body = error_body(scope["path"], failure.status, failure.message, failure.param, failure.kind)
            if started:
                await send({"type": "http.response.body", "body": b"event: error\ndata: " + body + b"\n\n"})
                return
            for ready in _messages(failure.status, body, MutableHeaders({REQUEST_ID_HEADER: request.request_id})):
                await send(ready)
        finally:
            with contextlib.suppress(ValueError):
                context.current.reset(token)
            for told in request.on_end:
                try:
                    told(request.tool_called)
                except Exception:
                    log.exception("the end of a response of %s could not be told", scope["path"])


def _is_certain(held: list[Message], request: context.RequestContext) -> bool:
    """Whether nothing can change the status any more: an answer has begun, or the whole response is here."""
    start, last = held[0], held[-1]
    if last["type"] != "http.response.body":
        return False
    if not last.get("more_body", False):
        return True
    return start["status"] < 400 and (not _is_stream(start) or request.answering)


def _released(path: str, held: list[Message], request: context.RequestContext) -> list[Message]:
    """The messages that go out in place of those held."""
    start = held[0]
    headers = MutableHeaders(raw=start["headers"])
    headers[REQUEST_ID_HEADER] = request.request_id
    if request.rejection is not None:
        return _rejected(path, request, request.rejection)
    failure = request.failure
    if failure is not None and _is_stream(start) and not request.answering:
        headers = MutableHeaders({REQUEST_ID_HEADER: request.request_id})
        body = error_body(path, failure.status, failure.message, failure.param, failure.kind)
        return _messages(failure.status, body, headers)
    if start["status"] >= 400 and _is_anthropic(path):
        body = b"".join(message.get("body", b"") for message in held[1:])
        return _messages(start["status"], error_body(path, start["status"], _error_message(body)), headers)
    return held


def _rejected(path: str, request: context.RequestContext, rejection: Rejection) -> list[Message]:
    headers = MutableHeaders({"retry-after": str(rejection.retry_after_s), REQUEST_ID_HEADER: request.request_id})
    return _messages(rejection.status, error_body(path, rejection.status, rejection.reason), headers)


def _is_stream(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def _with_reason(path: str, message: Message, failure: context.Failure) -> Message:
    """A stream's message; where it is vLLM's general error event, with what failed in its place."""
    body: bytes = message.get("body", b"")
    for prefix in (b'data: {"error"', b"event: error\n"):
        if body.startswith(prefix):
            event = prefix.partition(b"data: ")[0]
            error = error_body(path, failure.status, failure.message, failure.param, failure.kind)
            end = body.partition(b"\n\n")[2]
            return {**message, "body": event + b"data: " + error + b"\n\n" + end}
    return message


def _is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def _error_message(body: bytes) -> str:
    """The message of an error body in either shape; else the body itself."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode(errors="replace")


def error_body(path: str, status: int, message: str, param: str | None = None, kind: str | None = None) -> bytes:
    """An error in the shape the path's clients expect: OpenAI's, or Anthropic's under /v1/messages."""
    if _is_anthropic(path):
        # 529 and every status that is not listed is for trying again later.
        kind = ANTHROPIC_KINDS.get(status, "overloaded_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    kind = kind or OPENAI_KINDS.get(status, "ServiceUnavailableError")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


async def send_error(
    scope: Scope, send: Send, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> None:
    """A whole response, in the shape the path's clients expect."""
    for part in _messages(status, error_body(scope["path"], status, message, param), MutableHeaders(headers or {})):
        await send(part)


def _messages(status: int, body: bytes, headers: MutableHeaders) -> list[Message]:
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    return [
        {"type": "http.response.start", "status": status, "headers": headers.raw},
        {"type": "http.response.body", "body": body},
    ]


NOT_PASSED_ON = {b"content-length", b"transfer-encoding", *TRACE_HEADERS}
"""Traces are Baton's: vLLM would say that it makes none."""


def _as_read(scope: Scope, length: int) -> Scope:
    """A request's scope for what was let in of its body, `length` bytes."""
    headers = [(n, v) for n, v in scope["headers"] if n not in NOT_PASSED_ON]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
