"""The life cycle under whatever the outside can do to it: a machine of Hypothesis, and a small model beside it.

The machine is the world of some groups: replicas that die, fall silent and come back, engines that finish late, calls
that get lost, clients that leave. It does nothing that cannot happen, but in any order. The model knows of each
hand-off what has been done with it, and of each engine which requests it holds; the invariants are those of the design.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.protocol import KVHandoff, Phase
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

T = TypeVar("T")
MAX_REPLICAS = 4
"""Of one phase and alive: no more join."""
MAX_OPEN = 4
"""Sequences; while there are more, no prompt comes."""
MAX_EVENTS_TO_THE_END = 4 * MAX_PLACEMENTS
"""From any open stage, when nothing good happens: what an attempt asks for is late, so is its prefill, its decode is
lost, it is placed."""
WHICH = st.integers(0, 11)


class Use(StrEnum):
    """What has been done with a hand-off. GIVEN_BACK: nobody can be fetching it; TAKEN_AWAY: somebody may be."""

    SENT = "sent to a replica"
    GIVEN_BACK = "given back"
    TAKEN_AWAY = "given back under a fetch"


class Finish(StrEnum):
    """How a prefill ends."""

    READS = "hands over"
    WRITES = "hands over, and has written a token"
    ANSWERS = "hands over, and has written the last token"
    ANSWERS_WITHOUT = "has written the last token"
    FAILS = "fails"


ALLOWED_USES: set[tuple[Use, ...]] = {(), (Use.SENT,), (Use.GIVEN_BACK,), (Use.SENT, Use.GIVEN_BACK)}


@dataclass(eq=False)
class Replica:
    """`is_heard`: the gateway has a stream from it; one that has died may not have been missed yet."""

    replica_id: str
    phase: Phase
    is_alive: bool = True
    is_heard: bool = True


@dataclass(eq=False)
class Job:
    """One request to one engine, and the stage that waits for it. It is on its way until `is_sent`, and then with the
    engine until `is_over`.

    `is_answered`: the call that brought it has ended; `has_told`: a delta of it has been seen; `is_aborted`: the engine
    was told to stop it; `is_lost`: its replica was lost since, for certain if `is_known_dead`.
    """

    choice: "Choice"
    replica: Replica
    stage: Stage
    engine_request_id: str
    handoff: "Handed | None" = None
    is_sent: bool = False
    is_over: bool = False
    is_answered: bool = False
    has_told: bool = False
    is_aborted: bool = False
    is_lost: bool = False
    is_known_dead: bool = False
    is_refused: bool = False

    @property
    def can_tell(self) -> bool:
        return self.is_sent and not self.is_over and self.replica.is_alive and self.replica.is_heard

    @property
    def is_expected(self) -> bool:
        """Whether something will still come of it."""
        return not (self.is_over or self.is_aborted or self.is_lost)


@dataclass(eq=False)
class Handed:
    """A hand-off that the gateway was told of."""

    handoff: KVHandoff
    producer: Replica
    consumer: Job | None = None
    is_fetched: bool = False
    uses: list[Use] = field(default_factory=list)

    def given_back(self) -> None:
        job = self.consumer
        may_fetch = job is not None and job.is_sent and not job.is_refused and job.replica.is_alive
        self.uses.append(Use.TAKEN_AWAY if may_fetch or self.is_fetched else Use.GIVEN_BACK)

    @property
    def why_left_to_its_lease(self) -> str | None:
        """None: there is no reason for it."""
        job = self.consumer
        if not self.producer.is_alive:
            return "its producer is dead"
        if job is None or not job.is_sent or job.is_refused:
            return None
        if job.is_aborted:
            return "its consumer was told to abort, and gives it up"
        if job.is_over:
            return "its consumer has ended the request, and given it up"
        return "its consumer may live and be fetching it" if job.is_lost and not job.is_known_dead else None


@dataclass(eq=False)
class Choice:
    """One sequence and what the outside knows of it. `group`: all choices of its prompt, the leader first; `seen`: the
    last state from which the way to an end was looked at."""

    state: SequenceState
    group: "list[Choice]"
    jobs: list[Job] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    num_placements: int = 1
    num_ends: int = 0
    num_fails: int = 0
    asks_for_a_place: bool = False
    has_tokens: bool = False
    has_answer: bool = False
    has_left: bool = False
    may_fail: bool = False
    seen: SequenceState | None = None
    done_after_the_end: list[Action] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.state.stage

    @property
    def is_open(self) -> bool:
        return self.stage is not Stage.DONE

    def is_at(self, job: Job) -> bool:
        """Whether the present attempt waits for what this engine tells."""
        return self.stage is job.stage and self.owns(job)

    def owns(self, job: Job) -> bool:
        """Whether it is of the present attempt."""
        state = self.state
        if job.stage is Stage.ASKING:
            return job.engine_request_id == state.ask_request_id and job.replica.replica_id == state.ask
        is_there = job.replica.replica_id in (state.prefill, state.decode)
        return job.engine_request_id == state.engine_request_id and is_there


def one_of(items: Sequence[T], which: int) -> T:
    return items[which % len(items)]


class LifeCycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.replicas: list[Replica] = []
        self.choices: list[Choice] = []
        self.handoffs: list[Handed] = []

    @initialize()
    def the_pools_are_there(self) -> None:
        for phase in (Phase.PREFILL, Phase.PREFILL, Phase.DECODE, Phase.DECODE):
            self._join(phase)

    def _has_room(self) -> bool:
        return sum(choice.is_open for choice in self.choices) < MAX_OPEN and bool(self._heard(Phase.DECODE))

    @precondition(lambda self: self._has_room())
    @rule(
        num_choices=st.sampled_from([1, 1, 1, 3]),
        prefill=WHICH,
        decode=WHICH,
        ask=WHICH,
        resumable=st.booleans(),
        num_steps=st.integers(0, 6),
        how=st.sampled_from(Finish),
    )
    def a_prompt_comes(
        self, num_choices: int, prefill: int, decode: int, ask: int, resumable: bool, num_steps: int, how: Finish
    ) -> None:
        placement, group = self._placement(prefill, decode, ask), list[Choice]()
        for index in range(num_choices):
            request_id = f"r{len(self.choices)}"
            leads = index == 0
            ask_of = placement.ask if leads else None
            state = SequenceState(
                request_id, placement.prefill, placement.decode, ask=ask_of, leads=leads, resumable=resumable
            )
            group.append(Choice(state, group))
            self.choices.append(group[-1])
            self._advance(group[-1], Start())
        self._go_on(group[0], num_steps, how)

    def _placement(self, prefill: int, decode: int, ask: int) -> Placed:
        """Among those that are heard of; a quarter goes to decode alone, of the others half asks one of decode."""
        readers, writers = self._heard(Phase.PREFILL), self._heard(Phase.DECODE)
        writer = one_of(writers, decode).replica_id
        if not readers or prefill % 4 == 3:
            return Placed(None, writer)
        asked = one_of(writers, ask // 2).replica_id if ask % 2 else None
        return Placed(one_of(readers, prefill // 4).replica_id, writer, asked)

    # -- what the gateway does with the machine's actions

    def _advance(self, choice: Choice, event: Event) -> None:
        before = choice.state
        choice.state, actions = advance(before, event)
        if before.stage is Stage.DONE:
            choice.done_after_the_end += [a for a in actions if not isinstance(a, Release | ReleaseSource)]
            assert choice.state == before, "I3: what has ended has changed"
        for action in actions:
            self._perform(choice, action)
        if before.stage is not Stage.DONE and not choice.is_open:
            choice.num_ends += 1
            self._start_followers(choice)

    def _perform(self, choice: Choice, action: Action) -> None:
        engine_request_id = choice.state.engine_request_id
        match action:
            case SubmitAsk(replica_id):
                ask_id = choice.state.ask_request_id
                choice.jobs.append(Job(choice, self._replica(replica_id), Stage.ASKING, ask_id))
            case SubmitPrefill(replica_id, handoff) | SubmitDecode(replica_id, handoff):
                stage = Stage.PREFILLING if isinstance(action, SubmitPrefill) else Stage.DECODING
                handed = self._handed(handoff) if handoff is not None else None
                choice.jobs.append(Job(choice, self._replica(replica_id), stage, engine_request_id, handed))
            case AbortOn(replica_id) | AbortAsk(replica_id):
                ours = choice.state.ask_request_id if isinstance(action, AbortAsk) else engine_request_id
                jobs = [job for job in choice.jobs if job.replica.replica_id == replica_id]
                (job,) = (job for job in jobs if job.engine_request_id == ours)
                job.is_aborted = True
            case Release(handoff) | ReleaseSource(handoff):
                gives_to = Phase.PREFILL if isinstance(action, Release) else Phase.DECODE
                assert self._handed(handoff).producer.phase is gives_to, "I2: given back through its own pool"
                handed = self._handed(handoff)
                carried_by = [job for job in self._underway() if job.handoff is handed]
                assert not any(map(choice.is_at, carried_by)), "I1: a hand-off is to be sent and given back"
                # What has not been sent yet is given back by who was to send it.
                if not carried_by:
                    handed.given_back()
            case Place():
                assert choice.state.lost == choice.lost, "I4: a replica that has failed it may be chosen again"
                choice.asks_for_a_place = True
            case Fail():
                choice.num_fails += 1

    def _start_followers(self, choice: Choice) -> None:
        if choice.state.leads:
            for follower in choice.group[1:]:
                self._advance(follower, LeaderStarted())

    def _client_gets_tokens(self, choice: Choice) -> None:
        choice.has_tokens = True
        self._start_followers(choice)

    def _fault(self, choice: Choice, event: Event, *, ends: bool = False) -> None:
        """An event after which the sequence may fail: because it `ends` it, or because it was placed often enough."""
        choice.may_fail = choice.may_fail or (
            choice.is_open and (ends or choice.num_placements >= MAX_PLACEMENTS) and not choice.num_fails
        )
        self._advance(choice, event)

    # -- who is there

    def _join(self, phase: Phase) -> None:
        self.replicas.append(Replica(f"{phase[0]}{len(self.replicas)}", phase))

    def _replica(self, replica_id: str | None) -> Replica:
        (replica,) = (replica for replica in self.replicas if replica.replica_id == replica_id)
        return replica

    def _heard(self, phase: Phase) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_heard and replica.phase is phase]

    def _living(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_alive]

    def _busy(self) -> list[Replica]:
        """Those that the gateway hears and has open sequences on."""
        states = [choice.state for choice in self.choices if choice.is_open and choice.stage is not Stage.PLACING]
        ids = {replica_id for state in states for replica_id in (state.prefill, state.decode, state.ask)}
        return [replica for replica in self.replicas if replica.is_heard and replica.replica_id in ids]

    @precondition(lambda self: any(replica.is_alive for replica in self._busy()))
    @rule(which=WHICH)
    def a_process_dies(self, which: int) -> None:
        """Nobody has noticed it yet."""
        one_of([replica for replica in self._busy() if replica.is_alive], which).is_alive = False

    @precondition(lambda self: self._busy())
    @rule(which=WHICH, dies=st.booleans(), death_shows=st.booleans())
    def a_replica_is_lost(self, which: int, dies: bool, death_shows: bool) -> None:
        """Its stream breaks, or it is silent for too long; it need not be dead."""
        replica = one_of(self._busy(), which)
        replica.is_alive = replica.is_alive and not dies
        self._lose(replica, death_shows)

    def _lose(self, replica: Replica, death_shows: bool) -> None:
        replica.is_heard = False
        is_dead = death_shows and not replica.is_alive
        for choice in self.choices:
            for job in choice.jobs:
                if job.replica is replica and job.is_sent and job.is_expected:
                    job.is_lost, job.is_known_dead = True, is_dead
            state = choice.state
            if choice.is_open and replica.replica_id in (state.prefill, state.decode, state.ask):
                self._note_loss(choice, replica, is_dead)
                self._fault(choice, ReplicaLost(replica.replica_id, is_dead))

    def _note_loss(self, choice: Choice, replica: Replica, is_dead: bool) -> None:
        """What the model says of the loss of a replica that a sequence is placed on: is it displaced?"""
        is_placed_there = replica.replica_id in (choice.state.prefill, choice.state.decode)
        match choice.stage:
            case Stage.WAITING:
                is_hit = replica.phase is Phase.DECODE
            case Stage.ASKING:
                is_hit = is_placed_there
            case Stage.PREFILLING:
                # Whether prefill has fetched it is not known before its end.
                is_hit = is_placed_there or (choice.jobs[-1].handoff is not None and not is_dead)
            case Stage.DECODING:
                job = choice.jobs[-1]
                unfetched = job.handoff is not None and not job.handoff.is_fetched and not job.has_told
                is_producer = replica.replica_id == choice.state.prefill
                is_hit = replica.replica_id == choice.state.decode or (is_producer and unfetched and not is_dead)
            case _:
                is_hit = False
        if is_hit:
            choice.lost.add(replica.replica_id)

    def _fetching(self) -> list[Job]:
        jobs = [job for job in self._jobs(sent=True) if job.handoff and not job.has_told]
        return [job for job in jobs if job.choice.is_at(job)]

    @precondition(lambda self: self._fetching())
    @rule(which=WHICH, reads=st.booleans(), dies=st.booleans(), death_shows=st.booleans())
    def a_replica_is_lost_during_a_fetch(self, which: int, reads: bool, dies: bool, death_shows: bool) -> None:
        job = one_of(self._fetching(), which)
        assert job.handoff is not None
        replica = job.handoff.producer if reads else job.replica
        if replica.is_heard:
            replica.is_alive = replica.is_alive and not dies
            self._lose(replica, death_shows)

    @precondition(lambda self: any(replica.is_alive and not replica.is_heard for replica in self.replicas))
    @rule(which=WHICH)
    def a_replica_comes_back(self, which: int) -> None:
        one_of([r for r in self.replicas if r.is_alive and not r.is_heard], which).is_heard = True

    @rule(phase=st.sampled_from(Phase))
    def a_replica_joins(self, phase: Phase) -> None:
        if len([replica for replica in self._living() if replica.phase is phase]) < MAX_REPLICAS:
            self._join(phase)

    # -- calls to workers

    def _jobs(self, *, sent: bool, stage: Stage | None = None) -> list[Job]:
        jobs = [job for choice in self.choices for job in choice.jobs if job.is_sent is sent]
        return [job for job in jobs if stage in (None, job.stage)]

    def _underway(self) -> list[Job]:
        return [job for job in self._jobs(sent=False) if not job.is_over]

    @precondition(lambda self: self._underway())
    @rule(which=WHICH)
    def a_request_is_sent(self, which: int) -> None:
        self._send(one_of(self._underway(), which))

    def _send(self, job: Job) -> None:
        """Unless its attempt has ended meanwhile: then nothing is sent, and its hand-off given back."""
        if job.choice.is_at(job):
            job.is_sent = True
            assert job.choice.is_open, "I3: a request was sent after its end"
            if job.handoff is not None:
                job.handoff.consumer = job
                job.handoff.uses.append(Use.SENT)
        else:
            job.is_over = job.is_answered = True
            if job.handoff is not None:
                job.handoff.given_back()

    def _unanswered(self) -> list[Job]:
        return [job for job in self._jobs(sent=True) if not job.is_answered]

    def _refusable(self) -> list[Job]:
        return [job for job in self._unanswered() if job.can_tell and not job.has_told and not job.is_lost]

    @precondition(lambda self: self._refusable())
    @rule(which=WHICH)
    def a_request_is_refused(self, which: int) -> None:
        job = one_of(self._refusable(), which)
        job.is_answered = job.is_over = job.is_refused = True
        self._tell_failed_call(job, SubmitFailed(job.replica.replica_id, "too long", refused=True))
        if job.handoff is not None:
            job.handoff.given_back()

    @precondition(lambda self: self._unanswered())
    @rule(which=WHICH, death_shows=st.booleans())
    def a_call_fails(self, which: int, death_shows: bool) -> None:
        """The worker has got it, or not; nobody knows."""
        job = one_of(self._unanswered(), which)
        job.is_answered = True
        is_dead = death_shows and not job.replica.is_alive
        if job.is_expected:
            job.is_lost, job.is_known_dead = True, is_dead
        self._tell_failed_call(job, SubmitFailed(job.replica.replica_id, "gone", is_dead=is_dead))
        job.is_aborted = job.is_aborted or not is_dead

    def _tell_failed_call(self, job: Job, failed: SubmitFailed) -> None:
        choice = job.choice
        if not choice.is_open or not choice.owns(job) or (job.stage is Stage.ASKING and not choice.is_at(job)):
            return
        is_placed_there = job.replica.replica_id in (choice.state.prefill, choice.state.decode)
        if choice.is_at(job) and not failed.refused and is_placed_there:
            choice.lost.add(job.replica.replica_id)
        self._fault(choice, failed, ends=failed.refused and job.stage is Stage.DECODING)

    # -- what engines tell

    def _handed(self, handoff: KVHandoff) -> Handed:
        (handed,) = (handed for handed in self.handoffs if handed.handoff == handoff)
        return handed

    def _telling(self, stage: Stage) -> list[Job]:
        return [job for job in self._jobs(sent=True, stage=stage) if job.can_tell]

    @precondition(lambda self: self._telling(Stage.ASKING))
    @rule(which=WHICH, fails=st.booleans())
    def who_was_asked_answers(self, which: int, fails: bool) -> None:
        self._finish_ask(one_of(self._telling(Stage.ASKING), which), fails=fails)

    def _finish_ask(self, job: Job, *, fails: bool) -> None:
        """Also late, when prefill reads the prompt already."""
        choice = job.choice
        job.is_over, job.has_told = True, True
        handoff: KVHandoff | None = None
        if not fails:
            handoff = KVHandoff(job.replica.replica_id, job.engine_request_id, 10, 1, b"")
            self.handoffs.append(Handed(handoff, job.replica))
        if choice.owns(job):
            self._advance(choice, AskFinished(handoff, "out of memory" if fails else None))
        elif handoff is not None:
            self._handed(handoff).given_back()

    @precondition(lambda self: self._telling(Stage.PREFILLING))
    @rule(which=WHICH, how=st.sampled_from(Finish), pull_failed=st.booleans())
    def a_prefill_finishes(self, which: int, how: Finish, pull_failed: bool) -> None:
        self._finish_prefill(one_of(self._telling(Stage.PREFILLING), which), how, pull_failed)

    def _given_up(self) -> list[Job]:
        return [job for job in self._telling(Stage.PREFILLING) if job.is_aborted]

    @precondition(lambda self: self._given_up())
    @rule(which=WHICH)
    def a_prefill_finishes_although_it_was_aborted(self, which: int) -> None:
        self._finish_prefill(one_of(self._given_up(), which), Finish.READS)

    def _finish_prefill(self, job: Job, how: Finish, pull_failed: bool = False) -> None:
        """Also late, when its attempt has been given up. Only for an only choice, and if it can be continued, prefill
        writes the next token."""
        choice = job.choice
        job.is_over, job.has_told = True, True
        pull_failed = job.handoff is not None and (pull_failed or not job.handoff.producer.is_alive)
        if job.handoff is not None and not pull_failed:
            job.handoff.is_fetched = True
            assert Use.GIVEN_BACK not in job.handoff.uses, "I1: a source was fetched after it was given back"
        handoff: KVHandoff | None = None
        if how not in (Finish.FAILS, Finish.ANSWERS_WITHOUT):
            handoff = KVHandoff(job.replica.replica_id, job.engine_request_id, 10, 1, b"")
            self.handoffs.append(Handed(handoff, job.replica))
        if not choice.owns(job):
            # Whoever hears of it gives it back.
            if handoff is not None:
                self._handed(handoff).given_back()
            return
        can_write = choice.state.resumable and len(choice.group) == 1 and choice.stage is Stage.PREFILLING
        is_all = can_write and how in (Finish.ANSWERS, Finish.ANSWERS_WITHOUT)
        writes = is_all or (can_write and how is Finish.WRITES)
        if writes:
            self._client_gets_tokens(choice)
            choice.has_answer = choice.has_answer or is_all
        error = None if handoff or writes else "out of memory"
        self._advance(choice, PrefillFinished(handoff, error, writes, answered=is_all, pull_failed=pull_failed))

    @precondition(lambda self: self._telling(Stage.DECODING))
    @rule(which=WHICH, writes=st.booleans(), is_last=st.booleans(), pull_failed=st.booleans())
    def decode_tells(self, which: int, writes: bool, is_last: bool, pull_failed: bool) -> None:
        self._tell_delta(one_of(self._telling(Stage.DECODING), which), writes, is_last, pull_failed)

    def _tell_delta(self, job: Job, writes: bool, is_last: bool, pull_failed: bool) -> None:
        choice, handed = job.choice, job.handoff
        is_first, job.has_told, job.is_over = not job.has_told, True, is_last
        pull_failed = pull_failed or (handed is not None and not handed.producer.is_alive)
        if is_first and handed is not None and not pull_failed:
            handed.is_fetched = True
            assert Use.GIVEN_BACK not in handed.uses, "I1: a hand-off was fetched after it was given back"
        if not choice.is_at(job):
            return
        if is_first and handed is not None and pull_failed:
            self._advance(choice, PullFailed())
        if writes or is_last:
            self._client_gets_tokens(choice)
        choice.has_answer = choice.has_answer or is_last
        self._advance(choice, Delta(is_last, has_written=writes or is_last))

    @precondition(lambda self: self._telling(Stage.DECODING))
    @rule(which=WHICH)
    def decode_fails(self, which: int) -> None:
        job = one_of(self._telling(Stage.DECODING), which)
        job.is_over = job.has_told = True
        if job.choice.is_at(job):
            job.choice.lost.add(job.replica.replica_id)
            self._fault(job.choice, DecodeFailed("out of memory"))

    def _replaying(self) -> list[Job]:
        jobs = [job for job in self._telling(Stage.DECODING) if job.choice.is_at(job)]
        return [job for job in jobs if job.choice.has_tokens and not job.choice.state.resumable]

    @precondition(lambda self: any(job.choice.num_placements > 1 for job in self._replaying()))
    @rule(which=WHICH)
    def an_answer_that_is_begun_again_differs(self, which: int) -> None:
        job = one_of([job for job in self._replaying() if job.choice.num_placements > 1], which)
        if job.handoff is not None:
            job.handoff.is_fetched = True
        job.has_told = True
        self._fault(job.choice, Mismatch(), ends=True)

    # -- what else happens to a sequence

    def _at(self, *stages: Stage) -> list[Choice]:
        return [choice for choice in self.choices if choice.stage in stages]

    def _reading(self) -> list[Choice]:
        """A deadline is longer than it takes to send a request."""
        return [choice for choice in self._at(Stage.PREFILLING) if choice.jobs[-1].is_sent]

    def _asking(self) -> list[Choice]:
        return [choice for choice in self._at(Stage.ASKING) if choice.jobs[-1].is_sent]

    @precondition(lambda self: self._asking())
    @rule(which=WHICH)
    def who_was_asked_takes_too_long(self, which: int) -> None:
        self._fault(one_of(self._asking(), which), Deadline())

    @precondition(lambda self: self._reading())
    @rule(which=WHICH)
    def prefill_takes_too_long(self, which: int) -> None:
        self._pass_deadline(one_of(self._reading(), which))

    @precondition(lambda self: self._reading() and self._heard(Phase.DECODE))
    @rule(which=WHICH, prefill=WHICH, decode=WHICH, ask=WHICH)
    def prefill_takes_too_long_again(self, which: int, prefill: int, decode: int, ask: int) -> None:
        """The pool is slow, and the sequence is placed on it a second time."""
        choice = one_of(self._reading(), which)
        self._pass_deadline(choice)
        if choice.stage is Stage.PLACING:
            self._place(choice, self._placement(prefill, decode, ask))
        if choice.stage is Stage.ASKING:
            self._go_on(choice, 2)
        if choice.stage is Stage.PREFILLING:
            self._send(choice.jobs[-1])
            self._pass_deadline(choice)

    def _pass_deadline(self, choice: Choice) -> None:
        if not any(fault.kind == "prefill_slow" for fault in choice.state.faults):
            choice.lost.add(choice.state.prefill or "")
        self._fault(choice, Deadline())

    @precondition(lambda self: any(choice.is_open for choice in self.choices))
    @rule(which=WHICH, num_steps=st.integers(1, 4))
    def all_goes_well_for_a_while(self, which: int, num_steps: int) -> None:
        self._go_on(one_of([choice for choice in self.choices if choice.is_open], which), num_steps)

    def _go_on(self, choice: Choice, num_steps: int, how: Finish = Finish.WRITES) -> None:
        """As things go if nothing is lost: sent, read, handed over and sent, fetched, and written."""
        for _ in range(num_steps):
            job = choice.jobs[-1] if choice.stage in (Stage.ASKING, Stage.PREFILLING, Stage.DECODING) else None
            if job is not None and not job.is_sent:
                self._send(job)
            elif job is not None and job.can_tell and job.stage is Stage.ASKING:
                self._finish_ask(job, fails=False)
            elif job is not None and job.can_tell and job.stage is Stage.PREFILLING:
                self._finish_prefill(job, how)
            elif job is not None and job.can_tell:
                self._tell_delta(job, writes=True, is_last=False, pull_failed=False)

    @precondition(lambda self: any(choice.is_open for choice in self.choices))
    @rule(which=WHICH, patience=st.integers(0, 3))
    def a_client_leaves(self, which: int, patience: int) -> None:
        if not patience:
            choice = one_of([choice for choice in self.choices if choice.is_open], which)
            choice.has_left = True
            self._advance(choice, AbortAsked())

    @precondition(lambda self: self._at(Stage.PLACING) and self._heard(Phase.DECODE))
    @rule(which=WHICH, prefill=WHICH, decode=WHICH, ask=WHICH)
    def it_is_placed_again(self, which: int, prefill: int, decode: int, ask: int) -> None:
        self._place(one_of(self._at(Stage.PLACING), which), self._placement(prefill, decode, ask))

    def _place(self, choice: Choice, placement: Placed) -> None:
        choice.asks_for_a_place = False
        choice.num_placements += 1
        self._advance(choice, placement)

    @precondition(lambda self: self._at(Stage.PLACING) and not self._heard(Phase.DECODE))
    @rule(which=WHICH)
    def nobody_can_take_it(self, which: int) -> None:
        self._give_up(one_of(self._at(Stage.PLACING), which))

    def _give_up(self, choice: Choice) -> None:
        choice.asks_for_a_place = False
        self._fault(choice, Unplaceable("nobody"), ends=True)

    # -- what holds after every step

    @invariant()
    def i1_a_hand_off_is_used_at_most_once(self) -> None:
        for handed in self.handoffs:
            assert tuple(handed.uses) in ALLOWED_USES, f"I1: {handed.handoff} was {handed.uses}"

    @invariant()
    def i1_no_two_attempts_share_an_id(self) -> None:
        for phase in Phase:
            ids = [job.engine_request_id for job in self._all_jobs() if job.replica.phase is phase]
            assert len(ids) == len(set(ids)), f"I1: {ids}"

    @invariant()
    def i1_a_group_is_prefilled_once(self) -> None:
        """Its followers start when the leader's blocks are on decode, unless a loss has separated them."""
        for choice in self.choices:
            first = [job for job in choice.jobs if job.engine_request_id == choice.state.request_id]
            if first and not choice.state.leads:
                assert [(job.stage, job.handoff) for job in first] == [(Stage.DECODING, None)], f"I1: {first}"

    @invariant()
    def i2_a_hand_off_is_in_somebodys_hands(self) -> None:
        """Not sent and not given back is only one that is about to be sent."""
        carried = [job.handoff for job in self._underway()]
        for handed in self.handoffs:
            assert handed.uses or handed in carried, f"I2: {handed.handoff} is forgotten"

    @invariant()
    def i2_a_hand_off_is_left_to_its_lease_only_for_a_reason(self) -> None:
        for handed in self.handoffs:
            job = handed.consumer
            is_left = handed.uses == [Use.SENT] and not handed.is_fetched and job is not None and not job.is_expected
            assert not is_left or handed.why_left_to_its_lease, f"I2: {handed.handoff} is left to its lease"

    @invariant()
    def i2_no_engine_holds_what_nobody_waits_for(self) -> None:
        for job in self._jobs(sent=True):
            is_waited_for = job.choice.is_open and job.choice.is_at(job)
            assert is_waited_for or not job.is_expected, f"I2: {job.engine_request_id} on {job.replica.replica_id}"

    @invariant()
    def i3_a_sequence_ends_once(self) -> None:
        for choice in self.choices:
            assert (choice.num_ends, not choice.is_open) in {(0, False), (1, True)}, "I3: it has ended twice"
            assert not choice.done_after_the_end, f"I3: {choice.done_after_the_end} after its end"
            is_failed = not choice.is_open and not choice.has_answer and not choice.has_left
            assert choice.num_fails == is_failed, f"I3: told {choice.num_fails} times that it failed"
            assert choice.may_fail or not is_failed, f"I3: failed without need: {choice.state.faults}"

    @invariant()
    def i3_it_is_known_what_the_client_has(self) -> None:
        """Else an answer that is begun again would not be compared, and told twice."""
        for choice in self.choices:
            if choice.is_open:
                assert choice.state.has_written == choice.has_tokens, f"I3: {choice.state}"

    @invariant()
    def i4_placements_are_bounded(self) -> None:
        for choice in self.choices:
            assert choice.state.num_placements == choice.num_placements <= MAX_PLACEMENTS, f"I4: {choice.state}"

    @invariant()
    def i4_nothing_waits_for_what_will_not_come(self) -> None:
        for choice in self.choices:
            match choice.stage:
                case Stage.WAITING:
                    leader = choice.group[0]
                    is_bounded = leader.is_open and not leader.has_tokens
                    is_bounded = is_bounded and self._replica(choice.state.decode).is_heard
                case Stage.PLACING:
                    is_bounded = choice.asks_for_a_place
                case Stage.ASKING | Stage.PREFILLING | Stage.DECODING:
                    jobs = [job for job in choice.jobs if choice.is_at(job)]
                    is_bounded = len(jobs) == 1 and jobs[0].is_expected and self._is_watched(choice)
                case _:
                    is_bounded = True
            assert is_bounded, f"I4: it would wait for ever: {choice.state}"

    def _is_watched(self, choice: Choice) -> bool:
        """The replicas that the present stage needs are there, as far as the gateway knows. A fetch from a dead process
        fails; one from a process that hangs may never end."""
        reads = choice.stage in (Stage.ASKING, Stage.PREFILLING)
        if reads and not self._replica(choice.state.prefill).is_heard:
            return False
        job = choice.jobs[-1]
        if job.stage is Stage.ASKING and not job.replica.is_heard:
            return False
        producer = job.handoff.producer if job.handoff is not None and not job.has_told else None
        may_hang = producer is not None and producer.is_alive and not producer.is_heard
        return self._replica(choice.state.decode).is_heard and not may_hang

    @invariant()
    def i4_the_worst_that_can_happen_ends_it(self) -> None:
        for choice in self.choices:
            if choice.seen is choice.state:
                continue
            choice.seen = choice.state
            for is_placed in (False, True):
                state, num_events = choice.state, 0
                while state.stage is not Stage.DONE:
                    state, _ = advance(state, worst(state, is_placed))
                    num_events += 1
                    assert num_events <= MAX_EVENTS_TO_THE_END, f"I4: no end from {choice.state}"

    def _all_jobs(self) -> list[Job]:
        return [*self._jobs(sent=True), *self._jobs(sent=False)]

    # -- the end

    def teardown(self) -> None:
        """Drives what is open to its end, and looks at what is left."""
        for _ in range(MAX_EVENTS_TO_THE_END):
            for job in self._underway():
                self._send(job)
            for choice in self.choices:
                self._drive(choice)
        for job in self._telling(Stage.ASKING):
            self._finish_ask(job, fails=False)
        for job in self._telling(Stage.PREFILLING):
            self._finish_prefill(job, Finish.READS)
        self.i1_a_hand_off_is_used_at_most_once()
        self.i2_a_hand_off_is_in_somebodys_hands()
        self.i2_a_hand_off_is_left_to_its_lease_only_for_a_reason()
        self.i2_no_engine_holds_what_nobody_waits_for()
        self.i3_a_sequence_ends_once()
        for choice in self.choices:
            assert not choice.is_open, f"I4: it did not end: {choice.state}"
        for handed in self.handoffs:
            assert handed.uses, f"I2: {handed.handoff} was never used"

    def _drive(self, choice: Choice) -> None:
        match choice.stage:
            case Stage.ASKING if choice.jobs[-1].is_sent:
                self._fault(choice, Deadline())
            case Stage.PREFILLING if choice.jobs[-1].is_sent:
                self._pass_deadline(choice)
            case Stage.PLACING:
                self._give_up(choice)
            case Stage.DECODING if choice.jobs[-1].can_tell:
                self._tell_delta(choice.jobs[-1], writes=True, is_last=True, pull_failed=False)
            case Stage.DECODING if choice.jobs[-1].is_sent:
                self._lose(choice.jobs[-1].replica, death_shows=True)
            case _:
                pass


def worst(state: SequenceState, is_placed: bool) -> Event:
    """What happens at the latest in a stage: a time-out, or the loss of the replica that is waited for."""
    match state.stage:
        case Stage.ASKING | Stage.PREFILLING:
            return Deadline()
        case Stage.PLACING:
            return Placed("p", "d", "d") if is_placed else Unplaceable("nobody")
        case Stage.WAITING:
            return LeaderStarted()
        case _:
            return ReplicaLost(state.decode)


TestLifeCycle = LifeCycle.TestCase
TestLifeCycle.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
