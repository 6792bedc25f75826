"""Owns what is learnt of pauses: how long sessions stay away after a turn, by tenant, agent and tool; and how right
that was.

A pause begins when a turn has ended and ends when the session's next turn first arrives; it is learnt when that one is
taken. A session that stays away for longer than `idle_s` does not come back, by definition. Pure but for what it has
learnt; it has no clock.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from gateway.shares import Shares

NO_TOOL = ""
"""The tool of a turn that called none: the pause is a person's."""

FLOOR_S = 0.001
NUM_BINS = 40
"""Up to `idle_s`, equally wide on a logarithmic scale, and one more for sessions that do not come back."""

MEMORY = 500.0
"""Of how many pauses a histogram remembers: an older one counts exp(-age / MEMORY), its age counted in pauses."""
STRENGTH = 4.0
"""So many pauses weighs what the next more general distribution says."""
PRIOR_STRENGTH = 2.0
PRIOR_SHARES = ((1.0, 0.865), (10.0, 0.951))
"""Of next turns within so many seconds, as vllm-router's users have published (#285). The rest, up to `idle_s`."""
PRIOR_RETURN = 0.9
"""Nobody has published how many sessions go on."""

LARGEST_UNIT = 1e100


@dataclass(frozen=True, slots=True)
class PausePrediction:
    """The distribution of a pause's length. `cumulative[i]` is the probability of its end within the bin i; those bins
    end at `idle_s`. `num_seen` pauses, counted with what has been forgotten of them, were of this very kind."""

    idle_s: float
    cumulative: tuple[float, ...]
    num_seen: float

    @property
    def return_probability(self) -> float:
        return self.cumulative[-1]

    @property
    def median_s(self) -> float:
        return self.quantile_s(0.5)

    @property
    def p90_s(self) -> float:
        return self.quantile_s(0.9)

    def probability_within(self, length_s: float, waited_s: float = 0.0) -> float:
        """That the pause has ended after `length_s`, given that it had not after `waited_s`."""
        before = self._at(waited_s)
        if before >= 1.0:
            return 0.0
        return max(self._at(length_s) - before, 0.0) / (1.0 - before)

    def quantile_s(self, share: float, waited_s: float = 0.0) -> float:
        """How long the pause is at most, with probability `share`, given that it is longer than `waited_s` and that the
        session comes back."""
        before, last = self._at(waited_s), self.cumulative[-1]
        wanted = before + share * (last - before)
        index = bisect_left(self.cumulative, wanted)
        if index >= NUM_BINS:
            return self.idle_s
        lower = self.cumulative[index - 1] if index else 0.0
        within = self.cumulative[index] - lower
        part = (wanted - lower) / within if within > 0 else 1.0
        return max(FLOOR_S * math.exp((index + part) * _step(self.idle_s)), waited_s)

    def _at(self, length_s: float) -> float:
        if length_s <= FLOOR_S:
            return 0.0
        position = math.log(length_s / FLOOR_S) / _step(self.idle_s)
        if position >= NUM_BINS:
            return self.cumulative[-1]
        index = int(position)
        lower = self.cumulative[index - 1] if index else 0.0
        return lower + (position - index) * (self.cumulative[index] - lower)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predictions against what happened, over pauses that have ended. If predictions are right, half of the
    `num_returned` are in `num_within_median`, 90% in `num_within_p90`, and `expected_returns` is about `num_returned`;
    `num_gone` sessions did not come back."""

    num_returned: int = 0
    num_within_median: int = 0
    num_within_p90: int = 0
    num_gone: int = 0
    expected_returns: float = 0.0

    @property
    def median_share(self) -> float | None:
        return self.num_within_median / self.num_returned if self.num_returned else None

    @property
    def p90_share(self) -> float | None:
        return self.num_within_p90 / self.num_returned if self.num_returned else None


@dataclass(slots=True)
class _Histogram:
    """Counts in units that grow with every pause: so all older ones are forgotten a little at no cost."""

    counts: list[float] = field(default_factory=lambda: [0.0] * (NUM_BINS + 1))
    total: float = 0.0
    unit: float = 1.0

    @property
    def num_seen(self) -> float:
        return self.total / self.unit

    def age(self) -> None:
        self.unit *= 1.0 + 1.0 / MEMORY
        if self.unit > LARGEST_UNIT:
            self.counts = [count / self.unit for count in self.counts]
            self.total /= self.unit
            self.unit = 1.0

    def add(self, index: int, weight: float = 1.0) -> None:
        self.counts[index] += weight * self.unit
        self.total += weight * self.unit

    def over(self, general: list[float], strength: float) -> list[float]:
        """The probabilities of the bins, where `general` counts as much as `strength` pauses do."""
        scale = 1.0 / (self.total + strength * self.unit)
        share = strength * self.unit * scale
        return [count * scale + p * share for count, p in zip(self.counts, general, strict=True)]


class _Kind(NamedTuple):
    """Of pauses. None: whichever agent or tool; as `tenant`: of none, where keys are not asked for."""

    tenant: str | None
    agent: str | None = None
    tool: str | None = None


class PauseModel:
    """Learns from each pause for its agent and tool, its tool, its agent, and all of its tenant: agents and tools bear
    names of clients' choosing, so nobody teaches what is another's. A prediction starts from all pauses of the tenant
    and goes on to the more special ones, each of which counts as much as it has seen.

    Of more than `max_kinds` the tenant that has most forgets one (`gateway.shares`).
    """

    def __init__(self, idle_s: float = 1800.0, max_kinds: int = 4096) -> None:
        self.idle_s = idle_s
        self.calibration = Calibration()
        self._max_kinds = max_kinds
        self._by_kind: dict[_Kind, _Histogram] = {}
        self._by_use: Shares[_Kind] = Shares()
        self._prior = _prior(idle_s)

    def __len__(self) -> int:
        return len(self._by_kind)

    def predict(self, tenant: str | None, agent: str | None, tool: str | None) -> PausePrediction:
        """`tool` None: it is not known yet which one will be called; `NO_TOOL`: none was."""
        probabilities, strength, num_seen = self._prior, PRIOR_STRENGTH, 0.0
        for kind in _kinds(tenant, agent, tool):
            if histogram := self._by_kind.get(kind):
                probabilities = histogram.over(probabilities, strength)
                strength, num_seen = STRENGTH, histogram.num_seen
        return PausePrediction(self.idle_s, tuple(accumulate(probabilities[:NUM_BINS])), num_seen)

    def returned(
        self,
        tenant: str | None,
        agent: str | None,
        tool: str,
        pause_s: float,
        predicted: PausePrediction | None = None,
    ) -> None:
        """Learns from a pause that has ended, and scores what was predicted of it."""
        index = _bin(pause_s, self.idle_s)
        for histogram in self._histograms(tenant, agent, tool):
            histogram.age()
            histogram.add(index)
        if predicted is not None:
            old = self.calibration
            self.calibration = Calibration(
                old.num_returned + 1,
                old.num_within_median + (pause_s <= predicted.median_s),
                old.num_within_p90 + (pause_s <= predicted.p90_s),
                old.num_gone,
                old.expected_returns + predicted.return_probability,
            )

    def gone(self, tenant: str | None, agent: str | None, tool: str, predicted: PausePrediction | None = None) -> None:
        """Learns from a session that has not come back within `idle_s`."""
        for histogram in self._histograms(tenant, agent, tool):
            histogram.age()
            histogram.add(NUM_BINS)
        if predicted is not None:
            old = self.calibration
            self.calibration = Calibration(
                old.num_returned,
                old.num_within_median,
                old.num_within_p90,
                old.num_gone + 1,
                old.expected_returns + predicted.return_probability,
            )

    def unknown_after(self, tenant: str | None, agent: str | None, tool: str, waited_s: float) -> None:
        """Learns from a session that was lost sight of while it paused: all that is known is that its pause is longer
        than `waited_s`. It counts where the longer ones are expected (Efron's redistribution of censored samples)."""
        cumulative = self.predict(tenant, agent, tool).cumulative
        probabilities = [b - a for a, b in zip((0.0, *cumulative), cumulative, strict=False)]
        first = min(_bin(waited_s, self.idle_s), NUM_BINS)
        rest = 1.0 - (cumulative[first - 1] if first else 0.0)
        for histogram in self._histograms(tenant, agent, tool):
            histogram.age()
            for index in range(first, NUM_BINS):
                histogram.add(index, probabilities[index] / rest)
            histogram.add(NUM_BINS, (1.0 - cumulative[-1]) / rest)

    def _histograms(self, tenant: str | None, agent: str | None, tool: str) -> list[_Histogram]:
        found: list[_Histogram] = []
        for kind in _kinds(tenant, agent, tool):
            found.append(self._by_kind.setdefault(kind, _Histogram()))
            self._by_use.use(kind, tenant)
        while len(self._by_kind) > self._max_kinds:
            first = self._by_use.first
            del self._by_kind[first]
            self._by_use.discard(first)
        return found


def _kinds(tenant: str | None, agent: str | None, tool: str | None) -> list[_Kind]:
    """From the general to the special."""
    kinds = [_Kind(tenant)]
    if agent is not None:
        kinds.append(_Kind(tenant, agent))
    if tool is not None:
        kinds.append(_Kind(tenant, tool=tool))
        if agent is not None:
            kinds.append(_Kind(tenant, agent, tool))
    return kinds


def _step(idle_s: float) -> float:
    return math.log(idle_s / FLOOR_S) / NUM_BINS


def _bin(length_s: float, idle_s: float) -> int:
    if length_s > idle_s:
        return NUM_BINS
    if length_s <= FLOOR_S:
        return 0
    return min(int(math.log(length_s / FLOOR_S) / _step(idle_s)), NUM_BINS - 1)


def _prior(idle_s: float) -> list[float]:
    """The probabilities of the bins: evenly spread, on the logarithmic scale, between the published shares."""
    known = [(FLOOR_S, 0.0), *((s, share) for s, share in PRIOR_SHARES if s < idle_s), (idle_s, 1.0)]

    def share_within(length_s: float) -> float:
        for (lower_s, lower), (upper_s, upper) in pairwise(known):
            if length_s <= upper_s:
                return lower + (upper - lower) * math.log(length_s / lower_s) / math.log(upper_s / lower_s)
        return 1.0

    ends = [share_within(FLOOR_S * math.exp(_step(idle_s) * index)) for index in range(NUM_BINS + 1)]
    within = [PRIOR_RETURN * (b - a) for a, b in pairwise(ends)]
    return [*within, 1.0 - PRIOR_RETURN]
