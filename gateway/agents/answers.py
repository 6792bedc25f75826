"""Owns how long answers are: a running mean for each agent."""

from collections import OrderedDict

WEIGHT = 0.1
"""Of the newest answer."""


def running_mean(before: float | None, num_tokens: int) -> float:
    return float(num_tokens) if before is None else before + WEIGHT * (num_tokens - before)


class AnswerLengths:
    """By agent; None: those that say no name. The agent that was heard of last is forgotten last."""

    def __init__(self, max_agents: int = 1024) -> None:
        self._max_agents = max_agents
        self._means: OrderedDict[str | None, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._means)

    def learn(self, agent: str | None, num_tokens: int) -> None:
        self._means[agent] = running_mean(self._means.get(agent), num_tokens)
        self._means.move_to_end(agent)
        if len(self._means) > self._max_agents:
            self._means.popitem(last=False)

    def expected_tokens(self, agent: str | None) -> float | None:
        return self._means.get(agent)
