"""Owns the clock of `bench streams`: from a token to the time when a simulated engine wrote it. Pure."""

from collections.abc import Sequence


class StreamClock:
    """Reads the times that `TokenRule.clock_tick_s` writes: the token at place n of the vocabulary stands for all ticks
    that leave n when divided by its size. So a time is known within a tick, and if it is not older than `range_s`."""

    def __init__(self, vocabulary: Sequence[int], tick_s: float) -> None:
        self._place = {token: place for place, token in enumerate(vocabulary)}
        self._tick_s = tick_s

    @property
    def range_s(self) -> float:
        return len(self._place) * self._tick_s

    def written_s(self, token: int, read_s: float) -> float:
        """The middle of the last tick before `read_s` that the token stands for. Raises ValueError for others."""
        place = self._place.get(token)
        if place is None:
            raise ValueError(f"token {token} is none that a simulated engine writes")
        read_tick = int(read_s / self._tick_s)
        return (read_tick - (read_tick - place) % len(self._place) + 0.5) * self._tick_s
