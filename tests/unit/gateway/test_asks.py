"""The orchestrator asks decode for what it has cached: two turns of a session, and what may happen in the second."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from bench.asking import asks_when_it_can
from engine.protocol import FinishReason, Phase
from gateway.lifecycle import AskFinished, Event, Stage
from gateway.orchestrator import Sequence
from gateway.routing.policies import place
from gateway.routing.receipts import Receipt
from gateway.routing.types import ClusterSnapshot, Placement, RequestView
from tests.unit.gateway.rig import PROMPT, Rig, answer_to, until
from tests.unit.simulated_config import BLOCK, CONFIG
from tests.unit.virtual_time import simulate

ASK_TIMEOUT_S = 1.0
ANSWER_TOKENS = 3 * BLOCK
NEW_TOKENS = [7] * 5
KNOWN = (len(PROMPT) + ANSWER_TOKENS - 1) // BLOCK * BLOCK
"""Full blocks that decode has of the second turn's prompt: of the last token of an answer nothing was computed."""


def turns_move(request: RequestView, snapshot: ClusterSnapshot, rng: random.Random) -> Placement:
    """Decode is asked, and the answer written by another one."""
    placement = asks_when_it_can(request, snapshot, rng)
    assert isinstance(placement, Placement)
    others = [view.replica_id for view in snapshot.decode if view.replica_id != placement.ask]
    return replace(placement, decode=others[-1])


def asking_rig(prefill: int = 2, decode: int = 2, policy: Any = turns_move) -> Rig:
    return Rig(prefill, decode, policy=policy, can_ask=True, ask_timeout_s=ASK_TIMEOUT_S)


async def until_second_turn(rig: Rig, stage: Stage) -> tuple[str, Receipt, list[int]]:
    """Until what it asks for is on its way (ASKING), or prefill has the hand-off and fetches it (PREFILLING)."""
    answer, _ = await rig.ask(PROMPT, ANSWER_TOKENS)
    await rig.loads_are_told()
    prompt = [*PROMPT, *answer.token_ids, *NEW_TOKENS]
    request_id = rig.add(prompt, 6)
    receipt = rig.receipt(request_id)
    assert receipt.placement.ask is not None
    if stage is Stage.ASKING:
        await rig.placed_on(f"{request_id}~ask", receipt.placement.ask)
    else:
        await rig.placed_on(request_id, receipt.placement.prefill or "")
    return request_id, receipt, prompt


async def ends_whole(rig: Rig, request_id: str, prompt: list[int], *kinds: str) -> Receipt:
    answer = await rig.finished(request_id)
    assert (answer.error, answer.token_ids) == (None, answer_to(prompt, 6))
    receipt = rig.receipt(request_id)
    assert receipt.outcome.fault_kinds == kinds
    return receipt


@pytest.mark.parametrize("policy", [turns_move, asks_when_it_can], ids=["another answers", "the asked one answers"])
def test_a_second_turn_is_fetched_from_decode_and_only_its_rest_is_read(policy: Any) -> None:
    async def main() -> None:
        async with asking_rig(policy=policy) as rig:
            request_id, before, prompt = await until_second_turn(rig, Stage.PREFILLING)
            placement, cached = before.placement, before.snapshot.cached(before.placement.prefill)
            (ask,) = rig.transport.sent_to(placement.ask or "", f"{request_id}~ask")
            assert (ask.phase, ask.prompt_token_ids, ask.max_tokens, ask.sampling) == (
                Phase.PREFILL,
                prompt[:KNOWN],
                1,
                b"",
            )
            (read,) = rig.transport.sent_to(placement.prefill or "", request_id)
            assert read.handoff is not None
            assert (read.handoff.source_replica, read.handoff.num_tokens) == (placement.ask, KNOWN)
            receipt = await ends_whole(rig, request_id, prompt)
            outcome = receipt.outcome
            assert outcome.prefill_computed_tokens == len(prompt) - KNOWN
            assert outcome.kv_blocks_asked == (KNOWN - cached) // BLOCK > 0
            assert outcome.kv_bytes_asked == outcome.kv_blocks_asked * CONFIG.kv_block_bytes
            assert outcome.reused_tokens == KNOWN - BLOCK, "decode computes the last block of what it is asked for"
            assert receipt.predicted is not None
            assert (receipt.predicted.cached_tokens, receipt.predicted.ask_s is not None) == (KNOWN, True)
            assert place(policy, receipt.request, receipt.snapshot, receipt.seed) == placement

    simulate(main)


def test_nobody_is_asked_where_it_is_not_allowed() -> None:
    async def main() -> None:
        async with Rig(2, 2, policy=asks_when_it_can) as rig:
            answer, _ = await rig.ask(PROMPT, ANSWER_TOKENS)
            await rig.loads_are_told()
            _, receipt = await rig.ask([*PROMPT, *answer.token_ids, *NEW_TOKENS])
            assert (receipt.placement.ask, receipt.outcome.kv_blocks_asked) == (None, 0)
            asked = [r for target, _, r in rig.transport.submitted if "decode" in target and r.phase is Phase.PREFILL]
            assert asked == []

    simulate(main)


@pytest.mark.parametrize("can_ask", [True, False])
def test_pairs_are_warmed_in_both_directions_where_decode_can_be_asked(can_ask: bool) -> None:
    async def main() -> None:
        async with Rig(2, 2, can_ask=can_ask) as rig:
            fetches = {
                (target, request.handoff.source_replica)
                for target, _, request in rig.transport.submitted
                if request.handoff is not None
            }
            forth = {(f"decode-{d}", f"prefill-{p}") for d in range(2) for p in range(2)}
            back = {(prefill, decode) for decode, prefill in forth}
            assert fetches == (forth | back if can_ask else forth)

    simulate(main)


def test_the_whole_prompt_is_never_asked_for() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            answer, _ = await rig.ask(PROMPT, ANSWER_TOKENS)
            await rig.loads_are_told()
            prompt = [*PROMPT, *answer.token_ids][:KNOWN]
            request_id = rig.add(prompt, 6)
            receipt = await ends_whole(rig, request_id, prompt)
            (ask,) = rig.transport.sent_to(receipt.placement.ask or "", f"{request_id}~ask")
            assert ask.prompt_token_ids == prompt[: KNOWN - BLOCK]

    simulate(main)


def test_who_refuses_is_done_without() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            for name in ("decode-0", "decode-1"):
                rig.workers[name].takes = (Phase.DECODE,)
            request_id, _, prompt = await until_second_turn(rig, Stage.PREFILLING)
            receipt = await ends_whole(rig, request_id, prompt, "ask_failed")
            assert receipt.outcome.kv_blocks_asked == 0

    simulate(main)


def test_who_takes_too_long_is_done_without_and_its_hand_off_given_back() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            answer, _ = await rig.ask(PROMPT, ANSWER_TOKENS)
            await rig.loads_are_told()
            gates = {name: asyncio.Event() for name in ("decode-0", "decode-1")}
            rig.transport.before_submit.update(gates)
            prompt = [*PROMPT, *answer.token_ids, *NEW_TOKENS]
            request_id = rig.add(prompt, 6)
            await rig.placed_on(request_id, rig.receipt(request_id).placement.prefill or "")
            for gate in gates.values():
                gate.set()
            await ends_whole(rig, request_id, prompt, "ask_slow")

    simulate(main)


def test_who_dies_while_it_is_asked_is_done_without() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            request_id, receipt, prompt = await until_second_turn(rig, Stage.ASKING)
            rig.engines[receipt.placement.ask or ""].die()
            await ends_whole(rig, request_id, prompt, "ask_lost")
            assert rig.receipt(request_id).later == ()

    simulate(main)


def test_a_prompt_is_placed_again_when_its_decode_replica_dies_while_another_is_asked() -> None:
    async def main() -> None:
        async with asking_rig(decode=3) as rig:
            request_id, receipt, prompt = await until_second_turn(rig, Stage.ASKING)
            rig.engines[receipt.placement.decode].die()
            await ends_whole(rig, request_id, prompt, "decode_lost_before_token")

    simulate(main)


def test_a_source_that_dies_under_the_fetch_is_done_without() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            request_id, receipt, prompt = await until_second_turn(rig, Stage.PREFILLING)
            rig.engines[receipt.placement.ask or ""].die()
            await ends_whole(rig, request_id, prompt, "ask_pull_failed")

    simulate(main)


def test_what_a_prefill_replica_that_died_was_to_fetch_is_given_back_through_another() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            request_id, receipt, prompt = await until_second_turn(rig, Stage.PREFILLING)
            (read,) = rig.transport.sent_to(receipt.placement.prefill or "", request_id)
            assert read.handoff is not None
            rig.engines[receipt.placement.prefill or ""].die()
            await ends_whole(rig, request_id, prompt, "prefill_lost")
            assert rig.transport.released.count(read.handoff) == 1
            through = rig.transport.released_through[rig.transport.released.index(read.handoff)]
            assert through in {"prefill-0", "prefill-1"} - {receipt.placement.prefill}
            sources = [r.handoff for _, _, r in rig.transport.submitted if r.phase is Phase.PREFILL and r.handoff]
            assert sources.count(read.handoff) == 1, "I1: the next placement does not use it again"

    simulate(main)


@pytest.mark.parametrize("stage", [Stage.ASKING, Stage.PREFILLING])
def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(stage: Stage) -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            request_id, _, _ = await until_second_turn(rig, stage)
            rig.orchestrator.abort([request_id])
            await until(lambda: rig.orchestrator.num_in_flight == 0, "its end")
            assert rig.receipt(request_id).outcome.finish_reason == FinishReason.ABORT

    simulate(main)


def test_a_source_that_comes_after_its_client_has_left_is_given_back() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            gates = {name: asyncio.Event() for name in ("decode-0", "decode-1")}
            answer, _ = await rig.ask(PROMPT, ANSWER_TOKENS)
            await rig.loads_are_told()
            # The call that brings what is asked has not ended, so it cannot be aborted yet.
            rig.transport.after_submit.update(gates)
            request_id = rig.add([*PROMPT, *answer.token_ids, *NEW_TOKENS])
            ask = rig.receipt(request_id).placement.ask or ""
            await until(lambda: rig.workers[ask].num_requests, "it to reach the worker")
            rig.orchestrator.abort([request_id])
            num_released = len(rig.transport.released)
            await until(lambda: len(rig.transport.released) > num_released, "the source to be given back")
            assert rig.transport.released[-1].source_replica == ask
            assert rig.transport.released_through[-1].startswith("prefill")
            for gate in gates.values():
                gate.set()

    simulate(main)


def test_a_client_that_leaves_before_the_source_was_sent_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with asking_rig() as rig:
            request_id, receipt, _ = await until_second_turn(rig, Stage.ASKING)
            num_released, advance = len(rig.transport.released), rig.orchestrator._advance

            def leaves_at_once(sequence: Sequence, event: Event) -> None:
                advance(sequence, event)
                if isinstance(event, AskFinished):
                    rig.orchestrator.abort([request_id])

            rig.orchestrator._advance = leaves_at_once  # type: ignore[method-assign]
            await until(lambda: rig.orchestrator.num_in_flight == 0, "its end")
            await until(lambda: len(rig.transport.released) > num_released, "the source to be given back")
            assert rig.transport.sent_to(receipt.placement.prefill or "", request_id) == []
            assert rig.transport.released[-1].source_replica == receipt.placement.ask

    simulate(main)
