"""Owns the life of one sequence as a pure state machine: (state, event) -> (state, actions). No I/O, no clock.

The table of all transitions is in docs/life-cycle.md.

Open are WAITING, ASKING, PREFILLING, PLACING and DECODING; NEW is left within the call that makes it. *Lost* is
ReplicaLost, or a SubmitFailed that is no refusal. A sequence that was placed MAX_PLACEMENTS times fails instead of
PLACING.

Each placement is an attempt with an engine request id of its own (`engine_request_id`), so that what an engine still
tells of an earlier attempt is never taken for the present one. What it hands over is released by whoever hears of it.

The hand-off of an attempt is fetched once (invariant I1): when a decode replica is lost, its blocks are given back if
the replica's process is dead, and wait for the end of their lease if it may live: then it may be fetching them.

Where the placement says so, a decode replica is asked first for a hand-off of what it has cached of the prompt, the
*source*, which prefill fetches (docs/adr/0017). It is sent to that attempt's prefill replica and to no other, and given
back as a hand-off is; whatever becomes of the asking, prefill can read the prompt itself.

A group is the choices (n > 1) of one prompt. Its first sequence leads: only it is prefilled remotely, so the hand-off
is pulled once, and the others start on the same decode replica when the leader's blocks are in its prefix cache. After
a loss each of them is placed for itself.
"""

import enum
from dataclasses import dataclass, replace

from engine.protocol import KVHandoff

MAX_PLACEMENTS = 5
READS_ITSELF = "prefill reads the prompt itself"


class Stage(enum.StrEnum):
    NEW = "new"
    WAITING = "waiting"
    ASKING = "asking"
    PREFILLING = "prefilling"
    PLACING = "placing"
    DECODING = "decoding"
    DONE = "done"


class FaultKind(enum.StrEnum):
    """What went wrong, as metrics count it."""

    ASK_LOST = "ask_lost"
    ASK_SLOW = "ask_slow"
    ASK_FAILED = "ask_failed"
    ASK_PULL_FAILED = "ask_pull_failed"
    PREFILL_LOST = "prefill_lost"
    PREFILL_SLOW = "prefill_slow"
    PREFILL_FAILED = "prefill_failed"
    PULL_FAILED = "pull_failed"
    DECODE_LOST_BEFORE_TOKEN = "decode_lost_before_token"
    DECODE_LOST_MID_STREAM = "decode_lost_mid_stream"
    DECODE_FAILED = "decode_failed"
    DECODE_REFUSED = "decode_refused"
    REPLAY_DIFFERS = "replay_differs"
    UNPLACEABLE = "unplaceable"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that went wrong, and what was done about it, in words."""

    kind: FaultKind
    what: str
    done: str

    def __str__(self) -> str:
        return f"{self.what}: {self.done}"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One sequence: where it is placed, how far it is, and which faults it has met.

    `resumable`: an engine that is given prompt and answer so far goes on exactly as the one that is lost; otherwise the
    answer is written anew from its first token and compared. `lost` are the replicas that have failed it.
    `handoff` is what the decode replica was sent and has not told the fetch of, `given_up` what it could not fetch and
    keeps until its request ends. `ask` is the decode replica that is
    asked for what it has cached, `source` the hand-off of it that prefill was sent and has not told the end of.
    """

    request_id: str
    prefill: str | None
    decode: str
    leads: bool = True
    resumable: bool = False
    stage: Stage = Stage.NEW
    num_placements: int = 1
    has_written: bool = False
    handoff: KVHandoff | None = None
    given_up: KVHandoff | None = None
    ask: str | None = None
    source: KVHandoff | None = None
    lost: frozenset[str] = frozenset()
    faults: tuple[Fault, ...] = ()

    @property
    def engine_request_id(self) -> str:
        """What the engines of the present attempt call it."""
        return engine_request_id(self.request_id, self.num_placements)

    @property
    def ask_request_id(self) -> str:
        """What the engine that is asked calls that; it may be the one that answers later."""
        return f"{self.engine_request_id}~ask"


def engine_request_id(request_id: str, num_placements: int) -> str:
    return request_id if num_placements == 1 else f"{request_id}~{num_placements}"


@dataclass(frozen=True, slots=True)
class Start:
    pass


@dataclass(frozen=True, slots=True)
class LeaderStarted:
    """The group's leader has its first token, or will never have one."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the next attempt runs."""

    prefill: str | None
    decode: str
    ask: str | None = None


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No replica took it within the time that the configuration allows."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskFinished:
    handoff: KVHandoff | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """`has_written`: prefill has written the answer's next token; `answered`: it was also the last. `pull_failed`: it
    could not fetch the source and has read the prompt itself."""

    handoff: KVHandoff | None
    error: str | None = None
    has_written: bool = False
    answered: bool = False
    pull_failed: bool = False


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The decode replica could not fetch the hand-off and has computed the prompt itself."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The decode replica has told something; `last`: the answer is complete."""

    last: bool = False
    has_written: bool = True


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """The decode engine has given the request up; `error` says why."""

    error: str


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An answer that was begun again is not the one the client has the beginning of."""


@dataclass(frozen=True, slots=True)
class SubmitFailed:
    """The replica did not take the request; `error` says why. `refused`: it is well and says no; `is_dead` as in
    ReplicaLost."""

    replica_id: str
    error: str
    refused: bool = False
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """`is_dead`: its process has certainly ended; otherwise it may go on unheard."""

    replica_id: str
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class Deadline:
    """Prefill, or the replica that is asked, took longer than the configuration allows."""


@dataclass(frozen=True, slots=True)
class AbortAsked:
    """The client went away, or the text is complete (a stop string)."""


Event = (
    Start
    | LeaderStarted
    | Placed
    | Unplaceable
    | AskFinished
    | PrefillFinished
    | PullFailed
    | Delta
    | DecodeFailed
    | Mismatch
    | SubmitFailed
    | ReplicaLost
    | Deadline
    | AbortAsked
)


@dataclass(frozen=True, slots=True)
class SubmitAsk:
    replica_id: str


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    replica_id: str
    source: KVHandoff | None = None


@dataclass(frozen=True, slots=True)
class SubmitDecode:
    replica_id: str
    handoff: KVHandoff | None


@dataclass(frozen=True, slots=True)
class AbortOn:
    """Stop the present attempt on a replica."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class AbortAsk:
    """Stop what the present attempt has asked a replica for."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give the hand-off's blocks back through a decode replica; nobody will fetch them."""

    handoff: KVHandoff


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """Give a source's blocks back through a prefill replica; nobody will fetch them."""

    source: KVHandoff


@dataclass(frozen=True, slots=True)
class Place:
    """Find replicas for the next attempt, none of the state's `lost` if there are others; answer with Placed or
    Unplaceable."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the client that the request failed."""

    error: str


Action = SubmitAsk | SubmitPrefill | SubmitDecode | AbortAsk | AbortOn | Release | ReleaseSource | Place | Fail
Transition = tuple[SequenceState, tuple[Action, ...]]


def advance(state: SequenceState, event: Event) -> Transition:
    """One transition of the table above. Events that mean nothing in a stage change nothing."""
    if isinstance(event, AskFinished) and state.stage is not Stage.ASKING:
        # It came too late.
        return state, (ReleaseSource(event.handoff),) if event.handoff else ()
    match state.stage:
        case Stage.NEW:
            return _start(state) if isinstance(event, Start) else (state, ())
        case Stage.WAITING:
            return _while_waiting(state, event)
        case Stage.ASKING:
            return _while_asking(state, event)
        case Stage.PREFILLING:
            return _while_prefilling(state, event)
        case Stage.PLACING:
            return _while_placing(state, event)
        case Stage.DECODING:
            return _while_decoding(state, event)
        case Stage.DONE:
            if isinstance(event, PrefillFinished) and event.handoff is not None:
                return state, (Release(event.handoff),)
            return state, ()


def _start(state: SequenceState) -> Transition:
    if not state.leads:
        return replace(state, stage=Stage.WAITING), ()
    return _go(state)


def _go(state: SequenceState) -> Transition:
    """Sets off the attempt that the state's placement describes."""
    if state.prefill is None:
        return _decode(state, None)
    if state.ask is not None:
        return replace(state, stage=Stage.ASKING), (SubmitAsk(state.ask),)
    return _prefill(state, None)


def _while_waiting(state: SequenceState, event: Event) -> Transition:
    match event:
        case LeaderStarted():
            return _decode(state, None)
        case AbortAsked():
            return replace(state, stage=Stage.DONE), ()
        case _ if loss := _loss_of(state.decode, event):
            return _place_again(state, FaultKind.DECODE_LOST_BEFORE_TOKEN, loss)
        case _:
            return state, ()


def _while_asking(state: SequenceState, event: Event) -> Transition:
    assert state.prefill is not None
    assert state.ask is not None
    match event:
        case AskFinished(handoff, error):
            if handoff is None:
                what = f"{state.ask} was asked and gave no hand-off: {error or 'no reason given'}"
                state = _with_fault(state, FaultKind.ASK_FAILED, what, READS_ITSELF)
            return _prefill(state, handoff)
        case AbortAsked():
            return replace(state, stage=Stage.DONE), (AbortAsk(state.ask),)
        case Deadline():
            what, given_up = f"{state.ask} was asked and took too long", AbortAsk(state.ask)
            state, actions = _prefill(_with_fault(state, FaultKind.ASK_SLOW, what, READS_ITSELF), None)
            return state, (given_up, *actions)
        case SubmitFailed(state.ask, refused=True) as refusal:
            return _prefill(_with_fault(state, FaultKind.ASK_FAILED, _words(refusal), READS_ITSELF), None)
        case _ if loss := _loss_of(state.decode, event):
            given_up = () if state.ask == state.decode else (AbortAsk(state.ask),)
            return _place_again(state, _decode_lost(state), loss, given_up)
        case _ if loss := _loss_of(state.ask, event):
            return _prefill(_with_fault(state, FaultKind.ASK_LOST, _words(loss), READS_ITSELF), None)
        case _ if loss := _loss_of(state.prefill, event):
            return _place_again(state, FaultKind.PREFILL_LOST, loss, (AbortAsk(state.ask),))
        case _:
            return state, ()


def _while_prefilling(state: SequenceState, event: Event) -> Transition:
    """An abort gives the source back that prefill has not fetched; at its end it has fetched it,
    or could not."""
    source, kept = state.source, state
    state = replace(state, source=None)
    assert state.prefill is not None
    match event:
        case PrefillFinished(handoff, answered=True):
            return replace(state, stage=Stage.DONE, has_written=True), (Release(handoff),) if handoff else ()
        case PrefillFinished(handoff, error, has_written, _, pull_failed):
            state = replace(state, has_written=state.has_written or has_written)
            if pull_failed:
                what = f"{state.prefill} could not fetch what {state.ask} was asked for"
                state = _with_fault(state, FaultKind.ASK_PULL_FAILED, what, "it has read the prompt itself")
            if handoff is None:
                what = f"prefill on {state.prefill} gave no hand-off: {error or 'no reason given'}"
                state = _with_fault(state, FaultKind.PREFILL_FAILED, what, "decode reads the prompt itself")
            return _decode(state, handoff)
        case AbortAsked():
            return replace(state, stage=Stage.DONE), (AbortOn(state.prefill),)
        case Deadline():
            what, given_up = f"prefill on {state.prefill} took too long", AbortOn(state.prefill)
            if any(fault.kind is FaultKind.PREFILL_SLOW for fault in state.faults):
                # All of the pool is slow: one more queue would not be shorter.
                state = _with_fault(state, FaultKind.PREFILL_SLOW, what, "decode reads the prompt itself")
                state, actions = _decode(state, None)
                return state, (given_up, *actions)
            return _again(state, FaultKind.PREFILL_SLOW, what, state.prefill, (given_up,))
        case SubmitFailed(state.prefill, refused=True) as refusal:
            state = _with_fault(state, FaultKind.PREFILL_FAILED, _words(refusal), "decode reads the prompt itself")
            return _decode(state, None)
        case SubmitFailed(state.decode, refused=True) as refusal:
            state, actions = _failed(state, FaultKind.DECODE_REFUSED, _words(refusal))
            return state, (AbortOn(state.prefill or ""), *actions)
        case _ if loss := _loss_of(state.decode, event):
            return _place_again(state, _decode_lost(state), loss, (AbortOn(state.prefill),))
        case _ if loss := _loss_of(state.prefill, event):
            # As in decode: one that may live may be fetching it.
            given_back = (ReleaseSource(source),) if source is not None and loss.is_dead else ()
            return _place_again(state, FaultKind.PREFILL_LOST, loss, given_back)
        case ReplicaLost(state.ask, is_dead=False) as loss if source is not None:
            return _place_again(state, FaultKind.ASK_LOST, loss, (AbortOn(state.prefill),))
        case _:
            return kept, ()


def _while_placing(state: SequenceState, event: Event) -> Transition:
    match event:
        case Placed(prefill, decode, ask):
            number = state.num_placements + 1
            return _go(replace(state, prefill=prefill, decode=decode, ask=ask, num_placements=number))
        case Unplaceable(reason):
            return _failed(state, FaultKind.UNPLACEABLE, reason)
        case AbortAsked():
            return replace(state, stage=Stage.DONE), ()
        case PrefillFinished(handoff=handoff) if handoff is not None:
            return state, (Release(handoff),)
        case _:
            return state, ()


def _while_decoding(state: SequenceState, event: Event) -> Transition:
    match event:
        case Delta(last=False, has_written=has_written) if state.handoff is None and state.has_written >= has_written:
            # Nearly all that a sequence meets: nothing is new.
            return state, ()
        case Delta(last, has_written):
            stage = Stage.DONE if last else Stage.DECODING
            return replace(state, stage=stage, has_written=state.has_written or has_written, handoff=None), ()
        case DecodeFailed(error):
            what = f"{state.decode} failed the request: {error}"
            return _again(replace(state, handoff=None), FaultKind.DECODE_FAILED, what, state.decode)
        case Mismatch():
            what = f"{state.decode} began the answer again and wrote other tokens than the client has"
            state, actions = _failed(state, FaultKind.REPLAY_DIFFERS, what)
            return state, (AbortOn(state.decode), *actions)
        case AbortAsked():
            return replace(state, stage=Stage.DONE, handoff=None), (AbortOn(state.decode),)
        case PrefillFinished(handoff=handoff) if handoff is not None:
            # Prefill finished after it was given up: decode has begun without it.
            return state, (Release(handoff),)
        case PullFailed():
            what = f"{state.decode} could not fetch the hand-off of {state.prefill}"
            state = replace(state, handoff=None, given_up=state.handoff)
            return _with_fault(state, FaultKind.PULL_FAILED, what, "it has read the prompt itself"), ()
        case SubmitFailed(state.decode, refused=True) as refusal:
            return _failed(replace(state, handoff=None), FaultKind.DECODE_REFUSED, _words(refusal))
        case _ if loss := _loss_of(state.decode, event):
            unfetched = state.handoff or state.given_up
            given_back = (Release(unfetched),) if unfetched is not None and loss.is_dead else ()
            return _place_again(replace(state, handoff=None), _decode_lost(state), loss, given_back)
        case ReplicaLost(state.prefill, is_dead=False) as loss if state.handoff is not None:
            # A fetch from a dead process fails; one from a process that hangs may never end.
            state = replace(state, handoff=None)
            return _place_again(state, FaultKind.PREFILL_LOST, loss, (AbortOn(state.decode),))
        case _:
            return state, ()


def _prefill(state: SequenceState, source: KVHandoff | None) -> Transition:
    assert state.prefill is not None
    return replace(state, stage=Stage.PREFILLING, source=source), (SubmitPrefill(state.prefill, source),)


def _decode(state: SequenceState, handoff: KVHandoff | None) -> Transition:
    state = replace(state, stage=Stage.DECODING, handoff=handoff, given_up=None)
    return state, (SubmitDecode(state.decode, handoff),)


def _place_again(
    state: SequenceState, kind: FaultKind, loss: SubmitFailed | ReplicaLost, first: tuple[Action, ...] = ()
) -> Transition:
    return _again(state, kind, _words(loss), loss.replica_id, first)


def _again(state: SequenceState, kind: FaultKind, what: str, lost: str, first: tuple[Action, ...] = ()) -> Transition:
    """The next attempt, after `first`; or the end, when there have been enough."""
    if state.num_placements >= MAX_PLACEMENTS:
        state, actions = _failed(state, kind, f"{what}, after {state.num_placements} placements")
        return state, (*first, *actions)
    done = "placed again"
    if state.has_written:
        done = "goes on elsewhere" if state.resumable else "begun again elsewhere and compared"
    state = _with_fault(replace(state, lost=state.lost | {lost}), kind, what, done)
    return replace(state, stage=Stage.PLACING), (*first, Place())


def _failed(state: SequenceState, kind: FaultKind, what: str) -> Transition:
    return replace(_with_fault(state, kind, what, "the request failed"), stage=Stage.DONE), (Fail(what),)


def _with_fault(state: SequenceState, kind: FaultKind, what: str, done: str) -> SequenceState:
    return replace(state, faults=(*state.faults, Fault(kind, what, done)))


def _decode_lost(state: SequenceState) -> FaultKind:
    return FaultKind.DECODE_LOST_MID_STREAM if state.has_written else FaultKind.DECODE_LOST_BEFORE_TOKEN


def _loss_of(replica_id: str, event: Event) -> SubmitFailed | ReplicaLost | None:
    match event:
        case ReplicaLost() | SubmitFailed(refused=False) if event.replica_id == replica_id:
            return event
        case _:
            return None


def _words(loss: SubmitFailed | ReplicaLost) -> str:
    if isinstance(loss, SubmitFailed):
        return f"{loss.replica_id} did not take the request: {loss.error}"
    return f"{loss.replica_id} was lost"
