"""Owns the Ray Serve adapter of the port between gateways: who they are, and one call to all of them.

Serve has no custom request router for an ingress deployment behind HAProxy, so that a call cannot be pinned to a
gateway: `DeploymentHandle.broadcast` asks them all, and each answers with its id (docs/adr/0013).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import Metric
from ray.serve.handle import DeploymentHandle

from gateway.peers import Answers, PoliciesInUse, gather_answers

log = logging.getLogger("baton.peers")

TIMEOUT_S = 2.0
"""The longest wait for other gateways: a fifth of Prometheus's own limit for a scrape."""


class RayPeers:
    """Gateways that are replicas of one Ray Serve deployment.

    Its class has the methods that are called here: `peer_metrics(asker)`, `peer_receipt(asker, request_id)` and
    `peer_policies(asker)` answer with the replica's own id and the answer, or None to themselves.
    """

    def __init__(self, own_id: str, handle: DeploymentHandle):
        self.own_id = own_id
        # With its first options a handle starts to follow the controller's list of replicas.
        self._handle = handle.options()

    def members(self) -> tuple[str, ...]:
        router: Any = self._handle._router
        replicas = router._asyncio_router.request_router
        ids = () if replicas is None else (replica_id.unique_id for replica_id in list(replicas.curr_replicas))
        return tuple(sorted({self.own_id, *ids}))

    async def metrics(self) -> Answers[list[Metric]]:
        return await self._ask("peer_metrics")

    async def receipt(self, request_id: str) -> Answers[dict[str, Any] | None]:
        return await self._ask("peer_receipt", request_id, is_enough=lambda receipt: receipt is not None)

    async def policies(self) -> Answers[PoliciesInUse]:
        return await self._ask("peer_policies")

    async def _ask(self, method: str, *arguments: Any, is_enough: Callable[[Any], bool] = lambda _: False) -> Any:
        others = [member for member in self.members() if member != self.own_id]
        if not others:
            return Answers({})
        loop = asyncio.get_running_loop()
        end_s = loop.time() + TIMEOUT_S
        try:
            async with asyncio.timeout_at(end_s):
                # `results_async` would lose all answers to one that does not come.
                sent = await self._handle.broadcast(method, self.own_id, *arguments)._fetch_replica_results_async()
        except Exception as error:
            # Whatever Serve raises: this gateway's own answer is better than none, and the others show as missing.
            log.warning("%s could not be asked of the other gateways: %r", method, error)
            return Answers({}, tuple(others))
        try:
            calls = [result.get_async() for result in sent]
            return await gather_answers(calls, others, end_s - loop.time(), is_enough)
        finally:
            for result in sent:
                result.cancel()
