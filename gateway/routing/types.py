"""Owns the values a placement is decided from and the values it results in. Pure, frozen, serializable."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One engine as the router sees it at the moment of a decision.

    What is in flight is of all gateways: this one's own, counted when sent, and the others', as the engine's worker
    reports them (up to `engine.reports.LOAD_INTERVAL_S` old).
    """

    replica_id: str
    in_flight_requests: int
    in_flight_tokens: int
    num_kv_blocks: int
    num_kv_blocks_used: int


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The replicas that may be chosen, each pool in the order of its ids."""

    prefill: tuple[ReplicaView, ...]
    decode: tuple[ReplicaView, ...]

    def without(self, replica_ids: frozenset[str]) -> "ClusterSnapshot":
        return ClusterSnapshot(
            prefill=tuple(view for view in self.prefill if view.replica_id not in replica_ids),
            decode=tuple(view for view in self.decode if view.replica_id not in replica_ids),
        )


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request.

    `needs_whole_prompt`: the engine that answers must read the prompt itself.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    num_choices: int = 1
    needs_whole_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Who prefills (None: the decode replica itself) and who decodes, why, and what each candidate scored."""

    prefill: str | None
    decode: str
    policy: str
    reason: str
    scores: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Rejection:
    """No placement: the HTTP status the client gets, why, and when to try again."""

    status: int
    reason: str
    retry_after_s: int
