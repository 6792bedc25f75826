"""The list of real faults covers what it promises, in no more cases than it may."""

import itertools

import pytest

from bench.fault_cases import (
    MAX_CASES,
    QUICK,
    REPLAYED_KINDS,
    SIGNALS,
    Blow,
    Case,
    Kind,
    Moment,
    Row,
    Victim,
    all_cases,
    chosen,
    covering,
    expected_kinds,
    rows,
)
from gateway import lifecycle

CASES = all_cases()


def test_a_covering_holds_every_pair_of_two_factors_in_as_few_triples_as_can_be() -> None:
    many, more, few = "abcdefgh", "123456", "xyz"
    triples = covering(many, more, few)
    assert len(triples) == len(many) * len(more)
    assert {(a, b) for a, b, _ in triples} == set(itertools.product(many, more))
    assert {(a, c) for a, _, c in triples} == set(itertools.product(many, few))
    assert {(b, c) for _, b, c in triples} == set(itertools.product(more, few))


def test_a_factor_that_is_too_long_to_be_dealt_out_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be dealt out"):
        covering("ab", "123", "xyz")


def test_every_pair_of_process_signal_and_moment_is_among_the_cases() -> None:
    struck = [case for case in CASES if case.is_signal]
    assert {(case.victim, case.blow) for case in struck} == set(itertools.product(Victim, SIGNALS))
    assert {(case.victim, case.moment) for case in struck} == set(itertools.product(Victim, Moment))
    assert {(case.blow, case.moment) for case in struck} == set(itertools.product(SIGNALS, Moment))


def test_every_row_of_the_table_is_among_the_cases() -> None:
    assert {row for case in CASES for row in rows(case)} == set(Row)


def test_every_kind_of_answer_that_is_begun_again_loses_its_decode_engine() -> None:
    kinds = {case.kind for case in CASES if case.victim is Victim.DECODE_CORE and case.moment is Moment.REPLAYED}
    assert kinds == set(REPLAYED_KINDS)


def test_there_are_no_more_cases_than_allowed_and_each_has_a_name_of_its_own() -> None:
    assert len(CASES) <= MAX_CASES
    assert len({case.name for case in CASES}) == len(CASES)


def test_an_answer_that_must_have_no_token_yet_is_one_whose_first_token_prefill_does_not_write() -> None:
    assert {case.kind for case in CASES if case.moment is Moment.BEFORE_TOKEN} == {Kind.SEEDED}


def test_cases_are_chosen_by_patterns() -> None:
    assert chosen(CASES, ()) == list(CASES)
    (one,) = chosen(CASES, (Case(Victim.HAPROXY, Blow.KILL, Moment.IDLE).name.replace("kill", "*"),))
    assert (one.victim, one.moment) == (Victim.HAPROXY, Moment.IDLE)
    assert chosen(CASES, ("no-such-case",)) == []
    for pattern in QUICK:
        assert len(chosen(CASES, (pattern,))) == 1, pattern


def test_what_a_receipt_is_expected_to_name_are_kinds_of_faults_of_the_life_cycle() -> None:
    known = {kind.value for kind in lifecycle.FaultKind}
    assert {kind for case in CASES for kind in expected_kinds(case)} <= known
    assert expected_kinds(Case(Victim.DECODE_CORE, Blow.KILL, Moment.REPLAYED)) == {"decode_lost_mid_stream"}
    assert expected_kinds(Case(Victim.GATEWAY, Blow.KILL, Moment.RESUMABLE)) == frozenset()
