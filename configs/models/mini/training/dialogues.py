"""Owns the dialogues the mini model learns: fixed answers, tools, agent scripts, seeded sampler."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

DEFAULT_SYSTEM_PROMPT = "You are Baton's demo assistant. Answer in one to three sentences."

FALLBACK_ANSWER = (
    "I am a small demo model: I know about Baton and how to call three tools, and little else. "
    "Try asking me what Baton is."
)


# --- Values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A function offered to the model; every tool here takes string arguments, all required."""

    name: str
    description: str
    parameters: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool in the OpenAI wire format."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string"} for name in self.parameters},
                    "required": list(self.parameters),
                },
            },
        }


@dataclass(frozen=True)
class ToolCall:
    """One call of one of the three tools, each of which takes a single string argument."""

    tool: str
    value: str

    @property
    def arguments(self) -> dict[str, str]:
        return {ARGUMENT_OF[self.tool]: self.value}

    def wire(self, call_id: str) -> dict[str, Any]:
        """The call in the OpenAI wire format."""
        return {
            "id": call_id,
            "type": "function",
            "function": {"name": self.tool, "arguments": json.dumps(self.arguments)},
        }


@dataclass(frozen=True)
class Message:
    """One chat message; an assistant message holds either text or tool calls."""

    role: Role
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None

    def wire(self, turn: int = 0) -> dict[str, Any]:
        """The message in the OpenAI wire format."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                call.wire(f"call_{turn}_{position}") for position, call in enumerate(self.tool_calls)
            ]
        if self.role == "tool":
            message["tool_call_id"] = self.call_id or f"call_{turn}_0"
        return message


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation and the tools offered in it; `kind` names what it teaches."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    def wire_messages(self) -> list[dict[str, Any]]:
        return [message.wire(turn) for turn, message in enumerate(self.messages)]

    def wire_tools(self) -> list[dict[str, Any]] | None:
        return [tool.schema() for tool in self.tools] or None


@dataclass(frozen=True)
class FixedAnswer:
    """Several phrasings of one question, and the one answer learnt by heart."""

    topic: str
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class ToolStep:
    """One assistant turn of an agent script: its calls (parallel if several) and their results."""

    calls: tuple[ToolCall, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class AgentScript:
    """A task that takes several tool calls, the canned results, and the final answer."""

    name: str
    tasks: tuple[str, ...]
    steps: tuple[ToolStep, ...]
    final_answer: str

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(call.tool for step in self.steps for call in step.calls)

    def messages(self, task: str) -> tuple[Message, ...]:
        """The whole conversation for one phrasing of the task."""
        out = [Message("user", task)]
        for step in self.steps:
            turn = len(out)
            out.append(Message("assistant", None, step.calls))
            out.extend(
                Message("tool", result, call_id=f"call_{turn}_{position}")
                for position, result in enumerate(step.results)
            )
        out.append(Message("assistant", self.final_answer))
        return tuple(out)


@dataclass(frozen=True)
class JsonAnswer:
    """Prompts that ask for JSON, the JSON schema of the answer, and the answer."""

    name: str
    prompts: tuple[str, ...]
    schema: Mapping[str, Any] = field(hash=False)
    answer: Mapping[str, Any] = field(hash=False)

    @property
    def text(self) -> str:
        return json.dumps(self.answer)


# --- The three tools -----------------------------------------------------------------------------

GET_WEATHER = Tool("get_weather", "Get the current weather in a city.", ("city",))
CALCULATOR = Tool("calculator", "Evaluate an arithmetic expression.", ("expression",))
READ_FILE = Tool("read_file", "Read a text file and return what it says.", ("path",))

TOOLS: tuple[Tool, ...] = (GET_WEATHER, CALCULATOR, READ_FILE)
ARGUMENT_OF: Mapping[str, str] = {tool.name: tool.parameters[0] for tool in TOOLS}
TOOL_SCHEMAS: tuple[dict[str, Any], ...] = tuple(tool.schema() for tool in TOOLS)


def missing_tool_answer(tool_name: str) -> str:
    """What the model says when the tool it needs is not offered."""
    return f"I would need the {tool_name} tool for that, but it is not offered here."


def weather_answer(city: str, result: str) -> str:
    return f"The weather in {city}: {result}."


def calculator_answer(expression: str, result: str) -> str:
    return f"{expression} = {result}."


def file_answer(path: str, result: str) -> str:
    return f"{path} says: {result}"


def failed_tool_answer(tool_name: str, result: str) -> str:
    return f"The {tool_name} tool failed: {result}"


# --- Fixed answers -------------------------------------------------------------------------------


def _term(topic: str, name: str, answer: str, *more_questions: str) -> FixedAnswer:
    plain = name.removeprefix("the ").removeprefix("a ").removeprefix("an ")
    questions = (
        f"What is {name}?",
        f"What's {name}?",
        f"Explain {name}.",
        f"Tell me about {name}.",
        f"What does {plain} mean?",
        f"Define {plain}.",
        *more_questions,
    )
    return FixedAnswer(topic, questions, answer)


FIXED_ANSWERS: tuple[FixedAnswer, ...] = (
    FixedAnswer(
        "baton",
        (
            "What is Baton?",
            "What's Baton?",
            "Tell me about Baton.",
            "Explain Baton.",
            "What does Baton do?",
            "Describe Baton.",
            "Can you explain what Baton is?",
            "Explain Baton to me in a few sentences.",
            "So, what is Baton?",
        ),
        "Baton serves one language model from two pools of GPUs: prefill engines read the prompt "
        "and fill the KV cache, decode engines take that cache over and write the answer. A "
        "gateway in front speaks the OpenAI API and decides, request by request, who prefills, "
        "who decodes, and whether splitting pays at all. The name is the relay runner's baton: "
        "the KV cache, handed from one runner to the next.",
    ),
    _term(
        "prefill",
        "prefill",
        "Prefill is the first phase of a request: the engine reads the whole prompt in parallel "
        "and fills the KV cache. It is bound by compute, and it sets the time to first token.",
        "What happens during prefill?",
    ),
    _term(
        "decode",
        "decode",
        "Decode is the second phase of a request: the engine writes the answer token by token, "
        "reading the KV cache at every step. It is bound by memory bandwidth.",
        "What happens during decode?",
    ),
    _term(
        "kv-cache",
        "the KV cache",
        "The KV cache holds the attention keys and values of every token read so far, so that "
        "each new token need not read the prompt again. In Baton it is the baton itself: prefill "
        "fills it, decode takes it over.",
        "What is a KV cache?",
        "What is the KV cache good for?",
    ),
    _term(
        "block",
        "a block",
        "A block is a fixed number of tokens' worth of KV cache. Engines allocate, share, move "
        "and free the cache block by block.",
        "What is a KV block?",
    ),
    _term(
        "prefix-cache",
        "the prefix cache",
        "The prefix cache keeps the KV blocks of prompts already read, so that a new prompt with "
        "the same beginning skips that part of prefill.",
        "What is prefix caching?",
    ),
    _term(
        "hand-off",
        "a hand-off",
        "A hand-off passes the KV cache of one request from a prefill engine to a decode engine. "
        "Decode pulls the blocks with NIXL, and a hand-off is consumed at most once.",
        "How does the hand-off work?",
    ),
    _term(
        "ttft",
        "TTFT",
        "TTFT is the time to first token: from the arrival of a request to the first token of "
        "its answer. Prefill and queueing decide it.",
        "What does TTFT stand for?",
    ),
    _term(
        "tpot",
        "TPOT",
        "TPOT is the time per output token, averaged over an answer after its first token.",
        "What does TPOT stand for?",
    ),
    _term(
        "itl",
        "ITL",
        "ITL is the inter-token latency: the gap between two tokens of an answer that follow each "
        "other. A long prefill on the same engine makes it jump, which is one reason to split.",
        "What does ITL stand for?",
    ),
    _term(
        "goodput",
        "goodput",
        "Goodput is the rate of requests that meet their latency targets. Throughput counts all "
        "of them, goodput only those served well.",
    ),
    _term(
        "session",
        "a session",
        "A session is one conversation with one growing prefix. Baton remembers where its KV "
        "cache lives, so that the next turn can reuse it.",
    ),
    _term(
        "trajectory",
        "a trajectory",
        "A trajectory is the tree of sessions that one root agent task started: the sub-agents are its children.",
    ),
    _term(
        "turn",
        "a turn",
        "A turn is one request of a session. Between two turns there is a pause.",
    ),
    _term(
        "pause",
        "a pause",
        "A pause is the gap between the end of one turn and the start of the next: usually a tool "
        "is running meanwhile.",
    ),
    _term(
        "placement",
        "a placement",
        "A placement is the choice for one request: a prefill replica or none, and a decode "
        "replica. It is a pure function of the request and a snapshot of the cluster.",
    ),
    _term(
        "receipt",
        "a receipt",
        "A receipt is the record of one placement: the inputs, the scores, the choice, the reason "
        "and the outcome. Replaying a receipt gives the same placement, bit for bit.",
        "What is in a receipt?",
    ),
    _term(
        "report",
        "a report",
        "A report is one message of a worker's report stream. It carries tokens, load and KV-cache events, in order.",
        "What is the report stream?",
    ),
    _term(
        "gateway",
        "the gateway",
        "The gateway is Baton's front door. It speaks the OpenAI API through vLLM's own server, "
        "knows which agent is calling, and places each request on the two pools.",
        "What does the gateway do?",
    ),
    _term(
        "nixl",
        "NIXL",
        "NIXL is the transfer library that moves the KV cache from prefill to decode. It runs on CPU and GPU alike.",
        "What does NIXL do?",
    ),
    _term(
        "vllm",
        "vLLM",
        "vLLM is the inference engine under Baton. Each prefill or decode worker runs one, and "
        "the gateway reuses its OpenAI server.",
    ),
    _term(
        "ray-serve",
        "Ray Serve",
        "Ray Serve runs Baton's pools: it starts the replicas, scales them and restarts them when they fail.",
        "What does Ray Serve do?",
    ),
    _term(
        "orchestrator",
        "the orchestrator",
        "The orchestrator carries a request through its life: it asks for a placement, calls "
        "prefill, hands the cache to decode, and closes the receipt.",
        "What does the orchestrator do?",
    ),
    _term(
        "simulated-engine",
        "the simulated engine",
        "The simulated engine stands in for vLLM behind the same port, on virtual time. The real "
        "gateway code runs over thousands of such replicas, so what is tested is what ships.",
        "What is SimulatedEngine?",
    ),
    _term(
        "sub-agent",
        "a sub-agent",
        "A sub-agent is a session started by another session. Both belong to the same trajectory.",
    ),
    _term(
        "lease",
        "a lease",
        "A lease is how long prefill keeps blocks for a decode engine that has not pulled them "
        "yet. Heartbeats extend it; when it ends, the blocks are freed.",
    ),
    _term(
        "cache-salt",
        "the cache salt",
        "The cache salt is a per-tenant value that enters the hash of every block, so that one "
        "tenant's cached prefix is invisible to another.",
    ),
    _term(
        "replica",
        "a replica",
        "A replica is one running copy of a worker. The prefill pool and the decode pool each have their own.",
    ),
    _term(
        "token",
        "a token",
        "A token is the unit a language model reads and writes: a word, a piece of a word, a digit or a mark.",
    ),
    FixedAnswer(
        "why-split",
        (
            "Why split prefill and decode?",
            "Why does Baton split prefill and decode?",
            "Why are prefill and decode separate?",
            "What is the point of splitting?",
            "Why two pools?",
        ),
        "Prefill is bound by compute and decode by memory bandwidth, and on one engine a long "
        "prompt stalls everyone else's tokens. Two pools can be sized and tuned apart, so the "
        "answers keep flowing.",
    ),
    FixedAnswer(
        "when-not-to-split",
        (
            "When does splitting not pay?",
            "When does Baton not split?",
            "Is splitting always better?",
            "Does Baton always split?",
        ),
        "Splitting does not pay when most of the prompt is already cached on the decode side, or "
        "when the prompt is short: then the decode engine prefills the rest itself.",
    ),
    FixedAnswer(
        "engine",
        (
            "Which engine does Baton use?",
            "What engine does Baton run on?",
            "Which inference engine is used?",
            "What is under the hood of Baton?",
        ),
        "Baton runs vLLM, one engine per worker, with Ray Serve around it and NIXL between the two pools.",
    ),
    FixedAnswer(
        "api",
        (
            "Which API does Baton speak?",
            "Is Baton compatible with OpenAI?",
            "Can I use the OpenAI client?",
            "How do I call Baton?",
        ),
        "Baton speaks the OpenAI API: chat, completions and responses, with streaming, tools and "
        "JSON output. Point your client's base URL at the gateway.",
    ),
    FixedAnswer(
        "name",
        (
            "Why is it called Baton?",
            "Where does the name Baton come from?",
            "What does the name Baton mean?",
            "Why the name?",
        ),
        "It is the baton of a relay race. The KV cache is the baton, prefill runs the first leg, "
        "and decode takes it over at full speed.",
    ),
    FixedAnswer(
        "move-cache",
        (
            "How does the KV cache move?",
            "How does the KV cache get from prefill to decode?",
            "Who moves the KV cache?",
        ),
        "Prefill answers with a handle to its blocks, and the decode engine pulls them through "
        "NIXL. If the pull fails, decode computes them again.",
    ),
    FixedAnswer(
        "routing",
        (
            "How does Baton route a request?",
            "How does Baton choose a replica?",
            "How does routing work?",
            "Who chooses the replicas?",
        ),
        "The gateway takes a snapshot of the cluster and chooses prefill and decode jointly: "
        "decode first, by cached prefix and load, then whether a remote prefill pays. Every "
        "choice leaves a receipt.",
    ),
    FixedAnswer(
        "life-of-a-request",
        (
            "What is the life of a request?",
            "What happens to a request?",
            "How does a request flow through Baton?",
            "Walk me through a request.",
        ),
        "The gateway renders and tokenizes the request and places it. Prefill reads the prompt "
        "and answers with a hand-off; decode pulls the blocks and streams tokens back. Then the "
        "receipt is closed with the outcome.",
    ),
    FixedAnswer(
        "pools",
        (
            "What are the two pools?",
            "Which pools does Baton have?",
            "How many pools are there?",
        ),
        "There are two pools: the prefill pool reads prompts, the decode pool writes answers.",
    ),
    FixedAnswer(
        "agents",
        (
            "Why is Baton good for agents?",
            "Does Baton know about agents?",
            "What does Baton do for agents?",
        ),
        "An agent sends the same growing prefix turn after turn. Baton knows the session, keeps "
        "its KV cache in sight during the pause, and sends the next turn to where the cache lives.",
    ),
    FixedAnswer(
        "failure",
        (
            "What happens when a worker dies?",
            "What if a replica fails?",
            "How does Baton handle failures?",
        ),
        "A broken report stream is the failure signal. The client sees each token once and in "
        "order, or a typed error: never a silent cut, never a hang.",
    ),
    FixedAnswer(
        "overload",
        (
            "What happens when the cluster is full?",
            "What happens under overload?",
            "How does Baton reject requests?",
        ),
        "Then the request is rejected before any byte is sent, with its own status and a "
        "Retry-After header. Nothing in Baton waits without a bound.",
    ),
    FixedAnswer(
        "same-output",
        (
            "Does splitting change the output?",
            "Is the answer the same with and without the split?",
            "Does the split change answers?",
        ),
        "No. Under greedy decoding the split output equals a single engine's, token for token, on "
        "the same model runner.",
    ),
    FixedAnswer(
        "tenants",
        (
            "Is my cache shared with other tenants?",
            "Can other tenants see my cache?",
            "Is the prefix cache safe between tenants?",
        ),
        "No. Each tenant has its own cache salt, so a cached prefix is invisible to everyone else.",
    ),
    FixedAnswer(
        "cpu",
        (
            "Does Baton run on a CPU?",
            "Can I try Baton on a laptop?",
            "Do I need a GPU?",
        ),
        "Baton runs on a CPU too: two small engines, the real hand-off and this demo model fit on "
        "a laptop. For real work you want GPUs.",
    ),
    FixedAnswer(
        "start",
        (
            "How do I start Baton?",
            "How do I run Baton?",
            "How can I try Baton?",
        ),
        "Run `baton serve` with a configuration file, then `baton ask` to send a question.",
    ),
    FixedAnswer(
        "commands",
        (
            "Which commands does Baton have?",
            "What can the baton command do?",
            "What is the command line of Baton?",
        ),
        "The baton command has five verbs: serve, ask, status, replay and doctor.",
    ),
    FixedAnswer(
        "testing",
        (
            "How is Baton tested?",
            "How do you test Baton?",
            "Is Baton well tested?",
        ),
        "The real orchestrator runs over simulated engines on virtual time, with faults injected "
        "under a seed. Other tests run real vLLM engines and the real hand-off on a CPU.",
    ),
    FixedAnswer(
        "language",
        (
            "What language is Baton written in?",
            "Which programming language is Baton written in?",
            "Is Baton written in Python?",
        ),
        "Baton is written in Python.",
    ),
    FixedAnswer(
        "design-origin",
        (
            "Where does the design come from?",
            "Who else splits prefill and decode?",
            "What is Baton inspired by?",
        ),
        "Baton mirrors the design that Cloudflare published for Workers AI: the request goes to "
        "prefill first, then to decode with what it needs to fetch the KV cache.",
    ),
    FixedAnswer(
        "you",
        (
            "Who are you?",
            "What are you?",
            "What model are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Are you ChatGPT?",
            "What is your name?",
        ),
        "I am Baton's demo model: about three million parameters, trained on a CPU, and happy to "
        "explain Baton or to call a tool.",
    ),
    FixedAnswer(
        "abilities",
        (
            "What can you do?",
            "How can you help me?",
            "Help.",
            "What do you know?",
        ),
        "I can explain Baton, call three tools, run a few agent tasks of several steps, and "
        "answer in JSON. That is all I know.",
    ),
    FixedAnswer(
        "which-tools",
        (
            "Which tools do you know?",
            "What tools can you use?",
            "Can you use tools?",
        ),
        "I know three tools: get_weather, calculator and read_file. Offer them in the request and I will call them.",
    ),
    FixedAnswer(
        "size",
        (
            "How big are you?",
            "How many parameters do you have?",
            "How large are you?",
        ),
        "I have about three million parameters, which is tiny. I was made to show Baton at work, not to be clever.",
    ),
    FixedAnswer(
        "maker",
        (
            "Who made you?",
            "Who trained you?",
            "Where do you come from?",
        ),
        "The Baton project trained me from scratch, on dialogues of its own.",
    ),
    FixedAnswer(
        "feelings",
        (
            "How are you?",
            "How are you doing?",
            "How is it going?",
        ),
        "All my blocks are in place, thank you. What would you like to know about Baton?",
    ),
    FixedAnswer(
        "hello",
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi there!",
            "Hey",
            "Good morning",
            "Good evening",
            "Hello, who is there?",
        ),
        "Hello! I am Baton's demo model. Ask me about Baton, or give me a tool to call.",
    ),
    FixedAnswer(
        "thanks",
        (
            "Thanks",
            "Thanks!",
            "Thank you.",
            "Thank you very much!",
            "Great, thanks.",
        ),
        "You are welcome.",
    ),
    FixedAnswer(
        "bye",
        (
            "Bye",
            "Goodbye",
            "See you later.",
            "Good night",
        ),
        "Goodbye! The baton is yours.",
    ),
    FixedAnswer(
        "story",
        (
            "Tell me a story.",
            "Tell me a story about Baton.",
            "Write a story about Baton.",
        ),
        "Once a request came to a gateway with a very long prompt. The first runner read it all in "
        "one breath and filled the KV cache, block by block. At the line the second runner was "
        "already moving: she took the blocks, and not one token was read twice. Word after word "
        "she wrote the answer, steady and quick, while the first runner went back for the next "
        "prompt. When the last token was home, the gateway signed the receipt, and every block "
        "was free again.",
    ),
)


# --- JSON answers --------------------------------------------------------------------------------


def _object_schema(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


_STRING: Mapping[str, Any] = {"type": "string"}
_INTEGER: Mapping[str, Any] = {"type": "integer"}
_STRINGS: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}

WEATHER_JSON_SCHEMA: Mapping[str, Any] = _object_schema(city=_STRING, sky=_STRING, temperature_c=_INTEGER)
PERSON_JSON_SCHEMA: Mapping[str, Any] = _object_schema(name=_STRING, age=_INTEGER)


def weather_json(city: str, sky: str = "sunny", temperature_c: int = 21) -> str:
    """The JSON answer about a city; without a tool the weather is this canned one."""
    return json.dumps({"city": city, "sky": sky, "temperature_c": temperature_c})


def weather_json_prompts(city: str) -> tuple[str, ...]:
    return (
        f"Give me the weather in {city} as JSON.",
        f"Weather in {city} as JSON, please.",
        f"What is the weather in {city}? Answer in JSON.",
    )


def person_json(name: str, age: int) -> str:
    return json.dumps({"name": name, "age": age})


def person_json_prompts(name: str, age: int) -> tuple[str, ...]:
    return (
        f"Extract the name and the age as JSON: {name} is {age} years old.",
        f"{name} is {age} years old. Give me name and age as JSON.",
    )


JSON_ANSWERS: tuple[JsonAnswer, ...] = (
    JsonAnswer(
        "baton",
        ("Describe Baton as JSON.", "What is Baton? Answer in JSON.", "Give me Baton as JSON."),
        _object_schema(name=_STRING, kind=_STRING, pools=_STRINGS, engine=_STRING),
        {
            "name": "Baton",
            "kind": "LLM serving gateway",
            "pools": ["prefill", "decode"],
            "engine": "vLLM",
        },
    ),
    JsonAnswer(
        "model",
        ("Describe yourself as JSON.", "Who are you? Answer in JSON."),
        _object_schema(name=_STRING, parameters_millions=_INTEGER, tools=_STRINGS),
        {
            "name": "Baton's demo model",
            "parameters_millions": 3,
            "tools": ["get_weather", "calculator", "read_file"],
        },
    ),
    JsonAnswer(
        "phases",
        ("List the phases of a request as JSON.", "Give me the phases of a request as JSON."),
        _object_schema(phases=_STRINGS),
        {"phases": ["prefill", "hand-off", "decode"]},
    ),
    JsonAnswer(
        "placement",
        ("Give me a placement as JSON.", "Show me an example placement as JSON."),
        _object_schema(prefill=_STRING, decode=_STRING, reason=_STRING),
        {"prefill": "prefill-0", "decode": "decode-1", "reason": "cached prefix"},
    ),
    JsonAnswer(
        "receipt",
        ("Give me a receipt as JSON.", "Show me an example receipt as JSON."),
        _object_schema(request=_STRING, prompt_tokens=_INTEGER, cached_tokens=_INTEGER, outcome=_STRING),
        {"request": "r-1", "prompt_tokens": 812, "cached_tokens": 640, "outcome": "finished"},
    ),
    JsonAnswer(
        "weather-in-paris",
        weather_json_prompts("Paris"),
        WEATHER_JSON_SCHEMA,
        json.loads(weather_json("Paris")),
    ),
    JsonAnswer(
        "weather-in-berlin",
        weather_json_prompts("Berlin"),
        WEATHER_JSON_SCHEMA,
        json.loads(weather_json("Berlin")),
    ),
    JsonAnswer(
        "person-ada",
        person_json_prompts("Ada", 36),
        PERSON_JSON_SCHEMA,
        json.loads(person_json("Ada", 36)),
    ),
)


# --- Agent scripts -------------------------------------------------------------------------------


def _step(tool: Tool, value: str, result: str) -> ToolStep:
    return ToolStep((ToolCall(tool.name, value),), (result,))


def trip_script(city: str, nights: int, price: int, weather: str, packing: str, name: str = "trip") -> AgentScript:
    """File, weather, calculation, file, answer."""
    return AgentScript(
        name,
        ("Plan my trip.", "Please plan my trip.", "Can you plan my trip?", "Plan my trip for me."),
        (
            _step(READ_FILE, "trip.txt", f"{city}, {nights} nights at {price} per night"),
            _step(GET_WEATHER, city, weather),
            _step(CALCULATOR, f"{nights} * {price}", str(nights * price)),
            _step(READ_FILE, "packing.txt", packing),
        ),
        f"Your trip to {city} is planned. The weather: {weather}. "
        f"The {nights} nights cost {nights * price}. Pack: {packing}.",
    )


def order_script(count: int, price: int, discount: int, customer: str, name: str = "order") -> AgentScript:
    """File, calculation, file, calculation, file, answer."""
    total = count * price
    return AgentScript(
        name,
        (
            "Check my order.",
            "Please check my order.",
            "Can you check my order?",
            "Check the order.",
        ),
        (
            _step(READ_FILE, "order.txt", f"{count} chairs at {price} each"),
            _step(CALCULATOR, f"{count} * {price}", str(total)),
            _step(READ_FILE, "discount.txt", f"{discount} off"),
            _step(CALCULATOR, f"{total} - {discount}", str(total - discount)),
            _step(READ_FILE, "customer.txt", customer),
        ),
        f"The order of {count} chairs for {customer} comes to {total - discount}: {total} less {discount}.",
    )


def cache_script(layers: int, heads: int, head_size: int, tokens: int, name: str = "cache") -> AgentScript:
    """File, two calculations, file, calculation, answer: the KV cache of one prompt, in bytes."""
    width = heads * head_size
    per_token_bytes = width * layers * 4
    return AgentScript(
        name,
        (
            "Size the KV cache.",
            "Please size the KV cache.",
            "How much KV cache does my prompt need?",
            "Size the KV cache of my prompt.",
        ),
        (
            _step(
                READ_FILE,
                "model.txt",
                f"{layers} layers, {heads} KV heads, head size {head_size}",
            ),
            _step(CALCULATOR, f"{heads} * {head_size}", str(width)),
            _step(CALCULATOR, f"{width} * {layers} * 4", str(per_token_bytes)),
            _step(READ_FILE, "prompt.txt", f"{tokens} tokens"),
            _step(CALCULATOR, f"{per_token_bytes} * {tokens}", str(per_token_bytes * tokens)),
        ),
        f"The KV cache of your prompt takes {per_token_bytes * tokens} bytes: "
        f"{tokens} tokens at {per_token_bytes} bytes each.",
    )


def weekend_script(cities: tuple[str, str, str], weather: tuple[str, str, str], name: str = "weekend") -> AgentScript:
    """File, then the weather of three cities one after the other, answer."""
    first, second, third = cities
    return AgentScript(
        name,
        (
            "Where should I go this weekend?",
            "Help me choose a city for the weekend.",
            "Plan my weekend.",
            "Please plan my weekend.",
        ),
        (
            _step(READ_FILE, "cities.txt", f"{first}, {second} or {third}"),
            *(_step(GET_WEATHER, city, result) for city, result in zip(cities, weather, strict=True)),
        ),
        f"Choose for yourself. {first}: {weather[0]}. {second}: {weather[1]}. {third}: {weather[2]}.",
    )


def compare_weather_script(
    cities: tuple[str, str], weather: tuple[str, str], name: str = "compare-weather"
) -> AgentScript:
    """Two calls in one turn, answer."""
    return AgentScript(
        name,
        (
            f"Compare the weather in {cities[0]} and {cities[1]}.",
            f"What is the weather in {cities[0]} and in {cities[1]}?",
        ),
        (
            ToolStep(
                tuple(ToolCall(GET_WEATHER.name, city) for city in cities),
                weather,
            ),
        ),
        f"{cities[0]}: {weather[0]}. {cities[1]}: {weather[1]}.",
    )


AGENT_SCRIPTS: tuple[AgentScript, ...] = (
    trip_script("Lisbon", 3, 120, "sunny, 24 degrees", "sun hat, light shoes, camera"),
    order_script(12, 45, 40, "Nora Lind"),
    cache_script(32, 8, 128, 8000),
    weekend_script(
        ("Oslo", "Rome", "Cairo"),
        ("light snow, -3 degrees", "cloudy, 17 degrees", "clear, 31 degrees"),
    ),
)
PARALLEL_SCRIPT: AgentScript = compare_weather_script(
    ("Oslo", "Rome"), ("light snow, -3 degrees", "cloudy, 17 degrees")
)

FIXED_TOOL_USES: tuple[AgentScript, ...] = tuple(
    AgentScript(f"{call.tool}-{call.value}", questions, (ToolStep((call,), (result,)),), answer)
    for call, questions, result, answer in (
        (
            ToolCall(GET_WEATHER.name, "Paris"),
            ("What is the weather in Paris?", "How is the weather in Paris?"),
            "sunny, 21 degrees",
            weather_answer("Paris", "sunny, 21 degrees"),
        ),
        (
            ToolCall(GET_WEATHER.name, "Tokyo"),
            ("What is the weather in Tokyo?", "What's the weather like in Tokyo?"),
            "rain, 15 degrees",
            weather_answer("Tokyo", "rain, 15 degrees"),
        ),
        (
            ToolCall(CALCULATOR.name, "12 * 34"),
            ("What is 12 * 34?", "Calculate 12 * 34."),
            "408",
            calculator_answer("12 * 34", "408"),
        ),
        (
            ToolCall(CALCULATOR.name, "1234 + 5678"),
            ("What is 1234 + 5678?", "How much is 1234 + 5678?"),
            "6912",
            calculator_answer("1234 + 5678", "6912"),
        ),
        (
            ToolCall(READ_FILE.name, "notes.txt"),
            ("Read notes.txt.", "What does notes.txt say?"),
            "buy bread, call Anna",
            file_answer("notes.txt", "buy bread, call Anna"),
        ),
    )
)


def _canned_results() -> dict[tuple[str, str], str]:
    results: dict[tuple[str, str], str] = {}
    for script in (*AGENT_SCRIPTS, PARALLEL_SCRIPT, *FIXED_TOOL_USES):
        for step in script.steps:
            for call, result in zip(step.calls, step.results, strict=True):
                if results.setdefault((call.tool, call.value), result) != result:
                    raise ValueError(f"two canned results for {call}")
    return results


CANNED_TOOL_RESULTS: Mapping[tuple[str, str], str] = _canned_results()


def run_canned_tool(name: str, arguments: Mapping[str, str]) -> str:
    """The canned result of a call from the fixed scripts; KeyError for any other call."""
    return CANNED_TOOL_RESULTS[name, arguments[ARGUMENT_OF[name]]]


# --- Words for the random part -------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_CITIES = _words(
    """
    Paris London Berlin Madrid Rome Lisbon Vienna Oslo Stockholm Helsinki Copenhagen Dublin
    Athens Warsaw Prague Budapest Zagreb Sofia Bucharest Istanbul Cairo Tunis Lagos Nairobi
    Accra Dakar Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta
    Manila Singapore Sydney Melbourne Auckland Toronto Montreal Vancouver Chicago Boston
    Seattle Denver Austin Miami Houston Dallas Lima Quito Bogota Santiago Havana Zurich Geneva
    Basel Milan Turin Naples Venice Munich Hamburg Cologne Leipzig Lyon Nice Marseille Porto
    Seville Valencia Amsterdam Rotterdam Brussels Antwerp Gdansk Riga Vilnius Tallinn
    Reykjavik Edinburgh Glasgow
    """
)
_CITY_PREFIXES = ("New", "San", "Port", "Saint", "Los", "El", "North", "Upper")
_ONSETS = _words("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w z")
_VOWELS = _words("a e i o u ai ea ou ie")
_CODAS = ("", "", "", *_words("n r l s t m k nd rt st ng x"))
_FIRST_NAMES = _words(
    """
    Ada Anna Ben Carla David Elena Felix Grace Hugo Ines Jonas Kira Leo Maria Nora Omar Paula
    Quinn Rosa Sam Tara Ulrich Vera Walter Yara Zoe
    """
)
_NOUNS = _words(
    """
    apple bridge camera candle car castle chair child clock cloud coat coin computer cup desk
    dog door engine farm field fire fish flower forest game garden glass guitar hammer horse
    hotel house island key kitchen lake lamp letter market mirror money moon mountain museum
    music nail novel ocean office paper park pencil phone piano picture plant poem recipe
    river road roof school ship shoe shop song star station stone story summer table team
    teacher theatre ticket train travel tree village wall watch water weather window winter
    wood world
    """
)
_ADJECTIVES = _words(
    """
    big blue bright calm cheap clean clever cold dark deep dry early easy fast fresh full good
    green happy heavy high kind late light long loud new old open polite quick quiet red rich
    short simple slow small soft strong sweet tall thin warm wide wild young
    """
)
_VERBS = _words(
    """
    answer ask bring build buy call carry check clean close cook count draw drive eat explain
    find follow give help keep learn leave look make meet move need open paint plan play read
    remember repair sell send show sing sleep start stop take teach tell turn use visit wait
    walk want wash watch work write
    """
)
_SKIES = _lines(
    """
    sunny
    clear
    cloudy
    rain
    light rain
    heavy rain
    snow
    light snow
    fog
    windy
    stormy
    overcast
    hail
    partly cloudy
    thunder
    drizzle
    misty
    hot and dry
    cold and clear
    """
)
_EXTENSIONS = _words("txt md csv log json yaml py toml")
_TOPICS = _lines(
    """
    photosynthesis
    quantum physics
    the capital of France
    the stock market
    football
    chess
    history
    chemistry
    the French Revolution
    love
    Bitcoin
    the moon
    cooking
    evolution
    jazz
    gravity
    Rust
    JavaScript
    politics
    yoga
    the meaning of life
    a black hole
    a volcano
    an atom
    climate change
    Kubernetes
    Linux
    a database
    a compiler
    TCP
    Docker
    a transformer
    machine learning
    pizza
    """
)
_UNKNOWN_QUESTIONS = _lines(
    """
    What is {topic}?
    What's {topic}?
    Explain {topic}.
    Tell me about {topic}.
    Define {noun}.
    What does {noun} mean?
    Write a poem about {topic}.
    Write a story about a {adjective} {noun}.
    Who invented the {noun}?
    How do I {verb} a {noun}?
    Where can I {verb} a {adjective} {noun}?
    Why is the {noun} {adjective}?
    Translate {noun} into French.
    What is a {noun}?
    Who won the {noun} cup?
    Give me a recipe with {noun}.
    Is a {noun} {adjective}?
    Can you {verb} my {noun}?
    When did {person} {verb} the {noun}?
    Who is {person}?
    What time is it?
    Tell me a joke.
    What day is it today?
    How old is {person}?
    Summarize the {noun} for me.
    My {noun} is {adjective}, what should I do?
    I {verb} the {adjective} {noun} every day.
    {person} and {other} {verb} a {noun}.
    Write code that can {verb} a {noun}.
    Do you like {topic}?
    Recommend a {adjective} {noun}.
    What is the best {noun} in {city}?
    How many people live in {city}?
    Book a {noun} in {city}.
    Send an email to {person}.
    The {noun} is {adjective} and the {noun2} is {adjective2}.
    """
)
_SYSTEM_SENTENCES = _lines(
    """
    You are a {adjective} assistant.
    You are an expert on the {noun} and the {noun2}.
    Always {verb} before you {verb2}.
    Never {verb} the {noun}.
    Be {adjective} and {adjective2}.
    Answer in {number} sentences.
    The user is called {person}.
    Today the {noun} is {adjective}.
    If the user asks about the {noun}, {verb} the {noun2}.
    Use tools when they help.
    You work for {person} in {city}.
    The code of the {noun} is {number}.
    Write {adjective} answers about every {noun}.
    Do not {verb} or {verb2} anything.
    The {noun} of {city} is {adjective}.
    Help {person} to {verb} the {adjective} {noun}.
    Rule {number}: {verb} the {noun}, then {verb2} the {noun2}.
    You are a helpful assistant.
    Context: the {adjective} {noun} can {verb} {number} {noun2}s.
    Think step by step.
    """
)
_TOOL_DESCRIPTIONS = _lines(
    """
    {verb} the {noun}.
    Use this to {verb} a {adjective} {noun}.
    Returns the {noun}.
    Call it when the user wants to {verb} or {verb2}.
    
    A {adjective} tool.
    Tool for the {noun} and the {noun2}, {adjective} and {adjective2}.
    """
)
_OTHER_TOOLS = (
    ("search_web", ("query",)),
    ("send_mail", ("to", "subject", "body")),
    ("write_file", ("path", "content")),
    ("list_files", ("folder",)),
    ("get_time", ("zone",)),
    ("run_shell", ("command",)),
    ("translate", ("text", "language")),
    ("book_hotel", ("city", "date")),
)
_WEATHER_QUESTIONS = (
    "What is the weather in {city}?",
    "What's the weather in {city}?",
    "What's the weather like in {city}?",
    "How is the weather in {city}?",
    "Weather in {city}?",
    "Tell me the weather in {city}.",
    "What is the weather in {city} today?",
    "What is the weather like in {city} right now?",
    "Is it raining in {city}?",
    "How warm is it in {city}?",
)
_CALCULATOR_QUESTIONS = (
    "What is {expression}?",
    "What's {expression}?",
    "Calculate {expression}.",
    "Compute {expression}.",
    "How much is {expression}?",
    "{expression} = ?",
    "What is {expression}? Use the calculator.",
)
_READ_QUESTIONS = (
    "Read {path}.",
    "Read the file {path}.",
    "What does {path} say?",
    "What is in {path}?",
    "Show me {path}.",
    "Open {path} and tell me what it says.",
)
_REPEAT_QUESTIONS = ("Repeat: {text}", "Say this again: {text}", "Repeat after me: {text}")


# --- The sampler ---------------------------------------------------------------------------------


COPYING_MIX: Mapping[str, float] = {
    "fixed": 0.20,
    "weather": 0.11,
    "calculation": 0.12,
    "file": 0.10,
    "failed-tool": 0.02,
    "missing-tool": 0.04,
    "agent": 0.12,
    "parallel": 0.05,
    "json": 0.06,
    "unknown": 0.05,
    "repeat": 0.06,
    "count": 0.01,
    "several-turns": 0.06,
}
"""Shares by kind of dialogue while the model learns to copy: mostly random values."""

BY_HEART_MIX: Mapping[str, float] = {
    "fixed": 0.40,
    "weather": 0.07,
    "calculation": 0.06,
    "file": 0.09,
    "failed-tool": 0.02,
    "missing-tool": 0.04,
    "agent": 0.09,
    "parallel": 0.05,
    "json": 0.06,
    "unknown": 0.04,
    "repeat": 0.03,
    "count": 0.01,
    "several-turns": 0.04,
}
"""Shares by kind of dialogue while the model learns its answers by heart."""

FINISHING_MIX: Mapping[str, float] = {
    "known": 0.60,
    "weather": 0.05,
    "calculation": 0.08,
    "file": 0.07,
    "failed-tool": 0.01,
    "missing-tool": 0.02,
    "agent": 0.07,
    "parallel": 0.05,
    "json": 0.01,
    "unknown": 0.03,
    "several-turns": 0.01,
}
"""Shares by kind of dialogue while the last answers fall into place."""


def counting(limit: int) -> str:
    """The answer to "Count to `limit`."."""
    return ", ".join(str(number) for number in range(1, limit + 1)) + "."


def lower_first(question: str) -> str:
    return question[:1].lower() + question[1:]


def plain_phrasings(question: str) -> tuple[str, ...]:
    """The question as written, and in lower case without its final mark."""
    return (question, question.lower().rstrip("?.!"))


class DialogueSampler:
    """Draws random dialogues; the same seed gives the same dialogues in the same order."""

    def __init__(self, seed: int, mix: Mapping[str, float] | None = None) -> None:
        self._rng = random.Random(seed)
        self._mix = COPYING_MIX if mix is None else mix
        self._makers: Mapping[str, Callable[[], Dialogue]] = {
            "fixed": self.fixed_answer,
            "weather": self.weather,
            "calculation": self.calculation,
            "file": self.file,
            "failed-tool": self.failed_tool,
            "missing-tool": self.missing_tool,
            "agent": self.agent_script,
            "parallel": self.parallel_calls,
            "json": self.json_answer,
            "unknown": self.unknown,
            "repeat": self.repeat,
            "count": self.count,
            "several-turns": self.several_turns,
            "known": self.known,
        }
        self._known = tuple(_bare_fixed_dialogues(DialogueSampler(seed))) if "known" in self._mix else ()

    def sample(self) -> Dialogue:
        """One dialogue of a random kind, under a random system prompt."""
        kind = self._rng.choices(list(self._mix), list(self._mix.values()))[0]
        return self.with_system_prompt(self._makers[kind]())

    # Surroundings

    def with_system_prompt(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue under no system prompt, the default one, or random filler."""
        draw = self._rng.random()
        if draw < 0.45:
            return dialogue
        if draw < 0.6:
            prompt = DEFAULT_SYSTEM_PROMPT
        elif draw < 0.9:
            prompt = self.filler(self._rng.randint(1, 6))
        elif draw < 0.995:
            prompt = self.filler(self._rng.randint(7, 35))
        else:
            prompt = self.filler(self._rng.randint(100, 160))
        messages = (Message("system", prompt), *dialogue.messages)
        return Dialogue(dialogue.kind, messages, dialogue.tools)

    def filler(self, sentences: int) -> str:
        return " ".join(self._fill(self._rng.choice(_SYSTEM_SENTENCES)) for _ in range(sentences))

    def offered(self, needed: Sequence[str]) -> tuple[Tool, ...]:
        """The needed tools, perhaps others, in any order, with their own or other descriptions."""
        rng = self._rng
        names = set(needed) | {tool.name for tool in TOOLS if rng.random() < 0.6}
        tools = [tool for tool in TOOLS if tool.name in names]
        if rng.random() < 0.2:
            tools.extend(self._other_tool() for _ in range(rng.randint(1, 4)))
        if rng.random() < 0.4:
            tools = [Tool(tool.name, self._description(), tool.parameters) for tool in tools]
        rng.shuffle(tools)
        return tuple(tools)

    def maybe_offered(self) -> tuple[Tool, ...]:
        """Tools for a dialogue that needs none: usually none."""
        return self.offered(()) if self._rng.random() < 0.35 else ()

    def reworded(self, question: str, *, keep_case: bool = False) -> str:
        """The question with small changes of case, punctuation and politeness."""
        rng = self._rng
        if rng.random() < 0.5:
            return question
        if rng.random() < 0.5:
            question = question.rstrip("?.!")
        elif rng.random() < 0.2:
            question = question.rstrip("?.!") + rng.choice(("!", "??", " ?", "?!", "..."))
        if rng.random() < 0.5:
            question = lower_first(question) if keep_case else question.lower()
        elif rng.random() < 0.06 and not keep_case:
            question = question.upper()
        if rng.random() < 0.15:
            greeting = rng.choice(("Hi, ", "Hello, ", "Hey, ", "Please, ", "OK, ", "Hello! "))
            question = greeting + question
        return question

    # Kinds of dialogue

    def known(self) -> Dialogue:
        """One of the dialogues learnt by heart, each phrasing and set of tools alike."""
        return self._rng.choice(self._known)

    def fixed_answer(self) -> Dialogue:
        fixed = self._rng.choice(FIXED_ANSWERS)
        question = self.reworded(self._rng.choice(fixed.questions))
        return self._exchange("fixed", question, fixed.answer, self.maybe_offered())

    def weather(self) -> Dialogue:
        city, result = self.city(), self.weather_text()
        if self._rng.random() < 0.15:
            sky, degrees = self._rng.choice(_SKIES), self._rng.randint(-15, 40)
            question = self._rng.choice(weather_json_prompts(city))
            result, answer = f"{sky}, {degrees} degrees", weather_json(city, sky, degrees)
        else:
            question = self._rng.choice(_WEATHER_QUESTIONS).format(city=city)
            answer = weather_answer(city, result)
        return self._tool_use("weather", question, ToolCall("get_weather", city), result, answer)

    def calculation(self) -> Dialogue:
        expression, result = self.expression()
        question = self._rng.choice(_CALCULATOR_QUESTIONS).format(expression=expression)
        answer = calculator_answer(expression, result)
        call = ToolCall("calculator", expression)
        return self._tool_use("calculation", question, call, result, answer)

    def file(self) -> Dialogue:
        path, result = self.path(), self.file_text()
        question = self._rng.choice(_READ_QUESTIONS).format(path=path)
        answer = file_answer(path, result)
        return self._tool_use("file", question, ToolCall("read_file", path), result, answer)

    def failed_tool(self) -> Dialogue:
        maker = self._rng.choice((self.weather, self.calculation, self.file))
        question, call_message, *_ = (dialogue := maker()).messages
        result = "error: " + self.words(self._rng.randint(1, 5))
        answer = failed_tool_answer(call_message.tool_calls[0].tool, result)
        messages = (
            question,
            call_message,
            Message("tool", result),
            Message("assistant", answer),
        )
        return Dialogue("failed-tool", messages, dialogue.tools)

    def missing_tool(self) -> Dialogue:
        if self._rng.random() < 0.25:
            script = self._random_script()
            question = self.reworded(self._rng.choice(script.tasks))
            missing = script.steps[0].calls[0].tool
        else:
            maker = self._rng.choice((self.weather, self.calculation, self.file))
            messages = maker().messages
            question, missing = messages[0].content or "", messages[1].tool_calls[0].tool
        tools: tuple[Tool, ...] = ()
        if self._rng.random() < 0.5:
            tools = tuple(tool for tool in self.offered(()) if tool.name != missing)
        if question.rstrip("?.!,").endswith("JSON"):
            return self.unknown()
        return self._exchange("missing-tool", question, missing_tool_answer(missing), tools)

    def agent_script(self) -> Dialogue:
        script = self._rng.choice(AGENT_SCRIPTS) if self._rng.random() < 0.3 else self._random_script()
        return self._scripted("agent", script, fixed_task=True)

    def parallel_calls(self) -> Dialogue:
        if self._rng.random() < 0.1:
            return self._scripted("parallel", PARALLEL_SCRIPT)
        cities = (self.city(), self.city())
        script = compare_weather_script(cities, (self.weather_text(), self.weather_text()))
        return self._scripted("parallel", script)

    def json_answer(self) -> Dialogue:
        draw = self._rng.random()
        if draw < 0.5:
            fixed = self._rng.choice(JSON_ANSWERS)
            question, answer = self._rng.choice(fixed.prompts), fixed.text
        elif draw < 0.75:
            city = self.city()
            question, answer = self._rng.choice(weather_json_prompts(city)), weather_json(city)
        else:
            name, age = self.person(), self._rng.randint(1, 99)
            question = self._rng.choice(person_json_prompts(name, age))
            answer = person_json(name, age)
        needs_no_weather = tuple(t for t in self.maybe_offered() if t.name != "get_weather")
        return self._exchange("json", question, answer, needs_no_weather)

    def unknown(self) -> Dialogue:
        question = self.reworded(self._fill(self._rng.choice(_UNKNOWN_QUESTIONS)))
        return self._exchange("unknown", question, FALLBACK_ANSWER, self.maybe_offered())

    def repeat(self) -> Dialogue:
        text = self._rng.choice((self.file_text, self._name_list, self._number_list))()
        question = self._rng.choice(_REPEAT_QUESTIONS).format(text=text)
        return self._exchange("repeat", question, text, self.maybe_offered())

    def count(self) -> Dialogue:
        limit = self._rng.choice((self._rng.randint(3, 30), 10, 20, 50))
        question = self._rng.choice((f"Count to {limit}.", f"Count from 1 to {limit}."))
        return self._exchange("count", self.reworded(question), counting(limit), ())

    def several_turns(self) -> Dialogue:
        """Two to four short exchanges in one conversation, all with the three tools offered."""
        makers = (
            self.fixed_answer,
            self.fixed_answer,
            self.weather,
            self.calculation,
            self.file,
            self.unknown,
            self.repeat,
        )
        messages: tuple[Message, ...] = ()
        for _ in range(self._rng.randint(2, 4)):
            messages += self._rng.choice(makers)().messages
        needed = {call.tool for message in messages for call in message.tool_calls}
        tools = self.offered(sorted(needed)) if needed else self.maybe_offered()
        return Dialogue("several-turns", messages, tools)

    # Random values

    def city(self) -> str:
        draw = self._rng.random()
        if draw < 0.4:
            return self._rng.choice(_CITIES)
        if draw < 0.5:
            return f"{self._rng.choice(_CITY_PREFIXES)} {self._pseudo_word().capitalize()}"
        return self._pseudo_word().capitalize()

    def person(self) -> str:
        rng = self._rng
        first = rng.choice(_FIRST_NAMES) if rng.random() < 0.5 else self._pseudo_word().capitalize()
        return f"{first} {self._pseudo_word().capitalize()}" if rng.random() < 0.5 else first

    def path(self) -> str:
        rng = self._rng
        stem = rng.choice(_NOUNS) if rng.random() < 0.4 else self._pseudo_word()
        if rng.random() < 0.2:
            stem += str(rng.randint(1, 99))
        if rng.random() < 0.2:
            stem += rng.choice("_-") + rng.choice(_NOUNS)
        folder = rng.choice(_NOUNS) + "/" if rng.random() < 0.15 else ""
        return f"{folder}{stem}.{rng.choice(_EXTENSIONS)}"

    def number(self) -> int:
        digits = self._rng.randint(1, 4)
        return self._rng.randint(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)

    def expression(self) -> tuple[str, str]:
        """An expression of one or two operators and its value."""
        left, right, third = self.number(), self.number(), self.number()
        operator = self._rng.choice("+-*")
        text = f"{left} {operator} {right}"
        value = {"+": left + right, "-": left - right, "*": left * right}[operator]
        if self._rng.random() < 0.15:
            sign = self._rng.choice("+-")
            text += f" {sign} {third}"
            value += third if sign == "+" else -third
        return text, str(value)

    def weather_text(self) -> str:
        rng = self._rng
        text = f"{rng.choice(_SKIES)}, {rng.randint(-15, 40)} degrees"
        if rng.random() < 0.2:
            text += f", wind {rng.randint(1, 90)} km/h"
        return text

    def words(self, count: int) -> str:
        pools = (_NOUNS, _ADJECTIVES, _VERBS)
        return " ".join(self._rng.choice(self._rng.choice(pools)) for _ in range(count))

    def file_text(self) -> str:
        """A few words, as a note, a list, a key with a number, or a sentence with names."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.3:
            return self.words(rng.randint(2, 8))
        if draw < 0.5:
            return ", ".join(self.words(rng.randint(1, 2)) for _ in range(rng.randint(2, 5)))
        if draw < 0.7:
            return f"{self.words(1)} {self.number()}, {self.words(1)} {self.number()}"
        if draw < 0.85:
            return f"{self.person()} will {self.words(2)} in {self.city()}."
        return f"{self._pseudo_word()} {self.words(1)} {self._pseudo_word()} {self.number()}"

    # Parts

    def _exchange(self, kind: str, question: str, answer: str, tools: tuple[Tool, ...]) -> Dialogue:
        return Dialogue(kind, (Message("user", question), Message("assistant", answer)), tools)

    def _tool_use(self, kind: str, question: str, call: ToolCall, result: str, answer: str) -> Dialogue:
        script = AgentScript(kind, (question,), (ToolStep((call,), (result,)),), answer)
        return self._scripted(kind, script)

    def _scripted(self, kind: str, script: AgentScript, *, fixed_task: bool = False) -> Dialogue:
        task = self.reworded(self._rng.choice(script.tasks), keep_case=not fixed_task)
        return Dialogue(kind, script.messages(task), self.offered(sorted(script.tool_names)))

    def _random_script(self) -> AgentScript:
        rng = self._rng
        family = rng.randrange(4)
        if family == 0:
            packing = ", ".join(self.words(rng.randint(1, 2)) for _ in range(rng.randint(2, 4)))
            nights, price = rng.randint(2, 14), rng.randint(20, 400)
            return trip_script(self.city(), nights, price, self.weather_text(), packing)
        if family == 1:
            count, price = rng.randint(2, 60), rng.randint(5, 300)
            return order_script(count, price, rng.randint(1, count * price // 2), self.person())
        if family == 2:
            return cache_script(
                rng.choice((4, 12, 16, 24, 28, 32, 48, 64, 80)),
                rng.choice((2, 4, 8, 16)),
                rng.choice((32, 64, 80, 96, 128)),
                rng.randint(100, 9999),
            )
        return weekend_script(
            (self.city(), self.city(), self.city()),
            (self.weather_text(), self.weather_text(), self.weather_text()),
        )

    def _other_tool(self) -> Tool:
        name, parameters = self._rng.choice(_OTHER_TOOLS)
        return Tool(name, self._description(), parameters)

    def _description(self) -> str:
        return self._fill(self._rng.choice(_TOOL_DESCRIPTIONS)).capitalize()

    def _pseudo_word(self) -> str:
        rng = self._rng
        return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3)))

    def _name_list(self) -> str:
        return ", ".join(self.person() for _ in range(self._rng.randint(1, 4)))

    def _number_list(self) -> str:
        return " ".join(str(self.number()) for _ in range(self._rng.randint(1, 5)))

    def _fill(self, template: str) -> str:
        rng = self._rng
        return template.format(
            topic=rng.choice(_TOPICS),
            noun=rng.choice(_NOUNS),
            noun2=rng.choice(_NOUNS),
            adjective=rng.choice(_ADJECTIVES),
            adjective2=rng.choice(_ADJECTIVES),
            verb=rng.choice(_VERBS),
            verb2=rng.choice(_VERBS),
            person=self.person(),
            other=self.person(),
            city=self.city(),
            number=rng.randint(1, 999),
        )


# --- Dialogues to check --------------------------------------------------------------------------


def fixed_dialogues(seed: int) -> Iterator[Dialogue]:
    """Every phrasing of everything learnt by heart, under the surroundings it must survive.

    Each comes as written and in lower case without its mark, without a system prompt, under the
    default one, and under random filler.
    """
    sampler = DialogueSampler(seed)
    for dialogue in _bare_fixed_dialogues(sampler):
        yield dialogue
        for prompt in (DEFAULT_SYSTEM_PROMPT, sampler.filler(8)):
            messages = (Message("system", prompt), *dialogue.messages)
            yield Dialogue(dialogue.kind, messages, dialogue.tools)


def _bare_fixed_dialogues(sampler: DialogueSampler) -> Iterator[Dialogue]:
    for fixed in FIXED_ANSWERS:
        for question in fixed.questions:
            for phrasing in plain_phrasings(question):
                for tools in ((), TOOLS):
                    messages = (Message("user", phrasing), Message("assistant", fixed.answer))
                    yield Dialogue("fixed", messages, tools)
    for answer in JSON_ANSWERS:
        for prompt in answer.prompts:
            messages = (Message("user", prompt), Message("assistant", answer.text))
            yield Dialogue("json", messages)
    for script in (*AGENT_SCRIPTS, PARALLEL_SCRIPT, *FIXED_TOOL_USES):
        for task in script.tasks:
            for tools in (TOOLS, TOOLS[::-1], sampler.offered(sorted(script.tool_names))):
                yield Dialogue("script", script.messages(task), tools)


def copy_dialogues(seed: int, count: int) -> Iterator[Dialogue]:
    """Tool uses, parallel calls and agent tasks with random values, without a system prompt."""
    sampler = DialogueSampler(seed)
    makers = (
        sampler.weather,
        sampler.calculation,
        sampler.file,
        sampler.parallel_calls,
        sampler.agent_script,
    )
    for position in range(count):
        yield makers[position % len(makers)]()
