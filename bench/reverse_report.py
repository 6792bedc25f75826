"""Owns what came of the experiment on second turns: cells, sources of KV, trials, medians, the table. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from rich import box
from rich.table import Table

from bench.results import Setting


class Source(StrEnum):
    """Where the KV of a second turn comes from. All but DECODE end with a hand-off to the decode engine."""

    PREFILL_CACHE = "prefill's own cache"
    PREFILL_CACHE_PINNED = "own cache, answer pinned"
    PREFILL_CACHE_ASKED = "own cache, answer asked for"
    NONE = "none: prefill reads all"
    PINNED = "pinned on decode"
    ASKED = "asked for from decode"
    DECODE = "decode itself"

    @property
    def fetches(self) -> bool:
        return self.is_pinned or self in (Source.PREFILL_CACHE_ASKED, Source.ASKED)

    @property
    def is_pinned(self) -> bool:
        """vLLM's reverse transfer: decode keeps the blocks from the end of the first turn on."""
        return self in (Source.PREFILL_CACHE_PINNED, Source.PINNED)

    @property
    def has_moved(self) -> bool:
        """The prefill engine has nothing cached."""
        return self in (Source.NONE, Source.PINNED, Source.ASKED)


@dataclass(frozen=True)
class Cell:
    """`others`: streams that decode writes meanwhile."""

    prompt_tokens: int
    answer_tokens: int
    new_tokens: int
    others: int = 0

    def __str__(self) -> str:
        others = f", {self.others} others" if self.others else ""
        return f"{self.prompt_tokens} + {self.answer_tokens} + {self.new_tokens}{others}"


FULL_CELLS = (
    *(Cell(prompt, answer, 128) for prompt in (500, 1500, 3500) for answer in (32, 256)),
    Cell(3500, 256, 1024),
    Cell(3500, 256, 128, others=8),
    Cell(3500, 256, 1024, others=8),
)
QUICK_CELLS = (Cell(500, 32, 128), Cell(3500, 32, 128))


@dataclass(frozen=True)
class ReversePlan:
    config: str
    cells: tuple[Cell, ...]
    rounds: int
    seed: int


@dataclass(frozen=True)
class Trial:
    """One second turn. Times run from its start, the request to decode for its blocks included.

    `others_gap_s` is the longest time between two tokens of another stream meanwhile; 0 without others.
    """

    cell: Cell
    source: Source
    round: int
    token_ids: tuple[int, ...]
    first_token_s: float
    second_token_s: float
    asked_s: float
    prefill_computed_tokens: int
    prefill_fetched_tokens: int
    decode_computed_tokens: int
    bytes_to_prefill: int
    bytes_to_decode: int
    others_gap_s: float


@dataclass(frozen=True)
class Median:
    """Of the trials of one cell and source. `differing`: trials whose tokens are not those of the round's others."""

    cell: Cell
    source: Source
    num_trials: int
    differing: int
    first_token_ms: float
    fastest_first_token_ms: float
    slowest_first_token_ms: float
    second_token_ms: float
    asked_ms: float
    others_gap_ms: float
    prefill_computed_tokens: int
    prefill_fetched_tokens: int
    decode_computed_tokens: int
    bytes_to_prefill: int
    bytes_to_decode: int


@dataclass(frozen=True)
class ReverseReport:
    complete: bool
    plan: ReversePlan
    setting: Setting
    medians: tuple[Median, ...]
    trials: tuple[Trial, ...]


def make_report(plan: ReversePlan, setting: Setting, trials: Sequence[Trial], complete: bool) -> ReverseReport:
    medians = [
        _median([trial for trial in trials if (trial.cell, trial.source) == (cell, source)], trials)
        for cell in plan.cells
        for source in Source
        if any((trial.cell, trial.source) == (cell, source) for trial in trials)
    ]
    return ReverseReport(complete, plan, setting, tuple(medians), tuple(trials))


def _median(own: Sequence[Trial], trials: Sequence[Trial]) -> Median:
    def ms(seconds: Callable[[Trial], float]) -> float:
        return round(1000 * median(map(seconds, own)), 2)

    def count(number: Callable[[Trial], int]) -> int:
        return int(median(map(number, own)))

    reference = {(trial.cell, trial.round): trial.token_ids for trial in reversed(trials)}
    first_ms = [round(1000 * trial.first_token_s, 2) for trial in own]
    return Median(
        cell=own[0].cell,
        source=own[0].source,
        num_trials=len(own),
        differing=sum(trial.token_ids != reference[trial.cell, trial.round] for trial in own),
        first_token_ms=ms(lambda trial: trial.first_token_s),
        fastest_first_token_ms=min(first_ms),
        slowest_first_token_ms=max(first_ms),
        second_token_ms=ms(lambda trial: trial.second_token_s),
        asked_ms=ms(lambda trial: trial.asked_s),
        others_gap_ms=ms(lambda trial: trial.others_gap_s),
        prefill_computed_tokens=count(lambda trial: trial.prefill_computed_tokens),
        prefill_fetched_tokens=count(lambda trial: trial.prefill_fetched_tokens),
        decode_computed_tokens=count(lambda trial: trial.decode_computed_tokens),
        bytes_to_prefill=count(lambda trial: trial.bytes_to_prefill),
        bytes_to_decode=count(lambda trial: trial.bytes_to_decode),
    )


def table(report: ReverseReport) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.title = None if report.complete else "interrupted run"
    shown.caption = "medians; tokens that prefill and decode computed of the prompt; MB that each received"
    for name in ("prompt + answer + new", "KV from"):
        shown.add_column(name, no_wrap=True)
    for name in ("first\ntoken ms", "second\ntoken ms", "asked\nms", "prefill\ncomputed", "prefill\nfetched"):
        shown.add_column(name, justify="right")
    for name in ("decode\ncomputed", "MB to\nprefill", "MB to\ndecode", "others'\ngap ms", "differ"):
        shown.add_column(name, justify="right")
    last: Cell | None = None
    for one in report.medians:
        if last is not None and one.cell != last:
            shown.add_section()
        shown.add_row(
            "" if one.cell == last else str(one.cell),
            one.source,
            f"{one.first_token_ms:.1f}",
            f"{one.second_token_ms:.1f}",
            f"{one.asked_ms:.1f}" if one.asked_ms else "",
            str(one.prefill_computed_tokens),
            str(one.prefill_fetched_tokens),
            str(one.decode_computed_tokens),
            f"{one.bytes_to_prefill / 1e6:.2f}",
            f"{one.bytes_to_decode / 1e6:.2f}",
            f"{one.others_gap_ms:.1f}" if one.cell.others else "",
            f"{one.differing}/{one.num_trials}",
        )
        last = one.cell
    return shown
