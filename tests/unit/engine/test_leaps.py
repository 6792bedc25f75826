"""Leaps of the simulated engine change nothing but how often it tells; priorities order what it admits and preempts."""

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from bench.virtual_time import VirtualTimeLoop
from engine.protocol import EngineGoneError, EngineRequest, KVHandoff, Phase
from engine.simulated import SimulatedEngine, SimulatedEngineConfig, SimulatedFabric, TokenRule
from tests.unit.simulated_config import CONFIG, LATENCY
from tests.unit.virtual_time import simulate

LEAPS = {"max_leap_steps": 16, "keeps_content": False}


@dataclass
class Told:
    """What one request's deltas said, and when in loop time."""

    first_s: float | None = None
    end_s: float | None = None
    tokens: list[int] = field(default_factory=list[int])
    handoff: KVHandoff | None = None


class Rig:
    """Engines of one fabric, read all the time."""

    def __init__(self, config: SimulatedEngineConfig, num_engines: int = 1):
        fabric = SimulatedFabric()
        self.engines = [SimulatedEngine(f"engine-{index}", config, fabric) for index in range(num_engines)]
        self.told: dict[str, Told] = {}
        self.num_steps = 0
        self._readers = [asyncio.create_task(self._read(engine)) for engine in self.engines]

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for engine in self.engines:
            await engine.shutdown()

    async def submit(self, request_id: str, prompt: Sequence[int], max_tokens: int, priority: int = 0) -> None:
        request = EngineRequest(request_id, Phase.DECODE, list(prompt), max_tokens, priority=priority)
        await self.engines[0].submit(request)

    async def _read(self, engine: SimulatedEngine) -> None:
        loop = asyncio.get_running_loop()
        async for step in engine.steps():
            self.num_steps += 1
            for delta in step.deltas:
                told = self.told.setdefault(delta.request_id, Told())
                told.first_s = loop.time() if told.first_s is None else told.first_s
                told.tokens += delta.token_ids
                told.handoff = delta.handoff
                told.end_s = loop.time() if delta.finish_reason is not None else None


def prompt(num_tokens: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(32_000) for _ in range(num_tokens)]


def times_of_a_busy_engine(config: SimulatedEngineConfig, seed: int) -> tuple[dict[str, Told], float, int]:
    """Requests come and are aborted at any moment, and blocks are so few that some wait and some are preempted."""

    async def main() -> tuple[dict[str, Told], float, int]:
        source, rig = random.Random(seed), Rig(config)
        for index in range(40):
            await asyncio.sleep(source.expovariate(2.0))
            await rig.submit(f"r{index}", prompt(source.randint(2, 60), index), source.randint(1, 80))
            if source.random() < 0.2:
                await rig.engines[0].abort([f"r{source.randrange(index + 1)}"])
        await asyncio.sleep(200)
        busy_s = rig.engines[0].busy_s
        await rig.close()
        return rig.told, busy_s, rig.num_steps

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("leaps", [LEAPS, {"max_leap_steps": 16}], ids=["no content", "content"])
def test_leaps_move_no_first_token_and_no_end(seed: int, leaps: dict[str, int | bool]) -> None:
    config = dataclasses.replace(CONFIG, num_kv_blocks=40)
    single, busy_s, num_steps = times_of_a_busy_engine(config, seed)
    leaping, leaping_busy_s, num_told = times_of_a_busy_engine(dataclasses.replace(config, **leaps), seed)
    ended = {request_id for request_id, told in single.items() if told.end_s is not None}
    assert ended == {request_id for request_id, told in leaping.items() if told.end_s is not None}
    for request_id in ended:
        assert leaping[request_id].first_s == pytest.approx(single[request_id].first_s, abs=1e-5)
        assert leaping[request_id].end_s == pytest.approx(single[request_id].end_s, abs=1e-5)
        assert len(leaping[request_id].tokens) == len(single[request_id].tokens)
    assert leaping_busy_s == pytest.approx(busy_s)
    assert num_told < num_steps


def test_with_content_leaps_write_the_same_answer() -> None:
    single, _, _ = times_of_a_busy_engine(CONFIG, 3)
    leaping, _, _ = times_of_a_busy_engine(dataclasses.replace(CONFIG, max_leap_steps=16), 3)
    ended = [request_id for request_id, told in single.items() if told.end_s is not None]
    assert ended
    assert [leaping[one].tokens for one in ended] == [single[one].tokens for one in ended]


def test_what_was_written_before_an_engine_died_in_a_leap_is_told() -> None:
    async def main() -> None:
        rig = Rig(dataclasses.replace(CONFIG, **LEAPS))
        await rig.submit("r", prompt(4, 1), 100)
        # The prompt, then three tokens of 22 ms; the fourth is under way.
        await asyncio.sleep(0.014 + 3.5 * 0.022)
        rig.engines[0].die()
        with pytest.raises(EngineGoneError):
            await rig._readers[0]
        assert len(rig.told["r"].tokens) == 4

    simulate(main)


@pytest.mark.parametrize(
    "more",
    [
        {"token_rule": TokenRule(stop_token_ids=frozenset({1}))},
        {"token_rule": TokenRule(clock_tick_s=1.0)},
        {"latency": dataclasses.replace(LATENCY, decode_interval_s=1.0)},
    ],
)
@pytest.mark.parametrize("leaps", [{"max_leap_steps": 2}, {"keeps_content": False}])
def test_leaps_and_empty_blocks_need_answers_of_which_only_the_length_matters(
    more: dict[str, object], leaps: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="max_leap_steps"):
        dataclasses.replace(CONFIG, **more, **leaps)


def test_a_decoded_answer_is_cached_and_found_by_the_next_prompt() -> None:
    async def main() -> None:
        rig = Rig(dataclasses.replace(CONFIG, **LEAPS))
        first = prompt(20, 1)
        await rig.submit("one", first, 30)
        await asyncio.sleep(5)
        await rig.submit("two", first + rig.told["one"].tokens + prompt(8, 2), 1)
        computed = rig.engines[0].load.prompt_tokens_computed_total
        await asyncio.sleep(5)
        # 20 + 30 tokens, of which the last one has no KV: 49 fill six blocks of 8; 58 - 48 are computed.
        assert rig.engines[0].load.prompt_tokens_computed_total - computed == 10
        await rig.close()

    simulate(main)


def test_lower_priorities_are_admitted_first_and_equals_in_order_of_arrival() -> None:
    async def main() -> None:
        rig = Rig(dataclasses.replace(CONFIG, max_num_seqs=1))
        for request_id, priority in (("now", 5), ("late", 2), ("first", 1), ("also late", 2), ("urgent", -1)):
            await rig.submit(request_id, prompt(4, priority), 3, priority)
            await asyncio.sleep(0.001)
        await asyncio.sleep(5)
        order = sorted(rig.told, key=lambda one: rig.told[one].first_s or 0.0)
        assert order == ["now", "urgent", "first", "late", "also late"]
        await rig.close()

    simulate(main)


def test_the_highest_priority_is_preempted_first_also_when_it_is_the_oldest() -> None:
    async def main() -> None:
        # 32 blocks of 8: three of 72 tokens fit, until they have grown by 16.
        rig = Rig(dataclasses.replace(CONFIG, num_kv_blocks=32))
        for request_id, priority in (("least", 9), ("most", 0), ("middle", 1)):
            await rig.submit(request_id, prompt(72, priority), 40, priority)
            await asyncio.sleep(0.001)
        await asyncio.sleep(20)
        ends = {one: told.end_s for one, told in rig.told.items()}
        assert sorted(ends, key=lambda one: ends[one] or 0.0) == ["most", "middle", "least"]
        assert [len(told.tokens) for told in rig.told.values()] == [40, 40, 40]
        await rig.close()

    simulate(main)
