"""A receipt says where a request's time went, and its parts add up to the time to the first token."""

from dataclasses import replace

import pytest
from prometheus_client import REGISTRY

from engine.protocol import FinishReason, Phase
from gateway import metrics
from gateway.routing.receipts import Times
from tests.unit.gateway.rig import PROMPT, Rig
from tests.unit.virtual_time import now_s, simulate

# The simulated engine's times: reading the prompt, fetching its six blocks, one decode step.
READ_MS, FETCH_MS, STEP_MS = 10.0 + len(PROMPT), 50.0 + 6 * 4.0, 22.0
FRONT_END_MS = 5.0


def times_of(outcome_times: Times) -> dict[str, float | None]:
    return {name: getattr(outcome_times, name) for name in Times.__slots__}


@pytest.mark.parametrize("resumable", [False, True])
def test_each_stage_is_timed_by_the_one_who_knows(resumable: bool) -> None:
    async def main() -> None:
        async with Rig() as rig:
            group = rig.orchestrator.new_group("timed", 1, received_s=now_s() - FRONT_END_MS / 1000)
            answer = await rig.finished(rig.add(PROMPT, 6, group=group, resumable=resumable))
            assert answer.finish_reason is FinishReason.LENGTH
            outcome = rig.receipt("timed").outcome
            expected = {
                "front_end": FRONT_END_MS, "decide": 0.0, "prefill_wait": 0.0, "prefill_compute": READ_MS,
                "decode_wait": FETCH_MS, "decode_compute": STEP_MS, "transit": 0.0, "gateway": FRONT_END_MS,
                "decode": 4 * STEP_MS + FETCH_MS + STEP_MS if resumable else 5 * STEP_MS,
            }  # fmt: skip
            assert times_of(outcome.times_ms) == pytest.approx(expected, abs=1.0)
            decode_ms = 0.0 if resumable else FETCH_MS + STEP_MS
            assert outcome.ttft_ms == pytest.approx(FRONT_END_MS + READ_MS + decode_ms, abs=1.0)
            assert outcome.duration_ms == pytest.approx(outcome.ttft_ms + expected["decode"], abs=1.0)

    simulate(main)


def test_what_was_not_reached_has_no_time() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6)
            await rig.placed_on(request_id, "prefill-0")
            rig.orchestrator.abort([request_id])
            await rig.everything_given_back()
            times = rig.receipt(request_id).outcome.times_ms
            assert (times.prefill_compute, times.decode_wait, times.transit, times.decode) == (None,) * 4
            assert times.front_end is not None

    simulate(main)


def test_a_prompt_that_decode_reads_alone_waits_for_no_prefill() -> None:
    async def main() -> None:
        async with Rig() as rig:
            _, receipt = await rig.ask(PROMPT, 6, needs_whole_prompt=True)
            times = receipt.outcome.times_ms
            assert (times.prefill_wait, times.prefill_compute) == (None, None)
            assert times.decode_compute == pytest.approx(READ_MS, abs=1.0)
            assert times.transit == pytest.approx(0.0, abs=1.0)

    simulate(main)


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_closed_receipt_is_counted_once_with_its_stages() -> None:
    async def main() -> None:
        async with Rig() as rig:
            _, receipt = await rig.ask(PROMPT, 6)
            names = [
                ("baton_requests_total", {"status": "finished", "split": "yes"}),
                ("baton_prompt_tokens_total", {"source": "computed"}),
                ("baton_kv_moved_bytes_total", {}),
                ("baton_ttft_seconds_count", {"split": "yes"}),
                ("baton_request_seconds_sum", {}),
                ("baton_stage_seconds_count", {"stage": "prefill_compute"}),
                ("baton_stage_seconds_sum", {"stage": "decode_wait"}),
                ("baton_faults_total", {}),
            ]
            before = [sample(name, **labels) for name, labels in names]
            metrics.count(receipt)
            grown = [sample(name, **labels) - b for (name, labels), b in zip(names, before, strict=True)]
            outcome = receipt.outcome
            expected = [1, len(PROMPT), outcome.kv_bytes_moved, 1, outcome.duration_ms / 1000, 1, FETCH_MS / 1000, 0]
            assert grown == pytest.approx(expected, abs=0.001)

    simulate(main)


def test_the_orchestrator_tells_of_each_receipt_that_closes() -> None:
    async def main() -> None:
        async with Rig() as rig:
            closed = rig.closed
            _, receipt = await rig.ask(PROMPT, 6)
            assert closed == [receipt]

    simulate(main)


def test_what_a_shadow_policy_would_have_done_is_counted() -> None:
    async def main() -> None:
        async with Rig() as rig:
            _, receipt = await rig.ask(PROMPT, 6)
            labels = {"policy": "another", "same_prefill": "no", "same_decode": "yes"}
            before = sample("baton_shadow_decisions_total", **labels)
            shadow = replace(receipt.placement, policy="another", prefill=None)
            metrics.count(replace(receipt, shadow=shadow))
            assert sample("baton_shadow_decisions_total", **labels) == before + 1

    simulate(main)


def test_losses_and_gateways_that_have_gone_are_counted() -> None:
    lost, gone = sample("baton_replicas_lost_total", phase="decode", cause="dead"), sample("baton_gateways_gone_total")
    metrics.count_loss(Phase.DECODE, "dead")
    metrics.count_gateways_gone(("a", "b", "c"), ("b", "d"))
    assert sample("baton_replicas_lost_total", phase="decode", cause="dead") == lost + 1
    assert sample("baton_gateways_gone_total") == gone + 2
