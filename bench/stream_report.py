"""Owns what `bench streams` leaves behind: its plan, the figures of its window, targets, the JSON file, the table."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from rich import box
from rich.table import Table

from bench.client import read_tokens
from bench.lateness import StreamClock
from bench.results import Setting
from bench.stats import Percentiles, percentiles
from bench.targets import ReportTarget

ERRORS_KEPT = 5
SPARE_S = 240.0
"""How much longer than planned a stream could go on, should opening them all take longer."""


@dataclass(frozen=True)
class StreamsPlan:
    """What is measured: `streams` open at once, that get `tokens_per_s` in all, opened `ramp_per_s` at most."""

    config: str
    streams: int
    tokens_per_s: float
    ramp_per_s: float
    measure_s: float
    settle_s: float = 30.0
    engine: str = "simulated"

    @property
    def interval_s(self) -> float:
        """Between two tokens of one stream."""
        return self.streams / self.tokens_per_s

    @property
    def max_tokens(self) -> int:
        """Of each stream: more than there is time for."""
        return int((self.streams / self.ramp_per_s + self.settle_s + self.measure_s + SPARE_S) / self.interval_s) + 2


@dataclass(frozen=True)
class Part:
    """What one part of the system used: memory before the first stream and at the end of the window, and CPU in it."""

    memory_before_mib: float
    memory_mib: float
    memory_per_stream_kib: float
    cores: float


@dataclass(frozen=True)
class StreamFigures:
    """What the window showed. `lateness_ms` is from a token's writing to its reading, within half a tick, and
    `opening_lateness_ms` that of all tokens read before the window. `parts` holds `gateway`, `worker` (with the
    simulated engine), `haproxy`, and the `rest` of Baton."""

    opened_s: float
    tokens_written_per_s: float
    tokens_read_per_s: float
    tokens_per_event: float
    lateness_ms: Percentiles
    lateness_max_ms: float
    opening_lateness_ms: Percentiles | None
    ttft_ms: Percentiles
    parts: dict[str, Part]
    client_cores: float
    other_cores: float


@dataclass(frozen=True)
class StreamsReport:
    """The content of the JSON file. `through_haproxy` of the streams went through HAProxy, the others straight to the
    gateway replica; `left_in_flight` requests were still known to the gateway a minute after all clients had gone."""

    complete: bool
    plan: StreamsPlan
    setting: Setting
    through_haproxy: int
    opened: int = 0
    num_errors: int = 0
    errors: tuple[str, ...] = ()
    left_in_flight: int | None = None
    figures: StreamFigures | None = None


@dataclass
class Stream:
    """One open answer; `read` are its bytes and when they came."""

    url: str
    sent_s: float = 0.0
    read: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Window:
    """When figures were taken, on the monotonic clock, and what was used meanwhile."""

    from_s: float
    to_s: float
    opened_s: float
    parts: dict[str, Part]
    client_cores: float
    other_cores: float

    def holds(self, at_s: float) -> bool:
        return self.from_s <= at_s < self.to_s


def evaluate(
    report: StreamsReport, streams: Sequence[Stream], clock: StreamClock, window: Window, left_in_flight: int
) -> StreamsReport:
    """The report with what the streams show. One that got nothing in the window, or what no simulated engine writes,
    has failed."""
    late_s: list[float] = []
    opening_late_s: list[float] = []
    ttft_ms: list[float] = []
    num_written = num_events = 0
    for stream in streams:
        if stream.error is not None:
            continue
        num_events_before = num_events
        first_s = None
        try:
            for at_s, token_ids in read_tokens(stream.read):
                first_s = at_s if first_s is None else first_s
                written_s = [clock.written_s(token, at_s) for token in token_ids]
                num_written += sum(window.holds(time_s) for time_s in written_s)
                if window.holds(at_s):
                    num_events += 1
                    late_s += [at_s - time_s for time_s in written_s]
                elif at_s < window.from_s:
                    opening_late_s += [at_s - time_s for time_s in written_s]
        except (msgspec.DecodeError, ValueError) as error:
            stream.error = f"the stream cannot be read: {error}"
            continue
        if first_s is not None:
            ttft_ms.append((first_s - stream.sent_s) * 1000)
        if num_events == num_events_before:
            stream.error = "no token came within the window"
    failed = [stream.error for stream in streams if stream.error is not None]
    duration_s = window.to_s - window.from_s
    figures = None
    if late_s:
        figures = StreamFigures(
            opened_s=window.opened_s,
            tokens_written_per_s=num_written / duration_s,
            tokens_read_per_s=len(late_s) / duration_s,
            tokens_per_event=len(late_s) / num_events,
            lateness_ms=percentiles([late * 1000 for late in late_s]),
            lateness_max_ms=max(late_s) * 1000,
            opening_lateness_ms=percentiles([late * 1000 for late in opening_late_s]) if opening_late_s else None,
            ttft_ms=percentiles(ttft_ms),
            parts=window.parts,
            client_cores=window.client_cores,
            other_cores=window.other_cores,
        )
    return StreamsReport(
        complete=True,
        plan=report.plan,
        setting=report.setting,
        through_haproxy=report.through_haproxy,
        opened=sum(bool(stream.read) for stream in streams),
        num_errors=len(failed),
        errors=tuple(f"{count} x {text}" for text, count in Counter(failed).most_common(ERRORS_KEPT)),
        left_in_flight=left_in_flight,
        figures=figures,
    )


StreamTarget = ReportTarget[StreamsReport]


def _of(figure: Callable[[StreamFigures], float]) -> Callable[[StreamsReport], float | None]:
    return lambda report: None if report.figures is None else figure(report.figures)


TARGETS = (
    StreamTarget("errors", lambda report: float(report.num_errors) if report.complete else None, 0),
    StreamTarget(
        "streams open, of those planned", lambda report: report.opened / report.plan.streams, 1, is_floor=True
    ),
    StreamTarget(
        "tokens read per second, of those planned",
        lambda report: report.figures and report.figures.tokens_read_per_s / report.plan.tokens_per_s,
        0.98,
        is_floor=True,
    ),
    StreamTarget("lateness of a token, p50", _of(lambda figures: figures.lateness_ms.p50), 50, " ms"),
    StreamTarget("lateness of a token, p99", _of(lambda figures: figures.lateness_ms.p99), 500, " ms"),
    StreamTarget(
        "gateway's memory per stream", _of(lambda figures: figures.parts["gateway"].memory_per_stream_kib), 128, " KiB"
    ),
    StreamTarget("requests left when all clients have gone", lambda report: report.left_in_flight, 0),
)


def table(report: StreamsReport) -> Table:
    """One figure per row."""
    plan, figures = report.plan, report.figures
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_header=False)
    shown.title = f"SIMULATED engine{'' if report.complete else ' (interrupted run)'}: no figure is a figure of a model"
    shown.title_justify = "left"
    rows: list[tuple[str, str]] = [
        ("streams open", f"{report.opened:,} of {plan.streams:,}, {report.through_haproxy:,} through HAProxy"),
        ("errors", ", ".join((f"{report.num_errors:,}", *report.errors))),
        ("left when all clients have gone", "-" if report.left_in_flight is None else f"{report.left_in_flight:,}"),
    ]
    if figures is not None:
        late, opening, ttft = figures.lateness_ms, figures.opening_lateness_ms, figures.ttft_ms
        rows += [
            ("opened in", f"{figures.opened_s:.0f} s"),
            (
                "tokens/s: planned, written, read",
                f"{plan.tokens_per_s:,.0f}, {figures.tokens_written_per_s:,.0f}, {figures.tokens_read_per_s:,.0f}",
            ),
            ("tokens/event", f"{figures.tokens_per_event:.2f}"),
            (
                "lateness ms: p50, p90, p99, max",
                f"{late.p50:.0f}, {late.p90:.0f}, {late.p99:.0f}, {figures.lateness_max_ms:.0f}",
            ),
            (
                "lateness ms before the window: p50, p90, p99",
                "-" if opening is None else f"{opening.p50:.0f}, {opening.p90:.0f}, {opening.p99:.0f}",
            ),
            ("TTFT ms: p50, p90, p99", f"{ttft.p50:.0f}, {ttft.p90:.0f}, {ttft.p99:.0f}"),
            *_part_rows(figures.parts.items()),
            ("client, others: cores", f"{figures.client_cores:.2f}, {figures.other_cores:.2f}"),
        ]
    for row in rows:
        shown.add_row(*row)
    return shown


def _part_rows(parts: Iterable[tuple[str, Part]]) -> list[tuple[str, str]]:
    return [
        (
            f"{name}: memory MiB, per stream KiB, cores",
            f"{part.memory_before_mib:.0f} to {part.memory_mib:.0f}, {part.memory_per_stream_kib:.1f}, "
            f"{part.cores:.2f}",
        )
        for name, part in parts
    ]
