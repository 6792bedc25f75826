"""What is learnt of pauses: their lengths by agent and tool, who does not come back, and how right predictions are."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.agents import pauses
from gateway.agents.answers import AnswerLengths
from gateway.agents.pauses import NO_TOOL, PauseModel

IDLE_S = 1800.0
TENANT = "t"


def lognormal(rng: random.Random, median_s: float, sigma: float = 1.0) -> float:
    return min(median_s * math.exp(rng.gauss(0.0, sigma)), IDLE_S)


def test_before_anything_is_seen_published_shares_are_believed() -> None:
    predicted = PauseModel(IDLE_S).predict(TENANT, "coder", "look")
    assert predicted.num_seen == 0
    assert predicted.return_probability == pytest.approx(0.9)
    # A bin's edges need not be those that were published.
    assert predicted.probability_within(1.0) / 0.9 == pytest.approx(0.865, abs=0.02)
    assert predicted.probability_within(10.0) / 0.9 == pytest.approx(0.951, abs=0.01)
    assert predicted.median_s < 1.0 < predicted.p90_s < 10.0


def test_an_idle_limit_below_the_published_times_has_a_prior_too() -> None:
    predicted = PauseModel(0.5).predict(TENANT, None, None)
    assert predicted.p90_s <= 0.5
    assert predicted.return_probability == pytest.approx(0.9)


def test_a_kind_that_was_never_seen_is_predicted_by_what_is_next_to_it() -> None:
    model = PauseModel(IDLE_S)
    for _ in range(200):
        model.returned(TENANT, "coder", "build", 60.0)
        model.returned(TENANT, "coder", "look", 0.05)
        model.returned(TENANT, "writer", NO_TOOL, 300.0)
    assert model.predict(TENANT, "unknown", "build").median_s == pytest.approx(60.0, rel=0.3)
    assert model.predict(TENANT, "coder", "look").median_s == pytest.approx(0.05, rel=0.3)
    assert model.predict(TENANT, "writer", "unknown").median_s == pytest.approx(300.0, rel=0.3)
    # Half of the coder's pauses are of either tool; which one comes next is not known yet.
    assert model.predict(TENANT, "coder", None).probability_within(1.0) == pytest.approx(0.5, abs=0.05)
    assert model.predict(TENANT, None, "build").num_seen == pytest.approx(164, abs=2)


def test_what_was_long_ago_is_forgotten() -> None:
    model = PauseModel(IDLE_S)
    for pause_s in (0.01, 100.0):
        for _ in range(2000):
            model.returned(TENANT, None, "look", pause_s)
    assert model.predict(TENANT, None, "look").median_s == pytest.approx(100.0, rel=0.3)
    assert model.predict(TENANT, None, "look").num_seen == pytest.approx(500, rel=0.01)


def test_it_learns_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "MEMORY", 5.0)
    model = PauseModel(IDLE_S)
    for _ in range(5000):
        model.returned(TENANT, None, "look", 5.0)
    predicted = model.predict(TENANT, None, "look")
    assert predicted.num_seen == pytest.approx(6.0, rel=0.01)
    assert predicted.median_s == pytest.approx(5.0, rel=0.3)


def test_the_longer_a_pause_is_the_longer_it_will_be() -> None:
    model = PauseModel(IDLE_S)
    for _ in range(200):
        for pause_s in (1.0, 1.0, 1.0, 100.0):
            model.returned(TENANT, None, "look", pause_s)
    predicted = model.predict(TENANT, None, "look")
    assert predicted.probability_within(5.0) == pytest.approx(0.75, abs=0.03)
    assert predicted.probability_within(5.0, waited_s=3.0) < 0.02
    assert predicted.quantile_s(0.5, waited_s=3.0) == pytest.approx(100.0, rel=0.3)
    assert predicted.probability_within(10.0, waited_s=20.0) == 0.0


def test_predictions_are_right_as_often_as_they_say() -> None:
    rng = random.Random(1)
    model = PauseModel(IDLE_S)
    tools = {"fast": (0.2, 0.95), "slow": (20.0, 0.9), NO_TOOL: (120.0, 0.6)}
    for _ in range(6000):
        tool = rng.choice(list(tools))
        median_s, probability = tools[tool]
        predicted = model.predict(TENANT, "coder", tool)
        if rng.random() < probability:
            model.returned(TENANT, "coder", tool, lognormal(rng, median_s), predicted)
        else:
            model.gone(TENANT, "coder", tool, predicted)
    seen = model.calibration
    assert seen.num_returned + seen.num_gone == 6000
    assert seen.median_share == pytest.approx(0.5, abs=0.03)
    assert seen.p90_share == pytest.approx(0.9, abs=0.02)
    assert seen.expected_returns == pytest.approx(seen.num_returned, rel=0.02)
    assert model.predict(TENANT, "coder", NO_TOOL).return_probability == pytest.approx(0.6, abs=0.08)


def test_sessions_lost_sight_of_do_not_distort_what_is_known() -> None:
    """A third of the pauses is cut off at 5 s by forgetting: by the others alone the long ones would look rarer."""
    rng = random.Random(2)
    model, naive = PauseModel(IDLE_S), PauseModel(IDLE_S)
    for _ in range(4000):
        pause_s = lognormal(rng, 5.0)
        if rng.random() < 1 / 3 and pause_s > 5.0:
            model.unknown_after(TENANT, None, "look", 5.0)
        else:
            model.returned(TENANT, None, "look", pause_s)
            naive.returned(TENANT, None, "look", pause_s)
    assert model.predict(TENANT, None, "look").median_s == pytest.approx(5.0, rel=0.15)
    assert naive.predict(TENANT, None, "look").median_s < 4.2


def test_invented_names_are_bounded_and_what_is_used_stays() -> None:
    model = PauseModel(IDLE_S, max_kinds=100)
    for number in range(1000):
        model.returned(TENANT, "coder", "look", 50.0)
        model.returned(TENANT, f"agent-{number}", f"tool-{number}", 0.01)
        assert len(model) <= 100
    assert model.predict(TENANT, "coder", "look").median_s == pytest.approx(50.0, rel=0.3)


def test_a_tenant_teaches_nobody_else_and_learns_of_nobody_else() -> None:
    model, alone = PauseModel(IDLE_S), PauseModel(IDLE_S)
    for _ in range(50):
        alone.returned("mine", "coder", "look", 1.0)
        model.returned("mine", "coder", "look", 1.0)
        model.returned("theirs", "coder", "look", 600.0)
        model.gone("theirs", None, "look")
        model.unknown_after(None, "coder", NO_TOOL, 300.0)
    for agent, tool in (("coder", "look"), (None, "look"), ("coder", None), (None, None), ("new", "new")):
        assert model.predict("mine", agent, tool) == alone.predict("mine", agent, tool)
        assert model.predict("new", agent, tool) == PauseModel(IDLE_S).predict("new", agent, tool)


def test_a_tenant_that_invents_names_forgets_its_own() -> None:
    model = PauseModel(IDLE_S, max_kinds=100)
    model.returned("calm", "coder", "look", 50.0)
    kept = model.predict("calm", "coder", "look")
    for number in range(1000):
        model.returned("loud", f"agent-{number}", f"tool-{number}", 0.01)
    assert len(model) == 100
    assert model.predict("calm", "coder", "look") == kept
    assert model.predict("loud", None, None).num_seen > 300, "what all its pauses are like is used each time, and stays"


def test_nothing_scored_has_no_shares() -> None:
    assert PauseModel().calibration.median_share is PauseModel().calibration.p90_share is None


kinds = st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from([NO_TOOL, "x", "y"]))
lengths = st.floats(0, 2 * IDLE_S, allow_nan=False)


@given(
    events=st.lists(st.tuples(kinds, st.sampled_from(["returned", "gone", "unknown"]), lengths), max_size=30),
    kind=kinds,
    waited_s=lengths,
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_a_prediction_is_always_a_distribution(events, kind, waited_s: float, shares: list[float]) -> None:
    model = PauseModel(IDLE_S)
    for (agent, tool), what, length_s in events:
        if what == "returned":
            model.returned(TENANT, agent, tool, length_s)
        elif what == "gone":
            model.gone(TENANT, agent, tool)
        else:
            model.unknown_after(TENANT, agent, tool, length_s)
    predicted = model.predict(TENANT, *kind)
    assert list(predicted.cumulative) == sorted(predicted.cumulative)
    assert 0 < predicted.return_probability <= 1 + 1e-9
    quantiles = [predicted.quantile_s(share, waited_s) for share in sorted(shares)]
    assert quantiles == sorted(quantiles)
    assert min(quantiles) >= min(waited_s, IDLE_S)
    within = [predicted.probability_within(length_s, waited_s) for length_s in (0.0, waited_s, waited_s + 1, IDLE_S)]
    assert within == sorted(within)
    assert 0 <= within[0] <= within[-1] <= 1 + 1e-9


def test_lengths_of_answers_are_kept_for_a_bounded_number_of_agents() -> None:
    answers = AnswerLengths(max_agents=2)
    for agent, num_tokens in (("a", 100), ("a", 200), ("b", 10), ("a", 110), ("c", 7)):
        answers.learn(TENANT, agent, num_tokens)
    assert len(answers) == 2
    assert answers.expected_tokens(TENANT, "a") == pytest.approx(110)
    assert answers.expected_tokens(TENANT, "b") is None


def test_lengths_of_answers_are_a_tenant_s_own_and_so_is_what_makes_room() -> None:
    answers = AnswerLengths(max_agents=5)
    answers.learn("calm", None, 100)
    answers.learn(None, None, 200)
    for number in range(20):
        answers.learn("loud", f"agent-{number}", 7)
    assert len(answers) == 5
    assert (answers.expected_tokens("calm", None), answers.expected_tokens(None, None)) == (100, 200)
    assert answers.expected_tokens("loud", None) is None
