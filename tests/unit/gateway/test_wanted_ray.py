"""What Serve is to run of each pool, as a gateway hears it from Serve's controller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError

from engine.protocol import Phase
from gateway.wanted_ray import ANSWER_S, EVERY_S, WantedReplicas
from tests.unit.virtual_time import simulate


class Controller:
    """What of Serve's controller is called. It answers with `targets`, or not at all, or with a failure."""

    def __init__(self, **targets: int) -> None:
        self.targets = targets
        self.is_silent = False
        self.failure: Exception | None = None
        self.get_deployment_details = SimpleNamespace(remote=self._details)

    async def _details(self, app_name: str, deployment: str) -> Any:
        assert app_name == "baton"
        if self.is_silent:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(target_num_replicas=self.targets[deployment])


@asynccontextmanager
async def running(wanted: WantedReplicas) -> AsyncIterator[None]:
    task = asyncio.create_task(wanted.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_it_is_the_configurations_number_until_serve_has_told_and_then_serves() -> None:
    async def main() -> None:
        controller = Controller(prefill=1, decode=2)
        wanted = WantedReplicas(controller, "baton", {Phase.PREFILL: 1, Phase.DECODE: 2})
        assert wanted.replicas == {Phase.PREFILL: 1, Phase.DECODE: 2}
        controller.targets = {"prefill": 2, "decode": 5}
        async with running(wanted):
            await asyncio.sleep(0.1)
            assert wanted.replicas == {Phase.PREFILL: 2, Phase.DECODE: 5}
            controller.targets = {"prefill": 1, "decode": 3}
            await asyncio.sleep(EVERY_S)
            assert wanted.replicas == {Phase.PREFILL: 1, Phase.DECODE: 3}

    simulate(main)


def test_serve_is_not_asked_for_a_pool_that_there_is_not() -> None:
    async def main() -> None:
        wanted = WantedReplicas(Controller(decode=3), "baton", {Phase.PREFILL: 0, Phase.DECODE: 2})
        async with running(wanted):
            await asyncio.sleep(0.1)
            assert wanted.replicas == {Phase.PREFILL: 0, Phase.DECODE: 3}

    simulate(main)


def test_what_was_told_last_holds_while_the_controller_fails_or_says_nothing() -> None:
    async def main() -> None:
        controller = Controller(decode=3)
        wanted = WantedReplicas(controller, "baton", {Phase.DECODE: 2})
        async with running(wanted):
            await asyncio.sleep(0.1)
            controller.targets, controller.failure = {"decode": 4}, RayActorError()
            await asyncio.sleep(EVERY_S)
            controller.failure, controller.is_silent = None, True
            await asyncio.sleep(EVERY_S)
            assert wanted.replicas == {Phase.DECODE: 3}
            controller.is_silent = False
            await asyncio.sleep(EVERY_S + ANSWER_S)
            assert wanted.replicas == {Phase.DECODE: 4}

    simulate(main)
