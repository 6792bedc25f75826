"""Owns what agents ask in `bench agents`: what all of a block share, each one's conversation and its growth. Pure.

Agents of the same seed have the same task, tools' results and pauses in every block. Only the block's name differs,
which stands before everything but the tools: so the work of two blocks can be compared, and no cache of one helps the
other, but for the tools' few blocks, which all engines have from the first warm-up on.
"""

import random
from dataclasses import dataclass, field
from typing import Any

MODEL = "baton-mini"
CHAT = "/v1/chat/completions"
SESSION_HEADER = "x-baton-session"

ANSWER_TOKENS = 48
TURNS = (6, 10)
PAUSE_S = (0.1, 0.6)
START_WITHIN_S = 1.0
SYSTEM_WORDS = 350
RESULT_WORDS = (60, 220)
WORDS = (
    "prefill", "decode", "cache", "block", "token", "gateway", "hand-off", "session", "engine", "prompt", "answer",
    "memory", "the", "of", "is", "reads", "writes", "keeps", "file", "line", "result", "weather", "number",
)  # fmt: skip
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Rome", "Accra", "Hanoi")


def _tool(name: str, description: str, parameter: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string", "description": f"The {parameter}"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool("get_weather", "Weather in a city", "city"),
    _tool("calculator", "Evaluates an expression", "expression"),
    _tool("read_file", "Reads a file", "path"),
)
"""Those that the shipped model has learnt to call."""


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str


def shared_messages(block: str, seed: int) -> list[dict[str, Any]]:
    """What every agent of a block begins with; the tools come before it in the prompt."""
    rng = random.Random(f"shared {seed}")
    rules = " ".join(rng.choice(WORDS) for _ in range(SYSTEM_WORDS))
    return [{"role": "system", "content": f"Block {block}. Use tools. {rules}"}]


def body(messages: list[dict[str, Any]], max_tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": messages,
        "tools": list(TOOLS),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass
class Agent:
    """One session. `messages` grow: what the model answers, then what its tool says."""

    number: int
    block: str
    seed: int
    fewest_turns: int = TURNS[0]
    most_turns: int = TURNS[1]
    num_done: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"agent {self.seed} {self.number}")
        self.num_turns = self._rng.randint(self.fewest_turns, self.most_turns)
        self.start_s = self._rng.uniform(0.0, START_WITHIN_S)
        self.messages = shared_messages(self.block, self.seed)
        self.messages.append({"role": "user", "content": f"Task {self.number}: {self._question()}"})

    @property
    def session(self) -> str:
        return f"{self.block}-agent-{self.number}"

    @property
    def has_ended(self) -> bool:
        return self.num_done == self.num_turns

    def took(self, text: str, calls: list[ToolCall]) -> float:
        """The model has answered. Returns how long its tool runs, in seconds, before the next turn."""
        self.num_done += 1
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            functions = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in calls]
            answer["tool_calls"] = [{"id": id, "type": "function", "function": one} for id, one in functions]
        self.messages.append(answer)
        for call in calls:
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": self._result()})
        if not calls:
            # The small model may forget to call a tool: then the agent has run one all the same.
            self.messages.append({"role": "user", "content": f"{self._result()} {self._question()}"})
        return self._rng.uniform(*PAUSE_S)

    def _question(self) -> str:
        return f"What is the weather in {self._rng.choice(CITIES)}?"

    def _result(self) -> str:
        words = (self._rng.choice(WORDS) for _ in range(self._rng.randint(*RESULT_WORDS)))
        return f"{self._rng.randint(-9, 39)} degrees. {' '.join(words)}."
