"""Owns the experiment `interference`: streams that are written while long prompts arrive, split and aggregated.

Each system is started for its turn and stopped after it, so that nothing of another one runs while it is measured.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import cpu
from bench.client import Client
from bench.compare_systems import aggregated_config
from bench.interference_report import SPLIT, InterferencePlan, InterferenceReport, Storm, aggregated, evaluate, storm
from bench.overhead import PromptMaker
from bench.results import Setting
from bench.stats import Cell, Exchange
from bench.systems import System, make_system
from gateway.settings import Settings, load

SETTLE_S = 2.0
"""Streams run so long before a window begins."""


def make_systems(plan: InterferencePlan, settings: Settings, folder: Path) -> dict[str, System]:
    """By name, not started; `settings` are the plan's configuration. Raises ConfigError, ValueError."""
    configs = {SPLIT: Path(plan.config)} | {
        aggregated(chunk): aggregated_config(settings, chunk, folder) for chunk in plan.chunks
    }
    return {name: make_system("baton", load(config), config) for name, config in configs.items()}


class InterferenceExperiment:
    """`report` is what there is so far, at any time."""

    def __init__(
        self,
        plan: InterferencePlan,
        systems: Mapping[str, System],
        settings: Settings,
        setting: Setting,
        say: Callable[[str], None],
    ):
        """`settings`: of any of the systems, which serve the same model."""
        self._plan = plan
        self._systems = systems
        self._model = settings.model_name
        self._prompts = PromptMaker(settings.model.path, settings.model.trust_remote_code, plan.seed)
        self._setting = setting
        self._say = say
        self._storms: list[Storm] = []
        self._complete = False

    @property
    def report(self) -> InterferenceReport:
        return evaluate(self._plan, self._setting, self._storms, complete=self._complete)

    def run(self, save: Callable[[], None]) -> None:
        """Calls `save` after each storm. Raises StartFailed, ValueError when streams cannot be measured."""
        for number, name in self._plan.turns():
            system = self._systems[name]
            try:
                began_s = time.monotonic()
                system.start()
                self._say(
                    f"round {number + 1}/{self._plan.rounds}, {name}: started in {time.monotonic() - began_s:.0f} s"
                )
                asyncio.run(self._turn(number, name, system.url, save))
            finally:
                system.stop()
        self._complete = True
        save()

    async def _turn(self, number: int, name: str, url: str, save: Callable[[], None]) -> None:
        async with Client(url, self._model) as client:
            await self._wake(client, number)
            for rate in self._plan.rates_per_s:
                with cpu.first_in_line():
                    found = await self._storm(client, number, name, rate)
                self._storms.append(found)
                save()
                self._say(
                    f"round {number + 1}/{self._plan.rounds}, {name}, {rate:g} prompts/s: ITL p99 "
                    f"{found.itl_p99_ms:.1f} ms, {found.stream_tokens_per_s:.0f} tokens/s, "
                    f"{found.num_in_window} of {found.num_prompts} prompts answered"
                )

    async def _wake(self, client: Client, number: int) -> None:
        """The first requests of a process are slow, and the first hand-off of a pair pays a handshake."""
        plan = self._plan
        for cell in (Cell(plan.prompt_tokens, 16, 4), Cell(plan.storm_tokens, plan.storm_answer_tokens, 2)):
            prompts = self._prompts.make("wake", number, cell, 2 * cell.concurrency)
            await client.run(prompts, cell.output_tokens, cell.concurrency)

    async def _storm(self, client: Client, number: int, name: str, rate_per_s: float) -> Storm:
        plan = self._plan
        arrivals = plan.arrivals(number, rate_per_s)
        cell = Cell(plan.prompt_tokens, plan.answer_tokens, plan.streams)
        storm_cell = Cell(plan.storm_tokens, plan.storm_answer_tokens, 1)
        prompts = self._prompts.make(f"storm {rate_per_s}", number, storm_cell, len(arrivals))
        begin_s = time.perf_counter() + SETTLE_S
        end_s = begin_s + plan.window_s

        async def stream(index: int) -> list[Exchange]:
            exchanges: list[Exchange] = []
            while time.perf_counter() < end_s:
                purpose = f"stream {rate_per_s} {index} {len(exchanges)}"
                (prompt,) = self._prompts.make(purpose, number, cell, 1)
                exchanges += (await client.run([prompt], plan.answer_tokens, 1)).exchanges
                if exchanges[-1].error is not None:
                    break
            return exchanges

        async def arrive(at_s: float, prompt: list[int]) -> Exchange:
            await asyncio.sleep(begin_s + at_s - time.perf_counter())
            (exchange,) = (await client.run([prompt], plan.storm_answer_tokens, 1)).exchanges
            return exchange

        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(stream(index)) for index in range(plan.streams)]
            storms = [group.create_task(arrive(*one)) for one in zip(arrivals, prompts, strict=True)]
        written = [exchange for one in streams for exchange in one.result()]
        return storm(number, name, rate_per_s, (begin_s, end_s), written, [one.result() for one in storms])
