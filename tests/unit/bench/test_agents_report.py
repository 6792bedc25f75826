"""Figures of agents' turns: what a receipt predicted, the ratio of two policies in each round, what targets say."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.agents_report import (
    TARGETS,
    AgentsPlan,
    AgentsReport,
    Block,
    ReceiptFacts,
    Turn,
    evaluate,
    ratio_lines,
    table,
)
from bench.results import Setting, write_json
from gateway.routing.predict import Prediction
from tests.unit.gateway.test_replay import receipt as a_receipt

PLAN = AgentsPlan("c.yaml", ("old", "new"), agents=2, turns=(2, 2), rounds=3, seed=0)
SETTING = Setting("now", {}, "commit", False, "cpu", 2, 24.0)
TURN = Turn(0, 0, 1.0, 0.5, False, "", "old", 100, 64, 64, 1, True)


def test_a_real_receipt_can_be_read() -> None:
    real = dataclasses.replace(a_receipt(), predicted=Prediction(96, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    facts = msgspec.json.decode(msgspec.json.encode(real.as_json()), type=ReceiptFacts)
    assert (facts.policy, facts.request.num_prompt_tokens) == (real.policy, real.request.num_prompt_tokens)
    assert (facts.placement.prefill, facts.outcome.reused_tokens) == (
        real.placement.prefill,
        real.outcome.reused_tokens,
    )
    assert facts.predicted is not None
    assert facts.predicted.cached_tokens == 96


def block(number: int, policy: str, *turns_s: float, **facts: Any) -> Block:
    changes = {"decided_by": policy} | facts
    turns = tuple(dataclasses.replace(TURN, turn_s=turn_s, **changes) for turn_s in turns_s)
    return Block(number, policy, turns, (sum(turns_s),))


def report(*blocks: Block) -> AgentsReport:
    return evaluate(PLAN, SETTING, blocks, complete=True)


def verdicts(of: AgentsReport) -> list[bool]:
    return [target.is_met_by(of) for target in TARGETS]


GOOD = (
    block(0, "old", 1.0, 3.0), block(0, "new", 1.0, 2.0), block(1, "new", 1.0, 1.0), block(1, "old", 2.0, 2.0),
    block(2, "old", 1.0, 1.0), block(2, "new", 1.0, 1.2),
)  # fmt: skip


def test_policies_take_turns_and_neither_is_always_the_first() -> None:
    assert PLAN.blocks() == [(0, "old"), (0, "new"), (1, "new"), (1, "old"), (2, "old"), (2, "new")]


def test_ratios_are_of_the_same_round_and_figures_medians_over_rounds() -> None:
    found = report(*GOOD)
    assert found.turn_ratios == (0.75, 0.5, 1.1)
    assert found.agent_ratios == (0.75, 0.5, 1.1)
    old, new = found.figures
    assert (old.policy, old.num_turns, old.turn_mean_s) == ("old", 6, 2.0)
    assert (new.policy, new.num_turns, new.turn_mean_s) == ("new", 6, 1.1)
    assert (old.exact_share, old.error_tokens, old.reused_share, old.split_share) == (1.0, 0.0, 0.64, 1.0)
    assert verdicts(found) == [True, True, True, True]
    assert "0.750 (rounds: 0.750, 0.500, 1.100)" in ratio_lines(found)[0]


def test_a_round_that_one_policy_has_not_answered_gives_no_ratio() -> None:
    found = report(*GOOD[:3])
    assert found.turn_ratios == (0.75,)
    assert report(GOOD[0]).turn_ratios == ()
    assert verdicts(report(GOOD[0]))[3] is False


def test_a_prediction_that_fails_counts_by_turns_and_by_tokens() -> None:
    found = report(*GOOD[:4], block(2, "old", 1.0, 1.0), block(2, "new", 1.0, 1.2, reused_tokens=96))
    assert found.figures[1].exact_share == pytest.approx(4 / 6, abs=1e-4)
    assert found.figures[1].error_tokens == pytest.approx(64 / 6, abs=0.01)
    assert verdicts(found) == [True, True, False, True]


def test_a_failed_turn_is_counted_told_and_in_no_time() -> None:
    found = report(*GOOD[:5], block(2, "new", 1.0, 1.2), block(2, "new", 99.0, error="503: full"))
    assert found.figures[1].num_failed == 1
    assert found.figures[1].turn_mean_s < 2.0
    assert found.errors == ("new, agent 0: 503: full",)
    assert verdicts(found)[0] is False


def test_a_turn_that_another_policy_decided_is_found() -> None:
    found = report(*GOOD[:5], block(2, "new", 1.0, 1.2, decided_by="old"))
    assert found.wrong_policy == 2
    assert verdicts(found)[1] is False


def test_slower_turns_miss_the_target() -> None:
    slow = [dataclasses.replace(one, policy="new" if one.policy == "old" else "old") for one in GOOD]
    assert verdicts(report(*slow))[3] is False


def test_the_file_and_the_table_hold_what_was_measured_also_when_nothing_was(tmp_path: Path) -> None:
    write_json(report(*GOOD), tmp_path / "a.json")
    assert msgspec.json.decode((tmp_path / "a.json").read_bytes(), type=AgentsReport) == report(*GOOD)
    assert table(report(*GOOD)).row_count == 2
    assert table(report()).row_count == 0
    assert ratio_lines(report()) == []
    assert verdicts(report()) == [False, True, False, False]
