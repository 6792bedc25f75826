"""Owns the life of one sequence as a pure state machine: (state, event) -> (state, actions). No I/O, no clock.

| stage      | event                              | next       | actions                                     |
|------------|------------------------------------|------------|---------------------------------------------|
| NEW        | Start, follower of a group         | WAITING    | -                                           |
| NEW        | Start, placed with prefill         | PREFILLING | SubmitPrefill                               |
| NEW        | Start, placed without prefill      | DECODING   | SubmitDecode(no hand-off)                   |
| WAITING    | LeaderStarted                      | DECODING   | SubmitDecode(no hand-off)                   |
| PREFILLING | PrefillFinished                    | DECODING   | SubmitDecode(its hand-off; none is a fault) |
| PREFILLING | PrefillFinished, answer complete   | DONE       | Release(its hand-off, if any)               |
| PREFILLING | SubmitFailed, ReplicaLost(prefill) | DECODING   | SubmitDecode(no hand-off), fault            |
| PREFILLING | Deadline                           | DECODING   | Abort(prefill), SubmitDecode(none), fault   |
| any open   | SubmitFailed, ReplicaLost(decode)  | DONE       | Abort(prefill) if prefilling, Fail, fault   |
| DECODING   | PrefillFinished with a hand-off    | DECODING   | Release(its hand-off): it came too late     |
| DECODING   | PullFailed                         | DECODING   | -, fault                                    |
| DECODING   | Delta(last)                        | DONE       | -                                           |
| WAITING    | Abort                              | DONE       | -                                           |
| PREFILLING | Abort                              | DONE       | Abort(prefill)                              |
| DECODING   | Abort                              | DONE       | Abort(decode)                               |
| DONE       | PrefillFinished with a hand-off    | DONE       | Release(its hand-off)                       |
| any        | anything else                      | the same   | -                                           |

Open are WAITING, PREFILLING and DECODING; NEW is left within the call that makes it. There is no second SubmitDecode:
if the decode replica does not take a hand-off, the one who sent it there gives it back.

A group is the choices (n > 1) of one prompt. Its first sequence leads: only it is prefilled remotely, so the hand-off
is pulled once, and the others start on the same decode replica when the leader's blocks are in its prefix cache.
"""

import enum
from dataclasses import dataclass, replace

from engine.protocol import KVHandoff


class Stage(enum.StrEnum):
    NEW = "new"
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One sequence: where it is placed, how far it is, and which faults it has met."""

    request_id: str
    prefill: str | None
    decode: str
    leads: bool = True
    stage: Stage = Stage.NEW
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    pass


@dataclass(frozen=True, slots=True)
class LeaderStarted:
    """The group's leader has its first token, or will never have one."""


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """`answered`: the first token, which prefill has written, was also the last."""

    handoff: KVHandoff | None
    error: str | None = None
    answered: bool = False


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The decode replica could not fetch the hand-off and has computed the prompt itself."""


@dataclass(frozen=True, slots=True)
class Delta:
    last: bool


@dataclass(frozen=True, slots=True)
class SubmitFailed:
    """The replica did not take the request; `error` says why."""

    replica_id: str
    error: str


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    replica_id: str


@dataclass(frozen=True, slots=True)
class Deadline:
    """Prefill took longer than the configuration allows."""


@dataclass(frozen=True, slots=True)
class AbortAsked:
    """The client went away, or the text is complete (a stop string)."""


Event = (
    Start | LeaderStarted | PrefillFinished | PullFailed | Delta | SubmitFailed | ReplicaLost | Deadline | AbortAsked
)


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    replica_id: str


@dataclass(frozen=True, slots=True)
class SubmitDecode:
    replica_id: str
    handoff: KVHandoff | None


@dataclass(frozen=True, slots=True)
class AbortOn:
    replica_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give the hand-off's blocks back through a decode replica; nobody will fetch them."""

    handoff: KVHandoff


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the client that the request failed."""

    error: str


Action = SubmitPrefill | SubmitDecode | AbortOn | Release | Fail


def advance(state: SequenceState, event: Event) -> tuple[SequenceState, tuple[Action, ...]]:
    """One transition of the table above. Events that mean nothing in a stage change nothing."""
    match state.stage:
        case Stage.NEW:
            return _start(state) if isinstance(event, Start) else (state, ())
        case Stage.WAITING:
            return _while_waiting(state, event)
        case Stage.PREFILLING:
            return _while_prefilling(state, event)
        case Stage.DECODING:
            return _while_decoding(state, event)
        case Stage.DONE:
            if isinstance(event, PrefillFinished) and event.handoff is not None:
                return state, (Release(event.handoff),)
            return state, ()


def _start(state: SequenceState) -> tuple[SequenceState, tuple[Action, ...]]:
    if not state.leads:
        return replace(state, stage=Stage.WAITING), ()
    if state.prefill is not None:
        return replace(state, stage=Stage.PREFILLING), (SubmitPrefill(state.prefill),)
    return _decode(state, None)


def _while_waiting(state: SequenceState, event: Event) -> tuple[SequenceState, tuple[Action, ...]]:
    if isinstance(event, LeaderStarted):
        return _decode(state, None)
    if _is_loss_of(state.decode, event):
        return _failed(state, event)
    if isinstance(event, AbortAsked):
        return replace(state, stage=Stage.DONE), ()
    return state, ()


def _while_prefilling(state: SequenceState, event: Event) -> tuple[SequenceState, tuple[Action, ...]]:
    assert state.prefill is not None
    match event:
        case PrefillFinished(handoff, answered=True):
            return replace(state, stage=Stage.DONE), (Release(handoff),) if handoff is not None else ()
        case PrefillFinished(handoff, error):
            if handoff is None:
                state = _with_fault(state, f"prefill on {state.prefill} gave no hand-off: {error or 'no reason given'}")
            return _decode(state, handoff)
        case AbortAsked():
            return replace(state, stage=Stage.DONE), (AbortOn(state.prefill),)
        case Deadline():
            state, actions = _decode(_with_fault(state, f"prefill on {state.prefill} took too long"), None)
            return state, (AbortOn(state.prefill or ""), *actions)
        case _ if _is_loss_of(state.decode, event):
            state, actions = _failed(state, event)
            return state, (AbortOn(state.prefill or ""), *actions)
        case _ if _is_loss_of(state.prefill, event):
            return _decode(_with_fault(state, _loss(event)), None)
        case _:
            return state, ()


def _while_decoding(state: SequenceState, event: Event) -> tuple[SequenceState, tuple[Action, ...]]:
    match event:
        case Delta(last=True):
            return replace(state, stage=Stage.DONE), ()
        case AbortAsked():
            return replace(state, stage=Stage.DONE), (AbortOn(state.decode),)
        case PrefillFinished(handoff=handoff) if handoff is not None:
            # Prefill finished after its deadline: decode has begun without it.
            return state, (Release(handoff),)
        case PullFailed():
            return _with_fault(state, f"{state.decode} could not fetch the hand-off of {state.prefill}"), ()
        case _ if _is_loss_of(state.decode, event):
            return _failed(state, event)
        case _:
            return state, ()


def _decode(state: SequenceState, handoff: KVHandoff | None) -> tuple[SequenceState, tuple[Action, ...]]:
    return replace(state, stage=Stage.DECODING), (SubmitDecode(state.decode, handoff),)


def _failed(state: SequenceState, event: Event) -> tuple[SequenceState, tuple[Action, ...]]:
    return replace(_with_fault(state, _loss(event)), stage=Stage.DONE), (Fail(_loss(event)),)


def _with_fault(state: SequenceState, fault: str) -> SequenceState:
    return replace(state, faults=(*state.faults, fault))


def _is_loss_of(replica_id: str, event: Event) -> bool:
    return isinstance(event, SubmitFailed | ReplicaLost) and event.replica_id == replica_id


def _loss(event: Event) -> str:
    if isinstance(event, SubmitFailed):
        return f"{event.replica_id} did not take the request: {event.error}"
    assert isinstance(event, ReplicaLost)
    return f"{event.replica_id} was lost"
