"""Owns the values a placement is decided from and the values it results in. Pure, frozen, serializable."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from gateway.routing.costs import Costs


class Priority(enum.StrEnum):
    """What a client says its request is to the others; under load the lower are refused first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def urgency(self) -> int:
        """0 for the lowest."""
        return tuple(Priority).index(self)


class Cause(enum.StrEnum):
    """Why a request is refused, as metrics count it. Those of load are 429; where something is missing it is 503."""

    NO_DECODE = "no-decode-replica"
    GATEWAY_FULL = "gateway-full"
    DEADLINE = "deadline"
    QUEUE_FULL = "queue-full"
    TENANT_CONCURRENCY = "tenant-concurrency"
    TENANT_RATE = "tenant-rate"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client says of a request beside its body. `ttft_deadline_s`: when its first token is of no use any more,
    counted from the HTTP request's arrival; None: the configuration's. `session`: which conversation it is a turn of,
    a name made from what the client calls it; None: it does not say. `parent`: the session that has started this one,
    named in the same way. `output_tokens`: how long the answer is expected to be. `tool`: the tool whose result this
    turn brings. `agent`: the program that calls. `is_last`: the session ends with this turn. `is_retry`: it was sent
    before, and refused or lost. `tenant`: whose key it came with; None: keys are not asked for. `capped` says in words
    what of its claims the tenant's limits have changed.
    """

    priority: Priority = Priority.NORMAL
    ttft_deadline_s: float | None = None
    session: str | None = None
    parent: str | None = None
    output_tokens: int | None = None
    tool: str | None = None
    agent: str | None = None
    is_last: bool = False
    is_retry: bool = False
    tenant: str | None = None
    capped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session before the turn that is placed: how many turns this gateway has placed, and where the last one went.
    `prefill` is where a turn was last prefilled remotely. `attained_s`: the engine time that all sessions of its
    trajectory have taken. `inherited_priority` and `inherited_deadline_s` are the most urgent of all ancestors that
    wait for it, each for the next: their last turns have called a tool that has not answered yet (the deadline counts
    from the arrival, as `Hints.ttft_deadline_s` does). `output_tokens`: how long its answers are on average, or its
    agent's.
    """

    num_turns: int = 0
    prefill: str | None = None
    decode: str | None = None
    attained_s: float = 0.0
    inherited_priority: Priority | None = None
    inherited_deadline_s: float | None = None
    output_tokens: float | None = None


class ReplicaView(msgspec.Struct, frozen=True):
    """One engine as the router sees it at the moment of a decision.

    What is in flight is of all gateways: this one's own, counted when sent, and the others', as the engine's worker
    reports them (up to `engine.reports.LOAD_INTERVAL_S` old). `queued_tokens` of it are prompts of requests that were
    sent there and have no token yet. The rest is measured, and 0 until it was: `prefill_tokens_per_s`, of the tokens
    that are computed; `computed_share` of the prompts read there lately, the rest was cached; `slot_s`, how long a
    request has held one of the `max_num_seqs` (0: unknown) lately. `num_kv_blocks` hold `block_size_tokens` each.
    `read_until_s`: when it will have read the prompts that wait there, as predicted, on the clock of
    `ClusterSnapshot.now_s`. `promised_tokens`: of sessions that are expected to come back to what it has cached.
    Blocks are handed over only between engines of one `kv_format`.
    """

    replica_id: str
    in_flight_requests: int
    in_flight_tokens: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    queued_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    computed_share: float = 1.0
    slot_s: float = 0.0
    max_num_seqs: int = 0
    block_size_tokens: int = 0
    read_until_s: float = 0.0
    promised_tokens: float = 0.0
    kv_format: str = ""

    def blocks_of(self, num_tokens: float) -> float:
        """How many of its KV blocks so many tokens fill."""
        return num_tokens / max(self.block_size_tokens, 1)


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The replicas that may be chosen, each pool in the order of its ids. `expects_prefill`: there should be prefill
    replicas, by the configuration. `cached_tokens` is how much of the request's prompt, from its beginning, each
    replica has in its cache, as its engine reports; who has none is left out. `now_s` is the gateway's clock.
    `can_ask`: decode may be asked for a hand-off of what it has cached, which prefill fetches (docs/adr/0017)."""

    prefill: tuple[ReplicaView, ...]
    decode: tuple[ReplicaView, ...]
    expects_prefill: bool = False
    cached_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    costs: Costs = field(default_factory=Costs)
    now_s: float = 0.0
    can_ask: bool = False

    def without(self, replica_ids: frozenset[str]) -> "ClusterSnapshot":
        return replace(
            self,
            prefill=tuple(view for view in self.prefill if view.replica_id not in replica_ids),
            decode=tuple(view for view in self.decode if view.replica_id not in replica_ids),
        )

    @property
    def has_several_formats(self) -> bool:
        """Whether there are replicas that cannot hand over to each other, as in an update of the engines."""
        formats = {view.kv_format for pool in (self.prefill, self.decode) for view in pool}
        return len(formats) > 1

    def of_format(self, kv_format: str) -> "ClusterSnapshot":
        """Only those that can hand over to each other."""
        return replace(
            self,
            prefill=tuple(view for view in self.prefill if view.kv_format == kv_format),
            decode=tuple(view for view in self.decode if view.kv_format == kv_format),
        )

    def prefill_view(self, replica_id: str) -> ReplicaView:
        return _view(self.prefill, replica_id)

    def decode_view(self, replica_id: str) -> ReplicaView:
        return _view(self.decode, replica_id)

    def read_wait_s(self, view: ReplicaView) -> float:
        """Until a replica has read the prompts that wait there, as predicted."""
        return max(view.read_until_s - self.now_s, 0.0)

    def cached(self, replica_id: str | None) -> int:
        """Tokens of the request's prompt that a replica has cached."""
        return self.cached_tokens.get(replica_id or "", 0)

    def askable_tokens(self, replica_id: str | None, num_prompt_tokens: int) -> int:
        """For how many tokens of a prompt a decode replica can be asked: full blocks, and never the whole prompt, for
        the engine that reads it computes its last token in any case."""
        cached_tokens = self.cached(replica_id)
        if cached_tokens < num_prompt_tokens:
            return cached_tokens
        # What is cached are full blocks: then the prompt is, too.
        view = next((view for view in self.decode if view.replica_id == replica_id), None)
        return max(num_prompt_tokens - view.block_size_tokens, 0) if view else 0


def _view(pool: tuple[ReplicaView, ...], replica_id: str) -> ReplicaView:
    return next(view for view in pool if view.replica_id == replica_id)


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request.

    `needs_whole_prompt`: the engine that answers must read the prompt itself. `prefill_writes`: prefill writes the
    answer's first token (docs/adr/0010). `waited_s`: since the HTTP request came.
    `number` counts the placements that this gateway has decided. `session` is None for a turn of none.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    num_choices: int = 1
    needs_whole_prompt: bool = False
    prefill_writes: bool = False
    hints: Hints = Hints()
    waited_s: float = 0.0
    number: int = 0
    session: SessionView | None = None

    def expected_output_tokens(self, usual: float) -> float:
        """How long the answer will be, as far as is known: as the client says, or as it is usual for the session, or
        for all (`usual`)."""
        told = self.hints.output_tokens or (self.session.output_tokens if self.session else None)
        return min(told or usual, self.max_tokens)

    @property
    def priority(self) -> Priority:
        """Its own class, or that of an ancestor that waits for it."""
        inherited = self.session.inherited_priority if self.session else None
        return max(self.hints.priority, inherited or self.hints.priority, key=lambda priority: priority.urgency)

    @property
    def deadline_s(self) -> float | None:
        """When the first token is of no use any more, to it or to an ancestor that waits for it, counted from the HTTP
        request's arrival; None: nobody says."""
        told = (self.hints.ttft_deadline_s, self.session.inherited_deadline_s if self.session else None)
        return min((deadline_s for deadline_s in told if deadline_s is not None), default=None)

    @property
    def attained_s(self) -> float:
        """Engine time that the request's trajectory has had."""
        return self.session.attained_s if self.session else 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Who prefills (None: the decode replica itself) and who decodes, why, and what each candidate scored. `degraded`:
    a prefill replica would have been chosen, if there were one. `ask`: the decode replica that is asked for what it has
    cached of the prompt, before prefill reads the rest."""

    prefill: str | None
    decode: str
    policy: str
    reason: str
    scores: dict[str, float] = field(default_factory=dict[str, float])
    degraded: bool = False
    ask: str | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """No placement: the HTTP status the client gets, why, and when to try again."""

    status: int
    reason: str
    retry_after_s: int
    cause: Cause = Cause.OTHER


NO_DECODE = Rejection(503, "no decode replica is available", retry_after_s=5, cause=Cause.NO_DECODE)
