"""Owns the processes that work is spread over: they end with what has started them, which alone is interrupted."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

END_WITHIN_S = 10.0
"""After SIGTERM; then they are killed."""


@contextlib.contextmanager
def started(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """They run inside; after it none is left, whatever happens inside.

    Ctrl-C reaches every process of a terminal's foreground, also one that is still being imported, whose traceback says
    nothing. So they are born with SIGINT blocked.
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield
    finally:
        begun = [process for process in processes if process.pid is not None]
        for process in begun:
            process.terminate()
        for process in begun:
            process.join(END_WITHIN_S)
            if process.is_alive():
                process.kill()
                process.join()
