"""Log lines name the request that they concern, and say nothing that its client has written."""

import asyncio
import logging
import logging.handlers
from collections.abc import Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from engine import logs
from gateway.api import context, fields
from gateway.api.access_log import route_of
from gateway.api.middleware import ResponseStart
from tests.unit.gateway.rig import PROMPT, Rig
from tests.unit.virtual_time import simulate

SECRET = "words-of-a-client"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, as a replica's handlers get it."""
    name = logs.NameRequest()
    caplog.set_level(logging.INFO, "baton")
    caplog.handler.addFilter(name)
    yield caplog
    caplog.handler.removeFilter(name)


def request_of(record: logging.LogRecord) -> str | None:
    return getattr(record, logs.REQUEST_ID, None)


def test_a_line_names_the_request_that_it_is_about_and_others_name_none(lines: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("baton.test")
    with logs.about("outer"):
        with logs.about("inner"):
            log.info("one")
        log.info("two")
    log.info("three")
    assert [request_of(record) for record in lines.records] == ["inner", "outer", None]


def test_serves_own_id_stays_where_serve_has_set_one() -> None:
    plain, served = (logging.makeLogRecord({"msg": "a line"}) for _ in range(2))
    served.request_id = "serves"
    with logs.about("ours"):
        assert logs.NameRequest().filter(plain)
        assert logs.NameRequest().filter(served)
    assert (plain.request_id, request_of(plain)) == ("ours", "ours")  # type: ignore[attr-defined]
    assert (served.request_id, request_of(served)) == ("serves", "ours")


def test_what_becomes_of_a_request_later_is_logged_with_its_receipts_id(lines: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            group = rig.orchestrator.new_group("receipt-1", 1)
            request_id = rig.add(PROMPT, 6, group=group)
            await rig.writing(request_id)
            rig.engines[rig.receipt("receipt-1").placement.decode].die()
            await rig.finished(request_id)
            rig.is_over = True

    simulate(main)
    again = [record for record in lines.records if "is placed again" in record.getMessage()]
    assert [request_of(record) for record in again] == ["receipt-1"]


def test_a_line_of_membership_names_no_request(lines: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.ask(PROMPT, 6)

    simulate(main)
    ready = [record for record in lines.records if "is ready" in record.getMessage()]
    assert ready
    assert {request_of(record) for record in ready} == {None}


async def answer(path: str, *, method: str = "POST", breaks: BaseException | None = None) -> str:
    """The id of a request that is answered; its application begins a stream, and ends it unless it breaks."""
    ids: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = context.current.get()
        assert request is not None
        ids.append(request.request_id)
        request.answering = True
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": SECRET.encode(), "more_body": True})
        if breaks is not None:
            raise breaks
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": SECRET.encode()}

    async def send(message: Message) -> None:
        pass

    headers = [(b"authorization", SECRET.encode()), (b"x-baton-session", SECRET.encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": SECRET.encode(), "headers": headers}
    if breaks is None:
        await ResponseStart(app)(scope, receive, send)
    else:
        with pytest.raises(type(breaks)):
            await ResponseStart(app)(scope, receive, send)
    return ids[0]


def test_each_request_leaves_one_line_with_the_id_that_its_client_has(lines: pytest.LogCaptureFixture) -> None:
    request_id = asyncio.run(answer("/v1/chat/completions"))
    (record,) = lines.records
    assert request_of(record) == request_id
    told = {
        "http_method": "POST", "http_route": "/v1/chat/completions", "http_status": 200, "whole": True, "prompts": 0,
        "tenant": None,
    }  # fmt: skip
    assert vars(record).items() >= told.items()
    assert record.getMessage().startswith("POST /v1/chat/completions 200 in ")


@pytest.mark.parametrize("breaks", [asyncio.CancelledError(), OSError("gone")])
def test_a_response_that_breaks_off_leaves_its_line_too(lines: pytest.LogCaptureFixture, breaks: BaseException) -> None:
    request_id = asyncio.run(answer("/v1/messages", breaks=breaks))
    (record,) = lines.records
    assert request_of(record) == request_id
    assert record.getMessage().endswith(", broken off")


def test_what_a_client_has_written_is_in_no_line(lines: pytest.LogCaptureFixture) -> None:
    asyncio.run(answer(f"/v1/{SECRET}"))
    asyncio.run(answer(f"/baton/receipts/{SECRET}", method=SECRET.upper()))
    asyncio.run(answer("/v1/completions", breaks=OSError("gone")))
    assert len(lines.records) == 3
    for record in lines.records:
        assert SECRET not in f"{vars(record)} {record.getMessage()}".lower()


@pytest.mark.parametrize("path", sorted({path for _, path in fields.ROUTES if "{" not in path}))
def test_batons_routes_are_named_in_lines(path: str) -> None:
    assert route_of(path) == path


def test_a_replicas_own_lines_go_where_serves_do_and_nowhere_else() -> None:
    handler, serve, library = logging.Handler(), logging.getLogger("ray.serve"), logging.getLogger("a.library")
    baton = logging.getLogger("baton")
    before = serve.handlers[:], baton.handlers[:], baton.propagate, baton.level
    library.addHandler(logging.StreamHandler())
    serve.handlers[:] = [handler]
    try:
        logs.begin()
        logs.adopt("a.library")
        assert baton.handlers == library.handlers == [handler]
        assert [type(one) for one in handler.filters] == [logs.NameRequest]
        assert (baton.propagate, library.propagate) == (False, False)
        assert baton.isEnabledFor(logging.INFO)
    finally:
        serve.handlers[:], baton.handlers[:], baton.propagate = before[:3]
        baton.setLevel(before[3])


def test_serves_handlers_write_again_after_a_library_has_configured_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    file = logging.Handler()
    file.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    handler = logging.handlers.MemoryHandler(capacity=1, target=file)
    serve = logging.Logger("ray.serve")
    serve.addHandler(handler)
    monkeypatch.setattr(logs, "_files", {handler: file})
    # What `logging.config.dictConfig` does to every handler there is.
    handler.close()
    serve.warning("kept")
    assert written == []
    logs.adopt("a.library")
    serve.warning("again")
    assert written == ["kept", "again"]
