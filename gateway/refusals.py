"""Owns what the log says of refused requests: the first at once, then a line of sums now and then, for under load there
are thousands."""

import logging
import time
from collections import Counter
from collections.abc import Callable

from gateway.routing.types import Cause, Priority, Rejection

log = logging.getLogger("baton.refusals")

INTERVAL_S = 10.0


class RefusalLog:
    """Writes at most one line per INTERVAL_S. Each request is also a metric (`gateway.metrics.count_rejection`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock()
        self._counts: Counter[tuple[Cause, Priority]] = Counter()

    def note(self, request_id: str, rejection: Rejection, priority: Priority) -> None:
        self._counts[rejection.cause, priority] += 1
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + INTERVAL_S
        sums = ", ".join(f"{number} x {cause}/{of}" for (cause, of), number in sorted(self._counts.items()))
        log.warning("refused since the last such line: %s; now %s: %s", sums, request_id, rejection.reason)
        self._counts.clear()
