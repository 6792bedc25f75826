"""Owns how a Ray Serve handle chooses a replica: it takes the one that the caller names.

Ray's RequestRouter is an alpha API. Ray ships this module to every process by value, so that anything it shares with
the rest of the process is imported inside the methods.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PinnedRequestRouter(RequestRouter):
    """Sends each call to the replica it names, and publishes the pool's members to POOLS."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        from gateway.transport_ray import POOLS

        POOLS.publish(self._deployment_id.name, [replica.replica_id.unique_id for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        from gateway.transport_ray import TARGET

        target = pending_request.kwargs.get(TARGET) if pending_request else None
        if pending_request is None or target is None:
            return [candidate_replicas]
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == target:
                return [[replica]]
        from gateway.transport import ReplicaGoneError

        # No candidate would be retried without end. The call is failed here, and then anything may be returned.
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGoneError(f"{target} is not in its pool any more"))
        return [candidate_replicas]
