"""The oracle's bounds are what idle engines with an infinite cache need."""

import pytest

from bench.oracle import (
    Limits,
    capacity_per_s,
    decode_s,
    gpu_s_per_trajectory,
    num_new_tokens,
    prefill_s,
    session_spans,
    turn_s,
)
from bench.traces import Child, Session, Trace, Trajectory, Turn
from engine.latency import StepWork
from engine.roofline import ROOFLINES

QWEN = ROOFLINES["qwen3-coder-30b-a3b-fp8-h100"]
LIMITS = Limits(QWEN, max_num_batched_tokens=8192, max_pause_s=60.0)
SIZE = 64


def turn(num_prompt: int, num_output: int, kept: int = 0, pause_s: float = 0.0, blocks: tuple[int, ...] = ()) -> Turn:
    return Turn(num_prompt, num_output, blocks, pause_s, keeps_of=0 if kept else None, num_kept_tokens=kept)


def test_new_are_the_tokens_that_are_neither_kept_nor_shared_and_at_least_one() -> None:
    assert num_new_tokens(turn(1000, 1, kept=900), SIZE) == 100
    assert num_new_tokens(turn(1000, 1, blocks=(-1, -2, 5)), SIZE) == 1000 - 128
    assert num_new_tokens(turn(128, 1, blocks=(-1, -2)), SIZE) == 1


def test_a_long_prompt_takes_the_steps_of_its_chunks() -> None:
    one, two = StepWork.of([(8192, 0)]), StepWork.of([(1808, 8192)])
    assert prefill_s(LIMITS, 10_000, 0) == pytest.approx(QWEN.step_s(one) + QWEN.step_s(two))


def test_an_answer_takes_a_step_alone_for_each_further_token() -> None:
    steps = sum(QWEN.step_s(StepWork.of([(1, 5000 + index)])) for index in range(100))
    assert decode_s(LIMITS, 100, 5000) == pytest.approx(steps)
    assert turn_s(LIMITS, turn(5000, 1), SIZE)[1] == 0.0


def test_a_session_takes_its_turns_and_pauses_and_those_of_the_children_it_waits_for() -> None:
    child = Session((turn(1000, 10),))
    long = Session((turn(1000, 10), turn(2000, 500, kept=1010, pause_s=30.0)))
    parent = Session(
        (turn(3000, 50), turn(4000, 50, kept=3050, pause_s=100.0)),
        (Child(child, 0, 1.0, 1), Child(long, 0, 2.0, 1), Child(long, 1, 0.0, None)),
    )
    first, second = (sum(turn_s(LIMITS, one, SIZE)) for one in parent.turns)
    long_s = 30.0 + sum(sum(turn_s(LIMITS, one, SIZE)) for one in long.turns)
    starts_s, span, all_s = session_spans(LIMITS, parent, SIZE)
    # Pauses are cut at 60 s.
    assert starts_s == pytest.approx([0.0, first + 2.0 + long_s + 60.0])
    assert span.total_s == pytest.approx(first + 2.0 + long_s + 60.0 + second)
    assert span.pause_s == pytest.approx(2.0 + 30.0 + 60.0)
    assert all_s == pytest.approx(span.total_s + long_s)


def test_a_turn_that_arrives_by_the_clock_waits_for_the_one_before() -> None:
    turns = [Turn(1000, 500, (), arrives_s=0.0), Turn(1000, 10, (), arrives_s=0.1), Turn(1000, 10, (), arrives_s=50.0)]
    starts_s, span, _ = session_spans(LIMITS, Session(tuple(turns)), SIZE)
    assert starts_s == pytest.approx([0.0, sum(turn_s(LIMITS, turns[0], SIZE)), 50.0])
    assert span.busy_s == pytest.approx(sum(sum(turn_s(LIMITS, one, SIZE)) for one in turns))


@pytest.mark.parametrize(
    ("prompt", "output"),
    [(50_000, 1), (50_000, 2000), (500, 2000), (8000, 50)],
    ids=["prefill", "both", "short", "mixed"],
)
@pytest.mark.parametrize("batch", [1, 4, 32, 256])
def test_no_schedule_of_equal_turns_beats_the_bound_on_work(prompt: int, output: int, batch: int) -> None:
    """Prefill one by one in whole chunks, then decode in batches as large as the KV cache holds, all without a gap."""
    trace = Trace("t", SIZE, (Trajectory("one", Session((turn(prompt, output),)), 0),))
    batch = max(min(batch, QWEN.num_kv_tokens // (prompt + output)), 1)
    steps_s = sum(QWEN.step_s(StepWork.of([(1, prompt + index)] * batch)) for index in range(output - 1))
    needed_s = prefill_s(LIMITS, prompt, 0) + steps_s / batch
    bound_s = gpu_s_per_trajectory(LIMITS, trace)
    assert 0 < bound_s <= needed_s
    assert capacity_per_s(LIMITS, trace, 4) == pytest.approx(4 / bound_s)
