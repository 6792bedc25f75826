"""Owns the gateway's view of the cluster: it folds reports and its own sendings into a ClusterSnapshot."""

from dataclasses import dataclass, field

from engine.blocks import BlockMirror
from engine.protocol import EngineInfo, EngineLoad, InFlight, Phase, WorkerReport
from gateway.routing.types import ClusterSnapshot, ReplicaView


@dataclass
class Replica:
    """One member of a pool. `ready`: its stream is attached and every hand-off pair it is part of is warm.

    `in_flight` is what this gateway has sent there: tokens by request id, their sum in `in_flight_tokens`; it is exact
    and counts before the replica knows of it. `others_in_flight` is what the other gateways have there, as reported.
    `blocks` are the engine's cached blocks, as reported.
    """

    replica_id: str
    phase: Phase
    info: EngineInfo | None = None
    load: EngineLoad = field(default_factory=EngineLoad)
    ready: bool = False
    in_flight: dict[str, int] = field(default_factory=dict)
    in_flight_tokens: int = 0
    others_in_flight: InFlight = field(default_factory=InFlight)
    blocks: BlockMirror = field(default_factory=lambda: BlockMirror(0))

    @property
    def attached(self) -> bool:
        return self.info is not None

    @property
    def all_in_flight(self) -> InFlight:
        """What all gateways have in flight here."""
        return InFlight(
            len(self.in_flight) + self.others_in_flight.num_requests,
            self.in_flight_tokens + self.others_in_flight.num_tokens,
        )

    def detach(self) -> None:
        """Forgets what was reported: nobody knows what has become of it since. The next stream tells it anew."""
        self.ready, self.info = False, None
        self.others_in_flight, self.blocks = InFlight(), BlockMirror(0)


class Cluster:
    """The replicas of both pools, as reported, with what is in flight on each."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}

    def add(self, replica_id: str, phase: Phase) -> Replica:
        replica = self._replicas[replica_id] = Replica(replica_id, phase)
        return replica

    def remove(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)

    def get(self, replica_id: str) -> Replica | None:
        return self._replicas.get(replica_id)

    def pool(self, phase: Phase, *, ready_only: bool = False) -> list[Replica]:
        """The replicas of one pool in the order of their ids."""
        return sorted(
            (r for r in self._replicas.values() if r.phase is phase and (r.ready or not ready_only)),
            key=lambda replica: replica.replica_id,
        )

    def fold(self, report: WorkerReport) -> None:
        replica = self._replicas.get(report.replica_id)
        if replica is None:
            return
        replica.load = report.load
        replica.others_in_flight = report.others_in_flight
        if report.info is not None:
            replica.info = report.info
            replica.blocks = BlockMirror(report.info.num_kv_blocks)
        if report.blocks is not None:
            replica.blocks.apply(report.blocks)

    def sent(self, replica_id: str, request_id: str, tokens: int) -> None:
        """Counts a request's tokens as in flight on a replica until `ended`."""
        self.ended(replica_id, request_id)
        if replica := self._replicas.get(replica_id):
            replica.in_flight[request_id] = tokens
            replica.in_flight_tokens += tokens

    def produced(self, replica_id: str, request_id: str, tokens: int) -> None:
        """Adds tokens a running request has written: its KV, and so each further step, has grown by them."""
        replica = self._replicas.get(replica_id)
        if replica and request_id in replica.in_flight:
            replica.in_flight[request_id] += tokens
            replica.in_flight_tokens += tokens

    def ended(self, replica_id: str, request_id: str) -> None:
        if replica := self._replicas.get(replica_id):
            replica.in_flight_tokens -= replica.in_flight.pop(request_id, 0)

    def snapshot(self) -> ClusterSnapshot:
        """The replicas a request may be placed on now."""
        return ClusterSnapshot(
            prefill=tuple(map(_view, self.pool(Phase.PREFILL, ready_only=True))),
            decode=tuple(map(_view, self.pool(Phase.DECODE, ready_only=True))),
        )


def _view(replica: Replica) -> ReplicaView:
    in_flight = replica.all_in_flight
    return ReplicaView(
        replica_id=replica.replica_id,
        in_flight_requests=in_flight.num_requests,
        in_flight_tokens=in_flight.num_tokens,
        num_kv_blocks=replica.info.num_kv_blocks if replica.info else 0,
        num_kv_blocks_used=replica.load.num_kv_blocks_used,
    )
