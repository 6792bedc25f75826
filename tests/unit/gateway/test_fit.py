"""Costs of work, learnt online: what was measured is predicted, a change is followed, nothing becomes negative."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Phase
from gateway.routing.costs import FIRST_OUTPUT_TOKENS, FIRST_READ, HandoffCost, ReadCost, StepCost
from gateway.routing.fit import CostLearner, Fit

READ = ReadCost(0.003, 2e-5, 1.5e-9)


def read_some(learner: CostLearner, cost: ReadCost, number: int, noise: float = 0.0) -> None:
    draw = random.Random(1)
    for _ in range(number):
        length = draw.choice([500, 5_000, 50_000, 100_000])
        new = draw.randint(1, length)
        seconds = cost.seconds(new, length) * draw.uniform(1 - noise, 1 + noise)
        learner.read(Phase.PREFILL, [(new, length)], seconds)


def test_before_the_first_sample_there_are_sensible_costs_and_no_error() -> None:
    costs = CostLearner().costs
    assert costs.prefill.read == FIRST_READ
    assert costs.prefill.read.error is None
    assert costs.output_tokens == FIRST_OUTPUT_TOKENS


@pytest.mark.parametrize(("new", "length"), [(100, 100), (2_000, 100_000), (100_000, 100_000)])
def test_reading_is_predicted_from_new_tokens_and_context(new: int, length: int) -> None:
    learner = CostLearner()
    read_some(learner, READ, 200, noise=0.1)
    assert learner.costs.prefill.read.seconds(new, length) == pytest.approx(READ.seconds(new, length), rel=0.1)
    assert learner.costs.decode.read == learner.costs.prefill.read, "until it is seen there, for it is the same model"
    for _ in range(20):
        learner.read(Phase.DECODE, [(1_000, 1_000)], 1.0)
    assert learner.costs.decode.read != learner.costs.prefill.read


def test_the_error_shown_is_that_of_the_last_predictions() -> None:
    learner = CostLearner()
    read_some(learner, READ, 300, noise=0.1)
    error = learner.costs.prefill.read.error
    assert error is not None
    assert error == pytest.approx(0.05, abs=0.02)


def test_a_change_is_followed() -> None:
    learner = CostLearner()
    read_some(learner, READ, 500)
    slower = ReadCost(READ.fixed_s, 2 * READ.token_s, 2 * READ.pair_s)
    read_some(learner, slower, 1500)
    assert learner.costs.prefill.read.seconds(5_000, 50_000) == pytest.approx(slower.seconds(5_000, 50_000), rel=0.05)


def test_prompts_that_were_read_together_count_together() -> None:
    learner = CostLearner()
    for _ in range(200):
        learner.read(Phase.DECODE, [(300, 300), (700, 900)], 0.05)
    read = learner.costs.decode.read
    pairs = 300 * 150 + 700 * 550
    assert read.fixed_s + read.token_s * 1000 + read.pair_s * pairs == pytest.approx(0.05, rel=0.01)


def test_steps_handoffs_and_answers_are_learnt() -> None:
    step, handoff = StepCost(0.01, 2e-4, 1e-7), HandoffCost(0.004, 2e-4)
    learner, draw = CostLearner(), random.Random(2)
    for _ in range(400):
        requests, blocks = draw.randint(1, 60), draw.randint(1, 2000)
        tokens = requests * draw.randint(100, 9000)
        learner.stepped(requests, tokens, step.seconds(requests, tokens))
        learner.handed_over(blocks, handoff.seconds(blocks))
        learner.answered(50)
    assert learner.costs.decode.step.seconds(20, 50_000) == pytest.approx(step.seconds(20, 50_000), rel=0.02)
    assert learner.costs.handoff.seconds(500) == pytest.approx(handoff.seconds(500), rel=0.02)
    assert learner.costs.output_tokens == pytest.approx(50, abs=1)


samples = st.lists(
    st.tuples(st.integers(1, 200_000), st.integers(1, 10**9), st.floats(0, 1000, allow_nan=False)), max_size=60
)


@given(samples)
def test_no_cost_is_negative_whatever_is_measured(measured: list[tuple[int, int, float]]) -> None:
    fit = Fit((0.01, 1e-5, 1e-9))
    for first, second, seconds in measured:
        fit.add((1.0, first, second), seconds)
    assert all(coefficient >= 0 for coefficient in fit.coefficients)
    assert fit.num_samples == len(measured)


def test_prompts_of_one_length_leave_the_shape_of_the_line_as_it_was() -> None:
    """All samples at one size fit any line through that point; the one that is taken must be of use elsewhere."""
    learner = CostLearner()
    for _ in range(5_000):
        learner.read(Phase.PREFILL, [(2_000, 2_000)], 0.2)
    read = learner.costs.prefill.read
    first_ratio = FIRST_READ.seconds(20_000, 20_000) / FIRST_READ.seconds(2_000, 2_000)
    assert read.seconds(2_000, 2_000) == pytest.approx(0.2, rel=0.01)
    assert read.seconds(20_000, 20_000) == pytest.approx(0.2 * first_ratio, rel=0.05)
