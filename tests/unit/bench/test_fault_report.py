"""What a case of real faults is judged by, and what all of them show."""

from dataclasses import replace
from typing import Any

import pytest

from bench.fault_asks import Answer, Choice, End
from bench.fault_cases import Blow, Case, Moment, Victim, all_cases, rows
from bench.fault_report import (
    AnswerReport,
    CaseResult,
    Check,
    FaultsReport,
    Observed,
    ReceiptFacts,
    Struck,
    checks,
    judge_answers,
    problems,
    state_hit,
    whole_limit_s,
)

COLD_S = 20.0
ENGINE = Case(Victim.DECODE_CORE, Blow.KILL, Moment.RESUMABLE)
GATEWAY = Case(Victim.GATEWAY, Blow.KILL, Moment.RESUMABLE)
FINE = Observed("8 tokens", (), 0.5, "", 0.1, "", 20.0, "", "")


def answer(end: End = End.COMPLETE, token_ids: tuple[int, ...] = (1, 2, 3), name: str = "a", **more: Any) -> Answer:
    reason = "length" if end is End.COMPLETE else None
    return Answer(name, end, choices={0: Choice("", list(token_ids), reason)}, **more)


def judged(
    case: Case, *answers: Answer, receipts: dict[str, ReceiptFacts] | None = None, in_flight: int = 0
) -> list[AnswerReport]:
    references = {one.name: answer(name=one.name) for one in answers}
    return judge_answers(case, answers, references, receipts or {}, [Struck("gateway", 1, "g", in_flight)])


def test_a_complete_answer_that_equals_the_undisturbed_one_is_as_it_should_be() -> None:
    (report,) = judged(ENGINE, answer())
    assert (report.expected, report.difference) == (True, "")


def test_a_complete_answer_that_differs_is_a_fault_of_any_case() -> None:
    for case in all_cases():
        (report,) = judged(case, answer(token_ids=(1, 2, 4)))
        assert not report.expected
        assert "token 2" in report.difference


def test_an_answer_without_an_undisturbed_one_proves_nothing() -> None:
    (report,) = judge_answers(ENGINE, [answer()], {}, {}, ())
    assert not report.expected


@pytest.mark.parametrize("end", [End.ERROR, End.REFUSED, End.BROKEN, End.CUT, End.HUNG])
def test_no_client_may_see_the_loss_of_an_engine(end: End) -> None:
    (report,) = judged(ENGINE, answer(end, (1,), status=503, retry_after="1"))
    assert not report.expected


@pytest.mark.parametrize("end", [End.BROKEN, End.REFUSED, End.ERROR])
def test_as_many_answers_of_a_dead_gateway_may_end_as_it_had(end: End) -> None:
    answers = [answer(end, (1,), name=str(number)) for number in range(4)]
    assert [report.expected for report in judged(GATEWAY, *answers, in_flight=2)] == [True, True, True, False]


def test_an_answer_whose_gateway_lives_may_not_break() -> None:
    (report,) = judged(GATEWAY, answer(End.BROKEN, (1,)), receipts={"a": ReceiptFacts("aborted")}, in_flight=5)
    assert not report.expected


@pytest.mark.parametrize("end", [End.CUT, End.HUNG])
def test_no_answer_may_hang_or_be_cut_silently(end: End) -> None:
    for case in all_cases():
        (report,) = judged(case, answer(end, (1,)), in_flight=5)
        assert not report.expected, case.name


def test_an_answer_that_breaks_must_have_begun_right() -> None:
    (report,) = judged(GATEWAY, answer(End.BROKEN, (1, 9)), in_flight=5)
    assert not report.expected
    assert "before the end" in report.difference


def test_haproxys_connections_may_all_break() -> None:
    case = Case(Victim.HAPROXY, Blow.KILL, Moment.IDLE)
    assert all(report.expected for report in judged(case, *(answer(End.BROKEN, (), name=str(n)) for n in range(9))))


def test_a_flood_may_be_refused_with_a_time_to_come_back() -> None:
    case = Case(None, Blow.FLOOD, Moment.IDLE)
    (typed,) = judged(case, answer(End.REFUSED, (), status=503, retry_after="1"))
    (untyped,) = judged(case, answer(End.REFUSED, (), status=503))
    assert (typed.expected, untyped.expected) == (True, False)


def test_only_who_comes_when_no_decode_engine_is_left_may_be_refused() -> None:
    case = replace(ENGINE, is_whole_pool=True)
    late, early = (answer(End.REFUSED, (), name=name, status=503, retry_after="5") for name in ("late", "greedy-0"))
    assert [report.expected for report in judged(case, late, early)] == [True, False]
    prefill = replace(case, victim=Victim.PREFILL_CORE)
    assert [report.expected for report in judged(prefill, late)] == [False]


def test_a_client_that_left_is_as_it_should_be() -> None:
    (report,) = judged(replace(ENGINE, moment=Moment.CLIENT_LEFT), answer(End.LEFT, (1,)))
    assert report.expected


def test_only_an_engine_that_was_struck_has_a_time_to_be_back_in() -> None:
    assert whole_limit_s(ENGINE, COLD_S) == 35.0
    assert whole_limit_s(GATEWAY, COLD_S) is None
    assert whole_limit_s(replace(ENGINE, is_whole_pool=True), COLD_S) is None
    assert whole_limit_s(Case(None, Blow.LEAVE, Moment.QUEUED), COLD_S) is None
    assert whole_limit_s(Case(Victim.DECODE_ACTOR, Blow.DRAIN, Moment.QUEUED), COLD_S) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_back_s": None, "kv_wrong": "decode-0 holds 3 KV blocks"}, "decode-0 holds 3 KV blocks"),
        ({"kv_all_back_s": None, "kv_all_wrong": "prefill-0 holds 1"}, "prefill-0 holds 1"),
        ({"whole_s": None, "not_whole": "1 of 2 gateways answer"}, "not whole: 1 of 2"),
        ({"whole_s": 36.0}, "36.0 s; 35.0 s are allowed"),
        ({"left_over": "1 stray engine"}, "1 stray engine"),
    ],
)
def test_what_was_observed_and_should_not_be_is_a_problem(change: dict[str, Any], words: str) -> None:
    assert problems((), FINE, 35.0) == ()
    (problem,) = problems((), replace(FINE, **change), 35.0)
    assert words in problem


def test_a_receipt_says_whether_the_blow_met_its_moment() -> None:
    assert state_hit(ENGINE, ReceiptFacts(fault_kinds=("decode_lost_mid_stream",))) is True
    assert state_hit(ENGINE, ReceiptFacts()) is False
    assert state_hit(ENGINE, None) is None
    assert state_hit(GATEWAY, ReceiptFacts()) is None


def result(case: Case, answers: tuple[AnswerReport, ...], observed: Observed = FINE) -> CaseResult:
    return CaseResult(
        name=case.name,
        victim=case.victim,
        blow=case.blow,
        moment=case.moment,
        kind=case.kind,
        rows=tuple(rows(case)),
        seed="s",
        started_at="",
        git_commit="",
        took_s=1.0,
        state_hit=True,
        whole_limit_s=whole_limit_s(case, COLD_S),
        observed=observed,
        answers=answers,
        problems=problems(answers, observed, whole_limit_s(case, COLD_S)),
    )


def checked(results: list[CaseResult], is_quick: bool = False) -> dict[str, Check]:
    report = FaultsReport(True, "faults.yaml", COLD_S, (), tuple(results))
    return {check.what.partition(" ")[0]: check for check in checks(report, all_cases(), is_quick)}


def test_all_cases_without_a_problem_meet_every_target() -> None:
    good = judged(ENGINE, answer())
    found = checked([result(case, tuple(good)) for case in all_cases()])
    assert all(check.is_met for check in found.values()), [check.line() for check in found.values()]


def test_what_is_missed_is_said_with_its_figure() -> None:
    bad = (*judged(ENGINE, answer(End.ERROR, (1,))), *judged(ENGINE, answer(token_ids=(7,))))
    slow = replace(FINE, kv_back_s=None, whole_s=50.0, left_over="1 stray engine")
    found = checked([result(ENGINE, bad, slow)])
    assert not any(found[what].is_met for what in ("client-visible", "answers", "KV", "whole", "nothing", "rows"))
    assert found["client-visible"].line().startswith("MISSED client-visible failures")
    assert "1 of 2 answers" in found["client-visible"].figure
    assert "50.0 s of 35.0 s" in found["whole"].figure


def test_a_quick_run_need_not_cover_everything_and_no_run_proves_nothing() -> None:
    good = tuple(judged(ENGINE, answer()))
    assert all(check.is_met for check in checked([result(ENGINE, good)], is_quick=True).values())
    assert not checked([], is_quick=True)["client-visible"].is_met
