"""Owns virtual time: an event loop on which waiting costs nothing."""

import asyncio
import selectors
from typing import Any


class VirtualSelector(selectors.DefaultSelector):
    """Advances the clock to the next timer instead of waiting for it; waiting for nothing at all is an error."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("nothing is left that could ever happen")
            self.now_s += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s

    def skip(self, seconds: float) -> None:
        """As if this process had not run for so long."""
        self._virtual.now_s += seconds

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """A task in which a signal has interrupted this process says nothing: `run_forever` has raised it already."""
        if not isinstance(context.get("exception"), KeyboardInterrupt):
            super().default_exception_handler(context)
