"""Owns receiving from a ZeroMQ socket on an event loop, at a fraction of what zmq.asyncio costs a message.

zmq.asyncio makes a future, a timer and two system calls for each message. An engine sends one or two a step, and its
worker does little else (docs/adr/0012).
"""

import asyncio
from typing import Any

import zmq


class ZmqReader:
    """The receiving half of `socket`, which nobody else may receive from. Make and use it on one event loop.

    ZeroMQ's descriptor becomes readable when something has happened since the socket was last looked at; only a
    receive that finds nothing makes sure that it will again.
    """

    def __init__(self, socket: zmq.Socket[Any]):
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._arrival: asyncio.Future[None] | None = None
        self._is_watching = self._is_closed = False

    async def recv_multipart(self, copy: bool = True) -> list[Any]:
        """The next message's frames. One caller at a time. Raises zmq.ZMQError when the socket is closed."""
        while True:
            try:
                return self._socket.recv_multipart(zmq.NOBLOCK, copy=copy)
            except zmq.Again:
                self._arrival = self._loop.create_future()
                self._watch()
                try:
                    await self._arrival
                finally:
                    self._arrival = None

    def close(self) -> None:
        """Stops watching; the socket stays as it is. May be repeated."""
        self._is_closed = True
        self._stop_watching()

    def _watch(self) -> None:
        if not (self._is_watching or self._is_closed):
            self._loop.add_reader(self._descriptor, self._on_readable)
            self._is_watching = True

    def _stop_watching(self) -> None:
        if self._is_watching:
            self._loop.remove_reader(self._descriptor)
            self._is_watching = False

    def _on_readable(self) -> None:
        if self._arrival is None:
            # Nobody receives, so the descriptor stays readable: the loop would spin.
            self._stop_watching()
        elif not self._arrival.done():
            self._arrival.set_result(None)
