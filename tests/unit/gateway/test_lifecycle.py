"""The life of one sequence: each row of the module's table, and what holds whatever happens."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import KVHandoff
from gateway.lifecycle import (
    AbortAsked,
    AbortOn,
    Action,
    Deadline,
    Delta,
    Event,
    Fail,
    LeaderStarted,
    PrefillFinished,
    PullFailed,
    Release,
    ReplicaLost,
    SequenceState,
    Stage,
    Start,
    SubmitDecode,
    SubmitFailed,
    SubmitPrefill,
    advance,
)

HANDOFF = KVHandoff("p", "r", 10, 1, b"")
SPLIT = SequenceState("r", "p", "d")
LOCAL = SequenceState("r", None, "d")
FOLLOWER = SequenceState("r", "p", "d", leads=False)

WAITING = replace(FOLLOWER, stage=Stage.WAITING)
PREFILLING = replace(SPLIT, stage=Stage.PREFILLING)
DECODING = replace(SPLIT, stage=Stage.DECODING)
DONE = replace(SPLIT, stage=Stage.DONE)
OPEN = [WAITING, PREFILLING, DECODING]

DECODE_REFUSED = SubmitFailed("d", "too long")
DECODE_REFUSAL = "d did not take the request: too long"
PREFILL_REFUSED = SubmitFailed("p", "too long")
EVENTS: list[Event] = [
    Start(),
    LeaderStarted(),
    PrefillFinished(HANDOFF),
    PrefillFinished(None, "out of memory"),
    PrefillFinished(HANDOFF, answered=True),
    PrefillFinished(None, answered=True),
    PullFailed(),
    Delta(last=False),
    Delta(last=True),
    DECODE_REFUSED,
    PREFILL_REFUSED,
    SubmitFailed("elsewhere", "too long"),
    ReplicaLost("d"),
    ReplicaLost("p"),
    ReplicaLost("elsewhere"),
    Deadline(),
    AbortAsked(),
]

# state, event, next stage, actions, the fault that is added
TABLE: list[tuple[SequenceState, Event, Stage, tuple[Action, ...], str | None]] = [
    (FOLLOWER, Start(), Stage.WAITING, (), None),
    (SPLIT, Start(), Stage.PREFILLING, (SubmitPrefill("p"),), None),
    (LOCAL, Start(), Stage.DECODING, (SubmitDecode("d", None),), None),
    (WAITING, LeaderStarted(), Stage.DECODING, (SubmitDecode("d", None),), None),
    (PREFILLING, PrefillFinished(HANDOFF), Stage.DECODING, (SubmitDecode("d", HANDOFF),), None),
    (PREFILLING, PrefillFinished(HANDOFF, answered=True), Stage.DONE, (Release(HANDOFF),), None),
    (PREFILLING, PrefillFinished(None, answered=True), Stage.DONE, (), None),
    (
        PREFILLING,
        PrefillFinished(None, "out of memory"),
        Stage.DECODING,
        (SubmitDecode("d", None),),
        "prefill on p gave no hand-off: out of memory",
    ),
    (
        PREFILLING,
        PREFILL_REFUSED,
        Stage.DECODING,
        (SubmitDecode("d", None),),
        "p did not take the request: too long",
    ),
    (PREFILLING, ReplicaLost("p"), Stage.DECODING, (SubmitDecode("d", None),), "p was lost"),
    (
        PREFILLING,
        Deadline(),
        Stage.DECODING,
        (AbortOn("p"), SubmitDecode("d", None)),
        "prefill on p took too long",
    ),
    (WAITING, DECODE_REFUSED, Stage.DONE, (Fail(DECODE_REFUSAL),), DECODE_REFUSAL),
    (WAITING, ReplicaLost("d"), Stage.DONE, (Fail("d was lost"),), "d was lost"),
    (PREFILLING, DECODE_REFUSED, Stage.DONE, (AbortOn("p"), Fail(DECODE_REFUSAL)), DECODE_REFUSAL),
    (PREFILLING, ReplicaLost("d"), Stage.DONE, (AbortOn("p"), Fail("d was lost")), "d was lost"),
    (DECODING, DECODE_REFUSED, Stage.DONE, (Fail(DECODE_REFUSAL),), DECODE_REFUSAL),
    (DECODING, ReplicaLost("d"), Stage.DONE, (Fail("d was lost"),), "d was lost"),
    (DECODING, PrefillFinished(HANDOFF), Stage.DECODING, (Release(HANDOFF),), None),
    (DECODING, PrefillFinished(HANDOFF, answered=True), Stage.DECODING, (Release(HANDOFF),), None),
    (DECODING, PullFailed(), Stage.DECODING, (), "d could not fetch the hand-off of p"),
    (DECODING, Delta(last=True), Stage.DONE, (), None),
    (WAITING, AbortAsked(), Stage.DONE, (), None),
    (PREFILLING, AbortAsked(), Stage.DONE, (AbortOn("p"),), None),
    (DECODING, AbortAsked(), Stage.DONE, (AbortOn("d"),), None),
    (DONE, PrefillFinished(HANDOFF), Stage.DONE, (Release(HANDOFF),), None),
    (DONE, PrefillFinished(HANDOFF, answered=True), Stage.DONE, (Release(HANDOFF),), None),
]


@pytest.mark.parametrize(
    ("state", "event", "stage", "actions", "fault"), TABLE, ids=lambda value: getattr(value, "stage", None)
)
def test_each_row_of_the_table_holds(
    state: SequenceState, event: Event, stage: Stage, actions: tuple[Action, ...], fault: str | None
) -> None:
    faults = (fault,) if fault else ()
    assert advance(state, event) == (replace(state, stage=stage, faults=faults), actions)


@pytest.mark.parametrize("state", [SPLIT, LOCAL, FOLLOWER, *OPEN, DONE], ids=lambda s: f"{s.stage}-{s.prefill}")
def test_an_event_outside_the_table_changes_nothing(state: SequenceState) -> None:
    told = [event for row_state, event, *_ in TABLE if row_state == state]
    for event in EVENTS:
        if event not in told:
            assert advance(state, event) == (state, ()), event


@pytest.mark.parametrize("faults", [(), ("an earlier fault",)])
def test_faults_are_kept_in_their_order(faults: tuple[str, ...]) -> None:
    state, _ = advance(replace(PREFILLING, faults=faults), Deadline())
    state, _ = advance(state, ReplicaLost("d"))
    assert state.faults == (*faults, "prefill on p took too long", "d was lost")


def test_a_prefill_without_handoff_and_reason_says_so() -> None:
    state, _ = advance(PREFILLING, PrefillFinished(None))
    assert state.faults == ("prefill on p gave no hand-off: no reason given",)


def targets(action: Action) -> list[str]:
    return [action.replica_id] if isinstance(action, SubmitPrefill | SubmitDecode | AbortOn) else []


@given(
    first=st.sampled_from([SPLIT, LOCAL, FOLLOWER]),
    events=st.lists(st.sampled_from([event for event in EVENTS if not isinstance(event, PrefillFinished)])),
    # A worker says once that prefill is over; when, is anybody's guess.
    finished_at=st.integers(0, 12),
    handoff=st.sampled_from([HANDOFF, None]),
)
@settings(max_examples=400, deadline=None)
def test_whatever_happens_a_sequence_ends_once_and_its_handoff_has_one_fate(
    first: SequenceState, events: list[Event], finished_at: int, handoff: KVHandoff | None
) -> None:
    history: list[Event] = [Start(), *events[:finished_at], PrefillFinished(handoff), *events[finished_at:]]
    state, actions, num_ends = first, [], 0
    for event in [*history, AbortAsked(), AbortAsked()]:
        was_done = state.stage is Stage.DONE
        advanced, new = advance(state, event)
        if was_done:
            assert advanced == state
            assert all(isinstance(action, Release) for action in new)
        else:
            num_ends += advanced.stage is Stage.DONE
            assert advanced.stage is Stage.DONE or not any(isinstance(action, Fail) for action in new)
        state = advanced
        actions += new
    assert num_ends == 1

    placement = {first.prefill, first.decode}
    assert {target for action in actions for target in targets(action)} <= placement
    assert sum(isinstance(action, SubmitPrefill) for action in actions) == (first == SPLIT)
    assert sum(isinstance(action, SubmitDecode) for action in actions) <= 1
    assert sum(isinstance(action, Fail) for action in actions) <= 1
    consumed = sum(isinstance(action, SubmitDecode) and action.handoff is not None for action in actions)
    released = sum(isinstance(action, Release) for action in actions)
    if first == SPLIT:
        assert consumed + released == (handoff is not None)
    else:
        assert consumed == 0
