"""Owns the gateway's view of the cluster: it folds reports and its own sendings into a ClusterSnapshot."""

from dataclasses import dataclass, field

from engine.protocol import EngineInfo, EngineLoad, Phase, WorkerReport
from gateway.routing.types import ClusterSnapshot, ReplicaView


@dataclass
class Replica:
    """One member of a pool. `ready`: its stream is attached and every hand-off pair it is part of is warm."""

    replica_id: str
    phase: Phase
    info: EngineInfo | None = None
    load: EngineLoad = field(default_factory=EngineLoad)
    ready: bool = False
    in_flight: dict[str, int] = field(default_factory=dict)
    in_flight_tokens: int = 0

    @property
    def attached(self) -> bool:
        return self.info is not None


class Cluster:
    """The replicas of both pools, as reported, with what this gateway has in flight on each."""

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
        if report.info is not None:
            replica.info = report.info

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
    return ReplicaView(
        replica_id=replica.replica_id,
        in_flight_requests=len(replica.in_flight),
        in_flight_tokens=replica.in_flight_tokens,
        num_kv_blocks=replica.info.num_kv_blocks if replica.info else 0,
        num_kv_blocks_used=replica.load.num_kv_blocks_used,
    )
