"""Owns the sessions that are known: which one a request belongs to, where it was, what is expected of it next.

A session is one conversation: one growing prompt. Memory is bounded by the number of sessions and by their tokens: of
too many, those go first that the tenant with the most has used the longest ago (`gateway.shares`). A session
that nobody has used for `PauseModel.idle_s` is forgotten. Times are those of the caller's clock.
"""

import dataclasses
import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.agents.answers import AnswerLengths, running_mean
from gateway.agents.pauses import NO_TOOL, PauseModel, PausePrediction
from gateway.agents.promises import Promise, Promises
from gateway.agents.prompts import Prompt, packed
from gateway.agents.recognition import MIN_BLOCKS, Beginnings, Tips, checkpoints
from gateway.agents.trajectories import Member
from gateway.routing.types import Hints, Placement, SessionView
from gateway.shares import Shares

DUE_PER_SESSION = 4
"""So many expected returns are kept for each session that may be known; those before the last one mean nothing."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A turn that has come. `name`: its session's, None if it belongs to none; `hashes`: of its prompt's full blocks;
    `view`: the session before this turn."""

    name: str | None
    hashes: list[bytes]
    view: SessionView | None


@dataclass(frozen=True, slots=True)
class _Pause:
    """`tool` is what the turn before called (`NO_TOOL`: none). `is_whole`: its answer was not broken off. With
    `length_s` it is over: the next turn has come, but none was taken yet."""

    began_s: float
    tool: str
    predicted: PausePrediction
    is_whole: bool
    length_s: float | None = None


@dataclass(slots=True)
class _Session:
    """`num_running` of its turns have arrived and not ended. `promise`: where how many tokens are kept for its next
    turn, and until when it is expected."""

    tenant: str | None = None
    agent: str | None = None
    is_named: bool = True
    used_s: float = 0.0
    prompt: Prompt = field(default_factory=Prompt)
    num_prompt_tokens: int = 0
    tips: list[bytes] = field(default_factory=list[bytes])
    mark: tuple[int, int] | None = None
    member: Member = field(default_factory=Member)
    num_turns: int = 0
    num_running: int = 0
    prefill: str | None = None
    decode: str | None = None
    pause: _Pause | None = None
    is_last: bool = False
    return_probability: float = 0.0
    output_tokens: float | None = None
    promise: Promise | None = None
    promised_until_s: float = math.inf


class Sessions:
    """By name: what clients call a session (`Hints.session`), or else a name made from its first prompt."""

    def __init__(self, max_sessions: int, max_tokens: int, pauses: PauseModel | None = None) -> None:
        self.pauses = PauseModel() if pauses is None else pauses
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._by_use: Shares[str] = Shares()
        self._prompts: Shares[str] = Shares()
        self._tips = Tips()
        self._beginnings = Beginnings()
        self._answers = AnswerLengths()
        self._promises = Promises()
        self._due: list[tuple[float, str]] = []
        self._num_unnamed = 0
        self._now_s = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    # -- what is known

    def view(self, name: str | None) -> SessionView | None:
        """None for requests of no session; a session's first turn finds an empty view."""
        if name is None:
            return None
        session = self._sessions.get(name)
        return self._view(session, None) if session else SessionView()

    def hashes(
        self, name: str | None, token_ids: Sequence[int], block_size_tokens: int, salt: str | None = None
    ) -> list[bytes]:
        """The hashes of the full blocks of a text that a session's prompt may be the beginning of.

        Raises OverflowError for a token id that no tokenizer has (`engine.blocks.block_hashes`).
        """
        session = self._sessions.get(name) if name is not None else None
        prompt = session.prompt if session else Prompt()
        return prompt.hashes_of(packed(token_ids), block_size_tokens, salt)

    def promised_tokens(self, replica_id: str) -> float:
        """Of sessions that run or pause and whose last turn was decoded there: the tokens that they will want back,
        times the probability that they come back. A pause that is longer than nine in ten of its kind is not waited for
        any more."""
        return self._promises.tokens(replica_id)

    # -- the life of a turn

    def arrives(
        self, hints: Hints, token_ids: Sequence[int], block_size_tokens: int, salt: str | None, now_s: float
    ) -> Arrival:
        """A turn has come: `placed` or `dropped` follows, and `ended` when it is over.

        `block_size_tokens` 0: nobody knows yet; then there are no hashes, and nothing is recognised by them. Raises
        OverflowError as `hashes` does; then nothing has happened.
        """
        self._expire(now_s)
        tokens = packed(token_ids)
        name = hints.session
        marks = checkpoints(tokens, salt) if name is None else []
        alike = self._sessions.get(self._beginnings.owner(marks) if name is None else name)
        known = Prompt() if alike is None else alike.prompt
        hashes = known.hashes_of(tokens, block_size_tokens, salt) if block_size_tokens else []
        if name is None:
            name = self._recognised(tokens, hashes)
            if name is None:
                return Arrival(None, hashes, None)
        session = self._sessions.get(name) or self._new(name, hints.tenant)
        session.is_named = hints.session is not None
        self._touch(name, session, now_s)
        session.agent = hints.agent or session.agent
        if hints.parent is not None and (parent := self._sessions.get(hints.parent)):
            parent.member.adopt(session.member)
        for ancestor in session.member.waiting():
            # While those that it waits for go on, a session is not idle.
            self._touch(ancestor.name, self._sessions[ancestor.name], now_s)
        self._end_pause(session, hints, now_s, is_again=tokens == session.prompt.tokens)
        session.prompt = Prompt(tokens, hashes, block_size_tokens, salt)
        session.num_prompt_tokens = len(token_ids)
        self._prompts.use(name, session.tenant, session.num_prompt_tokens)
        if not session.is_named:
            self._set_tips(name, session, [hashes[-1]])
            session.mark = self._beginnings.replace(session.mark, marks, name)
        session.num_running += 1
        session.is_last = hints.is_last
        session.member.priority, session.member.ttft_deadline_s = hints.priority, hints.ttft_deadline_s
        view = self._view(session, hints.output_tokens)
        session.return_probability = self.pauses.predict(session.tenant, session.agent, None).return_probability
        self._make_room()
        return Arrival(name, hashes, view)

    def placed(self, name: str | None, placement: Placement) -> None:
        """Remembers where a turn went; a turn that is placed again counts again."""
        session = self._sessions.get(name) if name is not None else None
        if session is None:
            return
        if (pause := session.pause) and pause.length_s is not None:
            session.pause = None
            self.pauses.returned(session.tenant, session.agent, pause.tool, pause.length_s, pause.predicted)
        session.num_turns += 1
        session.prefill = placement.prefill or session.prefill
        session.decode = placement.decode
        self._promise(session, session.num_prompt_tokens)
        session.promised_until_s = math.inf

    def ended(
        self,
        name: str | None,
        now_s: float,
        written: Sequence[int],
        service_s: float,
        tool: str | None,
        *,
        is_whole: bool = True,
    ) -> None:
        """A turn is over: the session pauses. `written` is its answer, `service_s` the engine time that it took, `tool`
        the one that the answer has called. `is_whole`: the answer was not broken off, so its length says something."""
        session = self._sessions.get(name) if name is not None else None
        if name is None or session is None:
            return
        self._touch(name, session, now_s)
        session.num_running = max(session.num_running - 1, 0)
        session.member.trajectory.attained_s += service_s
        if is_whole:
            session.output_tokens = running_mean(session.output_tokens, len(written))
            self._answers.learn(session.tenant, session.agent, len(written))
        if session.is_last:
            if not session.num_running:
                self._forget(name, now_s)
            return
        if session.num_running:
            return
        predicted = self.pauses.predict(session.tenant, session.agent, tool or NO_TOOL)
        session.pause = _Pause(now_s, tool or NO_TOOL, predicted, is_whole)
        session.member.waits = tool is not None
        session.return_probability = predicted.return_probability
        self._promise(session, session.num_prompt_tokens + len(written))
        session.promised_until_s = now_s + predicted.p90_s
        self._expect(name, session)
        if not session.is_named:
            num_blocks, tip = session.prompt.with_answer(written)
            if tip is not None and num_blocks >= MIN_BLOCKS:
                self._set_tips(name, session, [*session.tips, tip])

    def dropped(self, name: str | None, now_s: float) -> None:
        """A turn was refused: a new session leaves nothing behind, a known one is expected to try again."""
        session = self._sessions.get(name) if name is not None else None
        if name is None or session is None:
            return
        self._touch(name, session, now_s)
        session.num_running = max(session.num_running - 1, 0)
        if not session.num_turns and not session.num_running:
            self._forget(name, now_s)

    def refused(self, hints: Hints, now_s: float) -> None:
        """A turn was refused before its prompt was looked at: its session has come back all the same."""
        session = self._sessions.get(hints.session) if hints.session is not None else None
        if hints.session is None or session is None:
            return
        self._touch(hints.session, session, now_s)
        self._end_pause(session, hints, now_s)

    # -- inside

    def _recognised(self, tokens: bytes, hashes: list[bytes]) -> str | None:
        """Whose next turn a prompt is that names no session, or the name of a new one; None if it is too short."""
        if len(hashes) < MIN_BLOCKS:
            return None
        for name in self._tips.owners(hashes):
            session = self._sessions[name]
            if not session.num_running and session.prompt.goes_on_in(tokens):
                return name
        name = f"~{hashes[-1].hex()}"
        if name not in self._sessions:
            return name
        self._num_unnamed += 1
        return f"{name}-{self._num_unnamed}"

    def _new(self, name: str, tenant: str | None) -> _Session:
        session = self._sessions[name] = _Session(tenant, member=Member(name))
        return session

    def _touch(self, name: str, session: _Session, now_s: float) -> None:
        session.used_s = now_s
        self._sessions.move_to_end(name)
        self._by_use.use(name, session.tenant)

    def _end_pause(self, session: _Session, hints: Hints, now_s: float, *, is_again: bool = False) -> None:
        """The next turn has come. How long the pause was is learnt when one is taken: one that is refused and comes
        again makes it no longer, and of one that never is taken nothing is known. `is_again`: its prompt is the last
        one."""
        session.member.waits = False
        pause = session.pause
        if pause is None or pause.length_s is not None:
            return
        if hints.is_retry or (is_again and not (session.is_named and pause.is_whole)):
            # It has come before, and nobody knows when.
            session.pause = None
            return
        length_s = max(now_s - pause.began_s, 0.0)
        session.pause = dataclasses.replace(pause, tool=pause.tool or hints.tool or NO_TOOL, length_s=length_s)

    def _view(self, session: _Session, output_tokens: int | None) -> SessionView:
        priority, deadline_s = session.member.inherited()
        expected: float | None = output_tokens
        if expected is None:
            expected = session.output_tokens
        if expected is None:
            expected = self._answers.expected_tokens(session.tenant, session.agent)
        return SessionView(
            num_turns=session.num_turns,
            prefill=session.prefill,
            decode=session.decode,
            attained_s=session.member.trajectory.attained_s,
            inherited_priority=priority,
            inherited_deadline_s=deadline_s,
            output_tokens=expected,
        )

    def _promise(self, session: _Session, num_tokens: int) -> None:
        kept = 0 if session.is_last else round(num_tokens * session.return_probability)
        promise = Promise(session.decode, kept) if session.decode is not None and kept else None
        self._promises.replace(session.promise, promise)
        session.promise = promise

    def _expect(self, name: str, session: _Session) -> None:
        heapq.heappush(self._due, (session.promised_until_s, name))
        if len(self._due) > DUE_PER_SESSION * self._max_sessions:
            # Most are of turns before the last one.
            self._due = [(s.promised_until_s, n) for n, s in self._sessions.items() if s.promised_until_s < math.inf]
            heapq.heapify(self._due)

    def _set_tips(self, name: str, session: _Session, tips: list[bytes]) -> None:
        for tip in session.tips:
            self._tips.remove(tip, name)
        session.tips = [tip for tip in dict.fromkeys(tips) if self._tips.add(tip, name)]

    def _expire(self, now_s: float) -> None:
        """Forgets those that nobody has used for too long; the one that was used first is the first in order."""
        self._now_s = now_s
        while self._due and self._due[0][0] <= now_s:
            _, due = heapq.heappop(self._due)
            if (late := self._sessions.get(due)) and late.promised_until_s <= now_s:
                self._promises.replace(late.promise, None)
                late.promise = None
        while self._sessions:
            name, session = next(iter(self._sessions.items()))
            if now_s - session.used_s <= self.pauses.idle_s:
                return
            if session.num_running:
                self._touch(name, session, now_s)
            else:
                self._forget(name, now_s)

    def _make_room(self) -> None:
        """Forgets a session where there are too many, and a prompt where its tokens are too many: a session that has a
        name goes on without. The tokens of one prompt may be more than are allowed in all; it is kept until the next.
        """
        while len(self._sessions) > self._max_sessions:
            self._forget(self._by_use.first, self._now_s)
        while self._prompts.total > self._max_tokens and len(self._prompts) > 1:
            first = self._prompts.first
            if self._sessions[first].is_named:
                self._forget_prompt(first)
            else:
                self._forget(first, self._now_s)

    def _forget_prompt(self, name: str) -> None:
        self._sessions[name].prompt = Prompt()
        self._prompts.discard(name)

    def _forget(self, name: str, now_s: float) -> None:
        self._forget_prompt(name)
        session = self._sessions.pop(name)
        self._by_use.discard(name)
        self._promises.replace(session.promise, None)
        self._set_tips(name, session, [])
        self._beginnings.replace(session.mark, [], name)
        session.member.leave()
        if (pause := session.pause) and pause.length_s is None:
            waited_s = now_s - pause.began_s
            if waited_s > self.pauses.idle_s:
                self.pauses.gone(session.tenant, session.agent, pause.tool, pause.predicted)
            else:
                self.pauses.unknown_after(session.tenant, session.agent, pause.tool, waited_s)
