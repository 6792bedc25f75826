"""Prefill writes a resumable request's first token: sooner for the client, the same answer, nothing left behind."""

import asyncio
from dataclasses import replace

import pytest

from engine.protocol import FinishReason, WorkerReport
from engine.simulated import TokenRule
from tests.unit.gateway.rig import PROMPT, Rig, answer_to, until
from tests.unit.simulated_config import BLOCK, CONFIG
from tests.unit.virtual_time import now_s, simulate

PREFILL_S = 0.01 + 0.001 * len(PROMPT)
FIRST_TOKEN_ENDS_IT = replace(CONFIG, token_rule=TokenRule(stop_token_ids=frozenset(answer_to(PROMPT, 1))))


def test_the_first_token_does_not_wait_for_the_hand_off() -> None:
    async def main() -> None:
        async with Rig() as rig:
            start_s = now_s()
            answer, receipt = await rig.ask(PROMPT, 6, resumable=True)
            assert answer.token_ids == answer_to(PROMPT, 6)
            assert answer.first_s == pytest.approx(start_s + PREFILL_S, abs=0.002)
            assert receipt.outcome.ttft_ms == pytest.approx(1000 * PREFILL_S, abs=2.0)
            assert (receipt.outcome.status, receipt.outcome.finish_reason) == ("finished", "length")
            assert receipt.outcome.output_tokens == 6

    simulate(main)


def test_decode_goes_on_after_the_first_token_and_computes_nothing_of_the_prompt() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6, resumable=True)
            await rig.finished(request_id)
            (prefill,) = rig.transport.sent_to("prefill-0", request_id)
            (decode,) = rig.transport.sent_to("decode-0", request_id)
            assert (prefill.sampling, prefill.max_tokens, prefill.num_written_tokens) == (b"sampling", 1, 0)
            assert decode.prompt_token_ids == PROMPT + answer_to(PROMPT, 1)
            assert (decode.sampling, decode.max_tokens, decode.num_written_tokens) == (b"sampling", 5, 1)
            assert decode.handoff is not None
            assert decode.handoff.num_tokens == len(PROMPT)
            outcome = rig.receipt(request_id).outcome
            assert (outcome.prefill_computed_tokens, outcome.decode_computed_tokens) == (len(PROMPT), 1)
            assert outcome.kv_blocks_moved == 6
            assert outcome.faults == ()

    simulate(main)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK])
def test_the_answer_is_the_same_around_block_edges_also_when_the_prompt_is_cached(length: int) -> None:
    async def main() -> None:
        async with Rig() as rig:
            for _ in range(2):
                answer, receipt = await rig.ask(PROMPT[:length], 5, resumable=True)
                assert answer.token_ids == answer_to(PROMPT[:length], 5)
                assert receipt.outcome.decode_computed_tokens == 1
                assert receipt.outcome.faults == ()

    simulate(main)


def test_the_client_learns_what_prefill_reused() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.ask(PROMPT, 2, resumable=True)
            answer, receipt = await rig.ask(PROMPT, 2, resumable=True)
            assert answer.facts is not None
            assert answer.facts.num_local_cached_tokens == receipt.outcome.reused_tokens == 5 * BLOCK

    simulate(main)


@pytest.mark.parametrize(
    ("config", "max_tokens", "finish"),
    [(FIRST_TOKEN_ENDS_IT, 6, FinishReason.STOP), (CONFIG, 1, FinishReason.LENGTH)],
    ids=["the token stops", "one token was asked for"],
)
def test_an_answer_of_one_token_never_reaches_decode_and_leaves_no_block(config, max_tokens, finish) -> None:
    async def main() -> None:
        async with Rig(engines={"prefill-0": config}) as rig:
            request_id = rig.add(PROMPT, max_tokens, resumable=True)
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 1)
            assert answer.finish_reason is finish
            assert not rig.transport.sent_to("decode-0", request_id)
            outcome = rig.receipt(request_id).outcome
            assert (outcome.status, outcome.output_tokens, outcome.kv_blocks_moved) == ("finished", 1, 0)

    simulate(main)


def test_a_prefill_that_fails_has_written_nothing() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6, resumable=True)
            await rig.placed_on(request_id, "prefill-0")
            rig.engines["prefill-0"].die()
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 6)
            (decode,) = rig.transport.sent_to("decode-0", f"{request_id}~2")
            assert (decode.prompt_token_ids, decode.num_written_tokens, decode.handoff) == (PROMPT, 0, None)
            rig.is_over = True

    simulate(main)


def test_a_prefill_that_dies_with_the_blocks_costs_decode_the_prompt_but_no_token() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6, resumable=True)
            await rig.writing(request_id)
            rig.engines["prefill-0"].die()
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 6)
            outcome = rig.receipt(request_id).outcome
            assert outcome.decode_computed_tokens == len(PROMPT) + 1
            assert len(outcome.faults) == 1
            rig.is_over = True

    simulate(main)


def test_an_abort_right_after_the_first_token_gives_the_hand_off_back() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 200, resumable=True)

            def on_report(report: WorkerReport) -> None:
                if any(delta.request_id == request_id and delta.handoff for delta in report.deltas):
                    # After this report was folded, before the task that it starts runs.
                    asyncio.get_running_loop().call_soon(rig.orchestrator.abort, [request_id])

            rig.transport.on_report = on_report
            await until(lambda: rig.transport.released, "its release")
            assert not rig.transport.sent_to("decode-0", request_id)
            await rig.everything_given_back()
            outcome = rig.receipt(request_id).outcome
            assert (outcome.status, outcome.output_tokens) == ("aborted", 1)

    simulate(main)
