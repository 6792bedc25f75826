"""Text of a load: a block is the same tokens wherever it stands, and no run's text is another's."""

from bench.load_text import DrawnTexts
from bench.replay_text import SessionText
from bench.traces import Session, Turn, linked

VOCABULARY = tuple(range(500, 600))
TURN = Turn(10, 2, (-1, 0, 1))


def texts(salt: str = "s") -> DrawnTexts:
    return DrawnTexts(4, VOCABULARY, salt)


def test_a_block_has_the_same_tokens_in_every_prompt_and_from_every_token_on() -> None:
    made = texts()
    whole = made.tokens(TURN, 4, 0)
    assert len(whole) == 10
    assert set(whole) <= set(VOCABULARY)
    assert [made.tokens(TURN, 4, start) for start in range(11)] == [whole[start:] for start in range(11)]
    assert made.tokens(Turn(4, 1, (0,)), 4, 0) == whole[4:8]


def test_copies_share_only_what_all_share_and_another_salt_shares_nothing() -> None:
    made = texts()
    one, other = (made.tokens(TURN, made.copy_of(2), 0) for _ in range(2))
    assert one[:4] == other[:4]
    assert one[4:8] != other[4:8]
    assert texts("t").tokens(TURN, 4, 0)[:4] != one[:4]


def test_the_next_prompt_holds_what_was_really_answered() -> None:
    session = Session(linked([Turn(8, 2, (0, 1)), Turn(14, 1, (0, 1, 2, 3))], 4))
    text = SessionText(session, made := texts(), made.copy_of(4))
    first = text.prompt(0)
    text.answered(0, first, [7, 8])
    assert text.prompt(1)[:10] == [*first, 7, 8]
    assert len(text.prompt(1)) == 14


def test_without_the_answers_tokens_the_prompt_is_kept_and_the_rest_is_made_up() -> None:
    session = Session(linked([Turn(8, 2, (0, 1)), Turn(14, 1, (0, 1, 2, 3))], 4))
    text = SessionText(session, made := texts(), made.copy_of(4))
    first = text.prompt(0)
    text.answered(0, first, [])
    assert text.prompt(1)[:8] == first
    assert len(text.prompt(1)) == 14
