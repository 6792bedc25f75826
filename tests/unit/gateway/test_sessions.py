"""What is remembered of sessions: where they were, the hashes of their prompts, and not more than is allowed."""

import pytest

from engine import blocks
from engine.blocks import block_hashes
from gateway.agents import sessions as module
from gateway.agents.sessions import Sessions
from gateway.routing.types import Placement, SessionView

B = 4
PROMPT = list(range(100, 100 + 5 * B + 3))


def placement(prefill: str | None, decode: str) -> Placement:
    return Placement(prefill, decode, "a-policy", "a reason")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were hashed, call by call."""
    counts: list[int] = []

    def counting(token_ids, *more):
        counts.append(len(token_ids))
        return blocks.block_hashes(token_ids, *more)

    monkeypatch.setattr(module, "block_hashes", counting)
    return counts


def test_a_session_remembers_where_its_last_turn_went_and_who_prefilled_last() -> None:
    sessions = Sessions(10, 1000)
    assert sessions.view(None) is None
    assert sessions.view("s") == SessionView()
    sessions.placed("s", placement("p1", "d1"))
    sessions.placed("s", placement(None, "d2"))
    sessions.placed("other", placement("p9", "d9"))
    assert sessions.view("s") == SessionView(2, "p1", "d2")


def test_requests_without_a_session_leave_nothing() -> None:
    sessions = Sessions(10, 1000)
    sessions.placed(None, placement("p1", "d1"))
    assert sessions.hashes(None, PROMPT, B) == block_hashes(PROMPT, B)
    assert len(sessions) == 0


def test_the_next_turn_costs_its_new_tokens_only(hashed: list[int]) -> None:
    sessions = Sessions(10, 1000)
    for length, new in ((5 * B + 3, 5 * B), (5 * B + 3, 0), (9 * B + 1, 4 * B)):
        prompt = list(range(100, 100 + length))
        assert sessions.hashes("s", prompt, B) == block_hashes(prompt, B)
        assert hashed[-1] == new


@pytest.mark.parametrize(
    ("prompt", "block_size", "salt"),
    [([1, *PROMPT[1:]], B, None), (PROMPT[: 2 * B], B, None), (PROMPT, 2 * B, None), (PROMPT, B, "salt")],
    ids=["another-beginning", "shorter", "other-blocks", "salted"],
)
def test_a_prompt_that_does_not_go_on_is_hashed_anew(prompt: list[int], block_size: int, salt: str | None) -> None:
    sessions = Sessions(10, 1000)
    sessions.hashes("s", PROMPT, B)
    assert sessions.hashes("s", prompt, block_size, salt) == block_hashes(prompt, block_size, salt)
    assert sessions.hashes("s", PROMPT, B) == block_hashes(PROMPT, B)


def test_the_session_that_was_used_last_is_forgotten_last() -> None:
    sessions = Sessions(2, 1000)
    for name in ("a", "b", "a", "c"):
        sessions.placed(name, placement("p", "d"))
    assert [sessions.view(name) != SessionView() for name in ("a", "b", "c")] == [True, False, True]


def test_tokens_are_bounded_over_all_sessions(hashed: list[int]) -> None:
    sessions = Sessions(1000, 10 * B)
    for name in ("a", "b", "c"):
        sessions.hashes(name, PROMPT, B)
    assert len(sessions) == 2
    sessions.hashes("huge", list(range(100 * B)), B)
    assert len(sessions) == 1
    sessions.hashes("a", PROMPT, B)
    assert (len(sessions), hashed[-1]) == (1, 5 * B)
