"""Owns the processes that work is spread over: they end with what has started them, which alone is interrupted."""

import contextlib
import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

J = TypeVar("J")
R = TypeVar("R")

POLL_S = 1.0
END_WITHIN_S = 10.0
"""After SIGTERM; then they are killed."""


@contextlib.contextmanager
def _put_off(number: int) -> Iterator[None]:
    """A signal that comes inside is handled at the end, if Python handles it. In the main thread only."""
    came: list[int] = []
    before = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


@contextlib.contextmanager
def started(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """They run inside; after it none is left, whatever happens inside.

    Ctrl-C reaches every process of a terminal's foreground, also one that is still being imported, whose traceback says
    nothing. So they are born with SIGINT blocked. Here it waits until all have begun: one that was half begun would
    miss what this process had still to tell it. To block it does not do that, because another thread may take it.
    """
    try:
        with _put_off(signal.SIGINT):
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


class WorkerDied(RuntimeError):
    """A process has ended before its work; what it had in hand is lost."""


def spread(jobs: Sequence[J], work: Callable[[J], Iterator[R]], num_shards: int, took: Callable[[R], None]) -> None:
    """Works all jobs off in so many processes, or in this one, and hands each result over as it comes. `work` is a
    function of a module. Raises WorkerDied, and KeyboardInterrupt when it is interrupted; no process is left then."""
    if num_shards == 1:
        for job in jobs:
            for result in work(job):
                took(result)
        return
    context = multiprocessing.get_context("spawn")
    results: Queue[tuple[R] | None] = context.Queue()
    waiting: Queue[tuple[J] | None] = context.Queue()
    for job in jobs:
        waiting.put((job,))
    processes = [context.Process(target=_serve, args=(work, waiting, results), daemon=True) for _ in range(num_shards)]
    for _ in processes:
        waiting.put(None)
    left = len(jobs)
    with started(processes):
        while left:
            try:
                result = results.get(timeout=POLL_S)
            except queue.Empty:
                if dead := [p.exitcode for p in processes if p.exitcode not in (None, 0)]:
                    raise WorkerDied(f"a process ended with {dead}; its job is lost") from None
                continue
            if result is None:
                left -= 1
            else:
                took(result[0])


def _serve(work: Callable[[J], Iterator[R]], jobs: "Queue[tuple[J] | None]", results: "Queue[tuple[R] | None]") -> None:
    while (job := jobs.get()) is not None:
        for result in work(job[0]):
            results.put((result,))
        results.put(None)
