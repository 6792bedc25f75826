"""The clock in a simulated engine's tokens: what it tells, how exactly, and for how long."""

import pytest

from bench.lateness import StreamClock
from engine.simulated import TokenRule

VOCABULARY = [7, 8, 9, 20, 21]
TICK_S = 0.5
RULE = TokenRule(vocabulary=VOCABULARY, clock_tick_s=TICK_S)
CLOCK = StreamClock(VOCABULARY, TICK_S)


@pytest.mark.parametrize("written_s", [0.0, 0.49, 10.0, 123.4, 100_000.7])
@pytest.mark.parametrize("under_way_s", [0.0, 0.3, 1.9])
def test_a_token_tells_when_it_was_written_within_half_a_tick(written_s: float, under_way_s: float) -> None:
    token = RULE.pick(b"any context", written_s)
    assert CLOCK.written_s(token, written_s + under_way_s) == pytest.approx(written_s, abs=TICK_S / 2)


def test_a_time_older_than_the_clocks_range_is_taken_for_a_later_one() -> None:
    assert CLOCK.range_s == 2.5
    token = RULE.pick(b"", 10.0)
    assert CLOCK.written_s(token, 12.4) == pytest.approx(10.25)
    assert CLOCK.written_s(token, 12.6) == pytest.approx(12.75)


def test_a_token_of_no_simulated_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="token 5 is none that a simulated engine writes"):
        CLOCK.written_s(5, 1.0)
