"""Owns how a test runs on virtual time: it ends cleanly or fails."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from bench.virtual_time import VirtualTimeLoop

LONGEST_TEST_S = 3600.0


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
