"""The layer that asks for keys: who is let in, what others are told, and that each request is counted out once."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.agents.tenants import Limiter, Tenant, Tenants, key_sha256
from gateway.api import context
from gateway.api.authentication import Authentication
from gateway.api.middleware import Departure, Intake, ResponseStart
from gateway.routing.types import Priority
from tests.unit.gateway.rig import until
from tests.unit.gateway.test_middleware import CHAT, MESSAGES, Exchange, body_of, chunk, start_of
from tests.unit.virtual_time import simulate

ALICE = Tenant("alice", (key_sha256(b"alice-key"),), max_concurrent_requests=2)
BOB = Tenant("bob", (key_sha256(b"bob-key"),))
BEARER = {"authorization": "Bearer alice-key"}
BODY: dict[str, Any] = {"model": "m"}
SEND_TIMEOUT_S = 5.0


class Site:
    """All layers in their order around an application."""

    def __init__(self, app: ASGIApp, *tenants: Tenant):
        self.limiter = Limiter(asyncio.get_running_loop().time)
        inner = Intake(app, max_body_bytes=1000, max_choices=4)
        keys = Authentication(inner, Tenants(tenants or (ALICE, BOB)), self.limiter)
        self.app = Departure(ResponseStart(keys), SEND_TIMEOUT_S)

    async def ask(self, headers: dict[str, str], **exchange: Any) -> Exchange:
        exchange = {"incoming": body_of(BODY)} | exchange
        return await Exchange(headers=headers, **exchange).run(self.app)


class Noting:
    """An application that notes whom it answers, and answers 200."""

    def __init__(self) -> None:
        self.requests: list[context.RequestContext] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = context.current.get()
        assert request is not None
        self.requests.append(request)
        await send(start_of(200, "text/plain"))
        await send(chunk(b"ok", more=False))


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"authorization": "bearer  alice-key "},
        {"x-api-key": "alice-key"},
        {"x-api-key": "alice-key", "authorization": "Bearer"},
    ],
)
def test_a_request_with_a_key_is_its_tenants(headers: dict[str, str]) -> None:
    async def main() -> None:
        app = Noting()
        exchange = await Site(app).ask(headers)
        assert exchange.status == 200
        (request,) = app.requests
        assert request.tenant == ALICE
        assert request.cache_salt == ALICE.cache_salt
        assert request.capped_hints.tenant == "alice"

    simulate(main)


NO_KEYS = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer "},
    {"authorization": "Basic alice-key"},
    {"authorization": "alice-key"},
    {"x-api-key": "wrong"},
    {"x-api-key": "alice-key\xff"},
    {"x-api-key": "wrong", "authorization": "Bearer alice-key"},
]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/models", "/metrics", "/baton/status", "/nowhere"])
@pytest.mark.parametrize("headers", NO_KEYS)
def test_without_a_key_nothing_is_answered_but_401_in_the_paths_shape(path: str, headers: dict[str, str]) -> None:
    async def main() -> None:
        app = Noting()
        before = REGISTRY.get_sample_value("baton_unauthenticated_total") or 0
        exchange = await Site(app).ask(headers, path=path, incoming=body_of(b"not even read"))
        assert (exchange.status, app.requests) == (401, [])
        assert exchange.response_headers["www-authenticate"] == "Bearer"
        error = exchange.json()["error"]
        assert error["type"] == ("authentication_error" if path == MESSAGES else "AuthenticationError")
        assert not any(value in exchange.body.decode() for value in headers.values() if len(value) > 7)
        assert REGISTRY.get_sample_value("baton_unauthenticated_total") == before + 1

    simulate(main)


def test_health_is_open() -> None:
    async def main() -> None:
        app = Noting()
        assert (await Site(app).ask({}, path="/health", method="GET")).status == 200
        assert app.requests[0].tenant is None

    simulate(main)


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/../metrics", "/metrics"])
def test_nothing_beside_health_is(path: str) -> None:
    async def main() -> None:
        assert (await Site(Noting()).ask({}, path=path, method="GET")).status == 401

    simulate(main)


def test_a_priority_above_the_tenants_is_lowered_and_the_session_is_its_own() -> None:
    async def main() -> None:
        app = Noting()
        site = Site(app, dataclasses.replace(ALICE, max_ttft_deadline_s=10.0), BOB)
        hints = {"x-baton-priority": "high", "x-baton-ttft-deadline-ms": "3600000", "x-session-id": "s"}
        for key in ("alice-key", "bob-key"):
            assert (await site.ask({"x-api-key": key} | hints)).status == 200
        alices, bobs = (request.capped_hints for request in app.requests)
        assert (alices.priority, alices.ttft_deadline_s) == (Priority.NORMAL, 10.0)
        assert alices.capped == ("priority high to normal", "ttft_deadline_s 3600 to 10")
        assert alices.session
        assert alices.session != bobs.session

    simulate(main)


# -- counted in and out


class Held:
    """An application that starts a stream and goes on when it is told to."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_inside += 1
        request = context.current.get()
        assert request is not None
        request.answering = True
        await send(start_of())
        await send(chunk(b"data: 1\n\n"))
        await self.release.wait()
        await send(chunk(b"", more=False))


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_beyond_its_limit_a_tenant_gets_429_with_retry_after_and_others_are_served(path: str) -> None:
    async def main() -> None:
        labels = {"tenant": "alice", "cause": "tenant-concurrency"}
        before = REGISTRY.get_sample_value("baton_tenant_refusals_total", labels) or 0
        app = Held()
        site = Site(app)
        running = [asyncio.create_task(site.ask(BEARER, stays=True)) for _ in range(2)]
        await until(lambda: app.num_inside == 2, "both to be inside")
        refused = await site.ask(BEARER, path=path)
        assert refused.status == 429
        assert refused.response_headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert error["type"] == ("rate_limit_error" if path == MESSAGES else "RateLimitError")
        assert "tenant alice" in error["message"]
        assert REGISTRY.get_sample_value("baton_tenant_refusals_total", labels) == before + 1
        assert site.limiter.held(ALICE) == 2
        bobs = asyncio.create_task(site.ask({"x-api-key": "bob-key"}, stays=True))
        await until(lambda: app.num_inside == 3, "the other tenant's to be inside")
        app.release.set()
        assert [exchange.status for exchange in await asyncio.gather(*running, bobs)] == [200] * 3
        assert site.limiter.held(ALICE) == site.limiter.held(BOB) == 0
        assert (await site.ask(BEARER)).status == 200

    simulate(main)


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise ZeroDivisionError("a bug")


async def fails_midway(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start_of())
    await send(chunk(b"data: 1\n\n"))
    raise ZeroDivisionError("a bug")


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await Noting()(scope, receive, send)


async def is_refused(scope: Scope, receive: Receive, send: Send) -> None:
    request = context.current.get()
    assert request is not None
    assert request.take_prompt(4) is not None
    await send(start_of(429, "application/json"))
    await send(chunk(b"{}", more=False))


async def takes_two_choices(scope: Scope, receive: Receive, send: Send) -> None:
    request = context.current.get()
    assert request is not None
    assert request.take_prompt(2) is None
    await answers(scope, receive, send)


async def broken_pipe(message: Message) -> None:
    raise OSError("the client is gone")


async def never_read(message: Message) -> None:
    await asyncio.get_running_loop().create_future()


WAYS: dict[str, tuple[ASGIApp, dict[str, Any]]] = {
    "answered": (answers, {}),
    "two choices": (takes_two_choices, {}),
    "a field is refused": (answers, {"incoming": body_of({"cache_salt": "mine"})}),
    "no JSON": (answers, {"incoming": body_of(b"{")}),
    "too large": (answers, {"incoming": body_of(b" " * 1001)}),
    "the client leaves while its body is read": (answers, {"incoming": []}),
    "a limit inside": (is_refused, {}),
    "a bug": (fails, {}),
    "a bug in mid-stream": (fails_midway, {}),
    "the client's connection breaks": (answers, {"send": broken_pipe}),
    "the client reads nothing": (answers, {"send": never_read}),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_whatever_becomes_of_a_request_it_is_counted_out_once(way: str) -> None:
    async def main() -> None:
        app, exchange = WAYS[way]
        site = Site(app)
        await asyncio.gather(site.ask(BEARER, **exchange), return_exceptions=True)
        assert site.limiter.held(ALICE) == 0

    simulate(main)


async def stops_at_once(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def never_stops(receive: Receive) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("stopping", [stops_at_once, never_stops])
def test_a_client_that_leaves_is_counted_out_once_when_the_application_has_ended(
    stopping: Callable[[Receive], Any],
) -> None:
    async def main() -> None:
        inside = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            inside.set()
            await stopping(receive)

        site = Site(app)
        asking = asyncio.create_task(site.ask(BEARER, stays=True))
        await inside.wait()
        assert site.limiter.held(ALICE) == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: site.limiter.held(ALICE) == 0, "the request to be counted out")

    simulate(main)


def test_what_is_not_http_passes() -> None:
    async def main() -> None:
        seen: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope)

        async def nothing(*_: Any) -> Any:
            raise AssertionError("nothing is said")

        await Site(app).app({"type": "lifespan"}, nothing, nothing)
        assert seen == [{"type": "lifespan"}]

    simulate(main)
