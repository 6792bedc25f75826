"""Owns what the clients of a fault ask and what came back: bodies, the reading of streams, answers. Pure.

Every case has prompts of its own, so that no cache has seen them; the same seed gives the same prompts.
"""

import json
import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bench.fault_cases import Case, Kind, Moment

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

SHORT_PROMPT_TOKENS = 48
LONG_PROMPT_TOKENS = 6000
"""Some seconds of prefill on a shared core: long enough to be met there."""

ANSWER_TOKENS = 600
"""Some seconds on shared cores: long enough to be met in mid-stream."""

LATE_TOKENS = 24
LONG_ANSWER_TOKENS = 64
FLOOD = "flood-"
"""What the names of a flood's requests begin with."""

FLOOD_TOKENS = 8
FLOOD_SIZE = 400
BLOCKERS = 4
LOWEST_TOKEN, HIGHEST_TOKEN = 20, 1500
"""Plain tokens of the shipped model."""

PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.1}

MODEL = "baton-mini"
WORDS = ("baton", "relay", "runner", "cache", "token", "block", "prefill", "decode")


@dataclass(frozen=True)
class Ask:
    """One streaming request."""

    name: str
    path: str
    body: dict[str, Any]


class End(StrEnum):
    """How an answer ended, as its client saw it."""

    COMPLETE = "complete"
    ERROR = "error"
    """With an error in the stream, typed as the API's are."""
    REFUSED = "refused"
    """With an HTTP status above 399."""
    BROKEN = "broken"
    """The connection ended before the answer."""
    CUT = "cut"
    """The stream ended in good order without the answer's end and without an error."""
    LEFT = "left"
    """The client went away, as it should."""
    HUNG = "hung"
    """Not within the time that a client waits."""


@dataclass
class Choice:
    """What came of one choice. Tool calls are names and arguments by index: their ids are random."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    tool_calls: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Answer:
    """What a client got. Times are in seconds from the fault, negative before it. `retry_after` is the header."""

    name: str
    end: End | None = None
    status: int | None = None
    error: str = ""
    retry_after: str | None = None
    receipt_id: str | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    is_done: bool = False
    sent_s: float = 0.0
    first_token_s: float | None = None
    ended_s: float | None = None
    longest_gap_s: float = 0.0
    """Between two events with tokens."""

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def take(self, line: str) -> None:
        """One line of the event stream. Raises ValueError for an event that is none of the API's."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            return
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            if not (isinstance(error, dict) and error.get("message") and error.get("type") and error.get("code")):
                raise ValueError(f"an error without message, type or code: {data[:200]}")
            self.end, self.error = End.ERROR, f"{error['type']} {error['code']}: {error['message']}"
            return
        for part in event["choices"]:
            self._take_choice(part)
        if usage := event.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]

    def _take_choice(self, part: dict[str, Any]) -> None:
        choice = self.choices.setdefault(part["index"], Choice())
        delta = part.get("delta") or {}
        choice.text += part.get("text") or delta.get("content") or ""
        choice.token_ids += part.get("token_ids") or []
        choice.finish_reason = part.get("finish_reason") or choice.finish_reason
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            name, arguments = choice.tool_calls.get(call["index"], ("", ""))
            choice.tool_calls[call["index"]] = (
                name + (function.get("name") or ""),
                arguments + (function.get("arguments") or ""),
            )

    def close(self) -> None:
        """The stream has ended in good order."""
        if self.end is None:
            ended = bool(self.choices) and all(choice.finish_reason for choice in self.choices.values())
            self.end = End.COMPLETE if self.is_done and ended else End.CUT


def difference(answer: Answer, reference: Answer) -> str:
    """Where a complete answer is not what an undisturbed one is; empty if nowhere."""
    if sorted(answer.choices) != sorted(reference.choices):
        return f"choices {sorted(answer.choices)} instead of {sorted(reference.choices)}"
    for index, right in sorted(reference.choices.items()):
        choice = answer.choices[index]
        if choice.token_ids != right.token_ids:
            return f"choice {index}: {_first_difference(choice.token_ids, right.token_ids)}"
        for what in ("text", "finish_reason", "tool_calls"):
            if getattr(choice, what) != getattr(right, what):
                return f"choice {index}: {what} {getattr(choice, what)!r} instead of {getattr(right, what)!r}"
    usage, right_usage = ((one.prompt_tokens, one.completion_tokens) for one in (answer, reference))
    return "" if usage == right_usage else f"usage {usage} instead of {right_usage}"


def begins(answer: Answer, reference: Answer) -> bool:
    """Whether what came of an answer, complete or not, is how the undisturbed one begins."""
    for index, choice in answer.choices.items():
        right = reference.choices.get(index)
        if right is None or choice.token_ids != right.token_ids[: len(choice.token_ids)]:
            return False
    return True


def _first_difference(token_ids: list[int], right: list[int]) -> str:
    for index, (token_id, right_id) in enumerate(zip(token_ids, right, strict=False)):
        if token_id != right_id:
            return f"token {index} of {len(right)} is {token_id} instead of {right_id}"
    return f"{len(token_ids)} tokens instead of {len(right)}"


class Asks:
    """The requests of one case. `seed` decides all prompts."""

    def __init__(self, case: Case, seed: str) -> None:
        self._rng = random.Random(f"{case.name} {seed}")
        self._case = case

    def background(self) -> list[Ask]:
        """What streams besides the target: three greedy answers, two seeded ones, a chat that calls a tool."""
        greedy = [_completion(f"greedy-{number}", self._prompt(SHORT_PROMPT_TOKENS)) for number in range(3)]
        seeded = [
            _completion(f"seeded-{number}", self._prompt(SHORT_PROMPT_TOKENS), temperature=0.8, seed=number + 1)
            for number in range(2)
        ]
        return [*greedy, *seeded, _tool_call("tools", self._rng, 100)]

    def target(self) -> Ask:
        early = self._case.moment in (Moment.QUEUED, Moment.PREFILLING, Moment.BEFORE_PULL, Moment.BEFORE_TOKEN)
        prompt = self._prompt(LONG_PROMPT_TOKENS if early else SHORT_PROMPT_TOKENS)
        max_tokens = LONG_ANSWER_TOKENS if early else ANSWER_TOKENS
        match self._case.kind:
            case Kind.GREEDY:
                return _completion("target", prompt, max_tokens)
            case Kind.SEEDED:
                return _completion("target", prompt, max_tokens, temperature=0.8, seed=7)
            case Kind.PENALTIES:
                return _completion("target", prompt, max_tokens, temperature=0.8, seed=7, **PENALTIES)
            case Kind.CHOICES:
                return _completion("target", prompt, max_tokens, temperature=0.8, seed=7, n=2)
            case Kind.LOGPROBS:
                return _completion("target", prompt, max_tokens, temperature=0.8, seed=7, logprobs=3)
            case Kind.SCHEMA:
                schema = {"type": "json_schema", "json_schema": {"name": "words", "schema": _words(200)}}
                return _chat("target", self._rng, response_format=schema)

    def blockers(self) -> list[Ask]:
        """Long prompts that keep every prefill engine busy, so that the next one waits."""
        return [
            _completion(f"blocker-{number}", self._prompt(LONG_PROMPT_TOKENS), LATE_TOKENS)
            for number in range(BLOCKERS)
        ]

    def late(self) -> Ask:
        """Of a client that comes right after the blow."""
        return _completion("late", self._prompt(SHORT_PROMPT_TOKENS), LATE_TOKENS)

    def flood(self) -> list[Ask]:
        """One prompt, very often at once."""
        prompt = self._prompt(SHORT_PROMPT_TOKENS)
        return [_completion(f"{FLOOD}{number}", prompt, FLOOD_TOKENS) for number in range(FLOOD_SIZE)]

    def _prompt(self, num_tokens: int) -> list[int]:
        return _prompt(self._rng, num_tokens)


class LoopAsks:
    """The requests of a client that asks one after the other: of each kind in turn, and no two alike. After the loss of
    a replica the first two kinds are continued and the others replayed. Answers take some seconds at most."""

    KINDS = ("greedy", "seeded", "penalties", "tools")
    PROMPT_TOKENS = (16, 600)
    ANSWER_TOKENS = (100, 400)

    def __init__(self, number: int, seed: int) -> None:
        self._number = number
        self._rng = random.Random(f"loop {number} {seed}")
        self._num_asked = 0

    def next(self) -> Ask:
        """Its name begins with its kind."""
        rng = self._rng
        kind = self.KINDS[(self._number + self._num_asked) % len(self.KINDS)]
        self._num_asked += 1
        name, max_tokens = f"{kind}-{self._number}-{self._num_asked}", rng.randint(*self.ANSWER_TOKENS)
        if kind == "tools":
            return _tool_call(name, rng, num_words=max_tokens // 4)
        prompt = _prompt(rng, rng.randint(*self.PROMPT_TOKENS))
        if kind == "greedy":
            return _completion(name, prompt, max_tokens)
        seeded = {"temperature": 0.8, "seed": self._num_asked}
        return _completion(name, prompt, max_tokens, **seeded, **(PENALTIES if kind == "penalties" else {}))


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(LOWEST_TOKEN, HIGHEST_TOKEN) for _ in range(num_tokens)]


def _tool_call(name: str, rng: random.Random, num_words: int) -> Ask:
    function = {"name": "note", "description": "Notes words.", "parameters": _words(num_words)}
    tools = [{"type": "function", "function": function}]
    return _chat(name, rng, tools=tools, tool_choice="required")


def _chat(name: str, rng: random.Random, **more: Any) -> Ask:
    content = " ".join(rng.choice(WORDS) for _ in range(12))
    body = {"messages": [{"role": "user", "content": f"Note these words: {content}"}], "max_tokens": ANSWER_TOKENS}
    return Ask(name, CHAT, _body(**body, **more))


def _completion(name: str, prompt: list[int], max_tokens: int = ANSWER_TOKENS, **more: Any) -> Ask:
    return Ask(name, COMPLETIONS, _body(prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **more))


def _body(**more: Any) -> dict[str, Any]:
    common = {"model": MODEL, "temperature": 0.0, "stream": True, "return_token_ids": True}
    return common | {"stream_options": {"include_usage": True}} | more


def _words(count: int) -> dict[str, Any]:
    """The schema of an object with a list of so many words."""
    words = {"type": "array", "items": {"enum": list(WORDS)}, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": False}
