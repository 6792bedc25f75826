"""The load of a rolling update over a server that needs no engine, and what its command line refuses and leaves."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from typer.testing import CliRunner

from bench import rolling
from bench.commands.app import app
from bench.fault_asks import COMPLETIONS, Ask, End, LoopAsks
from bench.fault_clients import Client, connections
from bench.fault_site import Site
from bench.fault_view import OutcomeView, PlacementView, ReceiptView
from bench.rolling import Load, RollingUpdate
from bench.rolling_report import RollingReport, changed
from bench.systems import StartFailed
from gateway.runtime import processes
from gateway.runtime.processes import HealPlan
from gateway.settings import load
from tests.unit.bench.fake_server import STREAM, Body, FakeServer, http_chunk

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PAUSE_S = 0.2


def token(token_id: int, reason: str | None = None) -> bytes:
    choice = {"index": 0, "token_ids": [token_id], "finish_reason": reason}
    return http_chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")


async def answer(body: Body, writer: asyncio.StreamWriter) -> None:
    """Three tokens, the last after a pause; the request is told by its header."""
    writer.write(STREAM.replace(b"\r\n\r\n", b"\r\nx-baton-request-id: id\r\n\r\n"))
    for token_id, reason in ((1, None), (2, None), (3, "length")):
        await asyncio.sleep(PAUSE_S if reason else 0)
        writer.write(token(token_id, reason))
        await writer.drain()
    writer.write(http_chunk(b"data: [DONE]\n\n") + http_chunk(b""))
    await writer.drain()


async def refuse(_body: Body, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


class FakeSite:
    def __init__(self, url: str) -> None:
        self.url = url

    async def receipt(self, receipt_id: str) -> ReceiptView | None:
        assert receipt_id == "id"
        return ReceiptView(PlacementView(None, "d"), OutcomeView("finished", ("lost",), ("decode_lost_mid_stream",)))


async def until(load: Load, num_ended: int) -> None:
    async with asyncio.timeout(10):
        while len(load.ended) < num_ended:  # noqa: ASYNC110  the load tells nobody
            await asyncio.sleep(0.01)


async def test_a_client_knows_the_longest_time_between_two_tokens() -> None:
    clients: list[Client] = []

    async def pausing(_body: Body, writer: asyncio.StreamWriter) -> None:
        """The pause begins when the client has what came before it."""
        writer.write(STREAM + token(1) + token(2))
        await writer.drain()
        async with asyncio.timeout(10):
            while not clients or clients[0].answer.num_tokens < 2:  # noqa: ASYNC110  the client tells nobody
                await asyncio.sleep(0.001)
        await asyncio.sleep(PAUSE_S)
        writer.write(token(3, "length") + http_chunk(b"data: [DONE]\n\n") + http_chunk(b""))
        await writer.drain()

    async with FakeServer(pausing).serving() as server, connections() as http:
        clients.append(Client(http, server.url, Ask("a", COMPLETIONS, {}), time.monotonic()))
        await clients[0].ended()
    assert clients[0].answer.end is End.COMPLETE
    assert clients[0].answer.longest_gap_s >= PAUSE_S


async def test_clients_ask_on_until_the_load_ends_and_no_answer_is_cut_off() -> None:
    server = FakeServer(answer)
    async with server.serving(), connections() as http:
        load = Load(http, cast(Site, FakeSite(server.url)), 2, 0, time.monotonic())
        await until(load, 5)
        await load.end()
        asked = await load.asked()
    assert load.num_failed == 0
    assert len(asked) == len(server.bodies)
    assert server.most_in_flight == 2
    assert {one.kind for one in asked} == set(LoopAsks.KINDS)
    assert all(one.receipt and one.receipt.fault_kinds == ("decode_lost_mid_stream",) for one in asked)


async def test_requests_that_are_refused_are_counted_and_not_repeated_at_once() -> None:
    server = FakeServer(refuse)
    async with server.serving(), connections() as http:
        load = Load(http, cast(Site, FakeSite(server.url)), 1, 0, time.monotonic())
        await until(load, 1)
        assert load.num_failed == 1
        load.give_up()
        await load.end()
        (one,) = await load.asked()
    assert (one.answer.end, one.receipt) == (End.REFUSED, None)


@pytest.fixture(autouse=True)
def _nothing_is_started_and_signals_are_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processes, "heal", lambda _base: HealPlan([], []))
    monkeypatch.setattr(Site, "start", lambda _site: pytest.fail("something was started"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*options: str, config: str = "faults.yaml") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["rolling", "--config", str(CONFIGS / config), *options])
    return done.exit_code, done.output


@pytest.mark.parametrize("config", ["simulated.yaml", "aggregated.yaml", "local.yaml", "local-2p2d.yaml"])
def test_a_configuration_that_an_update_would_leave_with_nobody_is_refused(config: str) -> None:
    code, output = run(config=config)
    assert code == 2
    assert "must have two gateways and two real engines in each pool" in output


def test_an_interrupted_update_leaves_a_report_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def be_interrupted(_update: RollingUpdate, _logs: Path | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(rolling.RollingUpdate, "run", be_interrupted)
    path = tmp_path / "report.json"
    code, output = run("--quick", "--check", "--json", str(path))
    assert code == 130
    assert "everything that was started is stopped" in output
    report = msgspec.json.decode(path.read_bytes(), type=RollingReport)
    assert (report.complete, report.plan.clients) == (False, 2)


def test_a_run_that_does_not_start_makes_the_update_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_update: RollingUpdate, _logs: Path | None) -> None:
        raise StartFailed("baton: baton-serve ended with code 1", "no memory")

    monkeypatch.setattr(rolling.RollingUpdate, "run", fail)
    code, output = run()
    assert code == 1
    assert "no memory" in output


def test_an_update_to_another_format_changes_the_engines_and_what_they_exchange() -> None:
    before = load(CONFIGS / "faults.yaml")
    after, same = changed(before, other_format=True), changed(before)
    assert (before.handoff.kv_format, same.handoff.kv_format, after.handoff.kv_format) == ("", "", "updated")
    assert after.pools == same.pools != before.pools
