"""Owns the replay of recorded decisions: by their own policy, which must decide the same, or by another. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gateway.routing.policies import POLICIES, place
from gateway.routing.receipts import Decision, Receipt
from gateway.routing.types import ClusterSnapshot, Placement, RequestView

MAX_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class Work:
    """What placements come to. `read_tokens` are prompt tokens that the reading replicas did not have cached, as far as
    was known; `reused_tokens` those that they had."""

    num_split: int = 0
    read_tokens: int = 0
    reused_tokens: int = 0

    def plus(self, request: RequestView, snapshot: ClusterSnapshot, placement: Placement) -> "Work":
        reader = placement.prefill or placement.decode
        cached = snapshot.cached(reader)
        # An engine computes a prompt's last token in any case.
        reused = min(cached, max(request.num_prompt_tokens - 1, 0))
        return Work(
            self.num_split + (placement.prefill is not None),
            self.read_tokens + request.num_prompt_tokens - reused,
            self.reused_tokens + reused,
        )


@dataclass(slots=True)
class Replay:
    """What came of replaying decisions. `unknown` counts decisions by policies that this version does not have."""

    num_decisions: int = 0
    num_same: int = 0
    num_other_prefill: int = 0
    num_other_decode: int = 0
    recorded: Work = field(default_factory=Work)
    replayed: Work = field(default_factory=Work)
    unknown: Counter[str] = field(default_factory=Counter[str])
    absent: Counter[str] = field(default_factory=Counter[str])
    """How many receipts say nothing of an input, by its name: an earlier version has written them."""
    differences: list[str] = field(default_factory=list[str])
    """The first few, in words."""


def replay(receipts: Iterable[Receipt], policy: str | None = None) -> Replay:
    """Decides everything again from the recorded inputs: by the policy that decided it, or by the one that is named.

    Another policy decides each on the load that was there, not on the load that it would have made. Raises
    KeyError for a policy that does not exist.
    """
    found = Replay()
    named = None if policy is None else POLICIES[policy]
    for receipt in receipts:
        for decision in _decisions(receipt):
            before = decision.placement
            decide = named or POLICIES.get(before.policy)
            if decide is None:
                found.unknown[before.policy] += 1
                continue
            after = place(decide, decision.request, decision.snapshot, decision.seed)
            found.num_decisions += 1
            found.recorded = found.recorded.plus(decision.request, decision.snapshot, before)
            if isinstance(after, Placement):
                found.replayed = found.replayed.plus(decision.request, decision.snapshot, after)
                found.num_other_prefill += after.prefill != before.prefill
                found.num_other_decode += after.decode != before.decode
            same = after == before if named is None else _where(after) == _where(before)
            found.num_same += same
            if not same and len(found.differences) < MAX_DIFFERENCES:
                found.differences.append(f"{decision.sequence_id}: {_words(before)}; now {_words(after)}")
    return found


def _decisions(receipt: Receipt) -> Iterator[Decision]:
    yield Decision(receipt.request_id, receipt.seed, receipt.request, receipt.snapshot, receipt.placement)
    yield from receipt.later


def _where(decided: object) -> object:
    return (decided.prefill, decided.decode) if isinstance(decided, Placement) else decided


def _words(decided: object) -> str:
    if isinstance(decided, Placement):
        return f"{decided.prefill or 'no prefill'}, {decided.decode} ({decided.reason})"
    return f"refused ({decided})"
