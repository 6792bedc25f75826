"""Owns the trees of sessions: who has started whom, what a trajectory has used, whose urgency a child inherits."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.routing.types import Priority

MAX_DEPTH = 8
MAX_SESSIONS = 1000
"""Of one trajectory. Further children are roots of their own."""


@dataclass(slots=True)
class Trajectory:
    """What all sessions of one root have used so far. `attained_s` is time on engines."""

    num_sessions: int = 0
    num_turns: int = 0
    read_tokens: int = 0
    written_tokens: int = 0
    attained_s: float = 0.0

    def add(self, other: "Trajectory") -> None:
        self.num_sessions += other.num_sessions
        self.num_turns += other.num_turns
        self.read_tokens += other.read_tokens
        self.written_tokens += other.written_tokens
        self.attained_s += other.attained_s


@dataclass(slots=True)
class Member:
    """A session's place in its trajectory. `waits`: its last turn has called a tool and the result has not come.
    `priority` and `ttft_deadline_s` are those of its last turn."""

    trajectory: Trajectory = field(default_factory=lambda: Trajectory(num_sessions=1))
    parent: "Member | None" = None
    depth: int = 0
    waits: bool = False
    priority: Priority = Priority.NORMAL
    ttft_deadline_s: float | None = None

    def adopt(self, child: "Member") -> bool:
        """Makes a session that is alone in its trajectory the child of this one; whether it could. Nobody descends from
        it, so there are no cycles."""
        if child is self or child.parent is not None or child.trajectory.num_sessions > 1:
            return False
        if self.depth >= MAX_DEPTH or self.trajectory.num_sessions >= MAX_SESSIONS:
            return False
        child.parent, child.depth = self, self.depth + 1
        self.trajectory.add(child.trajectory)
        child.trajectory = self.trajectory
        return True

    def leave(self) -> None:
        """The session is forgotten: nobody waits for anybody through it. What it has used stays used."""
        self.waits = False
        self.trajectory.num_sessions -= 1
        self.parent = None

    def waiting(self) -> Iterator["Member"]:
        """The ancestors that wait for this session, nearest first: its parent, the one that waits for that, ..."""
        ancestor = self.parent
        while ancestor is not None and ancestor.waits:
            yield ancestor
            ancestor = ancestor.parent

    def inherited(self) -> tuple[Priority | None, float | None]:
        """The highest priority and the shortest deadline among those that wait."""
        waiting = list(self.waiting())
        priority = max((member.priority for member in waiting), key=lambda p: p.urgency, default=None)
        deadlines = [member.ttft_deadline_s for member in waiting if member.ttft_deadline_s is not None]
        return priority, min(deadlines, default=None)
