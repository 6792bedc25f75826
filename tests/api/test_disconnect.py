"""A client that goes away, at any moment, leaves nothing running on either engine and no KV block behind."""

import asyncio
import contextlib
import json
import random
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.live import MODEL, Live, unique_text, unique_tokens

LONG_TOKENS = 4000
NUM_MIXED = 200
AT_ONCE = 16


def long_body(**more: Any) -> dict[str, Any]:
    """A prompt that takes seconds to read, and an answer that takes longer than any test waits."""
    return {
        "model": MODEL, "prompt": unique_tokens(LONG_TOKENS), "max_tokens": 4000, "temperature": 0.0,
        "ignore_eos": True, **more,
    }  # fmt: skip


def send(live: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request and reads nothing of the answer."""
    address = urlsplit(live.url)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: baton\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(head.encode() + data)
    return connection


def is_in_flight(live: Live) -> bool:
    """As early as anybody can see: the prompt is being read."""
    return any(replica["in_flight_requests"] for replica in live.replicas())


def is_decoding(live: Live) -> bool:
    return live.load("decode")["num_running_requests"] > 0


def is_past_prefill(live: Live) -> bool:
    """The prompt has been read, and the hand-off is on its way or just taken."""
    (prefill,), (decode,) = live.replicas("prefill"), live.replicas("decode")
    return not prefill["in_flight_requests"] and bool(decode["in_flight_requests"])


@pytest.fixture(autouse=True)
def nothing_is_left(live: Live):
    live.quiet()
    expired = live.load("prefill")["kv_leases_expired_total"]
    yield
    live.quiet()
    assert live.load("prefill")["kv_leases_expired_total"] == expired, "blocks came back only when their lease ended"


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("moment", [is_in_flight, is_past_prefill, is_decoding], ids=lambda moment: moment.__name__)
def test_a_client_that_leaves_before_its_first_token_leaves_nothing_behind(live, moment, stream):
    connection = send(live, "/v1/completions", long_body(stream=stream))
    live.wait(lambda: moment(live), moment.__name__)
    connection.close()
    live.quiet()


def test_clients_that_leave_one_after_the_other_leave_nothing_behind(live):
    """Aborts that come while the submission itself is on its way."""
    for turn in range(20):
        connection = send(live, "/v1/completions", long_body(stream=turn % 2 == 0))
        live.wait(lambda: is_in_flight(live), "the request is in")
        connection.close()
    live.quiet()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_client_that_leaves_in_mid_stream_is_an_abort_in_the_receipt(live, path):
    text = unique_text(200)
    endless = {"type": "array", "items": {"enum": [1]}, "minItems": 3000}  # Anthropic's API has no ignore_eos
    body = {
        "/v1/completions": {"prompt": text, "ignore_eos": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "ignore_eos": True},
        "/v1/responses": {"input": text, "ignore_eos": True},
        "/v1/messages": {
            "messages": [{"role": "user", "content": text}],
            "output_config": {"format": {"type": "json_schema", "schema": endless}},
        },
    }[path]
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    with live.http.stream("POST", path, json={"model": MODEL, "stream": True, limit: 4000, **body}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
    live.quiet()
    outcome = live.receipt(response)["outcome"]
    assert outcome["status"] == "aborted"
    assert 0 < outcome["output_tokens"] < 4000


def test_a_client_that_leaves_with_several_choices_running_stops_them_all(live):
    body = long_body(prompt=unique_tokens(200), n=4, temperature=1.0, stream=True)
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        live.wait(lambda: live.load("decode")["num_running_requests"] == 4, "four choices run")
    live.quiet()
    assert live.receipt(response)["outcome"]["status"] == "aborted"


def test_a_neighbour_of_a_client_that_leaves_is_not_disturbed(live):
    connection = send(live, "/v1/completions", long_body(stream=True))
    live.wait(lambda: is_decoding(live), "decoding")
    connection.close()
    assert live.ask_known() == live.known_answer


# -- two hundred mixed requests

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def mixed(kind: int) -> tuple[str, dict[str, Any], int]:
    """The path, body and expected status of one of the mixed requests."""
    text = unique_text(random.randrange(1, 120))
    chat: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 12}
    completion: dict[str, Any] = {"model": MODEL, "prompt": text, "max_tokens": 12}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1, 2]}}}
    return [
        ("/v1/chat/completions", chat, 200),
        ("/v1/chat/completions", chat | {"stream": True, "seed": 5}, 200),
        ("/v1/completions", completion | {"n": 3, "temperature": 1.0}, 200),
        ("/v1/completions", completion | {"n": 2, "temperature": 0.5, "stream": True}, 200),
        ("/v1/chat/completions", chat | {"tools": [TOOL], "tool_choice": "required"}, 200),
        ("/v1/completions", completion | {"prompt_logprobs": 2}, 200),
        ("/v1/completions", completion | {"echo": True, "logprobs": 1}, 200),
        ("/v1/completions", completion | {"prompt": [[5] * 40, [6] * 31, [7]]}, 200),
        ("/v1/chat/completions", chat | {"response_format": schema}, 200),
        ("/v1/chat/completions", chat | {"stop": ["a", "e", "i"]}, 200),
        ("/v1/responses", {"model": MODEL, "input": text, "max_output_tokens": 12, "stream": True}, 200),
        ("/v1/messages", chat, 200),
        ("/v1/chat/completions", chat | {"temperature": -1}, 400),
        ("/v1/chat/completions", chat | {"logit_bias": {"999999": 1}, "stream": True}, 400),
        ("/v1/completions", completion | {"model": "nobody"}, 404),
        ("/v1/completions", completion | {"prompt": "word " * 9000}, 400),
        ("/v1/completions", completion | {"max_tokens": 2000, "ignore_eos": True, "stream": True}, 0),
        (
            "/v1/completions",
            completion | {"max_tokens": 2000, "ignore_eos": True, "n": 2, "temperature": 1.0, "stream": True},
            0,
        ),
        ("/v1/completions", long_body(stream=True), 0),
        ("/v1/completions", long_body(), 0),
    ][kind % 20]


async def one_of_them(live: Live, client: httpx.AsyncClient, gate: asyncio.Semaphore, kind: int) -> None:
    """Expected status 0: the client leaves, after a few lines of a stream or without having read anything."""
    path, body, expected = mixed(kind)
    async with gate:
        if expected:
            response = await client.post(path, json=body)
            assert response.status_code == expected, (
                f"{path} {str(body)[:200]}: {response.text[:300]} {live.faults(response)}"
            )
        elif body.get("stream") and len(body["prompt"]) != LONG_TOKENS:
            async with client.stream("POST", path, json=body) as response:
                lines = response.aiter_lines()
                for _ in range(random.randrange(1, 12)):
                    await anext(lines)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.01, 1.0)):
                    response = await client.post(path, json=body)
                raise AssertionError(f"answered at once: {response.text[:300]} {live.faults(response)}")


async def test_after_two_hundred_mixed_requests_the_used_blocks_are_those_of_the_start(live):
    before = live.used_blocks()
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=2 * AT_ONCE)
    async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one_of_them(live, client, gate, kind) for kind in range(NUM_MIXED)))
    live.quiet()
    assert live.used_blocks() == before
    live.is_unharmed()
