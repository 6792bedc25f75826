"""Owns what a receipt says of a group of sequences that has ended: outcome, reuse, times. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.protocol import EngineTimes, FinishReason, KVHandoff, PrefillFacts
from gateway.lifecycle import Fault
from gateway.routing.receipts import Outcome, Times


@dataclass
class Attempt:
    """What the engines of one placement have told of a sequence. `prefill`, `decode`: the replicas that have told their
    facts; `num_told_tokens`: of the answer, from its first token
    on, those that the client had before included; `handoff_blocks`: what decode was offered; `source`: what prefill was
    offered, from a decode replica that was asked; `ask_facts`: how that one came by it."""

    num_told_tokens: int = 0
    prefill: str | None = None
    decode: str | None = None
    prefill_facts: PrefillFacts | None = None
    decode_facts: PrefillFacts | None = None
    prefill_times: EngineTimes | None = None
    decode_times: EngineTimes | None = None
    handoff_blocks: int = 0
    blocks_moved: int = 0
    prefill_has_written: bool = False
    source: KVHandoff | None = None
    ask_facts: PrefillFacts | None = None

    @property
    def asked_tokens(self) -> int:
        """What prefill has fetched from decode."""
        return self.prefill_facts.num_external_cached_tokens if self.prefill_facts else 0


@dataclass
class History:
    """What has become of one sequence so far. Times are on the orchestrator's clock. `first` is the attempt that wrote
    the first token, `faults_s` when each fault was met."""

    num_prompt_tokens: int
    arrived_s: float
    attempts: list[Attempt] = field(default_factory=lambda: [Attempt()])
    first: Attempt | None = None
    first_token_s: float | None = None
    output_tokens: int = 0
    finish_reason: FinishReason | None = None
    facts_told: PrefillFacts | None = None
    faults_s: list[float] = field(default_factory=list[float])

    @property
    def attempt(self) -> Attempt:
        return self.attempts[-1]


@dataclass(frozen=True)
class GroupTimes:
    """When a group's HTTP request arrived, how long its placement was decided, and now."""

    received_s: float
    decide_s: float
    now_s: float


def blocks_moved(handoff_blocks: int, facts: PrefillFacts, block_size_tokens: int) -> int:
    """Blocks that decode has fetched: those of the hand-off that it had not cached itself. An engine computes the last
    prompt token in any case; more than that means that it fetched nothing."""
    if not handoff_blocks or facts.num_computed_tokens > 1:
        return 0
    return handoff_blocks - facts.num_local_cached_tokens // block_size_tokens


def has_fetched(source: KVHandoff, facts: PrefillFacts) -> bool:
    """Whether prefill has computed no more than what the source does not cover."""
    return facts.num_computed_tokens <= max(facts.num_prompt_tokens - source.num_tokens, 1)


def facts_for_client(own: Attempt, leader: Attempt) -> PrefillFacts | None:
    """What the placement really reused: tokens that no engine computed for this prompt; None while nobody has told."""
    by_prefill = leader.prefill_facts if leader.handoff_blocks or leader.prefill_has_written else None
    facts = by_prefill or leader.decode_facts or own.decode_facts
    if facts is None:
        return None
    cached = facts.num_local_cached_tokens
    if by_prefill is not None:
        # Of what it fetched, the replica that was asked has computed what it had not cached any more.
        by_asked = leader.ask_facts.num_computed_tokens if leader.ask_facts else 0
        cached += max(leader.asked_tokens - by_asked, 0)
    return PrefillFacts(facts.num_prompt_tokens, facts.num_prompt_tokens - cached, cached, 0)


def outcome(
    histories: Sequence[History],
    faults: Sequence[Fault],
    times: GroupTimes,
    block_size_tokens: int,
    kv_block_bytes: int,
) -> Outcome:
    """`histories`: of all the group's sequences, the leader's first; `faults`: all that they have met."""
    leader = histories[0]
    reasons = [history.finish_reason for history in histories]
    status = "finished"
    if FinishReason.ERROR in reasons:
        status = "failed"
    elif None in reasons or FinishReason.ABORT in reasons:
        status = "aborted"
    attempts = [attempt for history in histories for attempt in history.attempts]
    moved = sum(attempt.blocks_moved for attempt in attempts)
    asked = sum(-(-attempt.asked_tokens // max(block_size_tokens, 1)) for attempt in attempts)
    on_decode = [facts for attempt in attempts for facts in (attempt.decode_facts, attempt.ask_facts) if facts]
    first_s = leader.first_token_s
    facts = leader.facts_told or facts_for_client(leader.attempt, leader.attempt)
    timed = leader.first or leader.attempt
    return Outcome(
        status=status,
        finish_reason=str(reasons[0]) if reasons[0] else None,
        ttft_ms=_ms(first_s - times.received_s) if first_s is not None else None,
        duration_ms=_ms(times.now_s - times.received_s),
        prompt_tokens=leader.num_prompt_tokens,
        output_tokens=sum(history.output_tokens for history in histories),
        reused_tokens=facts.num_local_cached_tokens if facts else 0,
        prefill_computed_tokens=sum(a.prefill_facts.num_computed_tokens for a in attempts if a.prefill_facts),
        decode_computed_tokens=sum(facts.num_computed_tokens for facts in on_decode),
        kv_blocks_moved=moved,
        kv_bytes_moved=moved * kv_block_bytes,
        kv_blocks_asked=asked,
        kv_bytes_asked=asked * kv_block_bytes,
        faults=tuple(map(str, faults)),
        fault_kinds=tuple(fault.kind.value for fault in faults),
        fault_times_ms=tuple(_ms(at_s - times.received_s) for history in histories for at_s in history.faults_s),
        times_ms=_times(leader, timed, times),
        prefill_replica=timed.prefill,
        decode_replica=timed.decode,
        prefill_has_written=timed.prefill_has_written,
    )


def _times(leader: History, attempt: Attempt, group: GroupTimes) -> Times:
    """The leader's times, those in engines of the attempt that wrote the first token: what went before is transit. An
    engine that never answered leaves its stages open, and with them the transit."""
    first_s = leader.first_token_s
    front_end_s = leader.arrived_s - group.received_s
    prefill, decode = attempt.prefill_times, attempt.decode_times
    on_the_way = [prefill] if attempt.prefill_has_written else [prefill, decode]
    engines_s = sum(times.waited_s + times.computed_s for times in on_the_way if times)
    gateway_s = None if first_s is None else max(first_s - group.received_s - engines_s, 0.0)
    transit_s = None if gateway_s is None else max(gateway_s - front_end_s - group.decide_s, 0.0)
    return Times(
        front_end=_ms(front_end_s),
        decide=_ms(group.decide_s),
        prefill_wait=_ms(prefill.waited_s) if prefill else None,
        prefill_compute=_ms(prefill.computed_s) if prefill else None,
        decode_wait=_ms(decode.waited_s) if decode else None,
        decode_compute=_ms(decode.computed_s) if decode else None,
        transit=_ms(transit_s) if transit_s is not None else None,
        decode=_ms(group.now_s - first_s) if first_s is not None else None,
        gateway=_ms(gateway_s) if gateway_s is not None else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
