"""Synthetic workloads are traces: sessions grow, share what they should, and are as long as is documented."""

import random
import statistics
from collections.abc import Iterator

import pytest

from bench.traces import Session, Trace, TraceError, Trajectory, Turn, cut_trace, linked
from bench.workloads import (
    MIX,
    WORKLOADS,
    Agents,
    Spread,
    fixed,
    fixed_lengths,
    longest_turn_tokens,
    scaled,
    synthetic,
)


def sessions(trace: Trace) -> Iterator[Session]:
    def below(session: Session) -> Iterator[Session]:
        yield session
        for child in session.children:
            yield from below(child.session)

    for trajectory in trace.trajectories:
        yield from below(trajectory.root)


def turns(trace: Trace) -> list[Turn]:
    return [turn for session in sessions(trace) for turn in session.turns]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("factor", [1.0, 0.05])
def test_blocks_cover_every_prompt_and_later_turns_go_on_with_the_one_before(name: str, factor: float) -> None:
    trace = scaled(synthetic(name, seed=1), factor)
    for session in sessions(trace):
        for index, turn in enumerate(session.turns):
            assert len(turn.block_ids) == -(-turn.num_prompt_tokens // trace.block_size_tokens)
            assert turn.num_prompt_tokens > 0 < turn.num_output_tokens
            if index:
                before = session.turns[index - 1]
                assert turn.keeps_of == index - 1
                assert turn.num_kept_tokens == min(before.num_tokens, turn.num_prompt_tokens)


def test_a_seed_gives_the_same_workload_and_another_one_another() -> None:
    assert synthetic("mixed", 3) == synthetic("mixed", 3)
    assert synthetic("mixed", 3) != synthetic("mixed", 4)


def test_agents_share_tools_and_system_prompt_and_nothing_else() -> None:
    first, second, *_ = (one.root.turns[0].block_ids for one in synthetic("agents", 0).trajectories)
    num_shared = -(-(Agents().tools_tokens + Agents().system_tokens) // 64)
    assert first[:num_shared] == second[:num_shared]
    assert max(first[:num_shared]) < 0 <= min(first[num_shared:])


def test_sub_agents_begin_alike_but_not_like_their_parent_and_are_waited_for() -> None:
    parents = [one.root for one in synthetic("agents", 0).trajectories if one.root.children]
    assert parents
    of_parents = {block for parent in parents for block in parent.turns[0].block_ids if block < 0}
    children = [child for parent in parents for child in parent.children]
    of_children = [{block for block in child.session.turns[0].block_ids if block < 0} for child in children]
    assert all(one == of_children[0] for one in of_children)
    assert not of_children[0] & of_parents
    assert all(child.joined_by == child.after_turn + 1 for child in children)
    for parent in parents:
        own = [set(b for b in child.session.turns[-1].block_ids if b >= 0) for child in parent.children]
        assert sum(map(len, own)) == len(set().union(*own)), "no two children have text of their own in common"


def test_lengths_have_the_quantiles_that_are_documented() -> None:
    of, found = Agents(), turns(synthetic("agents", 0))
    outputs = sorted(turn.num_output_tokens for turn in found)
    assert statistics.median(outputs) == pytest.approx(of.output_tokens.p50, rel=0.1)
    assert outputs[len(outputs) * 9 // 10] == pytest.approx(of.output_tokens.p90, rel=0.15)
    assert outputs[-1] == of.output_tokens.most


def test_a_spread_is_cut_to_its_bounds() -> None:
    source = random.Random(0)
    drawn = [Spread(10, 100, 5, 50).draw(source) for _ in range(500)]
    assert (min(drawn), max(drawn)) == (5, 50)


def test_a_mix_has_sessions_of_every_kind() -> None:
    kinds = {one.name.rpartition("-")[0] for one in synthetic("mixed", 0).trajectories}
    assert kinds == set(MIX)


def test_scaling_shortens_lengths_and_leaves_what_is_shared_and_kept() -> None:
    session = Session(linked([Turn(127, 40, (-1, 0)), Turn(300, 64, (-1, 1, 2, 3, 4))], 64))
    small = scaled(Trace("t", 64, (Trajectory("t", session, 5),)), 1 / 16)
    first, second = small.trajectories[0].root.turns
    assert small.block_size_tokens == 4
    assert (first.num_prompt_tokens, first.num_output_tokens) == (8, 2)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (19, 4)
    assert (first.block_ids, second.block_ids) == ((-1, 0), (-1, 1, 2, 3, 4))
    assert second.num_kept_tokens == first.num_tokens, "also where the scaled block is full and the recorded one not"


def test_what_is_scaled_to_the_context_is_not_cut() -> None:
    trace = synthetic("agents", 0)
    longest = longest_turn_tokens(trace)
    assert cut_trace(trace, longest).num_cut_turns == 0
    assert cut_trace(trace, longest - 1).num_cut_turns > 0
    assert longest_turn_tokens(scaled(trace, 8_192 / longest)) <= 8_192


def test_fixed_requests_have_the_lengths_that_were_asked_for() -> None:
    (turn,) = turns(fixed(70, 4))
    assert (turn.num_prompt_tokens, turn.num_output_tokens, len(turn.block_ids)) == (70, 4, 2)


def test_a_name_gives_the_lengths_of_fixed_requests() -> None:
    assert fixed_lengths("fixed:250/64") == (250, 64)
    assert fixed_lengths("fixed") is fixed_lengths("traces/fixed:1/2") is None
    for name in ("fixed:", "fixed:250", "fixed:250/0", "fixed:250/-4", "fixed:1/2/3"):
        with pytest.raises(TraceError, match=r"as in fixed:250/64"):
            fixed_lengths(name)
