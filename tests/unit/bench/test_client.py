"""The streaming client: what it asks, how it reads answers and their times, and what it calls a failure."""

import asyncio
import json

import pytest

from bench.client import Client, Question, Recording, exchange, read_tokens, stages_of
from bench.stats import Chunk
from tests.unit.bench.fake_server import STREAM, Body, FakeServer, answer_well, event, http_chunk

QUESTION = Question(model="m", prompt=[5, 6, 7], max_tokens=3)
BODY: Body = {"prompt": [5, 6, 7]}
DONE = b"data: [DONE]\n\n"


def recording(*arrivals: tuple[float, bytes]) -> Recording:
    return Recording(sent_s=0.5, ended_s=9.0, arrivals=list(arrivals))


def test_every_prompt_is_answered_and_the_exchanges_keep_their_order() -> None:
    async def scenario() -> None:
        async with FakeServer().serving() as server, Client(server.url, "m") as client:
            prompts = [[index, 7] for index in range(5)]
            load = await client.run(prompts, output_tokens=4, concurrency=2)
        assert [exchange.error for exchange in load.exchanges] == [None] * 5
        assert [exchange.token_ids for exchange in load.exchanges] == [(0, 1, 2, 3)] * 5
        assert sorted(body["prompt"] for body in server.bodies) == prompts
        assert load.window_s >= max(e.ended_s for e in load.exchanges) - min(e.sent_s for e in load.exchanges)
        for answered in load.exchanges:
            assert answered.sent_s <= answered.chunks[0].at_s <= answered.chunks[-1].at_s <= answered.ended_s

    asyncio.run(scenario())


def test_a_request_asks_for_an_exact_greedy_stream_with_token_ids() -> None:
    async def scenario() -> Body:
        async with FakeServer().serving() as server, Client(server.url, "m") as client:
            await client.run([[1, 2]], output_tokens=3, concurrency=1)
        return server.bodies[0]

    assert asyncio.run(scenario()) == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 3,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def test_as_many_requests_are_in_flight_as_asked_for_and_never_more() -> None:
    async def scenario() -> FakeServer:
        all_here = asyncio.Event()
        server = FakeServer()

        async def answer_when_three_wait(body: Body, writer: asyncio.StreamWriter) -> None:
            if server.most_in_flight == 3:
                all_here.set()
            await all_here.wait()
            await answer_well(body, writer)

        server.answer = answer_when_three_wait
        async with server.serving(), Client(server.url, "m") as client:
            load = await asyncio.wait_for(client.run([[1]] * 9, output_tokens=2, concurrency=3), timeout=20)
        assert len(load.exchanges) == 9
        return server

    assert asyncio.run(scenario()).most_in_flight == 3


def test_nothing_is_sent_after_the_limit_and_what_was_sent_is_finished() -> None:
    async def scenario() -> None:
        async with FakeServer().serving() as server, Client(server.url, "m") as client:
            load = await client.run([[1]] * 6, output_tokens=2, concurrency=2, limit_s=0.0)
        assert [exchange.error for exchange in load.exchanges] == [None, None]
        assert len(server.bodies) == 2

    asyncio.run(scenario())


def test_a_refusal_is_an_error_with_the_servers_words() -> None:
    async def refuse(_body: Body, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy")

    async def scenario() -> str | None:
        async with FakeServer(refuse).serving() as server, Client(server.url, "m") as client:
            return (await client.run([[1]], output_tokens=2, concurrency=1)).exchanges[0].error

    assert asyncio.run(scenario()) == "HTTP 503: busy"


def test_a_connection_that_breaks_in_the_stream_is_an_error() -> None:
    async def break_off(body: Body, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + http_chunk(event(body, [1], first=True)))
        await writer.drain()
        writer.close()

    async def scenario() -> str | None:
        async with FakeServer(break_off).serving() as server, Client(server.url, "m") as client:
            return (await client.run([[1]], output_tokens=2, concurrency=1)).exchanges[0].error

    error = asyncio.run(scenario())
    assert error is not None
    assert "Payload" in error


def test_a_server_that_is_not_there_is_an_error_not_an_exception() -> None:
    async def scenario() -> str | None:
        async with FakeServer().serving() as server:
            url = server.url
        async with Client(url, "m") as client:
            return (await client.run([[1]], output_tokens=2, concurrency=1)).exchanges[0].error

    error = asyncio.run(scenario())
    assert error is not None
    assert "Connect" in error


def test_an_event_arrives_when_its_last_byte_does() -> None:
    first = event(BODY, [1], first=True)
    read = exchange(
        recording(
            (1.0, first[:10]),
            (2.0, first[10:] + event(BODY, [2], first=False)[:-2]),
            (3.0, b"\n\n" + event(BODY, [3], first=False) + DONE),
        ),
        QUESTION,
    )
    assert read.error is None
    assert read.chunks == (Chunk(2.0, 1), Chunk(3.0, 2))
    assert read.token_ids == (1, 2, 3)
    assert read.num_events == 3


def test_tokens_of_one_event_are_one_chunk_and_events_read_together_too() -> None:
    data = event(BODY, [1, 2], first=True)
    read = exchange(recording((1.0, data), (2.0, event(BODY, [3], first=False) + DONE)), QUESTION)
    assert read.chunks == (Chunk(1.0, 2), Chunk(2.0, 1))


@pytest.mark.parametrize(
    ("arrivals", "error"),
    [
        ([(1.0, event(BODY, [1], True)), (2.0, event(BODY, [2], False) + DONE)], "has 2 tokens; 3 were asked for"),
        ([(1.0, event(BODY, [1], True)), (2.0, event(BODY, [2, 3], False))], "after 3 tokens without"),
        ([(1.0, event({"prompt": [5, 6]}, [1], True)), (2.0, event(BODY, [2, 3], False) + DONE)], "another prompt"),
        ([(1.0, b'data: {"error": {"message": "the engine died"}}\n\n' + DONE)], "the engine died"),
        ([(1.0, b"data: {\n\n")], "cannot be read"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(arrivals: list[tuple[float, bytes]], error: str) -> None:
    read = exchange(recording(*arrivals), QUESTION)
    assert read.error is not None
    assert error in read.error


def test_events_that_carry_no_tokens_are_passed_over() -> None:
    usage = b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}}).encode() + b"\r\n\r\n"
    data = [(1.0, b": ping\n\n" + event(BODY, [1], True)), (2.0, event(BODY, [2, 3], False)), (3.0, usage + DONE)]
    read = exchange(recording(*data), QUESTION)
    assert read.error is None
    assert read.chunks == (Chunk(1.0, 1), Chunk(2.0, 2))


def test_the_tokens_of_a_stream_are_read_event_by_event_until_it_says_what_went_wrong() -> None:
    first, second = event(BODY, [1, 2], True), event(BODY, [3], False)
    assert list(read_tokens([(1.0, first + second[:5]), (2.0, second[5:] + DONE)])) == [(1.0, [1, 2]), (2.0, [3])]
    broken = read_tokens([(1.0, first), (2.0, b'data: {"error": {"message": "the engine died"}}\n\n')])
    assert next(broken) == (1.0, [1, 2])
    with pytest.raises(ValueError, match="the engine died"):
        next(broken)


def test_the_stages_of_a_receipt_are_those_its_request_went_through() -> None:
    times_ms = {"front_end": 1.5, "prefill_wait": None, "decode": 30.0}
    receipt = {"request_id": "r", "outcome": {"ttft_ms": 20.0, "times_ms": times_ms, "faults": []}}
    assert stages_of(json.dumps(receipt).encode()) == {"ttft": 20.0, "front_end": 1.5, "decode": 30.0}


def test_an_exchange_keeps_the_id_of_its_receipt() -> None:
    recorded = recording((1.0, event(BODY, [1, 2, 3], first=True) + DONE))
    recorded.receipt_id = "r"
    assert exchange(recorded, QUESTION).receipt_id == "r"
