"""A process of a simulated world hangs while the others go on."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from bench.process import Process, ProcessLoop


def simulate(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=ProcessLoop) as runner:
        runner.run(main())


async def ticks(told: list[float], number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(1.0)
        told.append(asyncio.get_running_loop().time())


def test_nothing_of_a_process_runs_while_it_hangs_and_the_others_go_on() -> None:
    async def main() -> None:
        hanging, other = Process(), Process()
        told: list[float] = []
        told_by_other: list[float] = []
        tasks = [hanging.spawn(ticks(told)), other.spawn(ticks(told_by_other)), asyncio.create_task(ticks([]))]
        await asyncio.sleep(2.5)
        hanging.hang()
        await asyncio.sleep(2.0)
        assert (told, told_by_other) == ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0])
        hanging.go_on()
        await asyncio.gather(*tasks)
        # Its third second came late, and the next ones are counted from there.
        assert told == [1.0, 2.0, 4.5, 5.5, 6.5]

    simulate(main)


def test_what_was_due_runs_in_its_order_when_the_process_goes_on() -> None:
    async def main() -> None:
        process = Process()
        loop, ran = asyncio.get_running_loop(), list[str]()

        async def waits(event: asyncio.Event) -> None:
            await event.wait()
            ran.append("was told")

        async def begins() -> None:
            loop.call_later(3.0, ran.append, "third")
            loop.call_later(1.0, ran.append, "first")
            loop.call_later(2.0, ran.append, "cancelled").cancel()

        event = asyncio.Event()
        task = process.spawn(waits(event))
        await process.spawn(begins())
        process.hang()
        await asyncio.sleep(1.5)
        process.call(ran.append, "second")
        await asyncio.sleep(2.0)
        event.set()
        await asyncio.sleep(1.0)
        assert ran == []
        process.go_on()
        await task
        assert ran == ["first", "second", "third", "was told"]

    simulate(main)


def test_what_is_cancelled_when_the_process_goes_on_does_not_run() -> None:
    async def main() -> None:
        process = Process()
        loop, ran = asyncio.get_running_loop(), list[str]()

        async def begins() -> asyncio.TimerHandle:
            later = loop.call_later(2.0, ran.append, "was cancelled")
            loop.call_later(1.0, later.cancel)
            return later

        await process.spawn(begins())
        process.hang()
        await asyncio.sleep(3.0)
        process.go_on()
        await asyncio.sleep(1.0)
        assert ran == []

    simulate(main)


def test_a_task_of_a_process_that_hangs_is_cancelled_when_it_goes_on() -> None:
    async def main() -> None:
        process = Process()
        task = process.spawn(asyncio.sleep(10.0))
        await asyncio.sleep(1.0)
        process.hang()
        task.cancel()
        await asyncio.sleep(1.0)
        assert not task.done()
        process.go_on()
        await asyncio.sleep(0.0)
        await asyncio.sleep(0.0)
        assert task.cancelled()

    simulate(main)
