"""Owns how long answers are: a running mean for each agent of a tenant."""

from gateway.shares import Shares

WEIGHT = 0.1
"""Of the newest answer."""


def running_mean(before: float | None, num_tokens: int) -> float:
    return float(num_tokens) if before is None else before + WEIGHT * (num_tokens - before)


class AnswerLengths:
    """By tenant and agent; None: those that have, or say, no name. Of too many the tenant that has most forgets one."""

    def __init__(self, max_agents: int = 1024) -> None:
        self._max_agents = max_agents
        self._means: dict[tuple[str | None, str | None], float] = {}
        self._by_use: Shares[tuple[str | None, str | None]] = Shares()

    def __len__(self) -> int:
        return len(self._means)

    def learn(self, tenant: str | None, agent: str | None, num_tokens: int) -> None:
        key = tenant, agent
        self._means[key] = running_mean(self._means.get(key), num_tokens)
        self._by_use.use(key, tenant)
        if len(self._means) > self._max_agents:
            first = self._by_use.first
            del self._means[first]
            self._by_use.discard(first)

    def expected_tokens(self, tenant: str | None, agent: str | None) -> float | None:
        return self._means.get((tenant, agent))
