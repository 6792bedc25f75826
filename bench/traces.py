"""Owns the recorded traces: reads the published files into trajectories of sessions and turns. Formats are in
`bench.trace_files`; this is what they become.

A prompt is a row of block ids, and a turn says what of the session's earlier text it keeps. So a replay can put into
the next prompt what an engine really wrote, where the recorded prompt has grown by the recorded answer.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


class TraceError(ValueError):
    """A file is not what its format says; the message tells the place."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `block_ids` cover the whole prompt, the last block partly: ids from 0 on are the trajectory's own,
    below 0 they mean the same block in all trajectories of a trace.

    It starts `pause_s` after the turn before it (and after the children that turn waited for), or, where `arrives_s`
    is set, so long after its session's start, but never before the turn before it has ended.

    `keeps_of` is the earlier turn whose text it goes on with (None: no text), `num_kept_tokens` how much of it: of
    that turn's prompt, then its answer. The rest of the prompt follows from the block ids.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...]
    pause_s: float = 0.0
    arrives_s: float | None = None
    stop_reason: str = ""
    tool: str | None = None
    keeps_of: int | None = None
    num_kept_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Child:
    """A session that another one starts `delay_s` after the end of its turn `after_turn`. The parent's turn
    `joined_by` waits for its end; None: only the end of the trajectory does."""

    session: "Session"
    after_turn: int
    delay_s: float
    joined_by: int | None


@dataclass(frozen=True, slots=True)
class Session:
    turns: tuple[Turn, ...]
    children: tuple[Child, ...] = ()

    @property
    def num_turns(self) -> int:
        """With those of all sessions below."""
        return len(self.turns) + sum(child.session.num_turns for child in self.children)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """`num_own_ids`: its own block ids are below this."""

    name: str
    root: Session
    num_own_ids: int


@dataclass(frozen=True)
class Trace:
    """`num_cut_turns`: turns left out because they or one before them do not fit the model's context."""

    name: str
    block_size_tokens: int
    trajectories: tuple[Trajectory, ...]
    num_cut_turns: int = 0

    @property
    def num_turns(self) -> int:
        return sum(trajectory.root.num_turns for trajectory in self.trajectories)


def linked(turns: Sequence[Turn], block_size_tokens: int) -> tuple[Turn, ...]:
    """The turns of one session in order, each with what it keeps of an earlier one.

    That is the turn with which it shares most leading blocks, the last of equals. A prompt that holds all full blocks
    of that turn's prompt, and is longer than it by at least its answer, keeps both; without room for the answer it
    keeps the prompt; else the common blocks.
    """
    linked: list[Turn] = []
    for turn in turns:
        best, num_best = None, 0
        for index in range(len(linked) - 1, -1, -1):
            num_common = _num_common(linked[index].block_ids, turn.block_ids)
            if num_common > num_best:
                best, num_best = index, num_common
            is_whole = num_common >= linked[index].num_prompt_tokens // block_size_tokens
            if is_whole and 2 * num_common > len(turn.block_ids):
                break  # it goes on with this one; an earlier one cannot share more but by chance
        kept = 0
        if best is not None:
            before = linked[best]
            kept = min(num_best * block_size_tokens, before.num_prompt_tokens, turn.num_prompt_tokens)
            if num_best >= before.num_prompt_tokens // block_size_tokens:
                if turn.num_prompt_tokens >= before.num_tokens:
                    kept = before.num_tokens
                elif turn.num_prompt_tokens >= before.num_prompt_tokens:
                    kept = before.num_prompt_tokens
        linked.append(replace(turn, keeps_of=best, num_kept_tokens=kept))
    return tuple(linked)


def _num_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Of leading ids. By halving: ids of a session differ from some place on."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def cut(session: Session, max_model_len: int) -> tuple[Session | None, int]:
    """The session up to its first turn that does not fit, None if that is the first one; and how many turns were cut
    off, with the children that those would have started."""
    num_fit = next((i for i, turn in enumerate(session.turns) if turn.num_tokens > max_model_len), len(session.turns))
    if not num_fit:
        return None, session.num_turns
    num_cut = len(session.turns) - num_fit
    children: list[Child] = []
    for child in session.children:
        kept, num_cut_there = cut(child.session, max_model_len) if child.after_turn < num_fit else (None, 0)
        if kept is None:
            num_cut += child.session.num_turns
            continue
        num_cut += num_cut_there
        joined_by = child.joined_by if child.joined_by is not None and child.joined_by < num_fit else None
        children.append(replace(child, session=kept, joined_by=joined_by))
    return Session(session.turns[:num_fit], tuple(children)), num_cut


def cut_trace(trace: Trace, max_model_len: int) -> Trace:
    """The trace as a model of this context can serve it."""
    kept: list[Trajectory] = []
    num_cut = trace.num_cut_turns
    for trajectory in trace.trajectories:
        root, num = cut(trajectory.root, max_model_len)
        num_cut += num
        if root is not None:
            kept.append(replace(trajectory, root=root))
    return replace(trace, trajectories=tuple(kept), num_cut_turns=num_cut)


def arrivals(trace: Trace, rate_per_s: float, seed: str) -> Iterator[tuple[float, Trajectory]]:
    """Trajectories, and when they arrive from 0 on, as a Poisson process without an end: each one once in a round. With
    a seed they come at every rate in the same order and in the same proportions of time."""
    source, at_s = random.Random(seed), 0.0
    while True:
        round_of = list(trace.trajectories)
        source.shuffle(round_of)
        for trajectory in round_of:
            at_s += source.expovariate(1.0) / rate_per_s
            yield at_s, trajectory
