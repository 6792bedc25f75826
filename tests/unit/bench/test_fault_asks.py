"""What the clients of a fault ask, and how what came back is read and compared."""

import json
from typing import Any

import pytest

from bench.fault_asks import Answer, Asks, Choice, End, LoopAsks, begins, difference
from bench.fault_cases import Blow, Case, Kind, Moment, Victim, all_cases


def case(moment: Moment = Moment.RESUMABLE, kind: Kind = Kind.GREEDY) -> Case:
    return Case(Victim.DECODE_CORE, Blow.KILL, moment, kind)


def event(**more: Any) -> str:
    return f"data: {json.dumps({'choices': [], **more})}"


def part(index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, **more}


def answered(*parts: dict[str, Any], usage: tuple[int, int] = (3, 2)) -> Answer:
    answer = Answer("a")
    for one in parts:
        answer.take(event(choices=[one]))
    answer.take(event(usage={"prompt_tokens": usage[0], "completion_tokens": usage[1]}))
    answer.take("data: [DONE]")
    answer.close()
    return answer


WHOLE = (part(text="a", token_ids=[5]), part(text="b", token_ids=[6], finish_reason="length"))


def test_the_same_seed_gives_the_same_prompts_and_another_gives_others() -> None:
    first, again, other = (
        [ask.body for ask in (*asks.background(), asks.target(), asks.late())]
        for asks in (Asks(case(), "1"), Asks(case(), "1"), Asks(case(), "2"))
    )
    assert first == again
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("one", all_cases(), ids=lambda one: one.name)
def test_every_request_of_a_case_has_a_name_of_its_own_and_streams_token_ids(one: Case) -> None:
    asks = Asks(one, "seed")
    everything = [*asks.background(), asks.target(), *asks.blockers(), asks.late(), *asks.flood()]
    assert len({ask.name for ask in everything}) == len(everything)
    assert all(ask.body["stream"] and ask.body["return_token_ids"] for ask in everything)


def test_clients_that_ask_one_after_the_other_take_turns_with_all_kinds_and_repeat_nothing() -> None:
    clients = [[asks.next() for _ in range(8)] for asks in (LoopAsks(0, 5), LoopAsks(1, 5))]
    asked = [ask for client in clients for ask in client]
    assert len({ask.name for ask in asked}) == len({json.dumps(ask.body) for ask in asked}) == len(asked)
    assert [ask.name.partition("-")[0] for ask in clients[1][:4]] == ["seeded", "penalties", "tools", "greedy"]
    assert clients[0] == [asks.next() for asks in [LoopAsks(0, 5)] for _ in range(8)]
    assert clients[0][0] != LoopAsks(0, 6).next()
    for ask in asked:
        kind, body = ask.name.partition("-")[0], ask.body
        assert ("seed" in body, "frequency_penalty" in body, "tools" in body) == (
            kind in ("seeded", "penalties"), kind == "penalties", kind == "tools"
        )  # fmt: skip


@pytest.mark.parametrize("kind", Kind)
def test_a_target_asks_for_what_its_kind_says(kind: Kind) -> None:
    body = Asks(case(kind=kind), "seed").target().body
    assert (body["temperature"] > 0) == ("seed" in body) == (kind not in (Kind.GREEDY, Kind.SCHEMA))
    assert ("n" in body) == (kind is Kind.CHOICES)
    assert ("logprobs" in body) == (kind is Kind.LOGPROBS)
    assert ("frequency_penalty" in body) == (kind is Kind.PENALTIES)
    assert ("response_format" in body) == (kind is Kind.SCHEMA)


def test_a_target_that_is_to_be_met_before_its_first_token_has_a_long_prompt() -> None:
    early, mid_stream = (
        len(Asks(case(moment), "s").target().body["prompt"]) for moment in (Moment.QUEUED, Moment.RESUMABLE)
    )
    assert early > 50 * mid_stream


def test_an_answer_is_complete_with_all_finish_reasons_and_done() -> None:
    answer = answered(*WHOLE)
    assert answer.end is End.COMPLETE
    assert answer.choices == {0: Choice("ab", [5, 6], "length")}
    assert (answer.prompt_tokens, answer.completion_tokens, answer.num_tokens) == (3, 2, 2)


def test_a_stream_that_ends_without_done_or_finish_reason_is_cut() -> None:
    assert answered(part(text="a", token_ids=[5])).end is End.CUT
    answer = Answer("a")
    answer.take(event(choices=[part(finish_reason="stop")]))
    answer.close()
    assert answer.end is End.CUT
    nothing = Answer("a")
    nothing.close()
    assert nothing.end is End.CUT


def test_a_typed_error_in_the_stream_is_an_error_and_an_untyped_one_cannot_be_read() -> None:
    answer = Answer("a")
    answer.take(event(error={"message": "gone", "type": "ServerError", "code": 500}))
    answer.close()
    assert (answer.end, answer.error) == (End.ERROR, "ServerError 500: gone")
    with pytest.raises(ValueError, match="without message, type or code"):
        Answer("a").take(event(error={"message": "gone"}))


def test_lines_that_are_no_data_say_nothing() -> None:
    answer = Answer("a")
    for line in ("", ": comment", "event: message"):
        answer.take(line)
    assert answer == Answer("a")


def test_tool_calls_are_put_together_without_their_ids() -> None:
    def call(**function: str) -> dict[str, Any]:
        return part(delta={"tool_calls": [{"index": 0, "id": "random", "function": function}]})

    answer = answered(call(name="note"), call(arguments='{"a"'), call(arguments=": 1}"), part(finish_reason="stop"))
    assert answer.choices[0].tool_calls == {0: ("note", '{"a": 1}')}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (answered(part(text="a", token_ids=[5]), part(text="b", token_ids=[7], finish_reason="length")), "token 1 of"),
        (answered(part(text="ab", token_ids=[5], finish_reason="length")), "1 tokens instead of 2"),
        (answered(part(text="aB", token_ids=[5, 6], finish_reason="length")), "text 'aB' instead of 'ab'"),
        (answered(part(text="ab", token_ids=[5, 6], finish_reason="stop")), "finish_reason 'stop'"),
        (answered(*WHOLE, usage=(3, 4)), "usage (3, 4) instead of (3, 2)"),
        (answered(*WHOLE, part(1, token_ids=[5], finish_reason="stop")), "choices [0, 1] instead of [0]"),
    ],
)
def test_a_difference_is_named(other: Answer, words: str) -> None:
    assert words in difference(other, answered(*WHOLE))
    assert difference(answered(*WHOLE), answered(*WHOLE)) == ""


def test_a_broken_answer_is_the_beginning_of_the_undisturbed_one_or_is_not() -> None:
    broken, wrong = Answer("a"), Answer("a")
    broken.take(event(choices=[part(token_ids=[5])]))
    wrong.take(event(choices=[part(token_ids=[6])]))
    assert begins(broken, answered(*WHOLE))
    assert begins(Answer("a"), answered(*WHOLE))
    assert not begins(wrong, answered(*WHOLE))
