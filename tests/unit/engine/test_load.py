"""How load is counted: tokens queued and running, and an engine's pace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.load import PACE_STEPS, Ledger, Pace, Recent
from engine.protocol import InFlight


def tokens(ledger: Ledger) -> tuple[int, int]:
    return ledger.num_queued_tokens, ledger.num_running_tokens


def test_a_request_is_queued_until_its_first_token_and_grows_with_each() -> None:
    ledger = Ledger()
    ledger.began("r", 10)
    assert (tokens(ledger), ledger.in_flight) == ((10, 0), InFlight(1, 10, 10))
    ledger.wrote("r", 0)
    assert tokens(ledger) == (10, 0)
    ledger.wrote("r", 1)
    ledger.wrote("r", 2)
    assert tokens(ledger) == (0, 13)
    assert ledger.in_flight == InFlight(1, 13)
    ledger.ended("r")
    assert (tokens(ledger), ledger.in_flight) == ((0, 0), InFlight(0, 0))


def test_a_request_that_begins_again_counts_once() -> None:
    ledger = Ledger()
    ledger.began("r", 10)
    ledger.wrote("r", 5)
    ledger.began("r", 20)
    assert (tokens(ledger), ledger.in_flight) == ((20, 0), InFlight(1, 20, 20))


events = st.lists(
    st.tuples(st.sampled_from(["began", "wrote", "ended"]), st.sampled_from("abc"), st.integers(0, 9)), max_size=40
)


@given(events)
def test_whatever_happens_tokens_are_the_sum_over_the_requests(happened: list[tuple[str, str, int]]) -> None:
    ledger, expected = Ledger(), dict[str, list[int]]()
    for what, request_id, number in happened:
        if what == "began":
            ledger.began(request_id, number)
            expected[request_id] = [number, 0]
        elif what == "wrote":
            ledger.wrote(request_id, number)
            if request_id in expected:
                expected[request_id][1] += number
        else:
            ledger.ended(request_id)
            expected.pop(request_id, None)
        queued = sum(prompt for prompt, written in expected.values() if not written)
        running = sum(prompt + written for prompt, written in expected.values() if written)
        assert tokens(ledger) == (queued, running)
        assert ledger.in_flight == InFlight(len(expected), queued + running, queued)


def test_the_prefill_rate_is_tokens_over_the_time_of_the_steps_that_read_prompts() -> None:
    pace = Pace()
    assert (pace.step_duration_s, pace.prefill_tokens_per_s) == (0.0, 0.0)
    pace.stepped(0.5, 100)
    pace.stepped(0.1, 0)
    pace.stepped(1.5, 500)
    assert pace.step_duration_s == 1.5
    assert pace.prefill_tokens_per_s == pytest.approx(600 / 2.0)


def test_the_prefill_rate_forgets_old_steps() -> None:
    pace = Pace()
    pace.stepped(1000.0, 1)
    for _ in range(PACE_STEPS):
        pace.stepped(1.0, 7)
    assert pace.prefill_tokens_per_s == pytest.approx(7.0)


def test_a_recent_ratio_is_of_sums_and_forgets() -> None:
    recent = Recent(2)
    assert recent.ratio is None
    recent.add(0.0, 0.0)
    assert recent.ratio is None
    recent.add(1.0, 10.0)
    assert recent.ratio == pytest.approx(0.1)
    recent.add(5.0, 30.0)
    assert recent.ratio == pytest.approx(6.0 / 40.0)
    recent.add(7.0)
    recent.add(9.0)
    assert recent.ratio == pytest.approx(8.0)


def test_a_ledger_knows_whom_it_holds() -> None:
    ledger = Ledger()
    ledger.began("r", 10)
    assert "r" in ledger
    ledger.ended("r")
    assert "r" not in ledger
