"""Owns what the pools would need done to them, and whether it was right: proposals, which nobody carries out. Pure.

A proposal is made once, with its reason, and held against what then happened when its time is over. So there is
evidence, by kind of action, before any of them is left to act by itself (docs/adr/0020).
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from engine.protocol import Phase
from gateway.scaling.sizing import PoolSizes


class Action(enum.StrEnum):
    QUARANTINE = "quarantine"
    """Place nothing new on a replica: it comes and goes, is slow, or its hand-offs fail."""
    REPLACE = "replace"
    """End a replica that should have been in quarantine for a while."""
    GROW = "grow"
    SHRINK = "shrink"


class Verdict(enum.StrEnum):
    """Of a proposal nobody followed."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    """What it was about went away, or nothing happened that could tell."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """A member of a pool. `slowness`: what its last steps took over what the pool's costs say; None: it did nothing."""

    replica_id: str
    phase: Phase
    ready: bool
    slowness: float | None = None
    num_transfer_failures: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """The pools at one time. `wanted`: by the sizing, `needed` at this moment, before anything is held. `kept_share`:
    how many of the last turns were in time; None: there were too few."""

    at_s: float
    replicas: tuple[ReplicaHealth, ...]
    wanted: PoolSizes
    needed: PoolSizes
    kept_share: float | None = None

    def health(self, replica_id: str) -> ReplicaHealth | None:
        return next((one for one in self.replicas if one.replica_id == replica_id), None)

    def size(self, phase: Phase) -> int:
        return sum(one.phase is phase for one in self.replicas)


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """A replica is bad if it was lost `flaps` times in `memory_s`, if it has been `slow` times as slow as its pool for
    `patience_s`, or if `failures` of its hand-offs failed in `memory_s`. `horizon_s` is how long a proposal has to
    prove right; `target` the share of turns in time below which more replicas are right."""

    flaps: int = 2
    slow: float = 2.0
    failures: int = 3
    patience_s: float = 30.0
    memory_s: float = 600.0
    horizon_s: float = 300.0
    target: float = 0.95


@dataclass(frozen=True, slots=True)
class Proposal:
    """`subject`: a replica's id, or a pool. `size`: what the pool should have."""

    action: Action
    subject: str
    reason: str
    made_s: float
    size: int = 0


@dataclass(frozen=True, slots=True)
class Scored:
    proposal: Proposal
    verdict: Verdict
    happened: str


@dataclass(frozen=True, slots=True)
class History:
    """What was seen of one replica: when it was lost, since when it is slow, its failed hand-offs by time, since when
    it is bad."""

    ready: bool
    lost_s: tuple[float, ...] = ()
    slow_since_s: float | None = None
    failures: tuple[tuple[float, int], ...] = ()
    bad_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """A proposal whose time is not over: the most that its pool needed since, and the lowest share in time."""

    proposal: Proposal
    most_needed: int = 0
    least_kept: float | None = None
    was_lost: bool = False


@dataclass(frozen=True, slots=True)
class PlannerMemory:
    replicas: Mapping[str, History] = field(default_factory=dict[str, History])
    open: tuple[Open, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    proposals: tuple[Proposal, ...]
    scored: tuple[Scored, ...]
    memory: PlannerMemory


def plan(seen: Observation, memory: PlannerMemory, config: PlannerConfig = PlannerConfig()) -> Plan:
    """What to propose now, and what has come of earlier proposals. The same arguments give the same plan."""
    replicas = {
        one.replica_id: _followed(one, memory.replicas.get(one.replica_id), seen.at_s, config) for one in seen.replicas
    }
    waiting = [_watched(one, seen, replicas) for one in memory.open]
    over = [one for one in waiting if seen.at_s - one.proposal.made_s >= config.horizon_s or _is_moot(one, seen)]
    scored = tuple(_score(one, seen, replicas, config) for one in over)
    still = [one for one in waiting if one not in over]
    made = {(one.proposal.action, one.proposal.subject) for one in still}
    new = tuple(p for p in _proposals(seen, replicas, config) if (p.action, p.subject) not in made)
    opened = (*still, *(_watched(Open(proposal), seen, replicas) for proposal in new))
    return Plan(new, scored, PlannerMemory(replicas, opened))


def _followed(now: ReplicaHealth, before: History | None, at_s: float, config: PlannerConfig) -> History:
    if before is None:
        before = History(now.ready)
    since_s = at_s - config.memory_s
    lost = (*before.lost_s, at_s) if before.ready and not now.ready else before.lost_s
    # The first of those that are kept says what there was before the others.
    failures = (*before.failures, (at_s, now.num_transfer_failures))
    while len(failures) > 1 and failures[1][0] <= since_s:
        failures = failures[1:]
    slow_since_s = before.slow_since_s
    if now.slowness is not None:
        slow_since_s = (slow_since_s if slow_since_s is not None else at_s) if now.slowness >= config.slow else None
    history = History(now.ready, tuple(s for s in lost if s > since_s), slow_since_s, failures)
    if _complaint(history, at_s, config) is None:
        return history
    return replace(history, bad_since_s=at_s if before.bad_since_s is None else before.bad_since_s)


def _complaint(history: History, at_s: float, config: PlannerConfig) -> str | None:
    """What is wrong with a replica, in words."""
    if len(history.lost_s) >= config.flaps:
        return f"it was lost {len(history.lost_s)} times in {config.memory_s:g} s"
    if history.slow_since_s is not None and at_s - history.slow_since_s >= config.patience_s:
        return (
            f"for {at_s - history.slow_since_s:.0f} s its steps take {config.slow:g} times what its pool's do, or more"
        )
    failed = history.failures[-1][1] - history.failures[0][1] if history.failures else 0
    if failed >= config.failures:
        return f"{failed} hand-offs from or to it failed in {config.memory_s:g} s"
    return None


def _proposals(seen: Observation, replicas: Mapping[str, History], config: PlannerConfig) -> Iterator[Proposal]:
    for replica_id, history in replicas.items():
        if complaint := _complaint(history, seen.at_s, config):
            yield Proposal(Action.QUARANTINE, replica_id, complaint, seen.at_s)
            bad_s = seen.at_s - (history.bad_since_s if history.bad_since_s is not None else seen.at_s)
            if bad_s >= config.horizon_s:
                yield Proposal(Action.REPLACE, replica_id, f"{complaint}, and that for {bad_s:.0f} s", seen.at_s)
    for phase, wanted in ((Phase.PREFILL, seen.wanted.prefill), (Phase.DECODE, seen.wanted.decode)):
        if wanted != (size := seen.size(phase)):
            action = Action.GROW if wanted > size else Action.SHRINK
            yield Proposal(action, phase, f"{wanted} {phase} replicas in the place of {size}", seen.at_s, wanted)


def _needed(proposal: Proposal, seen: Observation) -> int:
    return seen.needed.prefill if proposal.subject == Phase.PREFILL else seen.needed.decode


def _watched(one: Open, seen: Observation, replicas: Mapping[str, History]) -> Open:
    kept = one.least_kept
    if seen.kept_share is not None:
        kept = seen.kept_share if kept is None else min(kept, seen.kept_share)
    history = replicas.get(one.proposal.subject)
    was_lost = one.was_lost or (history is not None and any(s > one.proposal.made_s for s in history.lost_s))
    return replace(
        one, most_needed=max(one.most_needed, _needed(one.proposal, seen)), least_kept=kept, was_lost=was_lost
    )


def _is_moot(one: Open, seen: Observation) -> bool:
    """Whether what a proposal is about is gone, or was done by somebody."""
    proposal = one.proposal
    if proposal.action in (Action.QUARANTINE, Action.REPLACE):
        return seen.health(proposal.subject) is None
    return seen.size(Phase(proposal.subject)) == proposal.size


def _score(one: Open, seen: Observation, replicas: Mapping[str, History], config: PlannerConfig) -> Scored:
    proposal = one.proposal
    if proposal.action in (Action.QUARANTINE, Action.REPLACE):
        if (history := replicas.get(proposal.subject)) is None:
            return Scored(proposal, Verdict.RIGHT, "it has left its pool")
        if one.was_lost:
            return Scored(proposal, Verdict.RIGHT, "it was lost again")
        if complaint := _complaint(replace(history, lost_s=()), seen.at_s, config):
            return Scored(proposal, Verdict.RIGHT, complaint)
        if not history.ready:
            return Scored(proposal, Verdict.RIGHT, "it is not ready")
        return Scored(proposal, Verdict.WRONG, "it has recovered by itself")
    if _is_moot(one, seen):
        return Scored(proposal, Verdict.UNKNOWN, "the pool has that size now")
    kept = "too few turns to tell" if one.least_kept is None else f"{one.least_kept:.1%} in time at the worst"
    happened = f"{one.most_needed} were needed at the most, {kept}"
    is_late = one.least_kept is not None and one.least_kept < config.target
    if proposal.action is Action.GROW:
        if one.least_kept is None:
            return Scored(proposal, Verdict.UNKNOWN, happened)
        return Scored(proposal, Verdict.RIGHT if is_late else Verdict.WRONG, happened)
    return Scored(proposal, Verdict.WRONG if is_late or one.most_needed > proposal.size else Verdict.RIGHT, happened)
