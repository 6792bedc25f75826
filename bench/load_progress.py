"""Owns what is seen of a load while it runs: a bar in a terminal, a line now and then elsewhere."""

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from bench.load import Progress as Reached
    from bench.load_plan import LoadPlan

SAID_EVERY_S = 10.0


class LoadProgress:
    """A context manager; call it with the load that runs and how far it is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # A thread that redraws would hold up the generator whenever it likes.
        self._bar = Progress(
            *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("")
        self._said_s = 0.0

    def __enter__(self) -> "LoadProgress":
        self._bar.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, plan: "LoadPlan", reached: "Reached") -> None:
        words = (
            f"{reached.num_turns:,} turns ended, {reached.in_flight:,} in flight, {reached.num_refused:,} refused, "
            f"{reached.num_failed:,} failed, at most {reached.lateness_ms:.1f} ms late"
        )
        self._bar.update(self._task, total=plan.duration_s, completed=reached.at_s, description=words, refresh=True)
        self._said_s = min(self._said_s, reached.at_s)
        if not self._console.is_terminal and reached.at_s - self._said_s >= SAID_EVERY_S:
            self._said_s = reached.at_s
            self._console.print(f"{reached.at_s:.0f} s: {words}", soft_wrap=True)
