"""Owns the targets of an experiment: a bound on one figure of its report, and the line that says whether it is met.

The overhead experiment compares systems, and has targets of its own (`bench.stats`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class ReportTarget(Generic[R]):
    """A bound on one figure of a report; `is_floor` bounds it from below. A figure that was not measured is missed."""

    limit_format: ClassVar[str] = ",g"
    figure_format: ClassVar[str] = ",.4g"

    name: str
    figure: Callable[[R], float | None]
    limit: float
    unit: str = ""
    is_floor: bool = False

    def is_met_by(self, report: R) -> bool:
        figure = self.figure(report)
        return figure is not None and (figure >= self.limit if self.is_floor else figure <= self.limit)

    def line(self, report: R) -> str:
        """Rich markup."""
        figure = self.figure(report)
        outcome = "[green]met[/]" if self.is_met_by(report) else "[bold red]missed[/]"
        bound = f"{'at least' if self.is_floor else 'at most'} {self.limit:{self.limit_format}}{self.unit}"
        value = "not measured" if figure is None else f"{figure:{self.figure_format}}{self.unit}"
        return f"{outcome} {self.name}: {bound}: {value}"
