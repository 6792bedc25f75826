"""Owns the formats of published traces: reads their files into `bench.traces`, and says which line of which is wrong.

- claude-code (github.com/callanjfox/kv-cache-tester, `traces/`): one JSON file per session, in a folder or alone.
  Blocks of 64 tokens, ids local to the file, full blocks only. The blocks of tools and system prompt, which come first,
  are the same in all files that give them the same length. A sub-agent's `t` is when it ended. It starts with the end
  of the parent's turn before it, and the parent's first turn later than its end waits for it; what is left of the
  pause then is from the last child's end on.
- Mooncake (github.com/kvcache-ai/Mooncake, `FAST25-release/traces/*.jsonl`): one request a line, blocks of 512 tokens,
  ids of the whole file. Sessions are not named. A request goes on with the earlier one that has the longest prompt of
  which it holds all full blocks, if that has not been gone on with before and is more than a system prompt (blocks that
  more than 1 in 100 requests hold). A turn starts when its request arrived, after its session's start, or when the turn
  before it has ended if that is later.
- Azure (github.com/Azure/AzurePublicDataset, `AzureLLMInferenceTrace_*.csv`): one request a line, in columns TIMESTAMP,
  ContextTokens and GeneratedTokens. Nothing is said of what prompts share, so each request is a session of its own.
"""

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.traces import Child, Session, Trace, TraceError, Trajectory, Turn, linked

MOONCAKE_BLOCK_TOKENS = 512
SYSTEM_PROMPT_SHARE = 0.01
AZURE_BLOCK_TOKENS = 64
"""The trace has no blocks; a prompt is made of such."""
AZURE_COLUMNS = ("ContextTokens", "GeneratedTokens")


def read(path: Path) -> Trace:
    """Raises TraceError, OSError."""
    if path.is_dir():
        if files := sorted(path.glob("*.json")):
            return _claude_code(path.name, files)
        if not (files := sorted((*path.glob("*.jsonl"), *path.glob("*.csv")))):
            raise TraceError(f"{path} holds neither *.json (claude-code) nor *.jsonl (Mooncake) nor *.csv (Azure)")
        if len(files) > 1:
            raise TraceError(f"{path} holds several traces; name one: {', '.join(str(file) for file in files)}")
        path = files[0]
    if not path.stat().st_size:
        raise TraceError(f"{path} is empty")
    try:
        if path.suffix == ".csv":
            return _azure(path)
        if path.suffix == ".jsonl":
            return _mooncake(path)
        return _claude_code(path.stem, [path])
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is no text: {error}") from error


@dataclass
class _Row:
    """A JSON object, and where it stands. What is read from it is checked."""

    fields: Mapping[str, Any]
    where: str

    def number(self, name: str, least: float = 0.0, default: float | None = None) -> float:
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise TraceError(f"{self.where}: {name} is {value!r}; a number of at least {least:g} is needed")
        return value

    def integer(self, name: str, least: int = 0, default: int | None = None) -> int:
        value = self.number(name, least, default)
        if value != int(value):
            raise TraceError(f"{self.where}: {name} is {value!r}; a whole number is needed")
        return int(value)

    def ids(self, name: str) -> list[int]:
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
            raise TraceError(f"{self.where}: {name} is not a list of block ids")
        return value

    def rows(self, name: str) -> "list[_Row]":
        value = self.fields.get(name)
        if not isinstance(value, list) or not value:
            raise TraceError(f"{self.where}: {name} is not a list of requests")
        return [_row(one, f"{self.where}, {name}[{index}]") for index, one in enumerate(value)]


def _row(value: object, where: str) -> _Row:
    if not isinstance(value, dict):
        raise TraceError(f"{where}: a JSON object is needed")
    return _Row(value, where)


def _parsed(text: str, where: str) -> _Row:
    try:
        return _row(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not JSON: {error}") from error


@dataclass
class _Ids:
    """Gives a trajectory's blocks its own numbers, from 0 on; below 0 are those it shares with others."""

    shared: dict[tuple[object, ...], int]
    own: dict[object, int] = field(default_factory=dict[object, int])

    def __call__(self, key: object) -> int:
        return self.own.setdefault(key, len(self.own))

    def common(self, *key: object) -> int:
        return self.shared.setdefault(key, -1 - len(self.shared))

    def fresh(self) -> int:
        return self(("fresh", len(self.own)))


# -- claude-code


def _claude_code(name: str, files: Sequence[Path]) -> Trace:
    shared: dict[tuple[object, ...], int] = {}
    trajectories: list[Trajectory] = []
    block_size_tokens = 0
    for path in files:
        row = _parsed(path.read_text(encoding="utf-8"), str(path))
        size = row.integer("block_size", least=1)
        if block_size_tokens not in (0, size):
            raise TraceError(f"{path}: block_size is {size}, and {block_size_tokens} in the files before it")
        block_size_tokens = size
        ids = _Ids(shared)
        root = _claude_session(row, size, ids)
        trajectories.append(Trajectory(path.stem, root, len(ids.own)))
    return Trace(name, block_size_tokens, tuple(trajectories))


@dataclass
class _Recorded:
    """A turn and when it began and ended, from its session's start on; of a child its end, and the child."""

    began_s: float
    ended_s: float
    turn: Turn


def _claude_session(row: _Row, block_size: int, ids: _Ids) -> Session:
    rows = row.rows("requests")
    tools = row.integer("tool_tokens", default=0) // block_size
    prefix = (row.integer("tool_tokens", default=0) + row.integer("system_tokens", default=0)) // block_size
    of_tools, of_both = ("tools", tools), ("system", tools, prefix)

    def number(block: int, position: int) -> int:
        if position < tools:
            return ids.common(of_tools, position)
        return ids.common(of_both, position) if position < prefix else ids(block)

    turns: list[_Recorded] = []
    agents: list[tuple[float, float, Session]] = []
    for one in rows:
        if one.fields.get("type") == "subagent":
            end_s = one.number("t")
            agents.append((end_s - one.number("duration_ms") / 1000, end_s, _claude_session(one, block_size, ids)))
        else:
            turns.append(_claude_turn(one, block_size, ids, number))
    if not turns:
        raise TraceError(f"{row.where}: no request but those of sub-agents")
    for earlier, later in itertools.pairwise(turns):
        if later.began_s < earlier.began_s:
            raise TraceError(f"{row.where}: t falls from {earlier.began_s:g} to {later.began_s:g}")
    children: list[Child] = []
    for began_s, end_s, session in agents:
        # The record's clocks are rounded to seconds.
        after = max((i for i, turn in enumerate(turns) if turn.ended_s <= began_s + 1.0), default=0)
        joined_by = next((i for i, turn in enumerate(turns) if i > after and turn.began_s >= end_s - 1.0), None)
        delay_s = max(began_s - turns[after].ended_s, 0.0)
        children.append(Child(session, after, delay_s, joined_by))
        if joined_by is not None:
            joining = turns[joined_by]
            joining.turn = replace(joining.turn, pause_s=min(joining.turn.pause_s, max(joining.began_s - end_s, 0.0)))
    return Session(linked([one.turn for one in turns], block_size), tuple(children))


def _claude_turn(one: _Row, block_size: int, ids: _Ids, number: Callable[[int, int], int]) -> _Recorded:
    num_prompt, blocks = one.integer("in", least=1), one.ids("hash_ids")
    if len(blocks) not in (num_prompt // block_size, -(-num_prompt // block_size)):
        raise TraceError(f"{one.where}: {len(blocks)} hash_ids of {block_size} tokens do not fit in={num_prompt}")
    numbers = [number(block, position) for position, block in enumerate(blocks)]
    if len(numbers) * block_size < num_prompt:
        numbers.append(ids.fresh())
    began_s = one.number("t")
    turn = Turn(
        num_prompt,
        one.integer("out", default=1) or 1,
        tuple(numbers),
        pause_s=one.number("think_time", default=0.0),
        stop_reason=str(one.fields.get("stop", "")),
        tool=one.fields.get("tool"),
    )
    return _Recorded(began_s, began_s + one.number("api_time", default=0.0), turn)


# -- Mooncake


@dataclass
class _Request:
    arrives_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...]


def _mooncake(path: Path) -> Trace:
    requests: list[_Request] = []
    with path.open(encoding="utf-8") as file:
        for index, line in enumerate(file, start=1):
            if line.strip():
                requests.append(_mooncake_request(_parsed(line, f"{path}, line {index}")))
    if not requests:
        raise TraceError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrives_s)
    sessions = _chained(requests)
    in_sessions = Counter(block for session in sessions for block in {b for turn in session for b in turn.blocks})
    shared: dict[tuple[object, ...], int] = {}
    trajectories: list[Trajectory] = []
    for index, session in enumerate(sessions):
        ids = _Ids(shared)
        turns = [
            Turn(
                one.num_prompt,
                one.num_output,
                tuple(ids.common(block) if in_sessions[block] > 1 else ids(block) for block in one.blocks),
                arrives_s=one.arrives_s - session[0].arrives_s,
            )
            for one in session
        ]
        root = Session(linked(turns, MOONCAKE_BLOCK_TOKENS))
        trajectories.append(Trajectory(f"{path.stem}-{index}", root, len(ids.own)))
    return Trace(path.stem, MOONCAKE_BLOCK_TOKENS, tuple(trajectories))


def _mooncake_request(row: _Row) -> _Request:
    num_prompt, blocks = row.integer("input_length", least=1), row.ids("hash_ids")
    if len(blocks) != -(-num_prompt // MOONCAKE_BLOCK_TOKENS):
        raise TraceError(
            f"{row.where}: {len(blocks)} hash_ids of {MOONCAKE_BLOCK_TOKENS} tokens do not fit "
            f"input_length {num_prompt}"
        )
    num_output = row.integer("output_length", default=1) or 1
    return _Request(row.number("timestamp") / 1000, num_prompt, num_output, tuple(blocks))


def _chained(requests: Iterable[_Request]) -> list[list[_Request]]:
    """The requests as sessions, each in order of arrival."""
    requests = list(requests)
    held = Counter(block for request in requests for block in set(request.blocks))
    most = max(SYSTEM_PROMPT_SHARE * len(requests), 1)
    open_ends: dict[tuple[int, ...], list[_Request]] = {}
    sessions: list[list[_Request]] = []
    for request in requests:
        session = None
        for length in range(len(request.blocks), 0, -1):
            if held[request.blocks[length - 1]] > most:
                break  # from here on down it is a system prompt
            if length * MOONCAKE_BLOCK_TOKENS <= request.num_prompt and request.blocks[:length] in open_ends:
                session = open_ends.pop(request.blocks[:length])
                break
        if session is None:
            sessions.append(session := [])
        session.append(request)
        if end := request.blocks[: request.num_prompt // MOONCAKE_BLOCK_TOKENS]:
            open_ends[end] = session
    return sessions


# -- Azure


def _azure(path: Path) -> Trace:
    trajectories: list[Trajectory] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for index, row in enumerate(csv.DictReader(file), start=2):
            where = f"{path}, line {index}"
            if missing := [name for name in AZURE_COLUMNS if name not in row]:
                raise TraceError(f"{where}: there is no column {', '.join(missing)}")
            num_prompt, num_output = (_whole(row[name], f"{where}: {name}") for name in AZURE_COLUMNS)
            num_prompt = max(num_prompt, 1)
            num_blocks = -(-num_prompt // AZURE_BLOCK_TOKENS)
            turn = Turn(num_prompt, max(num_output, 1), tuple(range(num_blocks)))
            trajectories.append(Trajectory(f"{path.stem}-{index}", Session((turn,)), num_blocks))
    if not trajectories:
        raise TraceError(f"{path} holds no request")
    return Trace(path.stem, AZURE_BLOCK_TOKENS, tuple(trajectories))


def _whole(text: str | None, what: str) -> int:
    if text is None or not text.strip().isdecimal():
        raise TraceError(f"{what} is {text!r}; a whole number is needed")
    return int(text)
