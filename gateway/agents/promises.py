"""Owns how many tokens each replica keeps for sessions that are expected to come back."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Promise:
    """A whole number of tokens, so that what is taken back is exactly what was given."""

    replica_id: str
    num_tokens: int


class Promises:
    """The sums of those that are held, by replica."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def tokens(self, replica_id: str) -> float:
        return float(self._tokens.get(replica_id, 0))

    def replace(self, old: Promise | None, new: Promise | None) -> None:
        for promise, sign in ((old, -1), (new, 1)):
            if promise is None:
                continue
            num_tokens = self._tokens.get(promise.replica_id, 0) + sign * promise.num_tokens
            if num_tokens:
                self._tokens[promise.replica_id] = num_tokens
            else:
                self._tokens.pop(promise.replica_id, None)
