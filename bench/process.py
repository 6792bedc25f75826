"""Owns how one process of a simulated world hangs while the others go on, although all run on one event loop.

Tasks and timers belong to the process that made them: its context says so, and they hand it on to what they make. While
a process hangs, nothing of it runs. What was due meanwhile runs when it goes on, in the order in which it was due, as
in a real process that was stopped: its clock has moved on, its timers fire late.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from bench.virtual_time import VirtualTimeLoop

T = TypeVar("T")


class Process:
    """One process. Needs a running `ProcessLoop`."""

    def __init__(self) -> None:
        self.is_hung = False
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[asyncio.Handle, Callable[..., object], tuple[Any, ...], Context]] = []

    def hang(self) -> None:
        self.is_hung = True

    def go_on(self) -> None:
        self.is_hung = False
        due, self._due = self._due, []
        for handle, callback, args, context in due:
            self._loop.call_soon(_run_unless_cancelled, handle, callback, args, context=context)

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Something from outside happens to the process: now, or when it goes on."""
        context = self.context()
        if self.is_hung:
            self.hold(asyncio.Handle(callback, args, self._loop, context), callback, args, context)
        else:
            context.run(callback, *args)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self._loop.create_task(work, context=self.context())

    def context(self) -> Context:
        """A new context of this process."""
        context = Context()
        context.run(_PROCESS.set, self)
        return context

    def hold(
        self, handle: asyncio.Handle, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> None:
        """Keeps what was due until the process goes on; cancelling the handle cancels it."""
        self._due.append((handle, callback, args, context or copy_context()))


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def _process_of(context: Context | None) -> Process | None:
    return _PROCESS.get() if context is None else context.get(_PROCESS)


def _run_unless_cancelled(handle: asyncio.Handle, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
    if not handle.cancelled():
        callback(*args)


class ProcessLoop(VirtualTimeLoop):
    """A loop of virtual time on which processes can hang."""

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        process = _process_of(context)
        if process is None or not process.is_hung:
            return super().call_soon(callback, *args, context=context)
        handle = asyncio.Handle(callback, args, self, context)
        process.hold(handle, callback, args, context)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        process = _process_of(context)
        if process is None:
            return super().call_at(when, callback, *args, context=context)

        def due() -> None:
            if process.is_hung:
                process.hold(handle, callback, args, None)
            else:
                callback(*args)

        handle = super().call_at(when, due, context=context)
        return handle
