"""Owns the trees of sessions: who has started whom, what a trajectory has used, whose urgency a child inherits."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.routing.types import Priority

MAX_DEPTH = 8
MAX_SESSIONS = 1000
"""Of one trajectory. Further children are roots of their own."""


@dataclass(slots=True)
class Trajectory:
    """The sessions of one root that are known, and the time on engines that all, the forgotten too, have taken."""

    num_sessions: int = 0
    attained_s: float = 0.0

    def add(self, other: "Trajectory") -> None:
        self.num_sessions += other.num_sessions
        self.attained_s += other.attained_s


@dataclass(slots=True)
class Member:
    """A session's place in its trajectory. `waits`: its last turn has called a tool and the result has not come.
    `priority` and `ttft_deadline_s` are those of its last turn. `is_known`: the session has not been forgotten."""

    name: str = ""
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(num_sessions=1))
    parent: "Member | None" = None
    depth: int = 0
    waits: bool = False
    priority: Priority = Priority.NORMAL
    ttft_deadline_s: float | None = None
    is_known: bool = True

    @property
    def is_alone(self) -> bool:
        """No other session is known of its trajectory: it has no descendants."""
        return self.trajectory.num_sessions == 1

    def adopt(self, child: "Member") -> bool:
        """Makes a session that has no parent, or a forgotten one, the child of this one; whether it could. One that is
        alone in its trajectory joins this one's. One that is not stays in its own, under a parent that is of it, or
        alone and joins it: so a parent that comes back after it was forgotten takes its place again.

        A child is deeper than its parent, and becomes so only while it has no descendants: there are no cycles."""
        if child is self or (child.parent is not None and child.parent.is_known):
            return False
        if child.is_alone and self.depth < MAX_DEPTH and self._takes_in(child):
            child.parent, child.depth = self, self.depth + 1
            return True
        is_between = child.parent is not None and self.depth < child.depth
        is_of_it = self.trajectory is child.trajectory
        if is_between and (is_of_it or (self.is_alone and child._takes_in(self))):
            child.parent = self
            return True
        return False

    def leave(self) -> None:
        """The session is forgotten: nobody waits for anybody through it. What it has used stays used."""
        self.waits = self.is_known = False
        self.trajectory.num_sessions -= 1
        self.parent = None

    def _takes_in(self, other: "Member") -> bool:
        """Whether there is room in its trajectory for one that is alone; then it is in it."""
        if self.trajectory.num_sessions >= MAX_SESSIONS:
            return False
        self.trajectory.add(other.trajectory)
        other.trajectory = self.trajectory
        return True

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
