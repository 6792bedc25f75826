"""Owns the fitting of costs: straight lines through measured times, learnt online and never negative. Pure.

Weighted least squares on the relative error: each sample counts 1/y^2, so that short and long prompts are fitted alike,
and older ones count less with each new one. What the samples leave open, because their sizes are all alike, is decided
by the shape of the line that holds before the first sample, scaled to them.
"""

from collections.abc import Sequence

from engine.protocol import Phase
from gateway.routing.costs import (
    FIRST_HANDOFF,
    FIRST_OUTPUT_TOKENS,
    FIRST_READ,
    FIRST_STEP,
    Costs,
    HandoffCost,
    PoolCosts,
    ReadCost,
    StepCost,
)

FORGETTING = 0.995
"""What the weight of all earlier samples is multiplied with by each: the last 200 or so count."""
RIDGE = 0.01
"""How much the shape of the first line counts beside the samples, in each coefficient."""
ERROR_SHARE = 0.05
"""Of the last prediction in the mean error."""
SHORTEST_S = 1e-4
"""Shorter times are taken for this long: they say more of the clock than of the work."""
OUTPUT_SHARE = 0.02
"""Of the last answer in the mean length of answers."""

FEW_SAMPLES = 16
"""With fewer a decode replica's reading is taken for a prefill replica's: they run the same model."""


class Fit:
    """`y = coefficients * x` with all coefficients at least 0."""

    def __init__(self, first: Sequence[float]) -> None:
        """`first`: the coefficients before any sample."""
        self.coefficients = tuple(first)
        self.error: float | None = None
        self.num_samples = 0
        self._first = tuple(first)
        self._xx = [[0.0] * len(first) for _ in first]
        self._xy = [0.0] * len(first)
        self._firsts = self._first_y = 0.0

    def predict(self, x: Sequence[float]) -> float:
        return sum(coefficient * value for coefficient, value in zip(self.coefficients, x, strict=True))

    def add(self, x: Sequence[float], y: float) -> None:
        """Learns one measured time, in seconds."""
        y = max(y, SHORTEST_S)
        missed = abs(self.predict(x) - y) / y
        self.error = missed if self.error is None else self.error + ERROR_SHARE * (missed - self.error)
        self.num_samples += 1
        weight = 1.0 / (y * y)
        for row, (xx, value) in enumerate(zip(self._xx, x, strict=True)):
            for column, other in enumerate(x):
                xx[column] = FORGETTING * xx[column] + weight * value * other
            self._xy[row] = FORGETTING * self._xy[row] + weight * value * y
        expected = sum(coefficient * value for coefficient, value in zip(self._first, x, strict=True))
        self._firsts = FORGETTING * self._firsts + weight * expected * expected
        self._first_y = FORGETTING * self._first_y + weight * expected * y
        self.coefficients = self._solved()

    def _solved(self) -> tuple[float, ...]:
        scale = self._first_y / self._firsts if self._firsts else 1.0
        xx = [list(row) for row in self._xx]
        xy = list(self._xy)
        for index, first in enumerate(self._first):
            ridge = RIDGE * xx[index][index]
            xx[index][index] += ridge
            xy[index] += ridge * scale * first
        return _least_squares(xx, xy)


def _least_squares(xx: Sequence[Sequence[float]], xy: Sequence[float]) -> tuple[float, ...]:
    """The solution of `xx * c = xy` without negative coefficients: the most negative one is left out, until none is."""
    active = list(range(len(xy)))
    while active:
        solved = _solve([[xx[i][j] for j in active] for i in active], [xy[i] for i in active])
        worst = min(range(len(active)), key=solved.__getitem__)
        if solved[worst] >= 0:
            found = dict(zip(active, solved, strict=True))
            return tuple(found.get(index, 0.0) for index in range(len(xy)))
        del active[worst]
    return (0.0,) * len(xy)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with scaling to a unit diagonal; the matrix is symmetric and positive definite."""
    size = len(right)
    scale = [matrix[i][i] ** -0.5 if matrix[i][i] > 0 else 1.0 for i in range(size)]
    rows = [[matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [right[i] * scale[i]] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda row, i=i: abs(rows[row][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-12:
            rows[i][i] = 1e-12
        for row in range(i + 1, size):
            factor = rows[row][i] / rows[i][i]
            for column in range(i, size + 1):
                rows[row][column] -= factor * rows[i][column]
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (rows[i][size] - sum(rows[i][j] * solved[j] for j in range(i + 1, size))) / rows[i][i]
    return [solved[i] * scale[i] for i in range(size)]


class CostLearner:
    """The costs of both pools, learnt from what reports show of them."""

    def __init__(self) -> None:
        self._reads = {phase: Fit((FIRST_READ.fixed_s, FIRST_READ.token_s, FIRST_READ.pair_s)) for phase in Phase}
        self._steps = Fit((FIRST_STEP.fixed_s, FIRST_STEP.request_s, FIRST_STEP.context_token_s))
        self._handoffs = Fit((FIRST_HANDOFF.fixed_s, FIRST_HANDOFF.block_s))
        self._output_tokens = FIRST_OUTPUT_TOKENS
        self._costs: Costs | None = Costs()

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            step = StepCost(*self._steps.coefficients, error=self._steps.error)
            prefill, decode = self._reads[Phase.PREFILL], self._reads[Phase.DECODE]
            if decode.num_samples < min(FEW_SAMPLES, prefill.num_samples):
                decode = prefill
            pools = [
                PoolCosts(ReadCost(*fit.coefficients, error=fit.error), fit_step)
                for fit, fit_step in ((prefill, FIRST_STEP), (decode, step))
            ]
            handoff = HandoffCost(*self._handoffs.coefficients, error=self._handoffs.error)
            self._costs = Costs(pools[0], pools[1], handoff, self._output_tokens)
        return self._costs

    def read(self, phase: Phase, sizes: Sequence[tuple[int, int]], seconds: float) -> None:
        """Prompts that were read together; of each how many tokens were computed, and how many it has."""
        num_new = sum(new for new, _ in sizes)
        pairs = sum(new * (length - new / 2) for new, length in sizes)
        self._reads[phase].add((1.0, num_new, pairs), seconds)
        self._costs = None

    def stepped(self, num_requests: int, num_context_tokens: int, seconds: float) -> None:
        """A step of a decode engine that read no prompt."""
        self._steps.add((1.0, num_requests, num_context_tokens), seconds)
        self._costs = None

    def handed_over(self, num_blocks: int, seconds: float) -> None:
        self._handoffs.add((1.0, num_blocks), seconds)
        self._costs = None

    def answered(self, num_output_tokens: int) -> None:
        self._output_tokens += OUTPUT_SHARE * (num_output_tokens - self._output_tokens)
        self._costs = None
