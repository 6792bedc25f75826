"""Owns the bounds that no policy can beat in a replay: on the rate that can be sustained and on a session's time. Pure.

Both take an infinite prefix cache that every GPU shares, pauses that are known, and no hand-offs.

**Rate.** A step takes `max(arithmetic, memory traffic) + overhead` (`engine.roofline`). So for any steps, in any order,
on any of the GPUs, the busy time is at least the larger one of all arithmetic and all traffic, plus all overhead. What
that is at least, for each trajectory:

- arithmetic: that of its new prompt tokens (those it does not keep from earlier turns and that no other trajectory has)
  and of its output tokens, which no batching makes less;
- traffic: the KV that each output token attends to, and a share of the weights; a step reads at least those of one
  token;
- shares: the KV of a step's sequences fits into one GPU, so shares of `context / KV capacity` add up to at most 1 in a
  step, and so do shares of `1 / max_num_batched_tokens` per token. Of the two ways, the one that gives more overall.

GPUs over the mean of this per trajectory is more trajectories a second than any policy sustains.

**Session.** Each turn takes at least the steps of its new tokens alone on an idle engine, and then one step alone for
each further output token: a step with more sequences never takes less. Turns of a session follow each other, with the
recorded pauses and the children they wait for between them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.traces import Session, Trace, Trajectory, Turn
from engine.latency import StepWork
from engine.roofline import Roofline


@dataclass(frozen=True)
class Limits:
    """What an engine is configured with, and what a replay shortens: pauses longer than `max_pause_s`."""

    roofline: Roofline
    max_num_batched_tokens: int
    max_pause_s: float


@dataclass(frozen=True)
class Work:
    """GPU-seconds, each a lower bound. `overhead_s` and `weights_s` are by the two ways to share a step."""

    compute_s: float = 0.0
    memory_s: float = 0.0
    kv_shares: float = 0.0
    token_shares: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.compute_s + other.compute_s,
            self.memory_s + other.memory_s,
            self.kv_shares + other.kv_shares,
            self.token_shares + other.token_shares,
        )


@dataclass(frozen=True)
class Span:
    """How long something takes, and how much of that is pauses on its critical path."""

    total_s: float = 0.0
    pause_s: float = 0.0

    @property
    def busy_s(self) -> float:
        return self.total_s - self.pause_s


def num_new_tokens(turn: Turn, block_size_tokens: int) -> int:
    """Of its prompt, with an infinite cache: at least the last one, of which the first output token comes."""
    num_shared = next((i for i, block in enumerate(turn.block_ids) if block >= 0), len(turn.block_ids))
    return max(turn.num_prompt_tokens - max(turn.num_kept_tokens, num_shared * block_size_tokens), 1)


def prefill_s(limits: Limits, num_new: int, num_before: int) -> float:
    """On an idle engine, in chunks."""
    total_s = 0.0
    while num_new > 0:
        chunk = min(num_new, limits.max_num_batched_tokens)
        total_s += limits.roofline.step_s(StepWork.of([(chunk, num_before)]))
        num_new, num_before = num_new - chunk, num_before + chunk
    return total_s


def decode_s(limits: Limits, num_steps: int, num_before: int) -> float:
    """On an idle engine. A step's time grows in a straight line with the context, so the middle one stands for all."""
    if not num_steps:
        return 0.0
    first = limits.roofline.step_s(StepWork.of([(1, num_before)]))
    last = limits.roofline.step_s(StepWork.of([(1, num_before + num_steps - 1)]))
    return num_steps * (first + last) / 2


def turn_s(limits: Limits, turn: Turn, block_size_tokens: int) -> tuple[float, float]:
    """The least time to the first token, and to the last one from there."""
    num_new = num_new_tokens(turn, block_size_tokens)
    ttft_s = prefill_s(limits, num_new, turn.num_prompt_tokens - num_new)
    return ttft_s, decode_s(limits, turn.num_output_tokens - 1, turn.num_prompt_tokens)


def session_spans(limits: Limits, session: Session, block_size_tokens: int) -> tuple[list[float], Span, float]:
    """When each turn starts at the earliest, from the session's start on; its span; and when all its children have
    ended as well."""
    now_s = pause_s = 0.0
    all_ended_s = 0.0
    starts_s: list[float] = []
    ends: dict[int | None, list[tuple[float, float]]] = {}
    for index, turn in enumerate(session.turns):
        end_s, child_pause_s = max(ends.get(index, []), default=(0.0, 0.0))
        if end_s > now_s:
            now_s, pause_s = end_s, pause_s + child_pause_s
        wait_s = min(turn.pause_s, limits.max_pause_s)
        if turn.arrives_s is not None:
            wait_s = max(turn.arrives_s - now_s, 0.0)
        now_s, pause_s = now_s + wait_s, pause_s + wait_s
        starts_s.append(now_s)
        now_s += sum(turn_s(limits, turn, block_size_tokens))
        for child in session.children:
            if child.after_turn == index:
                _, span, child_all_s = session_spans(limits, child.session, block_size_tokens)
                began_s = now_s + child.delay_s
                ends.setdefault(child.joined_by, []).append((began_s + span.total_s, child.delay_s + span.pause_s))
                all_ended_s = max(all_ended_s, began_s + child_all_s)
    return starts_s, Span(now_s, pause_s), max(all_ended_s, now_s)


def work(limits: Limits, turns: Iterable[Turn], block_size_tokens: int) -> Work:
    total = Work()
    roofline = limits.roofline
    for turn in turns:
        num_new = num_new_tokens(turn, block_size_tokens)
        prefill = StepWork.of([(num_new, turn.num_prompt_tokens - num_new)])
        num_steps = turn.num_output_tokens - 1
        decode_kv = num_steps * turn.num_prompt_tokens + num_steps * (num_steps + 1) // 2
        kv_bytes = roofline.model.kv_bytes_per_token * decode_kv
        total += Work(
            roofline.compute_s(num_new + num_steps, prefill.num_attended_tokens + decode_kv),
            roofline.read_s(kv_bytes),
            decode_kv / roofline.num_kv_tokens,
            (num_new + num_steps) / limits.max_num_batched_tokens,
        )
    return total


def all_turns(session: Session) -> Iterable[Turn]:
    yield from session.turns
    for child in session.children:
        yield from all_turns(child.session)


def gpu_s_per_trajectory(limits: Limits, trace: Trace) -> float:
    total = Work()
    for trajectory in trace.trajectories:
        total += work(limits, all_turns(trajectory.root), trace.block_size_tokens)
    roofline = limits.roofline
    steps = max(total.kv_shares, total.token_shares)
    memory_s = total.memory_s + steps * roofline.read_s(roofline.weight_bytes(1))
    busy_s = max(total.compute_s, memory_s) + steps * roofline.gpu.step_overhead_s
    return busy_s / len(trace.trajectories)


def capacity_per_s(limits: Limits, trace: Trace, num_gpus: int) -> float:
    """Trajectories per second that no policy exceeds."""
    return num_gpus / gpu_s_per_trajectory(limits, trace)


def trajectory_span(limits: Limits, trajectory: Trajectory, block_size_tokens: int) -> tuple[Span, float]:
    """The least span of its root session, and the least time until all its sessions have ended."""
    _, span, all_s = session_spans(limits, trajectory.root, block_size_tokens)
    return span, all_s
