"""Owns what the signals that ask for the end do to a benchmark: before it measures, and while it does."""

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""The exit code, as shells have it for Ctrl-C."""


def end_at_once() -> None:
    """From now on Ctrl-C ends the process in the middle of whatever it does, with one line: nothing is lost yet."""
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"bench: interrupted before anything was measured\n")
    os._exit(INTERRUPTED)


def interrupt_once() -> None:
    """From now on the first signal that asks for the end is a KeyboardInterrupt."""
    interrupt = _InterruptOnce()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


class _InterruptOnce:
    """Raises KeyboardInterrupt at the first signal and ignores later ones: stopping is bounded and must be whole."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            raise KeyboardInterrupt
