"""A ZmqReader on real sockets, on asyncio's loop and on uvloop's: no message is lost, late or twice."""

import asyncio
import itertools
import select
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from engine.zmq_reader import ZmqReader

PATIENCE_S = 10.0
NUMBERS = itertools.count()


class Pair:
    """Two sockets that are connected. Whoever makes it closes it."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.receiver = self.context.socket(zmq.PULL)
        self.receiver.bind(endpoint)
        self.sender = self.context.socket(zmq.PUSH)
        self.sender.connect(endpoint)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.sender.send_multipart([b"%d" % number, b"frame"])

    def arrived(self) -> None:
        """Returns when there is something to receive, and leaves it there."""
        assert self.receiver.poll(PATIENCE_S * 1000)

    def announced(self) -> None:
        """Returns when the descriptor tells of something. Looking at the socket would take the news off it."""
        assert select.select([self.receiver.getsockopt(zmq.FD)], [], [], PATIENCE_S)[0]

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture(params=["inproc", "ipc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    path = tmp_path / "s" if request.param == "ipc" else f"pair-{next(NUMBERS)}"
    pair = Pair(f"{request.param}://{path}")
    yield pair
    pair.close()


class Loops:
    def __init__(self, make: Any) -> None:
        self._make = make

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=self._make) as runner:
            runner.run(asyncio.wait_for(test, PATIENCE_S))


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loops(request: pytest.FixtureRequest) -> Loops:
    return Loops(request.param)


async def received(reader: ZmqReader, count: int) -> list[int]:
    return [int((await reader.recv_multipart())[0]) for _ in range(count)]


async def waits(reader: ZmqReader) -> "asyncio.Task[list[Any]]":
    """A receive that has found nothing and waits."""
    task = asyncio.create_task(reader.recv_multipart())
    while reader._arrival is None:  # noqa: ASYNC110  the reader tells nobody
        await asyncio.sleep(0)
    return task


def test_messages_that_were_there_first_are_received(pair: Pair, loops: Loops):
    async def test() -> None:
        pair.send(0, 1, 2)
        pair.arrived()
        assert await received(ZmqReader(pair.receiver), 3) == [0, 1, 2]

    loops.run(test())


def test_a_message_wakes_the_receive_that_waits_for_it(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        for number in range(100):
            task = await waits(reader)
            pair.send(number)
            assert await task == [b"%d" % number, b"frame"]

    loops.run(test())


def test_bursts_arrive_whole_and_in_order(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        for start in range(0, 1000, 100):
            pair.send(*range(start, start + 100))
            assert await received(reader, 100) == list(range(start, start + 100))

    loops.run(test())


def test_messages_of_another_thread_arrive_whole_and_in_order(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        thread = threading.Thread(target=pair.send, args=range(20_000))
        thread.start()
        try:
            assert await received(reader, 20_000) == list(range(20_000))
        finally:
            thread.join()

    loops.run(test())


def test_a_message_between_a_failed_receive_and_the_wait_is_received(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        loop = asyncio.get_running_loop()

        class Sending:
            """The loop, on which a message arrives just before the reader begins to wait."""

            add_reader = loop.add_reader

            def create_future(self) -> "asyncio.Future[None]":
                pair.send(7)
                pair.announced()
                return loop.create_future()

        reader._loop = Sending()  # type: ignore[assignment]
        assert await received(reader, 1) == [7]
        reader._loop = loop

    loops.run(test())


def test_a_message_that_came_while_nobody_received_is_there_for_the_next(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        for number in range(20):
            pair.send(2 * number, 2 * number + 1)
            assert await received(reader, 1) == [2 * number]
            # The loop sees the descriptor readable, and nobody waits.
            await asyncio.sleep(0)
            assert await received(reader, 1) == [2 * number + 1]

    loops.run(test())


def test_a_cancelled_receive_loses_nothing(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        for number in range(50):
            task = await waits(reader)
            pair.send(number)
            pair.arrived()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            assert await received(reader, 1) == [number]

    loops.run(test())


def test_frames_are_handed_over_without_a_copy_on_demand(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        pair.send(1)
        frames = await reader.recv_multipart(copy=False)
        assert [frame.bytes for frame in frames] == [b"1", b"frame"]
        assert all(isinstance(frame, zmq.Frame) for frame in frames)

    loops.run(test())


def test_closing_twice_is_closing_once_and_leaves_the_socket_open(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        reader.close()
        reader.close()
        pair.send(1)
        pair.arrived()
        assert pair.receiver.recv_multipart(zmq.NOBLOCK) == [b"1", b"frame"]

    loops.run(test())


def test_a_closed_socket_is_an_error(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = ZmqReader(pair.receiver)
        reader.close()
        pair.receiver.close()
        with pytest.raises(zmq.ZMQError):
            await reader.recv_multipart()

    loops.run(test())


class Counting(ZmqReader):
    num_woken = 0

    def _on_readable(self) -> None:
        self.num_woken += 1
        super()._on_readable()


def test_a_message_that_nobody_receives_does_not_keep_the_loop_busy(pair: Pair, loops: Loops):
    async def test() -> None:
        reader = Counting(pair.receiver)
        task = await waits(reader)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pair.send(1, 2)
        pair.announced()
        for _ in range(100):
            await asyncio.sleep(0)
        assert reader.num_woken <= 1
        assert await received(reader, 2) == [1, 2]
        pair.send(3)
        assert await received(reader, 1) == [3]

    loops.run(test())
