"""Owns streaming requests to /v1/completions, one by one and in a closed loop, and what came back when.

While an answer comes the client only stores arrivals; it parses them afterwards, so that its own CPU disturbs little.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    prompt: list[int] | str
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True
    stream: bool = True
    return_token_ids: bool = True


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a server says of a request's tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompt; None where the server does not tell."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


@dataclass
class Recording:
    """The bytes of one answer and when they came, in seconds of `time.perf_counter`. `receipt_id` is what Baton calls
    the request. `status` is HTTP's, 0 if there was none."""

    sent_s: float
    ended_s: float = 0.0
    status: int = 0
    receipt_id: str | None = None
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What one load gave. `window_s` lasts from the first request sent to the last answer complete."""

    exchanges: list[Exchange]
    window_s: float


class Client:
    """Connections to one server. An async context manager. `timeout_s` bounds a request from its start to its end."""

    def __init__(self, url: str, model: str, api_key: str | None = None, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._server = url
        self._url = f"{url}/v1/completions"
        self._model = model
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s)),
            headers=self._headers,
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
                recordings[index] = await self.ask(bodies[index])
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

    async def page(self, url: str) -> bytes | None:
        """What the server answers to a GET of this address; None where it does not."""
        try:
            async with self._session.get(url) as response:
                return await response.read() if response.status == 200 else None
        except (TimeoutError, aiohttp.ClientError):
            return None

    async def ask(self, body: bytes, headers: Mapping[str, str] | None = None) -> Recording:
        """One request. What goes wrong is in the recording."""
        recording = Recording(time.perf_counter())
        try:
            async with self._session.post(self._url, data=body, headers=headers) as response:
                recording.status = response.status
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


@dataclass(frozen=True)
class Answer:
    """A recorded answer, read. `token_ids` and `prompt` are empty where the server does not tell them; then each event
    with text is taken for a token. `is_complete`: it said that it had ended. `error`: what the stream itself says."""

    chunks: tuple[Chunk, ...]
    token_ids: tuple[int, ...]
    num_events: int
    prompt: list[int]
    usage: Usage | None
    finish_reason: str | None
    is_complete: bool
    error: str | None


def read_answer(recording: Recording) -> Answer:
    """What cannot be read is an answer with an error."""
    chunks: list[Chunk] = []
    token_ids: list[int] = []
    num_events = 0
    error = recording.error
    prompt: list[int] = []
    usage: Usage | None = None
    finish_reason: str | None = None
    is_complete = False
    if error is None:
        try:
            for at_s, data in _events(recording.arrivals):
                if data == b"[DONE]":
                    is_complete = True
                    continue
                event = msgspec.json.decode(data, type=_Event)
                if event.error:
                    error = f"the stream says: {bytes(event.error).decode(errors='replace')[:ERROR_CHARACTERS]}"
                    break
                usage = event.usage or usage
                for choice in event.choices:
                    prompt = choice.prompt_token_ids or prompt
                    finish_reason = choice.finish_reason or finish_reason
                    num_tokens = len(choice.token_ids) if choice.token_ids is not None else bool(choice.text)
                    if num_tokens:
                        num_events += 1
                        if chunks and chunks[-1].at_s == at_s:
                            num_tokens += chunks.pop().num_tokens
                        chunks.append(Chunk(at_s, num_tokens))
                        token_ids += choice.token_ids or ()
        except msgspec.DecodeError as problem:
            error = f"the stream holds an event that cannot be read: {problem}"
    return Answer(tuple(chunks), tuple(token_ids), num_events, prompt, usage, finish_reason, is_complete, error)


def exchange(recording: Recording, question: Question) -> Exchange:
    """Reads a recorded answer. An answer that is not what was asked for gives an exchange with an error."""
    answer = read_answer(recording)
    return Exchange(
        recording.sent_s,
        recording.ended_s,
        answer.chunks,
        answer.token_ids,
        answer.error or _shortcoming(question, answer),
        answer.num_events,
        recording.receipt_id,
    )


def _shortcoming(question: Question, answer: Answer) -> str | None:
    if not answer.is_complete:
        return f"the stream ended after {len(answer.token_ids)} tokens without [DONE]"
    if len(answer.token_ids) != question.max_tokens:
        return f"the answer has {len(answer.token_ids)} tokens; {question.max_tokens} were asked for"
    if answer.prompt != question.prompt:
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
