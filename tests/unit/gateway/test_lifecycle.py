"""The life of one sequence: each row of the table in docs/life-cycle.md. What holds whatever happens has a machine."""

from dataclasses import replace

import pytest

from engine.protocol import KVHandoff
from gateway.lifecycle import (
    MAX_PLACEMENTS,
    AbortAsk,
    AbortAsked,
    AbortOn,
    Action,
    AskFinished,
    Deadline,
    DecodeFailed,
    Delta,
    Event,
    Fail,
    FaultKind,
    LeaderStarted,
    Mismatch,
    Place,
    Placed,
    PrefillFinished,
    PullFailed,
    Release,
    ReleaseSource,
    ReplicaLost,
    SequenceState,
    Stage,
    Start,
    SubmitAsk,
    SubmitDecode,
    SubmitFailed,
    SubmitPrefill,
    Unplaceable,
    advance,
)

HANDOFF = KVHandoff("p", "r", 10, 1, b"")
SOURCE = KVHandoff("a", "r~ask", 8, 1, b"")
SPLIT = SequenceState("r", "p", "d")
LOCAL = SequenceState("r", None, "d")
FOLLOWER = SequenceState("r", "p", "d", leads=False)

WAITING = replace(FOLLOWER, stage=Stage.WAITING)
PREFILLING = replace(SPLIT, stage=Stage.PREFILLING)
DECODING = replace(SPLIT, stage=Stage.DECODING)
FETCHING = replace(DECODING, handoff=HANDOFF)
PLACING = replace(SPLIT, stage=Stage.PLACING, lost=frozenset({"p"}))
DONE = replace(SPLIT, stage=Stage.DONE)
ASKS = replace(SPLIT, ask="a")
ASKING = replace(ASKS, stage=Stage.ASKING)
ASKING_D = replace(ASKING, ask="d")
SOURCED = replace(PREFILLING, ask="a", source=SOURCE)
OPEN = [WAITING, ASKING, ASKING_D, PREFILLING, SOURCED, DECODING, FETCHING, PLACING]

REFUSED = "d did not take the request: too long"
EVENTS: list[Event] = [
    Start(),
    LeaderStarted(),
    Placed("p2", "d2"),
    Placed(None, "d2"),
    Unplaceable("nobody"),
    AskFinished(SOURCE),
    AskFinished(None, "out of memory"),
    PrefillFinished(HANDOFF),
    PrefillFinished(HANDOFF, has_written=True),
    PrefillFinished(None, "out of memory"),
    PrefillFinished(HANDOFF, has_written=True, answered=True),
    PrefillFinished(None, has_written=True, answered=True),
    PullFailed(),
    Delta(),
    Delta(has_written=False),
    Delta(last=True),
    Mismatch(),
    DecodeFailed("out of memory"),
    SubmitFailed("d", "too long", refused=True),
    SubmitFailed("p", "too long", refused=True),
    SubmitFailed("d", "gone"),
    SubmitFailed("d", "gone", is_dead=True),
    SubmitFailed("p", "gone"),
    SubmitFailed("elsewhere", "too long"),
    SubmitFailed("a", "too long", refused=True),
    SubmitFailed("a", "gone"),
    ReplicaLost("d"),
    ReplicaLost("d", is_dead=True),
    ReplicaLost("p"),
    ReplicaLost("p", is_dead=True),
    ReplicaLost("elsewhere"),
    ReplicaLost("a"),
    ReplicaLost("a", is_dead=True),
    Deadline(),
    AbortAsked(),
]


def fails(why: str) -> tuple[Action, ...]:
    return (Fail(why),)


AGAIN = (Place(),)
GONE_D, GONE_P = "d did not take the request: gone", "p did not take the request: gone"
BEFORE, SLOW = FaultKind.DECODE_LOST_BEFORE_TOKEN, FaultKind.PREFILL_SLOW
A_LOST, A_SLOW, A_FAILED = FaultKind.ASK_LOST, FaultKind.ASK_SLOW, FaultKind.ASK_FAILED
ASK_ENDS, UNSOURCED = (AbortAsk("a"), Place()), (SubmitPrefill("p"),)
P_LOST, P_FAILED, D_REFUSED = FaultKind.PREFILL_LOST, FaultKind.PREFILL_FAILED, FaultKind.DECODE_REFUSED

# state, event, next stage, actions, the kind and words of the fault that is added
TABLE: list[tuple[SequenceState, Event, Stage, tuple[Action, ...], tuple[FaultKind, str] | None]] = [
    (FOLLOWER, Start(), Stage.WAITING, (), None),
    (SPLIT, Start(), Stage.PREFILLING, (SubmitPrefill("p"),), None),
    (LOCAL, Start(), Stage.DECODING, (SubmitDecode("d", None),), None),
    (WAITING, LeaderStarted(), Stage.DECODING, (SubmitDecode("d", None),), None),
    (WAITING, ReplicaLost("d"), Stage.PLACING, AGAIN, (BEFORE, "d was lost")),
    (WAITING, ReplicaLost("d", is_dead=True), Stage.PLACING, AGAIN, (BEFORE, "d was lost")),
    (WAITING, SubmitFailed("d", "gone"), Stage.PLACING, AGAIN, (BEFORE, GONE_D)),
    (WAITING, SubmitFailed("d", "gone", is_dead=True), Stage.PLACING, AGAIN, (BEFORE, GONE_D)),
    (WAITING, AbortAsked(), Stage.DONE, (), None),
    (ASKS, Start(), Stage.ASKING, (SubmitAsk("a"),), None),
    (ASKING, AskFinished(SOURCE), Stage.PREFILLING, (SubmitPrefill("p", SOURCE),), None),
    (
        ASKING,
        AskFinished(None, "out of memory"),
        Stage.PREFILLING,
        UNSOURCED,
        (A_FAILED, "a was asked and gave no hand-off: out of memory"),
    ),
    (ASKING, Deadline(), Stage.PREFILLING, (AbortAsk("a"), *UNSOURCED), (A_SLOW, "a was asked and took too long")),
    (
        ASKING,
        SubmitFailed("a", "too long", refused=True),
        Stage.PREFILLING,
        UNSOURCED,
        (A_FAILED, "a did not take the request: too long"),
    ),
    (
        ASKING,
        SubmitFailed("a", "gone"),
        Stage.PREFILLING,
        UNSOURCED,
        (A_LOST, "a did not take the request: gone"),
    ),
    (ASKING, ReplicaLost("a"), Stage.PREFILLING, UNSOURCED, (A_LOST, "a was lost")),
    (ASKING, ReplicaLost("a", is_dead=True), Stage.PREFILLING, UNSOURCED, (A_LOST, "a was lost")),
    *(
        (ASKING, event, Stage.PLACING, ASK_ENDS, (kind, words))
        for event, kind, words in (
            (ReplicaLost("d"), BEFORE, "d was lost"),
            (ReplicaLost("d", is_dead=True), BEFORE, "d was lost"),
            (SubmitFailed("d", "gone"), BEFORE, GONE_D),
            (SubmitFailed("d", "gone", is_dead=True), BEFORE, GONE_D),
            (ReplicaLost("p"), P_LOST, "p was lost"),
            (ReplicaLost("p", is_dead=True), P_LOST, "p was lost"),
            (SubmitFailed("p", "gone"), P_LOST, GONE_P),
        )
    ),
    (ASKING, AbortAsked(), Stage.DONE, (AbortAsk("a"),), None),
    (ASKING_D, ReplicaLost("d"), Stage.PLACING, AGAIN, (BEFORE, "d was lost")),
    (ASKING_D, ReplicaLost("p"), Stage.PLACING, (AbortAsk("d"), *AGAIN), (P_LOST, "p was lost")),
    (ASKING_D, SubmitFailed("d", "too long", refused=True), Stage.PREFILLING, UNSOURCED, (A_FAILED, REFUSED)),
    *(
        (state, AskFinished(SOURCE), state.stage, (ReleaseSource(SOURCE),), None)
        for state in (FOLLOWER, WAITING, PREFILLING, SOURCED, PLACING, DECODING, DONE)
    ),
    (SOURCED, PrefillFinished(HANDOFF), Stage.DECODING, (SubmitDecode("d", HANDOFF),), None),
    (
        SOURCED,
        PrefillFinished(HANDOFF, pull_failed=True),
        Stage.DECODING,
        (SubmitDecode("d", HANDOFF),),
        (FaultKind.ASK_PULL_FAILED, "p could not fetch what a was asked for"),
    ),
    (SOURCED, Deadline(), Stage.PLACING, (AbortOn("p"), *AGAIN), (SLOW, "prefill on p took too long")),
    (SOURCED, ReplicaLost("d"), Stage.PLACING, (AbortOn("p"), *AGAIN), (BEFORE, "d was lost")),
    (SOURCED, ReplicaLost("p"), Stage.PLACING, AGAIN, (P_LOST, "p was lost")),
    (SOURCED, SubmitFailed("p", "gone"), Stage.PLACING, AGAIN, (P_LOST, GONE_P)),
    (
        SOURCED,
        ReplicaLost("p", is_dead=True),
        Stage.PLACING,
        (ReleaseSource(SOURCE), *AGAIN),
        (P_LOST, "p was lost"),
    ),
    (SOURCED, ReplicaLost("a"), Stage.PLACING, (AbortOn("p"), *AGAIN), (A_LOST, "a was lost")),
    (
        SOURCED,
        SubmitFailed("p", "too long", refused=True),
        Stage.DECODING,
        (SubmitDecode("d", None),),
        (P_FAILED, "p did not take the request: too long"),
    ),
    (SOURCED, AbortAsked(), Stage.DONE, (AbortOn("p"),), None),
    (PREFILLING, PrefillFinished(HANDOFF), Stage.DECODING, (SubmitDecode("d", HANDOFF),), None),
    (PREFILLING, PrefillFinished(HANDOFF, has_written=True), Stage.DECODING, (SubmitDecode("d", HANDOFF),), None),
    (PREFILLING, PrefillFinished(HANDOFF, None, True, True), Stage.DONE, (Release(HANDOFF),), None),
    (PREFILLING, PrefillFinished(None, None, True, True), Stage.DONE, (), None),
    (
        PREFILLING,
        PrefillFinished(None, "out of memory"),
        Stage.DECODING,
        (SubmitDecode("d", None),),
        (P_FAILED, "prefill on p gave no hand-off: out of memory"),
    ),
    (
        PREFILLING,
        SubmitFailed("p", "too long", refused=True),
        Stage.DECODING,
        (SubmitDecode("d", None),),
        (P_FAILED, "p did not take the request: too long"),
    ),
    (PREFILLING, SubmitFailed("p", "gone"), Stage.PLACING, AGAIN, (P_LOST, GONE_P)),
    (PREFILLING, ReplicaLost("p"), Stage.PLACING, AGAIN, (P_LOST, "p was lost")),
    (PREFILLING, ReplicaLost("p", is_dead=True), Stage.PLACING, AGAIN, (P_LOST, "p was lost")),
    (PREFILLING, Deadline(), Stage.PLACING, (AbortOn("p"), *AGAIN), (SLOW, "prefill on p took too long")),
    (PREFILLING, SubmitFailed("d", "gone"), Stage.PLACING, (AbortOn("p"), *AGAIN), (BEFORE, GONE_D)),
    (PREFILLING, SubmitFailed("d", "gone", is_dead=True), Stage.PLACING, (AbortOn("p"), *AGAIN), (BEFORE, GONE_D)),
    (PREFILLING, ReplicaLost("d"), Stage.PLACING, (AbortOn("p"), *AGAIN), (BEFORE, "d was lost")),
    (PREFILLING, ReplicaLost("d", is_dead=True), Stage.PLACING, (AbortOn("p"), *AGAIN), (BEFORE, "d was lost")),
    (
        PREFILLING,
        SubmitFailed("d", "too long", refused=True),
        Stage.DONE,
        (AbortOn("p"), Fail(REFUSED)),
        (D_REFUSED, REFUSED),
    ),
    (PREFILLING, AbortAsked(), Stage.DONE, (AbortOn("p"),), None),
    (PLACING, Unplaceable("nobody"), Stage.DONE, fails("nobody"), (FaultKind.UNPLACEABLE, "nobody")),
    (PLACING, AbortAsked(), Stage.DONE, (), None),
    (PLACING, PrefillFinished(HANDOFF), Stage.PLACING, (Release(HANDOFF),), None),
    (PLACING, PrefillFinished(HANDOFF, has_written=True), Stage.PLACING, (Release(HANDOFF),), None),
    (PLACING, PrefillFinished(HANDOFF, None, True, True), Stage.PLACING, (Release(HANDOFF),), None),
    (DECODING, SubmitFailed("d", "too long", refused=True), Stage.DONE, fails(REFUSED), (D_REFUSED, REFUSED)),
    (DECODING, SubmitFailed("d", "gone"), Stage.PLACING, AGAIN, (BEFORE, GONE_D)),
    (DECODING, SubmitFailed("d", "gone", is_dead=True), Stage.PLACING, AGAIN, (BEFORE, GONE_D)),
    (DECODING, ReplicaLost("d"), Stage.PLACING, AGAIN, (BEFORE, "d was lost")),
    (DECODING, ReplicaLost("d", is_dead=True), Stage.PLACING, AGAIN, (BEFORE, "d was lost")),
    (DECODING, PrefillFinished(HANDOFF), Stage.DECODING, (Release(HANDOFF),), None),
    (DECODING, PrefillFinished(HANDOFF, has_written=True), Stage.DECODING, (Release(HANDOFF),), None),
    (DECODING, PrefillFinished(HANDOFF, None, True, True), Stage.DECODING, (Release(HANDOFF),), None),
    (DECODING, PullFailed(), Stage.DECODING, (), (FaultKind.PULL_FAILED, "d could not fetch the hand-off of p")),
    (
        DECODING,
        DecodeFailed("out of memory"),
        Stage.PLACING,
        AGAIN,
        (FaultKind.DECODE_FAILED, "d failed the request: out of memory"),
    ),
    (DECODING, Delta(last=True), Stage.DONE, (), None),
    (DECODING, Delta(), Stage.DECODING, (), None),
    (
        DECODING,
        Mismatch(),
        Stage.DONE,
        (AbortOn("d"), Fail("d began the answer again and wrote other tokens than the client has")),
        (FaultKind.REPLAY_DIFFERS, "d began the answer again and wrote other tokens than the client has"),
    ),
    (DECODING, AbortAsked(), Stage.DONE, (AbortOn("d"),), None),
    (DONE, PrefillFinished(HANDOFF), Stage.DONE, (Release(HANDOFF),), None),
    (DONE, PrefillFinished(HANDOFF, has_written=True), Stage.DONE, (Release(HANDOFF),), None),
    (DONE, PrefillFinished(HANDOFF, None, True, True), Stage.DONE, (Release(HANDOFF),), None),
]


@pytest.mark.parametrize(
    ("state", "event", "stage", "actions", "fault"), TABLE, ids=lambda value: getattr(value, "stage", None)
)
def test_each_row_of_the_table_holds(
    state: SequenceState, event: Event, stage: Stage, actions: tuple[Action, ...], fault: tuple[FaultKind, str] | None
) -> None:
    advanced, done = advance(state, event)
    assert (advanced.stage, done) == (stage, actions)
    assert [(f.kind, f.what) for f in advanced.faults] == ([fault] if fault else [])
    if AGAIN[0] in actions:
        assert fault is not None
        assert advanced.lost == ({"p"} if fault[0] in (P_LOST, SLOW) else {"a"} if fault[0] is A_LOST else {"d"})
    if advanced.stage is not state.stage:
        assert advanced.source == (SOURCE if SubmitPrefill("p", SOURCE) in done else None)
    assert (advanced.prefill, advanced.decode, advanced.num_placements) == ("p" if state.prefill else None, "d", 1)


@pytest.mark.parametrize("state", [SPLIT, LOCAL, FOLLOWER, *OPEN, DONE], ids=lambda s: f"{s.stage}-{s.prefill}")
def test_an_event_outside_the_table_changes_nothing(state: SequenceState) -> None:
    known = {FETCHING: DECODING, ASKING_D: ASKING, SOURCED: PREFILLING}.get(state, state)
    told = [event for row_state, event, *_ in TABLE if row_state in (known, state)]
    if known != DONE:
        told += [event for event in EVENTS if isinstance(event, AskFinished)]
    if state == FETCHING:
        told += [ReplicaLost("p"), Delta(has_written=False)]
    if state == PLACING:
        told += [event for event in EVENTS if isinstance(event, Placed)]
    for event in EVENTS:
        if event not in told:
            assert advance(state, event) == (state, ()), event


def test_a_displaced_sequence_starts_anew_under_another_id() -> None:
    assert PLACING.engine_request_id == "r"
    state, actions = advance(PLACING, Placed("p2", "d2"))
    assert (state.stage, state.prefill, state.decode) == (Stage.PREFILLING, "p2", "d2")
    assert (state.engine_request_id, actions) == ("r~2", (SubmitPrefill("p2"),))
    state, actions = advance(replace(state, stage=Stage.PLACING), Placed(None, "d3"))
    assert (state.stage, state.engine_request_id, actions) == (Stage.DECODING, "r~3", (SubmitDecode("d3", None),))


def test_what_is_lost_is_remembered() -> None:
    state, _ = advance(PREFILLING, ReplicaLost("p"))
    state, _ = advance(state, Placed("p2", "d2"))
    state, actions = advance(state, ReplicaLost("d2"))
    assert (state.lost, actions) == ({"p", "d2"}, (AbortOn("p2"), Place()))


def test_placements_are_bounded() -> None:
    state, _ = advance(LOCAL, Start())
    for _ in range(MAX_PLACEMENTS - 1):
        state, actions = advance(state, ReplicaLost("d"))
        assert isinstance(actions[-1], Place)
        state, _ = advance(state, Placed(None, "d"))
    state, actions = advance(state, ReplicaLost("d"))
    assert (state.stage, actions) == (Stage.DONE, (Fail(f"d was lost, after {MAX_PLACEMENTS} placements"),))


@pytest.mark.parametrize("written_by", ["prefill", "decode"])
@pytest.mark.parametrize("resumable", [True, False])
def test_a_fault_says_whether_the_client_had_tokens_and_what_becomes_of_them(written_by: str, resumable: bool) -> None:
    state = replace(PREFILLING, resumable=resumable)
    state, _ = advance(state, PrefillFinished(HANDOFF, has_written=written_by == "prefill"))
    if written_by == "decode":
        state, _ = advance(state, Delta())
    state, _ = advance(state, ReplicaLost("d"))
    (fault,) = state.faults
    assert fault.kind is FaultKind.DECODE_LOST_MID_STREAM
    assert str(fault) == f"d was lost: {'goes on elsewhere' if resumable else 'begun again elsewhere and compared'}"


def test_a_prompt_that_no_prefill_replica_reads_in_time_is_left_to_decode() -> None:
    state, _ = advance(PREFILLING, Deadline())
    state, _ = advance(state, Placed("p2", "d2"))
    state, actions = advance(state, Deadline())
    assert (state.stage, actions) == (Stage.DECODING, (AbortOn("p2"), SubmitDecode("d2", None)))
    assert [fault.done for fault in state.faults] == ["placed again", "decode reads the prompt itself"]


def test_an_unfetched_hand_off_is_given_back_when_the_decode_replica_is_dead() -> None:
    for event in (ReplicaLost("d", is_dead=True), SubmitFailed("d", "gone", is_dead=True)):
        assert advance(FETCHING, event)[1] == (Release(HANDOFF), *AGAIN)


def test_an_unfetched_hand_off_is_left_to_its_lease_when_the_decode_replica_may_live() -> None:
    for event in (ReplicaLost("d"), SubmitFailed("d", "gone")):
        state, actions = advance(FETCHING, event)
        assert (state.handoff, actions) == (None, AGAIN)


def test_a_hand_off_that_decode_could_not_fetch_is_given_back_when_it_dies() -> None:
    state, _ = advance(FETCHING, PullFailed())
    state, _ = advance(state, Delta())
    _, actions = advance(state, ReplicaLost("d", is_dead=True))
    assert actions == (Release(HANDOFF), Place())
    _, actions = advance(state, ReplicaLost("d"))
    assert actions == (Place(),), "it may live"


def test_what_an_attempt_could_not_fetch_is_none_of_the_next_one_s() -> None:
    state, _ = advance(FETCHING, PullFailed())
    state, _ = advance(state, DecodeFailed("out of memory"))
    state, _ = advance(state, Placed(None, "e"))
    _, actions = advance(state, ReplicaLost("e", is_dead=True))
    assert actions == (Place(),)


def test_a_hand_off_that_was_fetched_is_never_given_back() -> None:
    state, _ = advance(FETCHING, Delta(has_written=False))
    assert advance(state, ReplicaLost("d", is_dead=True))[1] == AGAIN


def test_a_fetch_from_a_prefill_replica_that_hangs_is_given_up() -> None:
    state, actions = advance(FETCHING, ReplicaLost("p"))
    assert (state.stage, state.handoff, actions) == (Stage.PLACING, None, (AbortOn("d"), *AGAIN))
    # One from a dead replica fails by itself, and decode reads the prompt.
    assert advance(FETCHING, ReplicaLost("p", is_dead=True)) == (FETCHING, ())


def test_a_prefill_without_handoff_and_reason_says_so() -> None:
    state, _ = advance(PREFILLING, PrefillFinished(None))
    assert [fault.what for fault in state.faults] == ["prefill on p gave no hand-off: no reason given"]
