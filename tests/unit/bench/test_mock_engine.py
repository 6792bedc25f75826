"""The simulated engine behind vllm-router, on a real socket: vLLM's formats, its own pace, its own tokens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from bench.client import Client
from bench.mock_engine import Connection, Pace, content_length

TEXTS = {token: f" t{token}" for token in range(100)}


def count_up(prompt: list[int], num_tokens: int) -> list[int]:
    return list(range(prompt[0], prompt[0] + num_tokens))


@asynccontextmanager
async def serving(step_s: float = 0.0) -> AsyncIterator[str]:
    pace = Pace(step_s)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection("m", pace, count_up, TEXTS), "127.0.0.1", 0
    )
    running = asyncio.create_task(pace.run())
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        running.cancel()
        server.close()


def test_streams_are_read_by_the_benchmarks_client_token_by_token() -> None:
    async def scenario() -> None:
        async with serving() as url, Client(url, "m") as client:
            run = await client.run([[1, 2], [30, 2], [50, 2]], output_tokens=5, concurrency=2)
        assert [exchange.error for exchange in run.exchanges] == [None] * 3
        assert [list(exchange.token_ids) for exchange in run.exchanges] == [count_up([n], 5) for n in (1, 30, 50)]
        assert {exchange.num_events for exchange in run.exchanges} == {5}

    asyncio.run(scenario())


def test_a_prefill_request_gets_what_decode_would_fetch_its_blocks_with() -> None:
    async def scenario() -> None:
        async with serving() as url, aiohttp.ClientSession() as session:
            body = {"model": "m", "prompt": [7, 8], "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                answer = await response.json()
            async with session.post(f"{url}/v1/completions", json=body | {"kv_transfer_params": None}) as response:
                plain = await response.json()
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        assert answer["choices"][0]["text"] == " t7"
        assert answer["kv_transfer_params"]["do_remote_prefill"] is True
        assert plain["kv_transfer_params"] is None

    asyncio.run(scenario())


def test_what_is_not_simulated_is_refused_in_openais_form() -> None:
    async def scenario() -> None:
        async with serving() as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/health") as health, session.get(f"{url}/v1/models") as models:
                assert (health.status, (await models.json())["data"][0]["id"]) == (200, "m")
            async with session.post(f"{url}/v1/chat/completions", json={}) as chat:
                assert (chat.status, (await chat.json())["error"]["code"]) == (404, 404)
            async with session.post(f"{url}/v1/completions", json={"model": "m", "prompt": "text"}) as text:
                assert text.status == 400

    asyncio.run(scenario())


def test_a_stream_whose_reader_left_is_dropped() -> None:
    async def scenario() -> None:
        async with serving(step_s=0.001) as url:
            async with aiohttp.ClientSession() as session:
                body = {"model": "m", "prompt": [1], "max_tokens": 90, "stream": True}
                response = await session.post(f"{url}/v1/completions", json=body)
                await response.content.readany()
                response.close()
            async with Client(url, "m") as client:
                assert (await client.run([[1]], output_tokens=3, concurrency=1)).exchanges[0].error is None

    asyncio.run(scenario())


def test_a_head_tells_the_length_of_its_body() -> None:
    assert content_length("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 12") == 12
    assert content_length("GET / HTTP/1.1\r\nHost: x") == 0
