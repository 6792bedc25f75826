"""The planner's shadow run beside real requests: it looks, tells, and changes nothing."""

import asyncio
import logging

import pytest

from gateway import metrics
from gateway.planning import LOOKS_EVERY_S, ShadowPlanner
from gateway.scaling.planner import Action, PlannerConfig
from gateway.scaling.sizing import Bounds, PoolSizes, SizingConfig
from tests.unit.gateway.rig import PROMPT, Rig
from tests.unit.virtual_time import simulate

BOUNDS = Bounds(PoolSizes(1, 1), PoolSizes(8, 8))


def proposed(action: Action) -> float:
    return metrics.PROPOSALS.labels(action)._value.get()


def test_what_it_would_do_is_logged_counted_and_shown_and_nothing_is_done(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=2) as rig:
            await rig.ask(PROMPT)
            planner = ShadowPlanner(rig.orchestrator, BOUNDS, SizingConfig(), PlannerConfig(horizon_s=60.0))
            before = proposed(Action.SHRINK)
            with caplog.at_level(logging.INFO, "baton.planner"):
                for look in range(8):
                    planner.look(look * LOOKS_EVERY_S)
            assert proposed(Action.SHRINK) == before + 2
            assert "proposed, not done: shrink decode: 1 decode replicas in the place of 2" in caplog.text
            told = planner.as_json()
            assert [one["subject"] for one in told["open"]] == ["decode"]
            assert [one["verdict"] for one in told["scored"]] == ["right"]
            assert len(rig.cluster.snapshot().decode) == 2
            await rig.ask(PROMPT)

    simulate(main)


def test_it_outlives_a_look_that_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Rig() as rig:
            planner = ShadowPlanner(rig.orchestrator, BOUNDS, SizingConfig(), PlannerConfig())
            looks: list[float] = []

            def look(now_s: float) -> None:
                looks.append(now_s)
                raise RuntimeError("no view")

            monkeypatch.setattr(planner, "look", look)
            task = asyncio.create_task(planner.run())
            await asyncio.sleep(2.5 * LOOKS_EVERY_S)
            task.cancel()
            assert len(looks) == 2
            assert "goes on with its next look" in caplog.text

    simulate(main)
