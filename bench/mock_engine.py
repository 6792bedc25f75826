"""Owns the simulated engine that vllm-router stands before: vLLM's completions API over HTTP, and tokens at a pace.

It writes what Baton's simulated engine with the same configuration writes, so that lost or mixed-up tokens show.
Usage: python -m bench.mock_engine CONFIG PORT
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import uvloop
from tokenizers import Tokenizer

from engine.protocol import Phase
from engine.simulated import SimulatedEngineConfig, expected_answer
from gateway.runtime.environment import LOOPBACK
from gateway.settings import load

_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_DONE = b"data: [DONE]\n\n"
_LAST_CHUNK = b"0\r\n\r\n"
KEPT_BLOCKS = [0]

Answer = Callable[[list[int], int], Sequence[int]]


class CompletionRequest(msgspec.Struct):
    """The fields that matter here, of /v1/completions."""

    model: str
    prompt: list[int]
    max_tokens: int = 16
    stream: bool = False
    kv_transfer_params: dict[str, Any] | None = None


def event(head: bytes, text: str, token: int, is_last: bool, prompt: list[int] | None) -> bytes:
    """One server-sent event as vLLM writes it, with one token. `head` is what all events of an answer begin with."""
    choice = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": "length" if is_last else None,
        "stop_reason": None,
        "prompt_token_ids": prompt,
        "token_ids": [token],
    }
    return head + msgspec.json.encode([choice]) + b"}\n\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def complete(request: CompletionRequest, tokens: Sequence[int], text: str) -> dict[str, Any]:
    """The answer in one piece. A prefill request (`do_remote_decode`) gets what decode would fetch its blocks with."""
    answer: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(request.prompt) + len(tokens),
        },
        "kv_transfer_params": None,
    }
    if (request.kv_transfer_params or {}).get("do_remote_decode"):
        answer["kv_transfer_params"] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": KEPT_BLOCKS,
            "remote_engine_id": "simulated",
            "remote_request_id": answer["id"],
            "remote_host": LOOPBACK,
            "remote_port": 1,
            "tp_size": 1,
        }
    return answer


@dataclass(eq=False)
class _Stream:
    """One answer under way; `chunks` are in reverse."""

    connection: "Connection"
    chunks: list[bytes]


class Pace:
    """Writes the next token of every stream once a step. A stream whose reader is slow misses steps, never tokens."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._streams: dict[_Stream, None] = {}
        self._wake = asyncio.Event()

    def add(self, stream: _Stream) -> None:
        self._streams[stream] = None
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._step_s)
            for stream in list(self._streams):
                connection = stream.connection
                if connection.is_closed:
                    del self._streams[stream]
                elif not connection.is_held_up:
                    connection.write(stream.chunks.pop())
                    if not stream.chunks:
                        del self._streams[stream]
            if not self._streams:
                self._wake.clear()


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive."""

    def __init__(self, model: str, pace: Pace, answer: Answer, texts: dict[int, str]) -> None:
        self._model = model
        self._pace = pace
        self._answer = answer
        self._texts = texts
        self._received = b""
        self.is_held_up = False
        self.is_closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True

    def pause_writing(self) -> None:
        self.is_held_up = True

    def resume_writing(self) -> None:
        self.is_held_up = False

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].decode("latin-1")
            length = content_length(head)
            if len(self._received) < end + 4 + length:
                return
            body = self._received[end + 4 : end + 4 + length]
            self._received = self._received[end + 4 + length :]
            method, path, *_ = head.split(" ", 2)
            self._serve(method, path, body)

    def _serve(self, method: str, path: str, body: bytes) -> None:
        if (method, path) == ("GET", "/health"):
            self._send(200, {})
        elif (method, path) == ("GET", "/v1/models"):
            self._send(200, {"object": "list", "data": [{"id": self._model, "object": "model"}]})
        elif (method, path) == ("POST", "/v1/completions"):
            try:
                self._complete(msgspec.json.decode(body, type=CompletionRequest))
            except msgspec.DecodeError as error:
                self._send(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
        else:
            self._send(404, {"error": {"message": f"{path} is not simulated", "type": "NotFoundError", "code": 404}})

    def _complete(self, request: CompletionRequest) -> None:
        tokens = self._answer(request.prompt, request.max_tokens)
        if not request.stream:
            self._send(200, complete(request, tokens, "".join(self._texts[token] for token in tokens)))
            return
        model = json.dumps(request.model)
        head = (
            f'data: {{"id":"cmpl-{uuid.uuid4()}","object":"text_completion","created":{int(time.time())},'
            f'"model":{model},"choices":'
        ).encode()
        last = len(tokens) - 1
        chunks = [
            http_chunk(event(head, self._texts[token], token, place == last, None if place else request.prompt))
            for place, token in enumerate(tokens)
        ]
        chunks[-1] += http_chunk(_DONE) + _LAST_CHUNK
        self.write(_STREAM)
        self._pace.add(_Stream(self, chunks[::-1]))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.write(
            b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(data)) + data
        )


def content_length(head: str) -> int:
    """Of a request's head; 0 without one."""
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-length":
            return int(value)
    return 0


async def serve(config: str, port: int) -> None:
    # Ray takes seconds to import, and the tests of this module have no use for it.
    from gateway.app import engine_spec

    settings = load(config)
    engine: SimulatedEngineConfig = engine_spec(settings, Phase.DECODE).simulated_config()
    tokenizer = Tokenizer.from_file(f"{settings.model.path}/tokenizer.json")
    texts = {token: tokenizer.decode([token]) for token in engine.token_rule.vocabulary}
    assert settings.simulation is not None, "simulated_config() has said so"
    pace = Pace(settings.simulation.decode_step_s)

    def answer(prompt: list[int], num_tokens: int) -> list[int]:
        return expected_answer(engine, prompt, num_tokens)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(settings.model_name, pace, answer, texts), LOOPBACK, port)
    async with server:
        await pace.run()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
