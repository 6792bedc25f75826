"""What `bench streams` makes of what it read: lateness, failures, targets, table and file."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.lateness import StreamClock
from bench.results import write_json
from bench.stream_report import (
    TARGETS,
    Part,
    Stream,
    StreamsPlan,
    StreamsReport,
    Window,
    evaluate,
    table,
)
from engine.simulated import TokenRule
from tests.unit.bench.fake_server import event
from tests.unit.bench.test_results import SETTING

TICK_S = 0.01
VOCABULARY = range(1000)
CLOCK = StreamClock(VOCABULARY, TICK_S)
RULE = TokenRule(VOCABULARY, clock_tick_s=TICK_S)
PLAN = StreamsPlan("c.yaml", streams=4, tokens_per_s=2.0, ramp_per_s=100.0, measure_s=10.0)
PARTS = {"gateway": Part(500.0, 500.4, 102.4, 0.5), "haproxy": Part(10.0, 10.1, 25.6, 0.1)}
WINDOW = Window(from_s=100.0, to_s=110.0, opened_s=3.0, parts=PARTS, client_cores=0.2, other_cores=0.05)
STARTED = StreamsReport(False, PLAN, SETTING, through_haproxy=3)


def read_at(at_s: float, *late_s: float) -> tuple[float, bytes]:
    """One event with tokens that were written so long before it was read."""
    tokens = [RULE.pick(b"", at_s - late) for late in late_s]
    return at_s, event({"prompt": [1]}, tokens, first=False)


def stream(*read: tuple[float, bytes], error: str | None = None) -> Stream:
    return Stream("http://unused", sent_s=90.0, read=list(read), error=error)


def report_of(*streams: Stream, left_in_flight: int = 0) -> StreamsReport:
    return evaluate(STARTED, streams, CLOCK, WINDOW, left_in_flight)


def good_report() -> StreamsReport:
    streams = [stream(read_at(99.0, 0.1), *(read_at(100.5 + 2 * n, 0.02) for n in range(5))) for _ in range(4)]
    return report_of(*streams)


def test_lateness_is_of_what_was_read_in_the_window_and_rates_are_of_both_ends() -> None:
    one = stream(read_at(91.0, 5.0), read_at(100.1, 0.3), read_at(105.0, 0.1, 0.2), read_at(110.2, 0.5))
    figures = report_of(one).figures
    assert figures is not None
    assert figures.lateness_ms.p50 == pytest.approx(200, abs=6)
    assert figures.lateness_max_ms == pytest.approx(300, abs=6)
    assert figures.opening_lateness_ms is not None
    assert figures.opening_lateness_ms.p50 == pytest.approx(5000, abs=6)
    assert figures.tokens_read_per_s == 0.3
    assert figures.tokens_written_per_s == 0.3  # the first of the window was written before it, one after was in it
    assert figures.tokens_per_event == 1.5
    assert figures.ttft_ms.p50 == pytest.approx(1000)


def test_every_stream_that_is_not_whole_is_an_error_and_counts_in_no_figure() -> None:
    foreign = (105.0, event({"prompt": [1]}, [5000], first=False))
    streams = [
        stream(read_at(105.0, 0.1)),
        stream(read_at(105.0, 9.0), error="HTTP 503: b'busy'"),
        stream(read_at(99.0, 0.1)),
        stream(foreign),
        stream((105.0, b"data: {\n\n")),
    ]
    report = report_of(*streams, left_in_flight=2)
    assert (report.complete, report.opened, report.num_errors, report.left_in_flight) == (True, 5, 4, 2)
    assert "1 x no token came within the window" in report.errors
    assert any("token 5000 is none that a simulated engine writes" in error for error in report.errors)
    assert report.figures is not None
    assert report.figures.lateness_max_ms == pytest.approx(100, abs=6)


def test_nothing_read_gives_no_figures() -> None:
    assert report_of(stream()).figures is None


def test_a_good_report_meets_every_target_and_an_empty_one_misses_every_figure() -> None:
    assert [target.name for target in TARGETS if not target.is_met_by(good_report())] == []
    assert [target for target in TARGETS if target.is_met_by(STARTED)] == []
    assert all("not measured" in target.line(STARTED) for target in TARGETS if "open" not in target.name)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"num_errors": 1}, "errors"),
        ({"opened": 3}, "streams open, of those planned"),
        ({"left_in_flight": 1}, "requests left when all clients have gone"),
        ({"plan": replace(PLAN, tokens_per_s=2.1)}, "tokens read per second, of those planned"),
    ],
)
def test_a_target_that_is_missed_is_one_line_that_says_so(change: dict, missed: str) -> None:
    report = replace(good_report(), **change)
    (target,) = [target for target in TARGETS if not target.is_met_by(report)]
    assert target.name == missed
    assert target.line(report).startswith("[bold red]missed[/] " + missed)
    assert "\n" not in target.line(report)


def test_the_table_and_the_file_say_that_the_engine_is_simulated(tmp_path: Path) -> None:
    report = good_report()
    console = Console(file=StringIO(), width=120)
    console.print(table(report))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    for expected in ("SIMULATED engine", "4 of 4, 3 through HAProxy", "gateway: memory", "500 to 500, 102.4, 0.50"):
        assert expected in shown
    write_json(report, tmp_path / "report.json")
    data = (tmp_path / "report.json").read_bytes()
    assert b'"engine": "simulated"' in data
    assert msgspec.json.decode(data, type=StreamsReport) == report


def test_streams_are_longer_than_there_is_time_for() -> None:
    plan = StreamsPlan("c.yaml", streams=10_000, tokens_per_s=5_000.0, ramp_per_s=100.0, measure_s=30.0)
    assert plan.interval_s == 2.0
    assert plan.max_tokens * plan.interval_s > 100 + 30
