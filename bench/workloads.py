"""Owns the workloads that `bench load` makes itself: agents, chat, long prompts, long answers, a mix of them,
and requests of one length. Pure.

Each is a `bench.traces.Trace`, as a recorded one is. Lengths are log-normal with the quantiles that are given; where
they come from stands at each. The recorded ones (README, Recorded traffic) are

- claude-code: 63 sessions of a coding agent, 2,312 turns, 20 sub-agents in 6 of the sessions;
- Mooncake: the conversation trace, 12,031 requests in 8,099 sessions as `bench.trace_files` finds them;
- Azure: the LLM inference traces of 2023, 19,366 requests of chat and 8,819 of code.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from bench.traces import Child, Session, Trace, TraceError, Trajectory, Turn, linked

BLOCK_TOKENS = 64
NUM_TRAJECTORIES = 200
"""Of a workload; a run that needs more draws them again, with other text."""
_Z90 = 1.2816
"""Of the standard normal distribution, the 90th percentile."""


@dataclass(frozen=True)
class Spread:
    """A log-normal quantity by its median and 90th percentile, cut to `least` and `most`."""

    p50: float
    p90: float
    least: float
    most: float

    def draw(self, source: random.Random) -> float:
        value = source.lognormvariate(math.log(self.p50), math.log(self.p90 / self.p50) / _Z90)
        return min(max(value, self.least), self.most)

    def draw_whole(self, source: random.Random) -> int:
        return round(self.draw(source))


@dataclass(frozen=True)
class SubAgents:
    """Sessions that an agent starts and waits for. Of claude-code: 6 of 63 sessions have them, 2 to 5; all are waited
    for. Tools and system prompt are their own, and the same for all."""

    share_of_sessions: float = 0.1
    fewest: int = 2
    most: int = 5
    shared_tokens: int = 9_000
    """Of claude-code's sub-agents' first prompts, the 10th percentile."""
    task_tokens: Spread = Spread(2_600, 4_300, 64, 8_000)
    """What is left of the first prompts: median 11,683, 90th percentile 13,312."""
    turns: Spread = Spread(12, 24, 1, 24)
    result_tokens: Spread = Spread(1_903, 9_980, 16, 70_000)
    output_tokens: Spread = Spread(254, 507, 16, 3_926)
    pause_s: Spread = Spread(4, 20, 0.5, 47)


@dataclass(frozen=True)
class Agents:
    """Agents that loop over tools. All figures are of claude-code unless said; `most` is its 99th percentile.

    Simplified: a prompt is always the one before with its answer and what came after it (recorded: of 80% of turns),
    and all agents have the same tools and system prompt.
    """

    tools_tokens: int = 12_439
    system_tokens: int = 2_771
    task_tokens: Spread = Spread(4_057, 72_450, 64, 300_000)
    """First prompts (median 19,267, 90th percentile 87,664) less tools and system prompt."""
    turns: Spread = Spread(21, 120, 1, 170)
    result_tokens: Spread = Spread(222, 2_756, 16, 12_289)
    """By how much a prompt is longer than the one before with its answer."""
    output_tokens: Spread = Spread(245, 999, 16, 4_119)
    tool_pause_s: Spread = Spread(9, 56, 0.5, 815)
    person_pause_s: Spread = Spread(180, 2_090, 5, 52_748)
    person_share: float = 0.1
    """Of turns, that end with words for the person: 217 of 2,225."""
    sub_agents: SubAgents = SubAgents()


@dataclass(frozen=True)
class Chat:
    """People who talk to a model. Without tools; the system prompt's length is set, not measured."""

    system_tokens: int = 256
    first_tokens: Spread = Spread(1_020, 2_735, 16, 4_142)
    """Azure, chat: the prompts, of which the trace does not say what is history."""
    turns: Spread = Spread(1, 2, 1, 7)
    """Mooncake."""
    message_tokens: Spread = Spread(41, 4_226, 4, 16_705)
    """Mooncake: what a later prompt adds to the one before with its answer."""
    output_tokens: Spread = Spread(129, 424, 8, 601)
    """Azure, chat."""
    pause_s: Spread = Spread(123, 474, 5, 1_456)
    """Mooncake: between the arrivals of two turns; `--max-pause-s` cuts it."""


@dataclass(frozen=True)
class Single:
    """Requests that share nothing, one a session."""

    prompt_tokens: Spread
    output_tokens: Spread


LONG_PROMPT = Single(Spread(5_956, 26_389, 64, 87_174), Spread(13, 55, 2, 252))
"""First prompts of Mooncake with the answers of Azure's code: to read much and answer in a word."""
LONG_ANSWER = Single(Spread(128, 512, 16, 1_024), Spread(1_000, 2_000, 64, 4_000))
"""To think long about a short question. Set, not measured: no recorded trace here is of it."""
MIX: Mapping[str, float] = {"agents": 0.1, "chat": 0.5, "long-prompt": 0.2, "long-answer": 0.2}
"""Shares of the trajectories of `mixed`. Set, not measured."""


@dataclass
class _Texts:
    """Numbers the blocks of one trajectory."""

    num_own: int = 0

    def fresh(self, num_blocks: int) -> list[int]:
        first = self.num_own
        self.num_own += num_blocks
        return list(range(first, self.num_own))


def _growing(
    texts: _Texts, shared: tuple[int, int], first_tokens: int, steps: Iterable[tuple[int, int, float]]
) -> tuple[Turn, ...]:
    """A session whose text only grows. `shared` are its tokens that all have, and the number of the first such block
    (below 0); `steps` give each turn's new tokens, output tokens and pause. The first turn's new tokens come on top of
    `first_tokens`."""
    num_shared = -(-shared[0] // BLOCK_TOKENS)
    ids = [shared[1] - place for place in range(num_shared)]
    turns: list[Turn] = []
    num_tokens = num_shared * BLOCK_TOKENS + first_tokens
    for new_tokens, output_tokens, pause_s in steps:
        num_tokens += new_tokens
        num_full = num_tokens // BLOCK_TOKENS
        ids += texts.fresh(num_full - len(ids))
        last = texts.fresh(1) if num_tokens % BLOCK_TOKENS else []
        turns.append(Turn(num_tokens, output_tokens, (*ids, *last), pause_s))
        num_tokens += output_tokens
    return linked(turns, BLOCK_TOKENS)


def _steps(
    turns: Spread, new_tokens: Spread, output_tokens: Spread, pause_s: Spread, source: random.Random
) -> list[tuple[int, int, float]]:
    """As `_growing` takes them. The first turn has nothing new, and no pause before it."""
    return [
        (
            new_tokens.draw_whole(source) if number else 0,
            output_tokens.draw_whole(source),
            pause_s.draw(source) if number else 0.0,
        )
        for number in range(turns.draw_whole(source))
    ]


def _agent(of: Agents, shared_from: int, source: random.Random) -> tuple[Session, int]:
    texts = _Texts()

    def steps() -> Iterable[tuple[int, int, float]]:
        for number in range(of.turns.draw_whole(source)):
            is_persons = source.random() < of.person_share
            pause_s = (of.person_pause_s if is_persons else of.tool_pause_s).draw(source) if number else 0.0
            new_tokens = of.result_tokens.draw_whole(source) if number else 0
            yield new_tokens, of.output_tokens.draw_whole(source), pause_s

    num_shared = of.tools_tokens + of.system_tokens
    turns = _growing(texts, (num_shared, shared_from), of.task_tokens.draw_whole(source), steps())
    children: list[Child] = []
    sub = of.sub_agents
    if len(turns) > 1 and source.random() < sub.share_of_sessions:
        after = source.randrange(len(turns) - 1)
        sub_from = shared_from - num_shared // BLOCK_TOKENS - 1
        for _ in range(source.randint(sub.fewest, sub.most)):
            children.append(Child(_sub_agent(sub, texts, sub_from, source), after, 0.0, after + 1))
    return Session(turns, tuple(children)), texts.num_own


def _sub_agent(of: SubAgents, texts: _Texts, shared_from: int, source: random.Random) -> Session:
    steps = _steps(of.turns, of.result_tokens, of.output_tokens, of.pause_s, source)
    return Session(_growing(texts, (of.shared_tokens, shared_from), of.task_tokens.draw_whole(source), steps))


def _chat(of: Chat, shared_from: int, source: random.Random) -> tuple[Session, int]:
    texts = _Texts()
    steps = _steps(of.turns, of.message_tokens, of.output_tokens, of.pause_s, source)
    turns = _growing(texts, (of.system_tokens, shared_from), of.first_tokens.draw_whole(source), steps)
    return Session(turns), texts.num_own


def _single(of: Single, shared_from: int, source: random.Random) -> tuple[Session, int]:
    texts = _Texts()
    steps = [(0, of.output_tokens.draw_whole(source), 0.0)]
    return Session(_growing(texts, (0, shared_from), of.prompt_tokens.draw_whole(source), steps)), texts.num_own


_MAKERS: Mapping[str, Callable[[int, random.Random], tuple[Session, int]]] = {
    "agents": lambda shared_from, source: _agent(Agents(), shared_from, source),
    "chat": lambda shared_from, source: _chat(Chat(), shared_from, source),
    "long-prompt": lambda shared_from, source: _single(LONG_PROMPT, shared_from, source),
    "long-answer": lambda shared_from, source: _single(LONG_ANSWER, shared_from, source),
}
_MIXED = "mixed"
WORKLOADS = (*_MAKERS, _MIXED)
_SHARED_ROOM = 1_000
"""Numbers of shared blocks for each kind of session."""


def synthetic(name: str, seed: int, num_trajectories: int = NUM_TRAJECTORIES) -> Trace:
    """The workload of this name, of `WORKLOADS`."""
    source = random.Random(f"{name} {seed}")
    kinds = list(_MAKERS)
    trajectories: list[Trajectory] = []
    for number in range(num_trajectories):
        kind = source.choices(list(MIX), list(MIX.values()))[0] if name == _MIXED else name
        root, num_own = _MAKERS[kind](-1 - _SHARED_ROOM * kinds.index(kind), source)
        trajectories.append(Trajectory(f"{kind}-{number}", root, num_own))
    return Trace(name, BLOCK_TOKENS, tuple(trajectories))


FIXED = "fixed:PROMPT/ANSWER"
"""The form of the name that `fixed_lengths` reads."""


def fixed_lengths(name: str) -> tuple[int, int] | None:
    """Tokens of every prompt and answer, from a name as in fixed:250/64; None for any other name. Raises TraceError."""
    kind, separator, text = name.partition(":")
    if (kind, separator) != ("fixed", ":"):
        return None
    lengths = text.split("/")
    if len(lengths) != 2 or not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise TraceError(f"{name!r} is no workload; give {FIXED} in tokens as in fixed:250/64")
    return int(lengths[0]), int(lengths[1])


def fixed(prompt_tokens: int, output_tokens: int) -> Trace:
    """Requests that share nothing, all of the same lengths."""
    turns = _growing(texts := _Texts(), (0, -1), prompt_tokens, [(0, output_tokens, 0.0)])
    return Trace(
        f"{prompt_tokens}-{output_tokens}", BLOCK_TOKENS, (Trajectory("fixed", Session(turns), texts.num_own),)
    )


def scaled(trace: Trace, factor: float) -> Trace:
    """The trace with all lengths so much shorter or longer: blocks have other sizes, and what is shared or kept stays
    so. Blocks are whole tokens, so the factor that is used is the nearest that gives some; an answer has a token at
    least."""
    before, size = trace.block_size_tokens, max(round(trace.block_size_tokens * factor), 1)

    def prompt_tokens(num_tokens: int) -> int:
        """So many that they fill as many blocks as before."""
        return (num_tokens - 1) * size // before + 1

    def session(one: Session) -> Session:
        turns: list[Turn] = []
        for turn in one.turns:
            num_prompt, num_kept = prompt_tokens(turn.num_prompt_tokens), turn.num_kept_tokens * size // before
            if turn.keeps_of is not None and turn.num_kept_tokens >= one.turns[turn.keeps_of].num_prompt_tokens:
                kept = turns[turn.keeps_of]
                is_with_answer = turn.num_kept_tokens > one.turns[turn.keeps_of].num_prompt_tokens
                num_kept = min(kept.num_tokens if is_with_answer else kept.num_prompt_tokens, num_prompt)
            turns.append(
                replace(
                    turn,
                    num_prompt_tokens=num_prompt,
                    num_output_tokens=max(turn.num_output_tokens * size // before, 1),
                    num_kept_tokens=num_kept,
                )
            )
        children = tuple(replace(child, session=session(child.session)) for child in one.children)
        return Session(tuple(turns), children)

    return replace(
        trace,
        block_size_tokens=size,
        trajectories=tuple(replace(one, root=session(one.root)) for one in trace.trajectories),
    )


def longest_turn_tokens(trace: Trace) -> int:
    """Prompt and answer of the longest turn; 0 without one."""

    def longest(session: Session) -> int:
        own = max((turn.num_tokens for turn in session.turns), default=0)
        return max([own, *(longest(child.session) for child in session.children)])

    return max((longest(one.root) for one in trace.trajectories), default=0)
