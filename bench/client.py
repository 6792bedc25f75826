"""Owns the load: closed-loop streaming requests to /v1/completions, and what came back when.

While a load runs the client only stores arrivals; it parses them afterwards, so that its own CPU disturbs little.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

from bench.stats import Chunk, Exchange

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 300.0
ERROR_CHARACTERS = 300
RECEIPT_HEADER = "x-baton-request-id"


class Question(msgspec.Struct, frozen=True):
    """The body of a request. Token ids come back with every chunk: they say how many tokens it carries and that
    every system read the same prompt."""

    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True
    stream: bool = True
    return_token_ids: bool = True


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    error: msgspec.Raw = msgspec.Raw(b"")


@dataclass
class Recording:
    """The bytes of one answer and when they came, in seconds of `time.perf_counter`. `receipt_id` is what Baton calls
    the request."""

    sent_s: float
    ended_s: float = 0.0
    receipt_id: str | None = None
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What one load gave. `window_s` lasts from the first request sent to the last answer complete."""

    exchanges: list[Exchange]
    window_s: float


class Client:
    """Connections to one server. An async context manager."""

    def __init__(self, url: str, model: str) -> None:
        self._server = url
        self._url = f"{url}/v1/completions"
        self._model = model

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"content-type": "application/json"},
        )
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._session.close()

    async def run(
        self, prompts: Sequence[list[int]], output_tokens: int, concurrency: int, limit_s: float = REQUEST_TIMEOUT_S
    ) -> Run:
        """Sends every prompt once, `concurrency` at a time, each as soon as another is answered.

        After `limit_s` no more are sent, and those in flight are waited for. The exchanges are in the prompts' order;
        a failure is in its exchange, not raised.
        """
        questions = [Question(self._model, prompt, output_tokens) for prompt in prompts]
        bodies = [msgspec.json.encode(question) for question in questions]
        recordings: list[Recording | None] = [None] * len(bodies)
        pending = iter(range(len(bodies)))
        began_s = time.perf_counter()

        async def ask_one_after_another() -> None:
            for index in pending:
                recordings[index] = await self._record(bodies[index])
                if time.perf_counter() - began_s > limit_s:
                    return

        await asyncio.gather(*(ask_one_after_another() for _ in range(concurrency)))
        window_s = time.perf_counter() - began_s
        return Run(
            [
                exchange(recording, question)
                for recording, question in zip(recordings, questions, strict=True)
                if recording is not None
            ],
            window_s,
        )

    async def stages_ms(self, exchanges: Iterable[Exchange]) -> list[dict[str, float]]:
        """Where the time of each answer went, by its receipt; those without one are left out. Raises ClientError."""
        receipts: list[dict[str, float]] = []
        for exchange in exchanges:
            if exchange.error is None and exchange.receipt_id is not None:
                async with self._session.get(f"{self._server}/baton/receipts/{exchange.receipt_id}") as response:
                    if response.status == 200:
                        receipts.append(stages_of(await response.read()))
        return receipts

    async def _record(self, body: bytes) -> Recording:
        recording = Recording(time.perf_counter())
        try:
            async with self._session.post(self._url, data=body) as response:
                recording.receipt_id = response.headers.get(RECEIPT_HEADER)
                async for data in response.content.iter_any():
                    recording.arrivals.append((time.perf_counter(), data))
                if response.status != 200:
                    text = b"".join(data for _, data in recording.arrivals).decode(errors="replace")
                    recording.error = f"HTTP {response.status}: {text[:ERROR_CHARACTERS]}"
        except TimeoutError:
            recording.error = f"no complete answer after {time.perf_counter() - recording.sent_s:.0f} s"
        except aiohttp.ClientError as error:
            recording.error = f"{type(error).__name__}: {error}"
        recording.ended_s = time.perf_counter()
        return recording


class _Outcome(msgspec.Struct, frozen=True):
    times_ms: dict[str, float | None]
    ttft_ms: float | None = None


class _Receipt(msgspec.Struct, frozen=True):
    outcome: _Outcome


def stages_of(receipt: bytes) -> dict[str, float]:
    """The stages of a receipt that its request went through, and the TTFT as the gateway saw it, in milliseconds.

    Raises msgspec.DecodeError for anything that is no receipt.
    """
    outcome = msgspec.json.decode(receipt, type=_Receipt).outcome
    stages = {"ttft": outcome.ttft_ms} | outcome.times_ms
    return {name: time_ms for name, time_ms in stages.items() if time_ms is not None}


def read_tokens(arrivals: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, list[int]]]:
    """The tokens of each event of one stream and when it was complete. Raises ValueError for an event that tells of an
    error, msgspec.DecodeError for one that cannot be read."""
    for at_s, data in _events(arrivals):
        if data == b"[DONE]":
            return
        event = msgspec.json.decode(data, type=_Event)
        if event.error:
            raise ValueError(f"the stream says: {bytes(event.error).decode(errors='replace')[:ERROR_CHARACTERS]}")
        for choice in event.choices:
            if choice.token_ids:
                yield at_s, choice.token_ids


def exchange(recording: Recording, question: Question) -> Exchange:
    """Reads a recorded answer. An answer that is not what was asked for gives an exchange with an error."""
    chunks: list[Chunk] = []
    token_ids: list[int] = []
    num_events = 0
    error = recording.error
    prompt: list[int] | None = None
    complete = False
    if error is None:
        try:
            for at_s, data in _events(recording.arrivals):
                if data == b"[DONE]":
                    complete = True
                    continue
                event = msgspec.json.decode(data, type=_Event)
                if event.error:
                    error = f"the stream says: {bytes(event.error).decode(errors='replace')[:ERROR_CHARACTERS]}"
                    break
                for choice in event.choices:
                    prompt = choice.prompt_token_ids or prompt
                    if choice.token_ids:
                        num_events += 1
                        arrived_together = len(choice.token_ids)
                        if chunks and chunks[-1].at_s == at_s:
                            arrived_together += chunks.pop().num_tokens
                        chunks.append(Chunk(at_s, arrived_together))
                        token_ids += choice.token_ids
        except msgspec.DecodeError as problem:
            error = f"the stream holds an event that cannot be read: {problem}"
    if error is None:
        error = _shortcoming(question, prompt, len(token_ids), complete)
    return Exchange(
        recording.sent_s,
        recording.ended_s,
        tuple(chunks),
        tuple(token_ids),
        error,
        num_events,
        recording.receipt_id,
    )


def _shortcoming(question: Question, prompt: list[int] | None, num_tokens: int, complete: bool) -> str | None:
    if not complete:
        return f"the stream ended after {num_tokens} tokens without [DONE]"
    if num_tokens != question.max_tokens:
        return f"the answer has {num_tokens} tokens; {question.max_tokens} were asked for"
    if prompt != question.prompt:
        return "the server read another prompt than was sent"
    return None


def _events(arrivals: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event and when it was complete. One line of data per event, as vLLM writes them."""
    rest = b""
    for at_s, data in arrivals:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line[5:].strip()
