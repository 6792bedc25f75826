"""The log of refusals: the first at once, then sums, however many there are."""

import logging

import pytest

from gateway.refusals import INTERVAL_S, RefusalLog
from gateway.routing.types import Cause, Priority, Rejection

LATE = Rejection(429, "too much before it", 3, Cause.DEADLINE)
GONE = Rejection(503, "no decode replica", 5, Cause.NO_DECODE)


def test_the_first_refusal_is_logged_at_once_and_then_sums(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    refusals = RefusalLog(lambda: now_s)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            refusals.note(f"r{number}", LATE, Priority.LOW if number % 2 else Priority.NORMAL)
        assert [record.getMessage() for record in caplog.records] == [
            "refused since the last such line: 1 x deadline/normal; now r0: too much before it"
        ]
        now_s = INTERVAL_S
        refusals.note("last", GONE, Priority.HIGH)
    assert caplog.records[-1].getMessage() == (
        "refused since the last such line: 500 x deadline/low, 499 x deadline/normal, 1 x no-decode-replica/high; "
        "now last: no decode replica"
    )
