"""What a load's report makes of turns: who kept a limit, who is missing in a figure, and when a run is invalid."""

import io
import json
from array import array
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from bench.client import Recording
from bench.load_plan import DEFAULT_SLOS, SLOS, LoadPlan, ServerFacts, ServerKind, Slo, slo_of
from bench.load_report import (
    GENERATOR_TARGETS,
    AskedSession,
    AskedTurn,
    End,
    LoadReport,
    Use,
    evaluate,
    read_turn,
    table,
    targets,
)
from bench.results import EngineKind
from tests.unit.bench.test_results import SETTING

PROMPT = [5, 6, 7]
DONE = b"data: [DONE]\n\n"
SLO = Slo("own", 100, 10)
PLAN = LoadPlan("chat", 1.0, None, 10.0, 2.0, 5.0, 0, "salt", (SLO,))
SERVER = ServerFacts("http://here", "m", ServerKind.BATON, EngineKind.SIMULATED)


def event(
    tokens: list[int] | None, text: str = "x", finish: str | None = None, prompt: list[int] | None = PROMPT
) -> bytes:
    choice = {"text": text, "token_ids": tokens, "prompt_token_ids": prompt, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def usage(completion_tokens: int, cached_tokens: int | None = None) -> bytes:
    details = None if cached_tokens is None else {"cached_tokens": cached_tokens}
    told = {"prompt_tokens": 3, "completion_tokens": completion_tokens, "prompt_tokens_details": details}
    return b"data: " + json.dumps({"choices": [], "usage": told}).encode() + b"\n\n"


def read(*arrivals: tuple[float, bytes], max_tokens: int = 3, **recorded: object) -> tuple[AskedTurn, tuple[int, ...]]:
    recording = Recording(sent_s=101.0, ended_s=105.0, status=200, arrivals=list(arrivals))
    for name, value in recorded.items():
        setattr(recording, name, value)
    return read_turn(recording, PROMPT, max_tokens, 100.0, 0.5, (2.0, 4.0), ("s", None, 0))


def test_times_count_from_the_runs_start_and_tokens_of_the_window_from_when_they_came() -> None:
    turn, tokens = read(
        (101.5, event([1])), (103.0, event([2])), (104.5, event([3], finish="length") + usage(3, 2) + DONE)
    )
    assert (turn.end, turn.due_s, turn.sent_s, turn.first_s, turn.ended_s) == (End.ANSWERED, 0.5, 1.0, 1.5, 5.0)
    assert (turn.num_output_tokens, turn.num_window_tokens, turn.num_cached_tokens) == (3, 1, 2)
    assert turn.tpot_s == pytest.approx(1.5)
    assert list(turn.gaps_s) == [1.5, 1.5]
    assert tokens == (1, 2, 3)


def test_a_server_that_tells_no_token_ids_is_counted_by_its_usage() -> None:
    turn, tokens = read((101.5, event(None, prompt=None)), (102.0, event(None, finish="length") + usage(3) + DONE))
    assert (turn.end, turn.num_output_tokens, turn.num_cached_tokens, tokens) == (End.ANSWERED, 3, None, ())


@pytest.mark.parametrize(
    ("arrivals", "error"),
    [
        ([(1.0, event([1, 2, 3], finish="length"))], "without [DONE]"),
        ([(1.0, event([1, 2], finish="length") + DONE)], "has 2 tokens; 3 were asked for"),
        ([(1.0, event([1, 2, 3, 4], finish="length") + DONE)], "has 4 tokens; 3 were asked for"),
        ([(1.0, event([1, 2, 3], finish="length", prompt=[5]) + DONE)], "another prompt"),
        ([(1.0, DONE)], "has 0 tokens"),
        ([(1.0, b'data: {"error": {"message": "the engine died"}}\n\n')], "the engine died"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_has_failed(arrivals: list[tuple[float, bytes]], error: str) -> None:
    turn, _ = read(*arrivals)
    assert turn.end is End.FAILED
    assert error in turn.error
    assert (turn.first_s, turn.num_output_tokens) == (None, 0)


def test_an_answer_that_the_model_ended_is_short_but_whole() -> None:
    turn, _ = read((101.5, event([1, 2], finish="stop") + DONE))
    assert (turn.end, turn.is_short, turn.num_output_tokens) == (End.ANSWERED, True, 2)


@pytest.mark.parametrize(
    ("status", "end"), [(429, End.REFUSED), (503, End.REFUSED), (500, End.FAILED), (0, End.FAILED)]
)
def test_only_429_and_503_are_refusals(status: int, end: End) -> None:
    assert read(status=status, error="no")[0].end is end


def turn(due_s: float, ttft_ms: float = 50.0, tpot_ms: float | None = 5.0, **changes: object) -> AskedTurn:
    made = AskedTurn(
        "s", None, 0, due_s, due_s + 0.001, due_s + ttft_ms / 1000, due_s + 1.0, End.ANSWERED, 200, "", 100, 10, 10, 40,
        False, None if tpot_ms is None else tpot_ms / 1000, array("d", [0.005] * 9),
    )  # fmt: skip
    return replace(made, **changes)


def report(turns: list[AskedTurn], sessions: list[AskedSession] | None = None, **changes: object) -> LoadReport:
    use = Use(12.0, 3.0, 0.01)
    made = evaluate(replace(PLAN, **changes), SETTING, SERVER, turns, sessions or [], 0, use, [], complete=True)
    assert made.figures is not None
    return made


def test_refusals_failures_and_late_tokens_miss_the_limits() -> None:
    refused = turn(4.0, end=End.REFUSED, first_s=None, error="HTTP 429: busy")
    failed = turn(5.0, end=End.FAILED, first_s=None, error="broke off")
    made = report([turn(3.0), turn(3.5, tpot_ms=None), turn(4.5, ttft_ms=101), turn(6, tpot_ms=11), refused, failed])
    figures = made.figures
    assert figures is not None
    assert (figures.num_turns, figures.num_answered, figures.num_refused, figures.num_failed) == (6, 4, 1, 1)
    (kept,) = figures.slos
    assert kept.kept_share == pytest.approx(2 / 6)
    assert kept.goodput_per_s == pytest.approx(2 / 8)
    assert (kept.ttft_kept_share, kept.tpot_kept_share) == (3 / 6, 3 / 6)
    assert not kept.is_met
    assert made.errors == ("1 x HTTP 429: busy", "1 x broke off")


def test_what_lies_between_the_first_two_tokens_is_told_apart() -> None:
    gaps_s = ([0.04, 0.01, 0.01], [0.02, 0.01], [])
    figures = report([turn(3.0, gaps_s=array("d", each)) for each in gaps_s]).figures
    assert figures is not None
    assert figures.first_gap_ms is not None
    assert figures.first_gap_ms.p50 == pytest.approx(30)
    assert figures.itl_ms is not None
    assert figures.itl_ms.p50 == pytest.approx(10)


def test_a_limit_is_met_when_99_of_100_keep_it() -> None:
    good = [turn(3.0)] * 99
    for late, is_met in (([turn(3.0, ttft_ms=500)], True), ([turn(3.0, ttft_ms=500)] * 2, False)):
        figures = report(good + late).figures
        assert figures is not None
        assert figures.slos[0].is_met is is_met


def test_only_turns_due_in_the_window_are_measured() -> None:
    made = report([turn(1.9), turn(2.0, ttft_ms=70), turn(9.9, ttft_ms=90), turn(10.0)])
    assert made.figures is not None
    assert made.figures.num_turns == 2
    assert made.figures.ttft_ms is not None
    assert made.figures.ttft_ms.p50 == pytest.approx(80)
    assert made.figures.cached_share == pytest.approx(0.4)
    assert len(made.turns) == 4, "the file has them all"


def test_a_generator_that_fell_behind_makes_the_run_invalid_and_its_lateness_is_in_the_latency() -> None:
    made = report([turn(3.0, sent_s=3.011)])
    (why,) = made.why_invalid
    assert "lateness p99 is 11.0 ms" in why
    assert not any(target.is_met_by(made) for target in targets(PLAN)[:1])
    assert report([turn(3.0, sent_s=3.009)]).why_invalid == ()


def test_a_run_in_which_nothing_was_measured_is_invalid() -> None:
    made = evaluate(PLAN, SETTING, SERVER, [turn(1.0)], [], 3, Use(1.5, 1.0, 0.0), [], complete=False)
    assert made.figures is None
    assert made.why_invalid == ("no turn was measured",)
    assert not any(target.is_met_by(made) for target in GENERATOR_TARGETS)
    shown(made)


def test_sessions_that_did_not_end_well_are_counted_and_left_out() -> None:
    ended = [
        AskedSession("a", None, 3.0, 7.0, End.ANSWERED, 9.0),
        AskedSession("a.0", "a", 4.0, 9.0, End.ANSWERED),
        AskedSession("b", None, 3.0, 4.0, End.ANSWERED, None),
        AskedSession("c", None, 3.0, 4.0, End.CUT_OFF),
        AskedSession("d", None, 3.0, 4.0, End.REFUSED),
        AskedSession("early", None, 1.0, 100.0, End.ANSWERED, 100.0),
    ]
    figures = report([turn(3.0)], ended).figures
    assert figures is not None
    assert (figures.num_sessions, figures.num_sessions_cut_off, figures.num_sessions_given_up) == (3, 1, 1)
    assert figures.session_s is not None
    assert figures.session_s.p50 == 4.0
    assert (figures.num_trajectories, figures.trajectory_s and figures.trajectory_s.p50) == (1, 6.0)


def shown(of: LoadReport) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(of))
    return capture.get()


def test_the_table_says_first_what_must_not_be_overlooked() -> None:
    text = shown(replace(report([turn(3.0, sent_s=3.02)]), complete=False))
    assert text.index("SIMULATED") < text.index("INTERRUPTED") < text.index("INVALID") < text.index("TTFT")
    unknown = replace(report([turn(3.0)]), server=replace(SERVER, engine=None))
    assert "does not tell whether it is a real one" in shown(unknown)
    assert "SIMULATED" not in shown(replace(unknown, server=replace(SERVER, engine=EngineKind.VLLM)))


def test_a_report_can_be_read_again() -> None:
    made = report([turn(3.0)])
    assert msgspec.json.decode(msgspec.json.encode(made), type=LoadReport) == made


def test_service_levels_are_names_or_two_numbers() -> None:
    assert (SLOS["mlperf-llama2-70b-interactive"].ttft_ms, SLOS["mlperf-llama2-70b-interactive"].tpot_ms) == (450, 40)
    assert [slo_of(name).name for name in DEFAULT_SLOS] == list(DEFAULT_SLOS)
    assert slo_of("250/20") == Slo("250/20", 250, 20)
    for text in ("fast", "250", "0/20", "nan/1", "1/2/3"):
        with pytest.raises(ValueError, match="no service level"):
            slo_of(text)
