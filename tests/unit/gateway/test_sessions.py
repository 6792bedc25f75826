"""What is remembered of sessions: where they were, the hashes of their prompts, and not more than is allowed."""

import pytest

from engine import blocks
from engine.blocks import block_hashes
from gateway.agents import prompts as module
from gateway.agents import recognition
from gateway.agents import sessions as module_of_sessions
from gateway.agents.pauses import PauseModel
from gateway.agents.sessions import Arrival, Sessions
from gateway.routing.types import Hints, Placement, Priority, SessionView

B = 4
PROMPT = list(range(100, 100 + 5 * B + 3))
ANSWER = list(range(500, 500 + 2 * B))
IDLE_S = 100.0


def placement(prefill: str | None, decode: str) -> Placement:
    return Placement(prefill, decode, "a-policy", "a reason")


class Turns:
    """Sessions with a clock, turn by turn."""

    def __init__(self, max_sessions: int = 100, max_tokens: int = 100_000) -> None:
        self.sessions = Sessions(max_sessions, max_tokens, PauseModel(IDLE_S))
        self.now_s = 1000.0

    def arrive(self, prompt: list[int] = PROMPT, hints: Hints | None = None, salt: str | None = None) -> Arrival:
        return self.sessions.arrives(hints or Hints(), prompt, B, salt, self.now_s)

    def begin(self, prompt: list[int] = PROMPT, hints: Hints | None = None, decode: str = "d") -> Arrival:
        arrival = self.arrive(prompt, hints)
        self.sessions.placed(arrival.name, placement(None, decode))
        return arrival

    def end(
        self, name: str | None, answer: list[int] = ANSWER, tool: str | None = "look", service_s: float = 1.0
    ) -> None:
        self.sessions.ended(name, self.now_s, answer, service_s, tool)

    def turn(
        self,
        prompt: list[int] = PROMPT,
        hints: Hints | None = None,
        pause_s: float = 1.0,
        tool: str | None = "look",
        decode: str = "d",
    ) -> str | None:
        """One whole turn, and the pause after it."""
        name = self.begin(prompt, hints, decode).name
        self.end(name, tool=tool)
        self.now_s += pause_s
        return name

    def is_child(self, name: str | None) -> bool:
        assert name is not None
        return self.sessions._sessions[name].member.depth > 0

    def view(self, prompt: list[int] = PROMPT, hints: Hints | None = None) -> SessionView:
        view = self.arrive(prompt, hints).view
        assert view is not None
        return view


NAMED = Hints(session="s")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were hashed, call by call."""
    counts: list[int] = []

    def counting(token_ids, *more):
        counts.append(len(token_ids) // B * B)
        return blocks.block_hashes(token_ids, *more)

    monkeypatch.setattr(module, "block_hashes", counting)
    return counts


# -- names and hashes


def test_a_session_remembers_where_its_last_turn_went_and_who_prefilled_last() -> None:
    turns = Turns()
    assert turns.sessions.view(None) is None
    assert turns.sessions.view("s") == SessionView()
    turns.arrive(hints=NAMED)
    turns.arrive(hints=Hints(session="other"))
    turns.sessions.placed("s", placement("p1", "d1"))
    turns.sessions.placed("s", placement(None, "d2"))
    turns.sessions.placed("other", placement("p9", "d9"))
    view = turns.sessions.view("s")
    assert view is not None
    assert (view.num_turns, view.prefill, view.decode) == (2, "p1", "d2")


def test_requests_without_a_session_leave_nothing() -> None:
    turns = Turns()
    short = PROMPT[: 2 * B - 1]
    assert turns.begin(short) == Arrival(None, block_hashes(short, B), None)
    turns.end(None)
    turns.sessions.dropped(None, 0.0)
    assert len(turns.sessions) == 0


def test_before_a_block_size_is_known_named_sessions_are_known_and_others_not() -> None:
    sessions = Sessions(10, 1000)
    assert sessions.arrives(Hints(), PROMPT, 0, None, 0.0) == Arrival(None, [], None)
    assert sessions.arrives(NAMED, PROMPT, 0, None, 0.0).name == "s"
    assert sessions.arrives(NAMED, PROMPT, B, None, 0.0).hashes == block_hashes(PROMPT, B)


@pytest.mark.parametrize("hints", [NAMED, Hints()], ids=["named", "recognised"])
def test_the_next_turn_costs_its_new_tokens_only(
    hints: Hints, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognition, "CHECKPOINT_TOKENS", 5 * B)
    turns = Turns()
    for length, new in ((5 * B + 3, 5 * B), (9 * B + 1, 4 * B)):
        prompt = list(range(100, 100 + length))
        arrival = turns.begin(prompt, hints)
        assert arrival.hashes == block_hashes(prompt, B)
        assert hashed[-1] == new
        turns.end(arrival.name, [])


def test_a_text_that_begins_as_a_session_does_costs_the_rest_only(hashed: list[int]) -> None:
    turns = Turns()
    turns.begin(hints=NAMED)
    longer, edited = PROMPT + ANSWER, [*PROMPT[: 3 * B], 1, *PROMPT[3 * B + 1 :]]
    assert turns.sessions.hashes("s", longer, B) == block_hashes(longer, B)
    assert turns.sessions.hashes("s", edited, B) == block_hashes(edited, B)
    assert hashed[-2:] == [2 * B, 2 * B]


@pytest.mark.parametrize(
    ("prompt", "block_size", "salt"),
    [([1, *PROMPT[1:]], B, None), (PROMPT[: 2 * B], B, None), (PROMPT, 2 * B, None), (PROMPT, B, "salt")],
    ids=["another-beginning", "shorter", "other-blocks", "salted"],
)
def test_a_prompt_that_does_not_go_on_has_its_own_hashes(prompt: list[int], block_size: int, salt: str | None) -> None:
    sessions = Sessions(10, 1000)
    for token_ids, size, with_salt in ((PROMPT, B, None), (prompt, block_size, salt), (PROMPT, B, None)):
        arrival = sessions.arrives(NAMED, token_ids, size, with_salt, 0.0)
        assert arrival.hashes == block_hashes(token_ids, size, with_salt)


def test_a_token_that_does_not_exist_changes_nothing() -> None:
    sessions = Sessions(10, 1000)
    with pytest.raises(OverflowError):
        sessions.arrives(NAMED, [2**32], B, None, 0.0)
    assert len(sessions) == 0


# -- recognised by the prompt


def test_a_conversation_without_a_name_is_recognised_by_its_prompt() -> None:
    turns = Turns()
    first = turns.turn()
    longer = [*PROMPT, *ANSWER, 7, 8, 9]
    assert turns.turn(longer) == first is not None
    assert turns.view([*longer, 1, 2]).num_turns == 2
    assert len(turns.sessions) == 1


def test_a_next_prompt_that_has_the_answer_otherwise_is_still_recognised() -> None:
    turns = Turns()
    first = turns.turn()
    reasoning_left_out = [*PROMPT[:-2], 7, 8, 9, 10]
    assert turns.turn(reasoning_left_out) == first


def test_another_question_after_the_same_beginning_is_another_session() -> None:
    sessions = Sessions(10, 1000)
    system = list(range(38))
    # The first prompt's full blocks are all the system's: what comes after them tells whose next turn it is.
    first, other = [*system, 1, 1, 7, 7, 7, 7], [*system, 2, 2, *range(60, 80)]
    next_turn = [*first[:-4], 8, 8, *range(60, 80)]
    names: list[str | None] = []
    for prompt in (first, other, next_turn):
        arrival = sessions.arrives(Hints(), prompt, 16, None, 0.0)
        sessions.placed(arrival.name, placement(None, "d"))
        sessions.ended(arrival.name, 0.0, [], 1.0, None)
        names.append(arrival.name)
    assert names[0] == names[2] != names[1]


def test_prompts_with_another_salt_are_another_s() -> None:
    turns = Turns()
    name = turns.arrive(salt="a").name
    turns.end(name)
    assert turns.arrive([*PROMPT, *ANSWER], salt="b").name != name
    assert turns.arrive([*PROMPT, *ANSWER], salt="a").name == name


def test_the_same_text_under_two_salts_is_known_to_both(hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "CHECKPOINT_TOKENS", 5 * B)
    turns = Turns()
    for salt in ("a", "b"):
        turns.end(turns.arrive(salt=salt).name, [])
    for salt in ("a", "b"):
        turns.arrive([*PROMPT, *ANSWER], salt=salt)
        assert hashed[-1] == 2 * B


def test_of_a_forked_conversation_the_first_goes_on_and_the_second_is_new() -> None:
    turns = Turns()
    name = turns.turn()
    left, right = [*PROMPT, *ANSWER, 1, 2, 3], [*PROMPT, *ANSWER, 4, 5, 6]
    first, second = turns.begin(left), turns.begin(right)
    assert first.name == name != second.name
    assert second.view is not None
    assert second.view.num_turns == 0
    assert not turns.is_child(second.name)
    turns.end(first.name)
    turns.end(second.name)
    assert turns.turn([*right, *ANSWER, 7]) == second.name
    assert turns.turn([*left, *ANSWER, 7]) == first.name


def test_the_longest_known_text_wins() -> None:
    turns = Turns()
    short = turns.turn()
    long = [*PROMPT, 1, 2, 3, 4, 5, 6, 7, 8]
    begun = turns.begin()
    fork = turns.turn(long)
    turns.end(begun.name)
    assert begun.name == short != fork
    assert turns.turn([*long, 9, 9, 9, 9]) == fork


def test_the_same_prompt_again_is_the_same_session_and_no_pause() -> None:
    turns = Turns()
    assert turns.turn() == turns.turn()
    assert turns.sessions.pauses.calibration.num_returned == 0


def test_many_alike_at_once_are_many_sessions_in_bounded_time() -> None:
    turns = Turns(max_sessions=10_000)
    names = [turns.begin().name for _ in range(2000)]
    assert len(set(names)) == 2000
    for name in names:
        turns.end(name)
    # Of so many only a few are recognised; the others cost nothing to look through.
    next_names = [turns.begin([*PROMPT, *ANSWER, number]).name for number in range(20)]
    assert sum(name in names for name in next_names) == recognition.MAX_TWINS


# -- what is expected


def test_a_view_tells_of_turns_service_and_answers() -> None:
    turns = Turns()
    assert turns.view(hints=NAMED).num_turns == 0
    turns.end("s", [], tool=None)
    for _ in range(30):
        turns.turn(hints=NAMED)
    view = turns.view(hints=NAMED)
    assert (view.num_turns, view.attained_s) == (30, 31.0)
    assert view.output_tokens == pytest.approx(len(ANSWER), abs=1)
    assert turns.view(hints=Hints(session="s", output_tokens=77)).output_tokens == 77


def test_an_agent_s_new_session_is_expected_to_answer_as_its_others_do() -> None:
    turns = Turns()
    turns.turn(hints=Hints(session="a", agent="coder"))
    assert turns.view(hints=Hints(session="b", agent="coder")).output_tokens == len(ANSWER)
    assert turns.view(hints=Hints(session="c", agent="other")).output_tokens is None


def test_what_one_tenant_s_agents_do_says_nothing_of_another_s() -> None:
    turns = Turns(max_sessions=2)
    theirs = Hints(session="theirs", agent="coder", tenant="other")
    for _ in range(20):
        turns.turn(hints=theirs, pause_s=50.0)
    pauses, fresh = turns.sessions.pauses, PauseModel(IDLE_S)
    assert pauses.predict("other", "coder", "look").median_s > 10.0
    assert turns.view(hints=Hints(session="more", agent="coder", tenant="other")).output_tokens == len(ANSWER)
    assert turns.view(hints=Hints(session="mine", agent="coder", tenant="mine")).output_tokens is None
    assert pauses.predict("mine", "coder", "look") == fresh.predict("mine", "coder", "look")
    # So are those that are lost sight of, and those that do not come back.
    turns.turn(hints=theirs, pause_s=0.0)
    for number in range(3):
        turns.turn(hints=Hints(session=f"s{number}", tenant="other"), pause_s=IDLE_S + 1 if number == 2 else 0.0)
    turns.begin(hints=Hints(session="mine", tenant="mine"))
    assert pauses.calibration.num_gone == 1
    assert pauses.predict(None, "coder", "look") == fresh.predict(None, "coder", "look")


def test_a_session_is_waited_for_as_long_as_its_tenant_s_pauses_are() -> None:
    turns = Turns()
    slow = Hints(session="s", tenant="slow")
    for _ in range(20):
        turns.turn(hints=slow, pause_s=50.0)
    turns.turn(hints=slow, pause_s=40.0)
    turns.begin(hints=Hints(session="other"), decode="d2")
    assert turns.sessions.promised_tokens("d") > 0


def test_pauses_are_learnt_for_the_tool_that_was_called_and_predictions_are_scored() -> None:
    turns = Turns()
    for number in range(20):
        tool, pause_s = ("fast", 0.01) if number % 2 else ("slow", 50.0)
        turns.turn(hints=NAMED, pause_s=pause_s, tool=tool)
    turns.begin(hints=NAMED)
    model = turns.sessions.pauses
    assert model.calibration.num_returned == 20
    assert model.predict(None, None, "fast").median_s < 0.1 < 10 < model.predict(None, None, "slow").median_s


def test_where_the_answer_names_no_tool_the_next_request_may() -> None:
    turns = Turns()
    turns.turn(hints=NAMED, tool=None, pause_s=50.0)
    turns.begin(hints=Hints(session="s", tool="look"))
    assert turns.sessions.pauses.predict(None, None, "look").num_seen == pytest.approx(1.0)


def test_a_session_pauses_only_when_none_of_its_turns_runs() -> None:
    turns = Turns()
    turns.begin(hints=NAMED)
    turns.begin(hints=NAMED)
    turns.end("s")
    turns.now_s += 5
    turns.begin(hints=NAMED)
    assert turns.sessions.pauses.calibration.num_returned == 0
    turns.end("s")
    turns.end("s")
    turns.now_s += 5
    turns.begin(hints=NAMED)
    assert turns.sessions.pauses.calibration.num_returned == 1


# -- trajectories

PARENT = Hints(Priority.HIGH, 2.5, "parent")
CHILD = Hints(Priority.LOW, session="child", parent="parent")
GRANDCHILD = Hints(session="grandchild", parent="child")


def test_a_child_s_trajectory_is_its_parent_s() -> None:
    turns = Turns()
    turns.turn(hints=PARENT)
    turns.turn(hints=CHILD)
    view = turns.view(hints=GRANDCHILD)
    assert (view.num_turns, view.attained_s) == (0, 2.0)
    assert turns.is_child("grandchild")
    assert turns.view(hints=PARENT).attained_s == 2.0
    assert turns.view(hints=Hints(session="other")).attained_s == 0.0


def test_a_child_inherits_the_urgency_of_those_that_wait_for_it() -> None:
    turns = Turns()
    turns.turn(hints=PARENT)
    child = turns.view(hints=CHILD)
    assert (child.inherited_priority, child.inherited_deadline_s) == (Priority.HIGH, 2.5)
    turns.end("child")
    grandchild = turns.view(hints=GRANDCHILD)
    assert (grandchild.inherited_priority, grandchild.inherited_deadline_s) == (Priority.HIGH, 2.5)


def test_a_parent_that_goes_on_or_answers_a_person_does_not_wait() -> None:
    for tool, goes_on in (("look", True), (None, False)):
        turns = Turns()
        turns.turn(hints=PARENT, tool=tool)
        if goes_on:
            turns.begin(hints=PARENT)
        child = turns.view(hints=CHILD)
        assert turns.is_child("child")
        assert (child.inherited_priority, child.inherited_deadline_s) == (None, None)


def test_a_parent_is_not_idle_while_its_children_go_on() -> None:
    turns = Turns()
    turns.turn(hints=PARENT)
    for _ in range(3):
        turns.turn(hints=CHILD, pause_s=0.6 * IDLE_S)
    assert turns.view(hints=CHILD).inherited_priority is Priority.HIGH


def test_a_parent_that_is_unknown_or_the_session_itself_is_ignored() -> None:
    turns = Turns()
    turns.arrive(hints=CHILD)
    turns.arrive(hints=Hints(session="s", parent="s"))
    assert not turns.is_child("child")
    assert not turns.is_child("s")
    assert len(turns.sessions) == 2


def test_sessions_that_call_each_other_parent_make_no_circle() -> None:
    turns = Turns()
    for name, parent in (("a", "b"), ("b", "a"), ("a", "b"), ("c", "b"), ("a", "c")):
        turns.turn(hints=Hints(session=name, parent=parent))
    assert [turns.is_child(name) for name in ("a", "b", "c")] == [False, True, True]
    assert turns.view(hints=Hints(session="a")).attained_s == 5.0


def test_a_forgotten_session_s_descendants_make_no_circle_either() -> None:
    turns = Turns(max_sessions=3)
    for name, parent in (("a", None), ("b", "a"), ("c", "b"), ("a", None), ("c", None), ("x", None)):
        turns.turn(hints=Hints(session=name, parent=parent))
    turns.arrive(hints=Hints(session="a", parent="c"))
    assert not turns.is_child("a")


def test_a_root_keeps_its_trajectory_when_the_session_between_it_and_another_is_forgotten() -> None:
    turns = Turns(max_sessions=4)
    for name, parent in (("b", None), ("x", None), ("a", None), ("b", "a"), ("c", "b"), ("c", None), ("x", None)):
        turns.turn(hints=Hints(session=name, parent=parent))
    turns.turn(hints=Hints(session="a"))
    turns.turn(hints=Hints(session="y"))
    # b is gone; a and c still share what they use, so a cannot move into x's trajectory.
    assert turns.sessions.view("b") == SessionView()
    turns.arrive(hints=Hints(session="a", parent="x"))
    assert not turns.is_child("a")
    assert turns.view(hints=Hints(session="c")).attained_s == turns.view(hints=Hints(session="a")).attained_s


def urgency(view: SessionView) -> tuple[Priority | None, float | None]:
    return view.inherited_priority, view.inherited_deadline_s


def test_a_child_of_an_unknown_session_is_a_root_until_that_one_is_known() -> None:
    turns = Turns()
    turns.turn(hints=CHILD)
    orphan = turns.view(hints=CHILD)
    turns.end("child")
    assert (urgency(orphan), orphan.attained_s) == ((None, None), 1.0)
    turns.turn(hints=PARENT)
    child = turns.view(hints=CHILD)
    assert (urgency(child), child.attained_s) == ((Priority.HIGH, 2.5), 3.0)


def forget(turns: Turns, name: str) -> None:
    """As if it were the one to make room."""
    turns.sessions._forget(name, turns.now_s)


def test_children_of_a_forgotten_session_inherit_nothing_and_keep_what_the_trajectory_has_used() -> None:
    turns = Turns()
    for hints in (PARENT, CHILD, GRANDCHILD):
        turns.turn(hints=hints)
    forget(turns, "parent")
    grandchild = turns.view(hints=GRANDCHILD)
    assert (urgency(grandchild), grandchild.attained_s) == ((Priority.LOW, None), 3.0), (
        "the child's, which waits for it"
    )
    child = turns.view(hints=CHILD)
    assert (urgency(child), child.attained_s) == ((None, None), 3.0)


def test_a_parent_that_comes_back_after_it_was_forgotten_takes_its_place_again() -> None:
    turns = Turns()
    for hints in (PARENT, CHILD, GRANDCHILD, Hints(session="sibling", parent="parent")):
        turns.turn(hints=hints)
    forget(turns, "parent")
    turns.turn(hints=PARENT)
    assert turns.sessions.view("parent").attained_s == 1.0, "whose it was is not known until one says so"
    for name in ("child", "sibling"):
        assert urgency(turns.view(hints=Hints(session=name, parent="parent"))) == (Priority.HIGH, 2.5), name
        turns.end(name)
    view = turns.view(hints=GRANDCHILD)
    assert (urgency(view), view.attained_s) == ((Priority.HIGH, 2.5), 7.0)
    assert turns.sessions.view("parent").attained_s == 7.0


def test_a_forgotten_session_s_children_move_to_no_other_trajectory_and_under_no_descendant() -> None:
    turns = Turns()
    for hints in (PARENT, CHILD, GRANDCHILD, Hints(session="other"), Hints(session="of-other", parent="other")):
        turns.turn(hints=hints)
    forget(turns, "parent")
    for parent in ("other", "grandchild"):
        assert urgency(turns.view(hints=Hints(session="child", parent=parent))) == (None, None), parent
        turns.end("child", service_s=0.0)
    assert turns.sessions.view("other").attained_s == 2.0
    assert turns.sessions.view("child").attained_s == 3.0


def test_nobody_that_waits_is_idle_while_those_below_go_on() -> None:
    turns = Turns()
    for hints in (PARENT, CHILD):
        turns.turn(hints=hints, pause_s=0.0)
    for _ in range(3):
        turns.turn(hints=GRANDCHILD, pause_s=0.6 * IDLE_S)
    assert turns.view(hints=GRANDCHILD).inherited_priority is Priority.HIGH


def test_depth_and_size_of_a_trajectory_are_bounded() -> None:
    turns = Turns(max_sessions=3000)
    names = [f"s{number}" for number in range(12)]
    for name, parent in zip(names, [None, *names], strict=False):
        turns.turn(hints=Hints(session=name, parent=parent))
    # The ninth session is the eighth generation; the one after it begins anew.
    assert [turns.is_child(name) for name in names] == [False, *[True] * 8, False, True, True]
    turns.turn(hints=Hints(session="root"))
    for number in range(1100):
        turns.turn(hints=Hints(session=f"child{number}", parent="root"), pause_s=0.0)
    assert turns.view(hints=Hints(session="root")).attained_s == 1000.0


# -- what is kept for those that come back


def test_tokens_are_promised_where_a_session_was_last_until_it_moves_or_ends() -> None:
    turns = Turns()
    turns.begin(hints=NAMED, decode="d1")
    running = turns.sessions.promised_tokens("d1")
    assert 0 < running < len(PROMPT)
    turns.end("s")
    assert running < turns.sessions.promised_tokens("d1") < len(PROMPT) + len(ANSWER)
    turns.begin(hints=NAMED, decode="d2")
    assert turns.sessions.promised_tokens("d1") == 0 < turns.sessions.promised_tokens("d2")
    turns.end("s")
    turns.begin(hints=Hints(session="s", is_last=True), decode="d2")
    assert turns.sessions.promised_tokens("d2") == 0
    turns.end("s")
    assert len(turns.sessions) == 0


def test_a_refused_turn_leaves_nothing_of_a_new_session_and_a_known_one_as_it_was() -> None:
    turns = Turns()
    turns.sessions.dropped(turns.arrive(hints=NAMED).name, turns.now_s)
    assert len(turns.sessions) == 0
    turns.turn(hints=NAMED)
    kept = turns.sessions.promised_tokens("d")
    turns.sessions.dropped(turns.arrive(hints=NAMED).name, turns.now_s)
    assert (len(turns.sessions), turns.sessions.promised_tokens("d")) == (1, kept)


@pytest.mark.parametrize(
    ("hints", "is_looked_at"),
    [(NAMED, True), (Hints(), True), (NAMED, False)],
    ids=["named", "recognised", "named-and-refused-before-its-prompt-was-looked-at"],
)
def test_a_pause_lasts_until_the_first_try_of_the_turn_that_is_taken_in_the_end(
    hints: Hints, is_looked_at: bool
) -> None:
    turns, expected = Turns(), PauseModel(IDLE_S)
    turns.turn(hints=hints, pause_s=5.0)
    for _ in range(3):
        if is_looked_at:
            turns.sessions.dropped(turns.arrive([*PROMPT, *ANSWER, 7], hints).name, turns.now_s)
        else:
            turns.sessions.refused(hints, turns.now_s)
        assert turns.sessions.pauses.predict(None, None, "look").num_seen == 0, "no turn was taken"
        turns.now_s += 20.0
    turns.turn([*PROMPT, *ANSWER, 7], hints)
    expected.returned(None, None, "look", 5.0)
    assert turns.sessions.pauses.predict(None, None, "look") == expected.predict(None, None, "look")
    assert turns.sessions.pauses.calibration.num_returned == 1


def test_of_a_turn_that_is_never_taken_nothing_is_learnt() -> None:
    turns = Turns()
    turns.turn(hints=NAMED)
    turns.sessions.dropped(turns.arrive(hints=NAMED).name, turns.now_s)
    turns.now_s += IDLE_S + 1
    turns.begin(hints=Hints(session="other"))
    assert turns.sessions.view("s") == SessionView()
    assert turns.sessions.pauses.predict(None, None, "look") == PauseModel(IDLE_S).predict(None, None, "look")


def test_a_turn_that_its_client_sends_again_ends_no_pause_as_nobody_knows_when_it_came_first() -> None:
    turns = Turns()
    turns.turn(hints=NAMED, pause_s=50.0)
    turns.turn(hints=Hints(session="s", is_retry=True), pause_s=5.0)
    assert turns.sessions.pauses.predict(None, None, None).num_seen == 0
    turns.begin(hints=NAMED)
    assert turns.sessions.pauses.calibration.num_returned == 1, "the next one is a turn like any other"


@pytest.mark.parametrize(
    ("is_whole", "prompt", "num_learnt"), [(False, PROMPT, 0), (False, PROMPT[:-1], 1), (True, PROMPT, 1)]
)
def test_a_broken_off_turn_that_comes_again_ends_no_pause(is_whole: bool, prompt: list[int], num_learnt: int) -> None:
    turns = Turns()
    turns.begin(hints=NAMED)
    turns.sessions.ended("s", turns.now_s, [], 1.0, None, is_whole=is_whole)
    turns.now_s += 0.5
    turns.begin(prompt, NAMED)
    assert turns.sessions.pauses.calibration.num_returned == num_learnt


def test_a_refusal_of_a_session_that_is_not_known_leaves_nothing() -> None:
    turns = Turns()
    turns.sessions.refused(NAMED, turns.now_s)
    turns.sessions.refused(Hints(), turns.now_s)
    assert len(turns.sessions) == 0


# -- bounds


def test_a_session_that_stays_away_is_forgotten_and_learnt_from() -> None:
    turns = Turns()
    turns.turn(hints=NAMED, pause_s=IDLE_S + 1)
    running = turns.begin(hints=Hints(session="running")).name
    assert len(turns.sessions) == 1
    assert turns.sessions.promised_tokens("d") > 0
    assert turns.sessions.pauses.calibration.num_gone == 1
    turns.now_s += IDLE_S + 1
    turns.begin(hints=NAMED, decode="d2")
    assert len(turns.sessions) == 2
    turns.end(running)


def test_the_session_that_was_used_last_is_forgotten_last() -> None:
    turns = Turns(max_sessions=2)
    for name in ("a", "b", "a", "c"):
        turns.turn(hints=Hints(session=name), decode=f"on-{name}")
    assert [turns.sessions.promised_tokens(f"on-{name}") > 0 for name in ("a", "b", "c")] == [True, False, True]
    assert turns.sessions.pauses.calibration.num_gone == 0


def test_tokens_are_bounded_over_all_sessions_and_those_with_a_name_go_on_without(hashed: list[int]) -> None:
    turns = Turns(max_tokens=12 * B)
    for name in ("a", "b", "c"):
        turns.turn(hints=Hints(session=name), decode=f"on-{name}", pause_s=0.0)
    turns.begin(list(range(100 * B)), Hints(session="huge"))
    assert len(turns.sessions) == 4
    assert [turns.sessions.promised_tokens(f"on-{name}") > 0 for name in ("a", "b", "c")] == [True] * 3
    view = turns.begin(hints=Hints(session="a")).view
    assert view is not None
    assert (view.num_turns, view.decode) == (1, "on-a")
    assert hashed[-1] == 5 * B, "its prompt was forgotten, so all of it is hashed again"


def test_tokens_are_bounded_over_sessions_without_a_name_too() -> None:
    turns = Turns(max_tokens=12 * B)
    for first in range(4):
        turns.begin([first, *range(1, 5 * B)])
    assert len(turns.sessions) == 2


def test_what_is_told_of_a_forgotten_session_changes_nothing() -> None:
    turns = Turns(max_sessions=1)
    turns.begin(hints=NAMED)
    turns.begin(hints=Hints(session="other"), decode="d2")
    turns.sessions.placed("s", placement(None, "d"))
    turns.end("s")
    turns.sessions.dropped("s", turns.now_s)
    assert len(turns.sessions) == 1
    assert turns.sessions.promised_tokens("d") == 0


def known_of(turns: Turns, tenant: str, names: list[str]) -> list[bool]:
    """Which of a tenant's sessions are known."""
    return [turns.sessions.view(f"{tenant}-{name}") != SessionView() for name in names]


def test_a_tenant_that_invents_sessions_displaces_its_own_only() -> None:
    turns = Turns(max_sessions=10)
    for name in ("a", "b", "c"):
        turns.turn(hints=Hints(session=f"calm-{name}", tenant="calm"), pause_s=0.0)
    for number in range(100):
        turns.turn(hints=Hints(session=f"loud-{number}", tenant="loud"), pause_s=0.0)
    assert known_of(turns, "calm", ["a", "b", "c"]) == [True, True, True]
    assert known_of(turns, "loud", ["92", "93", "99"]) == [False, True, True], "of its own, those it used last"
    # Whoever asks for no more than an equal part gets it.
    for number in range(3):
        turns.turn(hints=Hints(session=f"late-{number}", tenant="late"), pause_s=0.0)
    assert known_of(turns, "late", ["0", "2"]) == known_of(turns, "calm", ["a", "c"]) == [True, True]
    assert len(turns.sessions) == 10


def test_a_tenant_with_many_tokens_displaces_its_own_prompts_only(hashed: list[int]) -> None:
    turns = Turns(max_tokens=12 * B)
    turns.turn(hints=Hints(session="calm", tenant="calm"))
    for number in range(20):
        turns.turn([number, *PROMPT], Hints(session=f"loud-{number}", tenant="loud"))
    turns.begin([*PROMPT, *ANSWER], Hints(session="calm", tenant="calm"))
    assert hashed[-1] == 2 * B, "its prompt is still known: the rest is hashed, no more"


def test_a_session_that_stays_away_for_longer_than_nine_in_ten_is_not_waited_for() -> None:
    turns = Turns()
    turns.turn(hints=NAMED, pause_s=0.0)
    predicted = turns.sessions.pauses.predict(None, None, "look")
    turns.now_s += predicted.p90_s * 0.99
    turns.begin(hints=Hints(session="other"), decode="d2")
    assert turns.sessions.promised_tokens("d") > 0
    turns.now_s += predicted.p90_s * 0.02
    turns.begin(hints=Hints(session="another"), decode="d2")
    assert turns.sessions.promised_tokens("d") == 0
    turns.begin(hints=NAMED)
    assert turns.sessions.promised_tokens("d") > 0, "it has come back after all"


def test_returns_that_were_expected_of_earlier_turns_are_forgotten() -> None:
    turns = Turns(max_sessions=2)
    for _ in range(50):
        turns.turn(hints=NAMED, pause_s=0.0)
    assert len(turns.sessions._due) <= module_of_sessions.DUE_PER_SESSION * 2
