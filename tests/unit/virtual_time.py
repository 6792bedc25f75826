"""Owns the clock of unit tests: an event loop on which waiting costs nothing, and a test that ends cleanly or fails."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

LONGEST_TEST_S = 3600.0


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


def simulate(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test's coroutine on virtual time. It fails when a task is left over, or when a task or callback failed
    without anybody having noticed."""
    unnoticed: list[dict[str, Any]] = []

    async def checked() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unnoticed.append(context))
        async with asyncio.timeout(LONGEST_TEST_S):
            await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks were left behind: {left}"

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(checked())
    assert not unnoticed, f"errors that nobody noticed: {unnoticed}"


def now_s() -> float:
    return asyncio.get_running_loop().time()
