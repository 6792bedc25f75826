"""Owns the list of real faults: which process gets which signal while a request is where. Pure.

A case is a blow to a victim at a moment of one request, the target, while other clients stream. The list covers every
pair of process and signal, of process and moment, and every row of docs/life-cycle.md's table of faults.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

MAX_CASES = 60


class Victim(StrEnum):
    """A process that is struck. A core is the EngineCore process of a vLLM engine, an actor the Serve replica around
    it."""

    DECODE_CORE = "decode-core"
    PREFILL_CORE = "prefill-core"
    DECODE_ACTOR = "decode-actor"
    PREFILL_ACTOR = "prefill-actor"
    GATEWAY = "gateway"
    HAPROXY = "haproxy"


ENGINES = frozenset({Victim.DECODE_CORE, Victim.PREFILL_CORE, Victim.DECODE_ACTOR, Victim.PREFILL_ACTOR})
DECODES = frozenset({Victim.DECODE_CORE, Victim.DECODE_ACTOR})
PREFILLS = frozenset({Victim.PREFILL_CORE, Victim.PREFILL_ACTOR})


class Blow(StrEnum):
    """What happens. The first three are signals; a process that was stopped is continued later."""

    KILL = "kill"
    TERM = "term"
    STOP = "stop"
    LEAVE = "leave"
    """The target's client goes away."""
    DRAIN = "drain"
    """Serve takes a replica out of the pool, and later puts one in."""
    FLOOD = "flood"
    """More requests than the gateways hold."""


SIGNALS = (Blow.KILL, Blow.TERM, Blow.STOP)


class Moment(StrEnum):
    """Where the target is."""

    RESUMABLE = "resumable"
    """In mid-stream; another engine can go on with the answer."""
    PREFILLING = "prefilling"
    BEFORE_PULL = "before-pull"
    """Prefill has finished, the decode engine has not begun to fetch."""
    REPLAYED = "replayed"
    """In mid-stream; another engine has to begin the answer again."""
    QUEUED = "queued"
    """Waiting in a prefill engine."""
    BEFORE_TOKEN = "before-token"
    """On the decode engine, without a token yet."""
    CLIENT_LEFT = "client-left"
    """In mid-stream, its client has just gone."""
    IDLE = "idle"
    """Nothing is in flight; the clients come right after the blow."""


class Kind(StrEnum):
    """What the target asks for."""

    GREEDY = "greedy"
    SEEDED = "seeded"
    PENALTIES = "penalties"
    CHOICES = "choices"
    SCHEMA = "schema"
    LOGPROBS = "logprobs"


REPLAYED_KINDS = (Kind.PENALTIES, Kind.CHOICES, Kind.SCHEMA, Kind.LOGPROBS)


class Row(StrEnum):
    """What each fault becomes: the rows of the table in issue 4 and docs/life-cycle.md."""

    PREFILL_LOST = "prefill replica dies or hangs before the pull"
    PULL_FAILS = "the pull fails"
    DECODE_LOST_BEFORE_TOKEN = "decode replica dies before the first token"
    DECODE_LOST_CONTINUED = "decode replica dies in mid-stream: continued"
    DECODE_LOST_REPLAYED = "decode replica dies in mid-stream: replayed"
    HANG = "a worker hangs without dying"
    CLIENT_GONE = "the client goes away"
    GATEWAY_LOST = "a gateway replica dies"
    ENGINE_PROCESS_DIES = "the engine process inside a replica dies"
    DRAIN = "a replica drains"
    OVERLOAD = "more work than capacity"
    NO_PREFILL = "no prefill replica at all"
    NO_DECODE = "no decode replica at all"


@dataclass(frozen=True)
class Case:
    """One fault. `is_whole_pool`: every process of the victim's kind is struck at once. `victim` is None when no
    process is."""

    victim: Victim | None
    blow: Blow
    moment: Moment
    kind: Kind = Kind.GREEDY
    is_whole_pool: bool = False

    @property
    def name(self) -> str:
        victim = self.victim.value if self.victim else "client" if self.blow is Blow.LEAVE else "load"
        everyone = "all-" if self.is_whole_pool else ""
        return f"{everyone}{victim}-{self.blow}-{self.moment}-{self.kind}"

    @property
    def is_signal(self) -> bool:
        return self.blow in SIGNALS


def covering(many: Sequence[A], more: Sequence[B], few: Sequence[C]) -> list[tuple[A, B, C]]:
    """Triples that hold every pair of two values of different factors, in as few as can be: each (many, more) once.

    Raises ValueError unless `few` is no longer than the other two: its values are dealt out along both.
    """
    if len(few) > min(len(many), len(more)):
        raise ValueError(f"{len(few)} values cannot be dealt out over {len(many)} and {len(more)}")
    return [
        (one, other, few[(row + column) % len(few)])
        for row, one in enumerate(many)
        for column, other in enumerate(more)
    ]


def all_cases() -> tuple[Case, ...]:
    """Every case, the most telling moments first."""
    pairs = covering(tuple(Moment), tuple(Victim), SIGNALS)
    cases = [Case(victim, blow, moment, _kind(moment, victim)) for moment, victim, blow in pairs]
    done = {case.kind for case in cases if case.victim is Victim.DECODE_CORE and case.moment is Moment.REPLAYED}
    cases += [Case(Victim.DECODE_CORE, Blow.KILL, Moment.REPLAYED, kind) for kind in REPLAYED_KINDS if kind not in done]
    cases += [
        Case(None, Blow.LEAVE, moment, _early_kind(number))
        for number, moment in enumerate((Moment.QUEUED, Moment.PREFILLING, Moment.BEFORE_PULL, Moment.BEFORE_TOKEN))
    ]
    cases += [
        Case(Victim.PREFILL_CORE, Blow.KILL, Moment.PREFILLING, is_whole_pool=True),
        Case(Victim.DECODE_CORE, Blow.KILL, Moment.RESUMABLE, is_whole_pool=True),
        Case(Victim.PREFILL_ACTOR, Blow.DRAIN, Moment.PREFILLING),
        Case(Victim.DECODE_ACTOR, Blow.DRAIN, Moment.RESUMABLE),
        Case(None, Blow.FLOOD, Moment.IDLE),
    ]
    return tuple(cases)


QUICK = (
    "decode-core-kill-resumable-*",
    "prefill-actor-term-prefilling-*",
    "decode-actor-stop-resumable-*",
    "client-leave-before-pull-*",
)
"""Patterns of the cases of `--quick`."""


def chosen(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose names match one of the patterns (as in a shell); all of them if there are no patterns."""
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def rows(case: Case) -> frozenset[Row]:
    """The rows of the table that a case shows."""
    found: set[Row] = set()
    before_pull = case.moment in (Moment.QUEUED, Moment.PREFILLING, Moment.BEFORE_PULL)
    mid_stream = {Moment.RESUMABLE: Row.DECODE_LOST_CONTINUED, Moment.REPLAYED: Row.DECODE_LOST_REPLAYED}
    if case.blow is Blow.LEAVE or case.moment is Moment.CLIENT_LEFT:
        found.add(Row.CLIENT_GONE)
    if case.blow in (Blow.DRAIN, Blow.FLOOD):
        found.add(Row.DRAIN if case.blow is Blow.DRAIN else Row.OVERLOAD)
    if not case.is_signal:
        return frozenset(found)
    if case.victim is Victim.GATEWAY:
        found.add(Row.GATEWAY_LOST)
    if case.victim in ENGINES and case.blow is Blow.STOP:
        found.add(Row.HANG)
    if case.victim in (Victim.DECODE_CORE, Victim.PREFILL_CORE) and case.blow is not Blow.STOP:
        found.add(Row.ENGINE_PROCESS_DIES)
    if case.victim in PREFILLS:
        found |= {Row.NO_PREFILL} if case.is_whole_pool else set()
        found |= {Row.PREFILL_LOST} if before_pull else set()
        found |= {Row.PULL_FAILS} if case.moment in (Moment.BEFORE_PULL, Moment.BEFORE_TOKEN) else set()
    if case.victim in DECODES:
        found |= {Row.NO_DECODE} if case.is_whole_pool else set()
        found |= {Row.DECODE_LOST_BEFORE_TOKEN} if before_pull or case.moment is Moment.BEFORE_TOKEN else set()
        found |= {mid_stream[case.moment]} if case.moment in mid_stream else set()
    return frozenset(found)


def expected_kinds(case: Case) -> frozenset[str]:
    """What the target's receipt names if the blow met it at the case's moment: one of these kinds of faults
    (`gateway.lifecycle.FaultKind`); empty where nothing needs to be named."""
    if not case.is_signal or case.victim not in ENGINES or case.moment in (Moment.IDLE, Moment.CLIENT_LEFT):
        return frozenset()
    if case.victim in DECODES:
        if case.moment in (Moment.RESUMABLE, Moment.REPLAYED):
            return frozenset({"decode_lost_mid_stream"})
        # The first token of a request that can be resumed comes from prefill.
        early = {"decode_lost_before_token"}
        return frozenset(early | ({"decode_lost_mid_stream"} if case.moment is Moment.BEFORE_PULL else set()))
    if case.moment in (Moment.QUEUED, Moment.PREFILLING):
        return frozenset({"prefill_lost", "prefill_failed", "prefill_slow"})
    if case.moment in (Moment.BEFORE_PULL, Moment.BEFORE_TOKEN):
        return frozenset({"pull_failed", "prefill_lost"})
    return frozenset()


def _kind(moment: Moment, victim: Victim) -> Kind:
    number = list(Victim).index(victim)
    match moment:
        case Moment.REPLAYED:
            return REPLAYED_KINDS[number % len(REPLAYED_KINDS)]
        case Moment.BEFORE_TOKEN:
            return Kind.SEEDED
        case Moment.QUEUED | Moment.PREFILLING | Moment.BEFORE_PULL:
            return _early_kind(number // 2)
        case _:
            return Kind.GREEDY


def _early_kind(number: int) -> Kind:
    """Of a request that has no token yet: one whose first token prefill writes, or one that decode writes whole."""
    return (Kind.GREEDY, Kind.SEEDED)[number % 2]
