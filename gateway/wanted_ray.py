"""Owns how many replicas Ray Serve is to run of each pool at this moment, as its controller tells."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError
from ray.serve.context import _get_global_client

from engine.protocol import Phase

EVERY_S = 5.0
ANSWER_S = 5.0

log = logging.getLogger("baton.wanted")


class WantedReplicas:
    """Asks again and again, because Serve tells nobody. Between two answers the last one holds."""

    def __init__(self, controller: Any, app_name: str, at_first: Mapping[Phase, int]) -> None:
        """`at_first`: by the configuration, until the controller has answered. A pool that has 0 there has no
        deployment; those of the others are named after their phase."""
        self.replicas = at_first
        self._deployments = [phase for phase, number in at_first.items() if number]
        self._controller = controller
        self._app_name = app_name

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    told = {phase: await self._ask(phase) for phase in self._deployments}
                self.replicas = {**self.replicas, **told}
            except (RayError, TimeoutError) as error:
                # Serve does without its controller for a while; of an application that is replaced it knows nothing.
                log.warning("Serve's controller does not tell how many replicas it is to run: %r", error)
            await asyncio.sleep(EVERY_S)

    async def _ask(self, phase: Phase) -> int:
        details = await self._controller.get_deployment_details.remote(self._app_name, phase.value)
        return details.target_num_replicas


def controller() -> Any:
    """Serve's, for a process that is a replica of it."""
    client: Any = _get_global_client()
    return client._controller
