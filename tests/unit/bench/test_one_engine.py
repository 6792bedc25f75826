"""The stand-in for an orchestrator: everything goes to one engine, and its deltas come back."""

import asyncio

from bench.one_engine import OneEngine
from engine.protocol import FinishReason
from engine.simulated import SimulatedEngine, SimulatedFabric, expected_answer
from gateway.orchestrator import SequenceRequest
from tests.unit.simulated_config import CONFIG
from tests.unit.virtual_time import simulate

PROMPT = [1, 2, 3]


def test_a_sequence_is_answered_and_then_not_in_flight() -> None:
    async def scenario() -> None:
        engine = SimulatedEngine("e", CONFIG, SimulatedFabric())
        one = OneEngine(engine)
        one.add(SequenceRequest("a", PROMPT, 5, b""), one.new_group("receipt", 1))
        assert one.num_in_flight == 1
        written: list[int] = []
        while one.num_in_flight:
            written += [token for delta in await one.next_deltas() for token in delta.token_ids]
        assert written == expected_answer(CONFIG, PROMPT, 5)
        await engine.shutdown()

    simulate(scenario)


def test_an_aborted_sequence_leaves_the_engine() -> None:
    async def scenario() -> None:
        engine = SimulatedEngine("e", CONFIG, SimulatedFabric())
        one = OneEngine(engine)
        one.add(SequenceRequest("a", PROMPT, 200, b""), one.new_group("receipt", 1))
        await one.next_deltas()
        one.abort(["a"], FinishReason.ABORT)
        assert one.num_in_flight == 0
        one.add(SequenceRequest("b", PROMPT, 1, b""), one.new_group("receipt", 1))
        while one.num_in_flight:
            deltas = await one.next_deltas()
        assert [(delta.request_id, delta.finish_reason) for delta in deltas][-1] == ("b", FinishReason.LENGTH)
        await asyncio.sleep(0)
        await engine.shutdown()

    simulate(scenario)
