"""The orchestrator over real workers and simulated engines, on virtual time: what it promises, what it gives back."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import (
    EngineRequest,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    WorkerReport,
)
from gateway.agents.pauses import PauseModel
from gateway.cluster import TRUSTED_AFTER_TOKENS
from gateway.orchestrator import PlacementRejected
from gateway.routing.admission import AdmissionConfig, admit
from gateway.routing.policies import POLICIES, least_tokens, place
from gateway.routing.types import Cause, Hints, Placement, Priority
from gateway.transport import ReplicaGoneError
from tests.unit.gateway.rig import (
    CREATED_S,
    HANDOFF_TIMEOUT_S,
    OTHER_PROMPT,
    PROMPT,
    Rig,
    answer_to,
    until,
)
from tests.unit.simulated_config import BLOCK, CONFIG
from tests.unit.virtual_time import now_s, simulate

# -- where prompts are cached


@pytest.mark.parametrize("session", ["a-session", None])
def test_the_receipt_predicts_what_the_engines_reuse(session: str | None) -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=1) as rig:
            prompt = PROMPT
            for turn in range(3):
                request_id = rig.add(
                    prompt, 2 * BLOCK, group=rig.orchestrator.new_group(f"t{turn}", 1, hints=Hints(session=session))
                )
                answer = await rig.finished(request_id)
                receipt = rig.receipt(f"t{turn}")
                placement, snapshot = receipt.placement, receipt.snapshot
                assert receipt.outcome.reused_tokens == min(snapshot.cached(placement.prefill), len(prompt) - 1)
                assert (snapshot.cached(placement.decode) > 0) is (turn > 0)
                assert receipt.request.number == turn
                assert receipt.request.session is not None, "it is recognised if it has no name"
                assert receipt.request.session.num_turns == turn
                prompt = prompt + answer.token_ids + OTHER_PROMPT[:BLOCK]
                await rig.loads_are_told()

    simulate(main)


@pytest.mark.parametrize("shadow", [None, *POLICIES])
def test_a_shadow_policy_changes_nothing(shadow: str | None) -> None:
    async def main() -> None:
        placements = []
        for policy in (None, shadow):
            async with Rig(prefill=3, decode=3, shadow=POLICIES.get(policy or "")) as rig:
                answers = [await rig.ask(prompt, 5) for prompt in (PROMPT, OTHER_PROMPT, PROMPT)]
                placements.append([receipt.placement for _, receipt in answers])
                for _, receipt in answers:
                    assert (receipt.shadow.policy if receipt.shadow else None) == policy
        assert placements[0] == placements[1]

    simulate(main)


def test_a_shadow_policy_that_fails_costs_no_request() -> None:
    def broken(*_: object) -> Placement:
        raise ZeroDivisionError

    async def main() -> None:
        async with Rig(shadow=broken) as rig:
            answer, receipt = await rig.ask(PROMPT, 5)
            assert answer.token_ids == answer_to(PROMPT, 5)
            assert receipt.shadow is None

    simulate(main)


def test_a_switch_of_policies_holds_from_the_next_placement_on_and_leaves_what_is_in_flight() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            before = rig.add(PROMPT, 30)
            rig.orchestrator.use(POLICIES["dynamo"], POLICIES["llm-d"])
            after = rig.add(OTHER_PROMPT, 5)
            rig.orchestrator.use(POLICIES["round-robin"], None)
            for request_id in (before, after):
                await rig.finished(request_id)
            _, last = await rig.ask(PROMPT, 5)
            receipts = [*(rig.receipt(request_id) for request_id in (before, after)), last]
            told = [(receipt.policy, receipt.shadow.policy if receipt.shadow else None) for receipt in receipts]
            assert told == [("least-tokens", None), ("dynamo", "llm-d"), ("round-robin", None)]
            assert all(receipt.outcome.status == "finished" for receipt in receipts)

    simulate(main)


def test_a_decision_that_is_not_taken_counts_too() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            hurry = Hints(ttft_deadline_s=1e-9)
            with pytest.raises(PlacementRejected):
                rig.add(PROMPT, 2, group=rig.orchestrator.new_group("late", 1, now_s() - 1.0, hurry))
            await rig.finished(rig.add(PROMPT, 2, group=rig.orchestrator.new_group("next", 1)))
            assert rig.receipt("next").request.number == 1

    simulate(main)


def test_a_session_goes_on_where_a_fault_has_brought_it() -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=2) as rig:
            for turn in range(2):
                group = rig.orchestrator.new_group(f"t{turn}", 1, hints=Hints(session="s"))
                request_id = rig.add(PROMPT, 30, group=group, resumable=True)
                await rig.writing(request_id)
                if not turn:
                    rig.engines[rig.receipt("t0").placement.decode].die()
                await rig.finished(request_id)
            (later,) = rig.receipt("t0").later
            second = rig.receipt("t1").request.session
            assert second is not None
            assert (second.num_turns, second.decode) == (2, later.placement.decode)

    simulate(main)


def test_a_session_s_turns_know_where_the_one_before_went() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            for turn in range(2):
                group = rig.orchestrator.new_group(f"t{turn}", 1, hints=Hints(session="s"))
                await rig.finished(rig.add(PROMPT, 2, group=group))
            first, second = rig.receipt("t0"), rig.receipt("t1")
            before, after = first.request.session, second.request.session
            assert before is not None
            assert after is not None
            assert (before.num_turns, before.prefill, before.decode) == (0, None, None)
            placement = first.placement
            assert (after.num_turns, after.prefill, after.decode) == (1, placement.prefill, placement.decode)

    simulate(main)


# -- answers


def test_split_and_decode_only_placements_give_the_same_answer() -> None:
    async def main() -> None:
        async with Rig(prefill=1) as split, Rig(prefill=0) as alone:
            answers = []
            for rig in (split, alone):
                answer, receipt = await rig.ask(PROMPT, 20)
                assert receipt.placement.prefill == ("prefill-0" if rig is split else None)
                assert answer.finish_reason is FinishReason.LENGTH
                answers.append(answer.token_ids)
            assert answers[0] == answers[1] == answer_to(PROMPT, 20)

    simulate(main)


def test_many_requests_at_once_are_each_answered_right() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            prompts = [PROMPT[: 1 + 3 * index] for index in range(14)]
            request_ids = [rig.add(prompt, 10 + index) for index, prompt in enumerate(prompts)]
            for index, (request_id, prompt) in enumerate(zip(request_ids, prompts, strict=True)):
                assert (await rig.finished(request_id)).token_ids == answer_to(prompt, 10 + index)
            assert {rig.receipt(r).placement.prefill for r in request_ids} == {"prefill-0", "prefill-1"}
            assert {rig.receipt(r).placement.decode for r in request_ids} == {"decode-0", "decode-1"}

    simulate(main)


def test_the_engines_get_what_their_phase_needs() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 6, cache_salt="tenant")
            await rig.finished(request_id)
            (prefill,) = rig.transport.sent_to("prefill-0", request_id)
            (decode,) = rig.transport.sent_to("decode-0", request_id)
            common = {"prompt_token_ids": PROMPT, "cache_salt": "tenant", "priority": prefill.priority}
            assert prefill.priority > 0, "it has a rank, the same in both phases"
            assert prefill == EngineRequest(request_id, Phase.PREFILL, max_tokens=1, **common)
            assert decode.handoff is not None
            assert decode.handoff.source_request_id == request_id
            assert decode == EngineRequest(
                request_id, Phase.DECODE, max_tokens=6, sampling=b"sampling", handoff=decode.handoff, **common
            )

    simulate(main)


def test_a_request_that_needs_its_whole_prompt_is_not_split() -> None:
    async def main() -> None:
        async with Rig() as rig:
            answer, receipt = await rig.ask(PROMPT, needs_whole_prompt=True)
            assert answer.token_ids == answer_to(PROMPT, 6)
            assert (receipt.placement.prefill, receipt.placement.decode) == (None, "decode-0")
            assert receipt.outcome.decode_computed_tokens == len(PROMPT)

    simulate(main)


# -- receipts


def test_a_receipt_tells_what_became_of_a_split_request() -> None:
    async def main() -> None:
        async with Rig() as rig:
            start_s = now_s()
            request_id = rig.add(PROMPT, 6)
            running = rig.receipt(request_id)
            assert (running.outcome.status, running.outcome.prompt_tokens) == ("running", len(PROMPT))
            answer = await rig.finished(request_id)
            receipt = rig.receipt(request_id)
            assert (receipt.request_id, receipt.created_s, receipt.seed) == (request_id, CREATED_S, 42)
            assert (receipt.placement.prefill, receipt.placement.decode) == ("prefill-0", "decode-0")
            assert receipt.placement == running.placement
            outcome = receipt.outcome
            assert (outcome.status, outcome.finish_reason, outcome.faults) == ("finished", "length", ())
            assert (outcome.prompt_tokens, outcome.output_tokens) == (len(PROMPT), 6)
            # Prefill read it all, decode fetched six blocks and computed the last token.
            assert (outcome.prefill_computed_tokens, outcome.decode_computed_tokens) == (len(PROMPT), 1)
            assert (outcome.reused_tokens, outcome.kv_blocks_moved) == (0, 6)
            assert outcome.kv_bytes_moved == 6 * CONFIG.kv_block_bytes
            # The model's times: a prefill step, the hand-off, and a decode step per token.
            ttft_s = 0.01 + 0.001 * len(PROMPT) + 0.05 + 6 * 0.004 + 0.022
            assert outcome.ttft_ms == pytest.approx(1000 * ttft_s, abs=1.0)
            assert outcome.duration_ms == pytest.approx(1000 * (ttft_s + 5 * 0.022), abs=1.0)
            assert answer.first_s == pytest.approx(start_s + ttft_s, abs=0.002)
            assert answer.facts == PrefillFacts(len(PROMPT), len(PROMPT), 0, 0)

    simulate(main)


def test_a_second_identical_prompt_is_reused_and_only_its_last_block_moves() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.ask(PROMPT)
            answer, receipt = await rig.ask(PROMPT)
            reused = len(PROMPT) // BLOCK * BLOCK
            assert receipt.outcome.reused_tokens == reused
            assert receipt.outcome.prefill_computed_tokens == len(PROMPT) - reused
            assert (receipt.outcome.kv_blocks_moved, receipt.outcome.kv_bytes_moved) == (1, CONFIG.kv_block_bytes)
            assert answer.facts == PrefillFacts(len(PROMPT), len(PROMPT) - reused, reused, 0)
            assert answer.token_ids == answer_to(PROMPT, 6)

    simulate(main)


def test_bytes_in_receipts_add_up_to_what_the_engines_received() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.loads_are_told()
            before = rig.loads["decode-0"].kv_bytes_received_total
            receipts = [(await rig.ask(prompt))[1] for prompt in (PROMPT, OTHER_PROMPT, PROMPT + [1] * 20)]
            await rig.everything_given_back()
            received = rig.loads["decode-0"].kv_bytes_received_total - before
            assert received == sum(receipt.outcome.kv_bytes_moved for receipt in receipts) > 0

    simulate(main)


def test_a_placement_without_prefill_reports_its_own_reuse() -> None:
    async def main() -> None:
        async with Rig(prefill=0) as rig:
            await rig.ask(PROMPT)
            answer, receipt = await rig.ask(PROMPT)
            reused = len(PROMPT) // BLOCK * BLOCK
            outcome = receipt.outcome
            assert (outcome.reused_tokens, outcome.decode_computed_tokens) == (reused, len(PROMPT) - reused)
            assert (outcome.prefill_computed_tokens, outcome.kv_blocks_moved, outcome.kv_bytes_moved) == (0, 0, 0)
            assert answer.facts is not None
            assert answer.facts.num_local_cached_tokens == reused

    simulate(main)


def test_placements_replay_from_their_receipts_bit_for_bit() -> None:
    async def main() -> None:
        async with Rig(prefill=3, decode=3) as rig:
            request_ids = []
            for index in range(12):
                request_ids.append(rig.add(PROMPT[: 5 + index], 4))
                await asyncio.sleep(0.01)
            for request_id in request_ids:
                await rig.finished(request_id)
            for request_id in request_ids:
                receipt = rig.receipt(request_id)
                again = place(least_tokens, receipt.request, receipt.snapshot, receipt.seed)
                assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(receipt.placement)
                assert receipt.admission_config is not None
                taken = admit(receipt.request, receipt.placement, receipt.snapshot, receipt.admission_config)
                assert msgspec.msgpack.encode(taken) == msgspec.msgpack.encode(receipt.admission)
            assert len({rig.receipt(r).placement.decode for r in request_ids}) == 3

    simulate(main)


# -- groups


def add_group(rig: Rig, num_choices: int, max_tokens: int = 10) -> list[str]:
    group = rig.orchestrator.new_group("the-group", num_choices)
    return [rig.add(PROMPT, max_tokens, group) for _ in range(num_choices)]


def test_a_group_is_handed_off_once_and_its_followers_start_after_the_leaders_first_token() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            leader, *followers = request_ids = add_group(rig, 3)
            for request_id in request_ids:
                assert (await rig.finished(request_id)).token_ids == answer_to(PROMPT, 10)
            receipt = rig.receipt("the-group")
            prefill, decode = receipt.placement.prefill, receipt.placement.decode
            assert prefill is not None
            sent = [(target, at_s, r) for target, at_s, r in rig.transport.submitted if r.request_id in request_ids]
            assert [(target, r.request_id) for target, _, r in sent] == [
                (prefill, leader),
                *((decode, request_id) for request_id in request_ids),
            ]
            assert [r.handoff is not None for _, _, r in sent] == [False, True, False, False]
            first_s = rig.answers[leader].first_s
            assert first_s is not None
            started_s = [at_s for _, at_s, r in sent if r.request_id in followers]
            assert started_s == pytest.approx([first_s] * 2, abs=0.001)
            assert min(started_s) >= first_s
            outcome = receipt.outcome
            assert (outcome.status, outcome.output_tokens, outcome.kv_blocks_moved) == ("finished", 30, 6)
            # The followers find the leader's full blocks in decode's prefix cache.
            assert outcome.decode_computed_tokens == 1 + 2 * (len(PROMPT) % BLOCK)

    simulate(main)


@pytest.mark.parametrize("stage", ["at once", "prefill", "pull"])
def test_followers_start_without_a_leader_that_is_aborted(stage: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            leader, *followers = add_group(rig, 3)
            if stage != "at once":
                await rig.placed_on(leader, "prefill-0" if stage == "prefill" else "decode-0")
            rig.orchestrator.abort([leader])
            for request_id in followers:
                assert (await rig.finished(request_id)).token_ids == answer_to(PROMPT, 10)
            outcome = rig.receipt("the-group").outcome
            assert (outcome.status, outcome.output_tokens) == ("aborted", 20)

    simulate(main)


def test_a_follower_that_is_aborted_while_it_waits_is_never_sent() -> None:
    async def main() -> None:
        async with Rig() as rig:
            leader, follower = add_group(rig, 2)
            rig.orchestrator.abort([follower])
            assert (await rig.finished(leader)).token_ids == answer_to(PROMPT, 10)
            assert all(request.request_id != follower for _, _, request in rig.transport.submitted)

    simulate(main)


def test_a_choice_that_joins_after_the_leader_started_starts_at_once() -> None:
    async def main() -> None:
        async with Rig() as rig:
            group = rig.orchestrator.new_group("the-group", 2)
            leader = rig.add(PROMPT, 50, group)
            await rig.writing(leader)
            late = rig.add(PROMPT, 10, group)
            assert (await rig.finished(late)).token_ids == answer_to(PROMPT, 10)
            await rig.finished(leader)

    simulate(main)


def test_a_group_whose_last_choice_never_came_still_closes_its_receipt() -> None:
    async def main() -> None:
        async with Rig() as rig:
            group = rig.orchestrator.new_group("the-group", 3)
            request_ids = [rig.add(PROMPT, 10, group) for _ in range(2)]
            await asyncio.sleep(0.01)
            rig.orchestrator.abort(request_ids)
            assert rig.receipt("the-group").outcome.status == "aborted"

    simulate(main)


# -- aborts


async def sent_to_nobody(rig: Rig, request_id: str) -> None:
    """The task that submits has not run yet."""


async def prefilling(rig: Rig, request_id: str) -> None:
    await rig.placed_on(request_id, "prefill-0")
    await asyncio.sleep(0.02)  # of the 0.053 s that the prompt takes


async def pulling(rig: Rig, request_id: str) -> None:
    await rig.placed_on(request_id, "decode-0")
    await asyncio.sleep(0.02)  # of the 0.074 s that the hand-off takes


async def decoding(rig: Rig, request_id: str) -> None:
    await rig.writing(request_id)


async def nothing_more_is_heard_of(rig: Rig, request_id: str) -> None:
    assert rig.orchestrator.num_in_flight == 0
    rig.orchestrator.abort([request_id])
    told = len(rig.answers[request_id].token_ids)
    await rig.everything_given_back()
    assert rig.receipt(request_id).outcome.status == "aborted"
    assert len(rig.answers[request_id].token_ids) == told
    assert rig.answers[request_id].finish_reason is None
    assert (await rig.ask(OTHER_PROMPT))[0].token_ids == answer_to(OTHER_PROMPT, 6)


@pytest.mark.parametrize("stage", [sent_to_nobody, prefilling, pulling, decoding])
def test_an_abort_in_any_stage_frees_both_sides(stage: Callable[[Rig, str], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 200)
            await stage(rig, request_id)
            rig.orchestrator.abort([request_id])
            await nothing_more_is_heard_of(rig, request_id)

    simulate(main)


@pytest.mark.parametrize("moment", ["before the hand-off is read", "before decode is sent the request"])
def test_an_abort_around_the_handoff_gives_it_back(moment: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 200)
            seen: list[KVHandoff] = []

            def abort() -> None:
                rig.orchestrator.abort([request_id])

            def on_report(report: WorkerReport) -> None:
                handoffs = [delta.handoff for delta in report.deltas if delta.request_id == request_id]
                if handoffs and handoffs[0]:
                    seen.append(handoffs[0])
                    if moment == "before the hand-off is read":
                        abort()
                    else:
                        # After this report was folded, before the task that it starts runs.
                        asyncio.get_running_loop().call_soon(abort)

            rig.transport.on_report = on_report
            await until(lambda: seen, "the hand-off")
            await until(lambda: rig.transport.released, "its release")
            assert rig.transport.released == seen
            assert not rig.transport.sent_to("decode-0", request_id)
            await nothing_more_is_heard_of(rig, request_id)

    simulate(main)


@pytest.mark.parametrize("replica_id", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("held", ["before", "after"])
def test_an_abort_while_a_submit_is_under_way_follows_it(replica_id: str, held: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            gates = rig.transport.before_submit if held == "before" else rig.transport.after_submit
            gate = gates[replica_id] = asyncio.Event()
            request_id = rig.add(PROMPT, 200)
            await rig.placed_on(request_id, replica_id)
            rig.orchestrator.abort([request_id])
            await asyncio.sleep(0.01)
            gate.set()
            await nothing_more_is_heard_of(rig, request_id)

    simulate(main)


def test_an_abort_of_a_request_that_decode_has_not_answered_for_yet_follows_its_submit() -> None:
    """Prefill was given up while its own submit was still under way; that one's end changes nothing for decode's."""

    async def main() -> None:
        async with Rig() as rig:
            prefill_gate = rig.transport.after_submit["prefill-0"] = asyncio.Event()
            decode_gate = rig.transport.before_submit["decode-0"] = asyncio.Event()
            request_id = rig.add(PROMPT, 200)
            await rig.placed_on(request_id, "decode-0")
            prefill_gate.set()
            await asyncio.sleep(0.01)
            rig.orchestrator.abort([request_id])
            await asyncio.sleep(0.01)
            decode_gate.set()
            await nothing_more_is_heard_of(rig, request_id)
            await rig.loads_are_told()
            assert rig.loads["decode-0"].num_running_requests == 0

    simulate(main)


# -- faults


def test_a_prefill_replica_that_dies_is_replaced_by_decode_and_named_in_the_receipt() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 10)
            await prefilling(rig, request_id)
            rig.engines["prefill-0"].die()
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 10)
            outcome = rig.receipt(request_id).outcome
            assert (outcome.status, outcome.faults) == ("finished", ("prefill-0 was lost: placed again",))
            assert (outcome.decode_computed_tokens, outcome.prefill_computed_tokens) == (len(PROMPT), 0)
            assert (outcome.reused_tokens, outcome.kv_blocks_moved) == (0, 0)
            _, receipt = await rig.ask(OTHER_PROMPT)
            assert receipt.placement.prefill is None

    simulate(main)


def test_a_prefill_replica_that_refuses_is_replaced_by_decode_and_named_in_the_receipt() -> None:
    async def main() -> None:
        async with Rig() as rig:

            async def refuse(gateway_id: str, request: EngineRequest) -> None:
                raise InvalidEngineRequestError("no room")

            rig.workers["prefill-0"].submit = refuse
            request_id = rig.add(PROMPT)
            await rig.writing(request_id)
            assert [len(replica.in_flight) for replica in rig.cluster.pool(Phase.PREFILL)] == [0]
            assert (await rig.finished(request_id)).token_ids == answer_to(PROMPT, 6)
            assert rig.receipt(request_id).outcome.faults == (
                "prefill-0 did not take the request: no room: decode reads the prompt itself",
            )

    simulate(main)


def test_a_prefill_replica_that_dies_with_the_blocks_costs_decode_the_prompt_and_is_in_the_receipt() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 10)
            await pulling(rig, request_id)
            rig.engines["prefill-0"].die()
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 10)
            outcome = rig.receipt(request_id).outcome
            assert (outcome.decode_computed_tokens, outcome.kv_blocks_moved) == (len(PROMPT), 0)
            assert outcome.faults == (
                "decode-0 could not fetch the hand-off of prefill-0: it has read the prompt itself",
            )

    simulate(main)


def test_a_handoff_that_decode_refuses_is_given_back() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT)
            decode = rig.receipt(request_id).placement.decode

            async def refuse(gateway_id: str, request: EngineRequest) -> None:
                raise InvalidEngineRequestError("no room")

            rig.workers[decode].submit = refuse
            answer = await rig.finished(request_id)
            assert answer.error == f"{decode} did not take the request: no room"
            await until(lambda: rig.transport.released, "the hand-off to be released")
            assert len(rig.transport.released) == 1

    simulate(main)


def test_a_release_goes_on_to_the_next_decode_replica_when_one_is_dead() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT)

            def on_report(report: WorkerReport) -> None:
                if any(delta.handoff for delta in report.deltas):
                    rig.engines["decode-0"].die()
                    rig.orchestrator.abort([request_id])

            rig.transport.on_report = on_report
            await until(lambda: len(rig.transport.released) == 2, "two attempts to release")

    simulate(main)


def test_a_prefill_that_takes_too_long_is_given_up() -> None:
    async def main() -> None:
        async with Rig() as rig:
            gate = rig.transport.before_submit["prefill-0"] = asyncio.Event()
            start_s = now_s()
            request_id = rig.add(PROMPT)
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 6)
            assert answer.first_s is not None
            assert answer.first_s - start_s == pytest.approx(HANDOFF_TIMEOUT_S + 0.01 + 0.001 * len(PROMPT), abs=0.01)
            outcome = rig.receipt(request_id).outcome
            assert outcome.faults == ("prefill on prefill-0 took too long: placed again",)
            assert outcome.decode_computed_tokens == len(PROMPT)
            gate.set()

    simulate(main)


@pytest.mark.parametrize("moment", ["while decode writes", "after the answer"])
def test_a_handoff_that_comes_after_its_deadline_is_released(moment: str) -> None:
    async def main() -> None:
        slow = replace(CONFIG, latency=replace(CONFIG.latency, prefill_fixed_s=2.0))
        engines = {"prefill-0": slow} if moment == "after the answer" else {}
        async with Rig(engines=engines, handoff_timeout_s=0.01) as rig:
            # The worker does not learn of the abort, as if prefill had been quicker.
            async def deaf(gateway_id: str, request_ids: Sequence[str]) -> None:
                pass

            rig.workers["prefill-0"].abort = deaf
            request_id = rig.add(PROMPT, 20)
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 20)
            await until(lambda: rig.transport.released, "the late hand-off to be released")
            (handoff,) = rig.transport.released
            assert handoff.source_request_id == request_id
            assert rig.receipt(request_id).outcome.kv_blocks_moved == 0

    simulate(main)


@pytest.mark.parametrize("breaks_with", [ReplicaGoneError("the network is down"), ValueError("not a report")])
def test_a_stream_that_breaks_displaces_its_requests_until_the_replica_is_back(breaks_with: Exception) -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 200, resumable=True)
            await rig.writing(request_id)

            def on_report(report: WorkerReport) -> None:
                if report.deltas:
                    rig.transport.on_report = lambda report: None
                    raise breaks_with

            rig.transport.on_report = on_report
            await until(lambda: rig.transport.on_report is not on_report, "the stream to break")
            with pytest.raises(PlacementRejected):
                rig.add(PROMPT)
            answer = await rig.finished(request_id)
            assert answer.token_ids == answer_to(PROMPT, 200)
            assert rig.receipt(request_id).outcome.faults == ("decode-0 was lost: goes on elsewhere",)
            assert (await rig.ask(PROMPT))[0].token_ids == answer_to(PROMPT, 6)

    simulate(main)


def test_without_decode_replicas_a_request_is_rejected_and_leaves_nothing() -> None:
    async def main() -> None:
        async with Rig(decode=0) as rig:
            with pytest.raises(PlacementRejected, match="no decode replica is available") as caught:
                rig.add(PROMPT)
            assert (caught.value.rejection.status, caught.value.rejection.retry_after_s) == (503, 5)
            assert len(rig.orchestrator.receipts) == 0

    simulate(main)


def test_a_full_gateway_rejects_and_takes_again_when_there_is_room() -> None:
    async def main() -> None:
        async with Rig(max_in_flight_requests=2) as rig:
            request_ids = [rig.add(PROMPT), rig.add(OTHER_PROMPT)]
            with pytest.raises(PlacementRejected, match="2 sequences") as caught:
                rig.add(PROMPT)
            rejection = caught.value.rejection
            assert (rejection.status, rejection.retry_after_s, rejection.cause) == (503, 1, Cause.GATEWAY_FULL)
            assert rig.orchestrator.num_in_flight == 2
            for request_id in request_ids:
                await rig.finished(request_id)
            await rig.ask(PROMPT)

    simulate(main)


async def read_enough(rig: Rig) -> None:
    """Lets prefill read what its measured rate needs to be believed."""
    for number in range(2 + TRUSTED_AFTER_TOKENS // len(PROMPT)):
        await rig.ask([number, *PROMPT], 1)


def hurried(rig: Rig, deadline_s: float, priority: Priority = Priority.NORMAL, prompt: list[int] = PROMPT) -> str:
    group = rig.orchestrator.new_group(f"hurried-{priority}", 1, hints=Hints(priority, deadline_s))
    return rig.add(prompt, 6, group)


def test_a_request_that_would_be_late_is_refused_and_leaves_nothing() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await read_enough(rig)
            receipts = len(rig.orchestrator.receipts)
            with pytest.raises(PlacementRejected, match="predicted time to the first token") as caught:
                hurried(rig, 0.001)
            rejection = caught.value.rejection
            assert (rejection.status, rejection.retry_after_s, rejection.cause) == (429, 60, Cause.DEADLINE)
            assert (rig.orchestrator.num_in_flight, len(rig.orchestrator.receipts)) == (0, receipts)
            assert (await rig.finished(hurried(rig, 1.0))).token_ids == answer_to(PROMPT, 6)

    simulate(main)


def test_what_is_refused_counts_as_demand_and_what_was_answered_in_time_is_told() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await read_enough(rig)
            before = rig.orchestrator.demand
            assert before.num_ended == before.num_ttft_kept > 0
            with pytest.raises(PlacementRejected, match="predicted time to the first token"):
                hurried(rig, 0.001)
            demand = rig.orchestrator.demand
            assert demand.read > before.read
            assert demand.write > before.write
            assert demand.num_ended == before.num_ended

    simulate(main)


def test_the_lowest_priority_is_refused_first_and_taken_again_when_the_queue_is_shorter() -> None:
    async def main() -> None:
        shares = AdmissionConfig(low_share=0.5, normal_share=0.7, high_share=0.9)
        async with Rig(admission=shares) as rig:
            await read_enough(rig)

            def outcomes(deadline_s: float) -> list[bool]:
                taken: list[bool] = []
                for priority in Priority:
                    try:
                        rig.orchestrator.abort([hurried(rig, deadline_s, priority)])
                        taken.append(True)
                    except PlacementRejected:
                        taken.append(False)
                return taken

            queue = [rig.add([number, *OTHER_PROMPT], 1) for number in range(20)]
            (view,) = rig.cluster.snapshot().prefill
            full_s = (view.queued_tokens + len(PROMPT)) / view.prefill_tokens_per_s
            assert outcomes(full_s / 0.45) == [True, True, True]
            assert outcomes(full_s / 0.6) == [False, True, True]
            assert outcomes(full_s / 0.8) == [False, False, True]
            assert outcomes(full_s / 0.95) == [False, False, False]
            for request_id in queue:
                await rig.finished(request_id)
            assert outcomes(full_s / 0.95) == [True, True, True]

    simulate(main)


def test_the_prediction_is_in_the_receipt_and_near_what_came() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await read_enough(rig)
            queue = [rig.add([number, *OTHER_PROMPT], 1, resumable=True) for number in range(20)]
            request_id = rig.add(PROMPT, 6, resumable=True)
            for other in (*queue, request_id):
                await rig.finished(other)
            receipt = rig.receipt(request_id)
            assert receipt.admission is not None
            assert receipt.outcome.ttft_ms == pytest.approx(1000 * receipt.admission.predicted_ttft_s, rel=0.3)

    simulate(main)


def test_what_the_front_end_has_waited_counts_for_the_deadline() -> None:
    async def main() -> None:
        async with Rig() as rig:
            group = rig.orchestrator.new_group("late", 1, received_s=now_s() - 5.0, hints=Hints(ttft_deadline_s=6.0))
            with pytest.raises(PlacementRejected, match="5 s, is above"):
                rig.add(PROMPT, 6, group)

    simulate(main)


def test_without_prefill_replicas_decode_reads_and_the_placement_is_degraded() -> None:
    async def main() -> None:
        async with Rig() as rig, Rig(prefill=0) as alone:
            assert not (await rig.ask(PROMPT))[1].placement.degraded
            rig.engines["prefill-0"].die()
            await until(lambda: not rig.cluster.snapshot().prefill, "the loss to be noticed")
            answer, receipt = await rig.ask(OTHER_PROMPT)
            assert answer.token_ids == answer_to(OTHER_PROMPT, 6)
            assert (receipt.placement.prefill, receipt.placement.degraded) == (None, True)
            assert not (await alone.ask(PROMPT))[1].placement.degraded

    simulate(main)


def test_a_cluster_without_decode_replicas_serves_again_when_one_joins() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engines["decode-0"].die()
            await until(lambda: not rig.cluster.snapshot().decode, "the loss to be noticed")
            with pytest.raises(PlacementRejected) as caught:
                rig.add(PROMPT)
            rejection = caught.value.rejection
            assert (rejection.status, rejection.retry_after_s, rejection.cause) == (503, 5, Cause.NO_DECODE)
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-1"))
            await rig.ready("decode-1")
            assert (await rig.ask(PROMPT))[0].token_ids == answer_to(PROMPT, 6)

    simulate(main)


def test_a_group_is_taken_whole_or_not_at_all() -> None:
    async def main() -> None:
        async with Rig(max_in_flight_requests=3) as rig:
            request_id = rig.add(OTHER_PROMPT)
            with pytest.raises(PlacementRejected):
                add_group(rig, 3)
            assert rig.orchestrator.num_in_flight == 1
            for choice in add_group(rig, 2):
                await rig.finished(choice)
            await rig.finished(request_id)

    simulate(main)


# -- members that come and go


def test_a_replica_that_leaves_is_let_go_of_after_its_last_request() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            old = rig.add(PROMPT, 50)
            leaver = rig.receipt(old).placement.decode
            await rig.writing(old)
            rig.transport.remove(leaver)
            new = [rig.add(OTHER_PROMPT, 10) for _ in range(4)]
            assert leaver not in {rig.receipt(request_id).placement.decode for request_id in new}
            for request_id in new:
                await rig.finished(request_id)
            assert leaver not in rig.transport.let_go_of
            assert (await rig.finished(old)).token_ids == answer_to(PROMPT, 50)
            assert rig.cluster.get(leaver) is None
            await until(lambda: leaver in rig.transport.let_go_of, "the stream to be closed")

    simulate(main)


OLD, NEW = (replace(CONFIG, kv_format=kv_format) for kv_format in ("old", "new"))
BOTH = {"prefill-0": OLD, "decode-0": OLD, "prefill-1": NEW, "decode-1": NEW}


def test_engines_that_cannot_hand_over_to_each_other_serve_side_by_side() -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2, engines=BOTH) as rig:
            asked = [rig.add([number, *PROMPT], 10) for number in range(16)]
            for request_id in asked:
                await rig.finished(request_id)
            pairs = {(rig.receipt(one).placement.prefill, rig.receipt(one).placement.decode) for one in asked}
            assert pairs == {("prefill-0", "decode-0"), ("prefill-1", "decode-1")}
            assert all(not rig.receipt(one).outcome.faults for one in asked)
            assert all(load.kv_transfer_failures_total == 0 for load in rig.loads.values())

    simulate(main)


def test_an_update_to_engines_that_cannot_fetch_from_the_old_ones_loses_nothing() -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=1, engines=BOTH) as rig:
            old = [rig.add([number, *PROMPT], 50) for number in range(4)]
            for request_id in old:
                await rig.writing(request_id)
            for phase in Phase:
                rig.transport.add(rig.new_worker(phase, f"{phase}-1"))
            await until(lambda: all(r.ready for p in Phase for r in rig.cluster.pool(p)), "the new ones to be ready")
            for replica_id in ("prefill-0", "decode-0"):
                rig.transport.leave(replica_id)
            new = [rig.add([number, *OTHER_PROMPT], 10) for number in range(4)]
            for number, request_id in enumerate(old):
                assert (await rig.finished(request_id)).token_ids == answer_to([number, *PROMPT], 50)
            for request_id in new:
                await rig.finished(request_id)
                placement = rig.receipt(request_id).placement
                assert (placement.prefill, placement.decode) == ("prefill-1", "decode-1")
            assert not any(rig.receipt(one).outcome.faults for one in (*old, *new))
            for replica_id in ("prefill-0", "decode-0"):
                await until(lambda gone=replica_id: rig.cluster.get(gone) is None, "the old ones to go")
                rig.transport.remove(replica_id)

    simulate(main)


def test_a_hand_off_is_given_back_through_one_that_its_source_can_hear() -> None:
    async def main() -> None:
        # The replica that is first in its pool is of the other format.
        engines = {"prefill-0": NEW, "decode-0": OLD, "decode-1": NEW}
        async with Rig(prefill=1, decode=2, engines=engines) as rig:
            request_id = next(
                one
                for one in (rig.add([number, *PROMPT]) for number in range(8))
                if rig.receipt(one).placement.prefill is not None
            )

            def on_report(report: WorkerReport) -> None:
                if any(delta.handoff and delta.request_id == request_id for delta in report.deltas):
                    rig.orchestrator.abort([request_id])

            rig.transport.on_report = on_report
            await until(lambda: rig.transport.released, "the hand-off to be released")
            assert rig.transport.released_through == ["decode-1"]

    simulate(main)


def test_an_idle_replica_that_leaves_is_let_go_of_at_once() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.transport.remove("prefill-0")
            assert rig.cluster.get("prefill-0") is None
            answer, receipt = await rig.ask(PROMPT)
            assert answer.token_ids == answer_to(PROMPT, 6)
            assert receipt.placement.prefill is None
            assert rig.transport.let_go_of == ["prefill-0"]

    simulate(main)


def test_a_prefill_replica_that_leaves_finishes_what_it_reads() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT)
            await prefilling(rig, request_id)
            rig.transport.remove("prefill-0")
            await rig.finished(request_id)
            outcome = rig.receipt(request_id).outcome
            assert (outcome.faults, outcome.kv_blocks_moved) == ((), 6)
            await until(lambda: rig.transport.let_go_of == ["prefill-0"], "the stream to be closed")

    simulate(main)


def test_a_prefill_replica_that_leaves_keeps_its_blocks_until_decode_has_fetched_them() -> None:
    async def main() -> None:
        async with Rig() as rig:
            other = rig.add(OTHER_PROMPT, 2, needs_whole_prompt=True)
            request_id = rig.add(PROMPT, 50)
            await pulling(rig, request_id)
            rig.transport.remove("prefill-0")
            await rig.finished(other)
            assert not rig.answers[request_id].token_ids
            assert rig.cluster.get("prefill-0") is not None
            await rig.writing(request_id)
            assert rig.cluster.get("prefill-0") is None
            await rig.finished(request_id)
            assert rig.receipt(request_id).outcome.kv_blocks_moved == 6

    simulate(main)


def test_a_replica_that_dies_after_it_left_is_forgotten() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT)
            await prefilling(rig, request_id)
            rig.transport.remove("prefill-0")
            rig.engines["prefill-0"].die()
            await until(lambda: rig.cluster.get("prefill-0") is None, "it to be forgotten")
            assert not rig.answers[request_id].token_ids
            assert (await rig.finished(request_id)).token_ids == answer_to(PROMPT, 6)
            assert rig.receipt(request_id).outcome.faults == ("prefill-0 was lost: placed again",)

    simulate(main)


def test_a_replica_that_comes_back_before_it_was_let_go_of_is_used_again() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, 50)
            await rig.writing(request_id)
            rig.transport.remove("decode-0")
            with pytest.raises(PlacementRejected):
                rig.add(PROMPT)
            rig.transport.add(rig.workers["decode-0"])
            await rig.ready("decode-0")
            assert (await rig.finished(request_id)).token_ids == answer_to(PROMPT, 50)
            assert (await rig.ask(PROMPT))[0].token_ids == answer_to(PROMPT, 6)
            assert rig.transport.let_go_of == []

    simulate(main)


def test_a_replica_that_joins_is_warmed_with_every_partner_before_it_is_used() -> None:
    async def main() -> None:
        async with Rig(prefill=2) as rig:
            gate = rig.transport.before_submit["decode-1"] = asyncio.Event()
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-1"))
            await until(lambda: any(target == "decode-1" for target, _, _ in rig.transport.submitted), "a warm-up")
            early = [rig.add(PROMPT, 30) for _ in range(3)]
            assert {rig.receipt(request_id).placement.decode for request_id in early} == {"decode-0"}
            gate.set()
            await rig.ready("decode-1")
            sent = [request for target, _, request in rig.transport.submitted if target == "decode-1"]
            assert [r.handoff.source_replica for r in sent if r.handoff] == ["prefill-0", "prefill-1"]
            assert all(r.max_tokens == 1 and r.sampling == b"warm-up" for r in sent)
            late = rig.add(OTHER_PROMPT)
            assert rig.receipt(late).placement.decode == "decode-1"
            for request_id in (*early, late):
                await rig.finished(request_id)

    simulate(main)


def test_a_replica_that_joins_is_not_kept_out_by_a_partner_that_leaves() -> None:
    async def main() -> None:
        slow = replace(CONFIG, latency=replace(CONFIG.latency, handoff_fixed_s=5.0))
        async with Rig(prefill=2, engines={"decode-0": slow}) as rig:
            reading = rig.add(PROMPT, 50)
            leaver = rig.receipt(reading).placement.prefill
            assert leaver is not None
            await pulling(rig, reading)
            rig.transport.remove(leaver)
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-1"))
            await rig.ready("decode-1")
            assert rig.cluster.get(leaver) is not None
            await rig.finished(reading)

    simulate(main)


def test_a_partner_that_dies_during_a_warm_up_does_not_hold_up_the_one_that_joins() -> None:
    async def main() -> None:
        slow = replace(CONFIG, latency=replace(CONFIG.latency, prefill_fixed_s=1.0))
        async with Rig(engines={"prefill-0": slow}) as rig:
            start_s = now_s()
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-1"))
            await until(lambda: len(warm_ups(rig, "prefill-0", start_s)) == 1, "its warm-up")
            rig.engines["prefill-0"].die()
            await rig.ready("decode-1")
            assert now_s() - start_s < 1.0

    simulate(main)


def test_a_replica_that_fails_its_warm_ups_stays_out_until_it_passes_one() -> None:
    async def main() -> None:
        async with Rig() as rig:
            worker, tries = rig.new_worker(Phase.DECODE, "decode-1"), itertools.count(1)
            submit = worker.submit

            async def refuse(gateway_id: str, request: EngineRequest) -> None:
                raise InvalidEngineRequestError(f"refusal {next(tries)}")

            worker.submit = refuse
            rig.transport.add(worker)
            await until(lambda: len(warm_ups(rig, "decode-1")) == 3, "three tries")
            _, receipt = await rig.ask(PROMPT)
            assert receipt.placement.decode == "decode-0"
            worker.submit = submit
            await rig.ready("decode-1")
            # The hand-offs of the warm-ups that were refused: nobody else knows of them.
            rig.leases_may_end = 3
            await asyncio.sleep(CONFIG.lease_s)

    simulate(main)


def warm_ups(rig: Rig, replica_id: str, since_s: float = 0.0) -> list[EngineRequest]:
    sent = [request for target, at_s, request in rig.transport.submitted if target == replica_id and at_s >= since_s]
    return [request for request in sent if request.request_id.startswith("warm-up-")]


def test_start_times_out_with_what_is_missing() -> None:
    async def main() -> None:
        rig = Rig()
        rig.expected[Phase.DECODE] = 2
        with pytest.raises(TimeoutError, match="after 5 s only 1 of 1 prefill and 1 of 2 decode replicas are ready"):
            await rig.orchestrator.start(rig.expected, timeout_s=5.0)
        assert now_s() == pytest.approx(5.0)
        await rig.close()

    simulate(main)


# -- the end


def test_close_in_the_middle_of_everything_leaves_no_task() -> None:
    async def main() -> None:
        rig = Rig(handoff_timeout_s=600.0)
        joiner = rig.new_worker(Phase.DECODE, "decode-1")
        not_ours = asyncio.all_tasks()
        await rig.start()
        writing, group = rig.add(PROMPT, 200), add_group(rig, 3)
        await rig.writing(writing)
        rig.transport.before_submit["prefill-0"] = asyncio.Event()
        rig.transport.before_submit["decode-0"] = asyncio.Event()
        held = rig.add(OTHER_PROMPT)
        await rig.placed_on(held, "prefill-0")
        rig.add(OTHER_PROMPT)
        assert rig.orchestrator.num_in_flight > len(group)
        await rig.orchestrator.close()
        rig.transport.add(joiner)
        (reader_of_deltas,) = asyncio.all_tasks() - not_ours
        assert not reader_of_deltas.cancelling()
        await rig.close()

    simulate(main)


def test_a_gateway_that_vanishes_has_its_requests_aborted() -> None:
    async def main() -> None:
        async with Rig() as rig:
            writing = rig.add(PROMPT, 200)
            await rig.writing(writing)
            reading = rig.add(OTHER_PROMPT, 200)
            await prefilling(rig, reading)
            await rig.orchestrator.close()
            await rig.loads_are_told()
            for replica_id in ("prefill-0", "decode-0"):
                load = rig.loads[replica_id]
                assert (load.num_running_requests, load.num_waiting_requests, load.num_kv_blocks_used) == (0, 0, 0)
            rig.is_over = True

    simulate(main)


# -- whatever happens


@dataclass(frozen=True)
class Job:
    """A group of a generated load. `patience_s`: when the client goes away."""

    start_s: float
    num_choices: int
    num_prompt_tokens: int
    max_tokens: int
    patience_s: float | None
    needs_whole_prompt: bool


jobs = st.builds(
    Job,
    start_s=st.floats(0, 0.5),
    num_choices=st.sampled_from([1, 1, 1, 3]),
    num_prompt_tokens=st.integers(1, 60),
    max_tokens=st.integers(1, 20),
    patience_s=st.none() | st.floats(0, 0.5),
    needs_whole_prompt=st.booleans(),
)


@given(
    load=st.lists(jobs, min_size=1, max_size=10),
    prefill_dies_at_s=st.none() | st.floats(0, 0.6),
    decode_leaves_at_s=st.none() | st.floats(0, 0.6),
    handoff_timeout_s=st.sampled_from([0.02, 0.1, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_load_and_no_fault_loses_a_token_or_a_block(
    load: list[Job], prefill_dies_at_s: float | None, decode_leaves_at_s: float | None, handoff_timeout_s: float
) -> None:
    async def ask(rig: Rig, number: int, job: Job) -> None:
        await asyncio.sleep(job.start_s)
        prompt = [*PROMPT[: job.num_prompt_tokens], number]
        group = rig.orchestrator.new_group(f"group-{number}", job.num_choices)
        more = {"needs_whole_prompt": job.needs_whole_prompt}
        request_ids = [rig.add(prompt, job.max_tokens, group, **more) for _ in range(job.num_choices)]
        if job.patience_s is not None:
            await asyncio.sleep(job.patience_s)
            rig.orchestrator.abort(request_ids)
        expected = answer_to(prompt, job.max_tokens)
        for request_id in request_ids:
            answer = rig.answers[request_id]
            if job.patience_s is None:
                await rig.finished(request_id)
            if answer.finish_reason is FinishReason.LENGTH:
                assert answer.token_ids == expected
            else:
                # Only a request that was on its way to the replica that left may fail.
                assert answer.finish_reason is None or decode_leaves_at_s is not None, answer.error
                assert answer.token_ids == expected[: len(answer.token_ids)]
        assert rig.receipt(f"group-{number}").outcome.status != "running"

    async def main() -> None:
        async with Rig(prefill=2, decode=2, handoff_timeout_s=handoff_timeout_s) as rig:
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(load):
                    group.create_task(ask(rig, number, job))
                if prefill_dies_at_s is not None:
                    await asyncio.sleep(prefill_dies_at_s)
                    rig.engines["prefill-0"].die()
                if decode_leaves_at_s is not None:
                    await asyncio.sleep(decode_leaves_at_s)
                    rig.transport.remove("decode-0")
            if decode_leaves_at_s is not None:
                # A hand-off that was on its way to the replica that left is its prefill engine's to give up.
                rig.leases_may_end = len(load)
                await asyncio.sleep(CONFIG.lease_s)

    simulate(main)


# -- what is learnt


def test_costs_are_learnt_from_reports_and_predict_what_happens() -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=1) as rig:
            for number in range(60):
                prompt = [number, *PROMPT]
                request_id = rig.add(prompt, 6, group=rig.orchestrator.new_group(f"n{number}", 1))
                await rig.finished(request_id)
            learnt = rig.orchestrator.learnt
            receipt = rig.receipt("n59")
            new = len(PROMPT) + 1
            assert learnt.costs.prefill.read.seconds(new, new) == pytest.approx(0.01 + 0.001 * new, rel=0.1)
            assert learnt.costs.decode.step.seconds(1, 50) == pytest.approx(0.022, rel=0.1)
            assert learnt.costs.output_tokens < 110, "answers have 6 tokens, and 256 is where it begins"
            assert receipt.predicted is not None
            assert receipt.outcome.ttft_ms is not None
            assert receipt.predicted.ttft_s == pytest.approx(receipt.outcome.ttft_ms / 1000, rel=0.2)
            error = learnt.costs.prefill.read.error
            assert error is not None
            assert error < 0.2

    simulate(main)


def test_a_turn_ends_when_the_response_is_over_and_the_pause_is_learnt() -> None:
    async def main() -> None:
        async with Rig() as rig:
            for turn in range(3):
                group = rig.orchestrator.new_group(f"t{turn}", 1, hints=Hints(session="s", agent="a"))
                rig.orchestrator.await_response(group)
                await rig.finished(rig.add(PROMPT, 6, group=group))
                assert rig.orchestrator.learnt.pauses.num_returned == turn, "it is learnt when the next turn comes"
                rig.orchestrator.response_over(group, "search")
                await asyncio.sleep(2.0)
            assert rig.receipt("t2").request.session is not None
            assert rig.orchestrator.learnt.num_sessions == 1

    simulate(main)


@pytest.mark.parametrize("refused_by", ["gateway", "tenant"])
def test_a_pause_ends_when_the_next_turn_came_though_it_was_refused(refused_by: str) -> None:
    async def main() -> None:
        async with Rig(max_in_flight_requests=1) as rig:
            hints = Hints(session="s", agent="a", tool="search")
            await rig.finished(rig.add(PROMPT, group=rig.orchestrator.new_group("t0", 1, hints=hints)))
            await asyncio.sleep(2.0)
            refused = rig.orchestrator.new_group("refused", 1, hints=hints)
            if refused_by == "tenant":
                rig.orchestrator.refused(refused)
            else:
                other = rig.add(OTHER_PROMPT)
                with pytest.raises(PlacementRejected, match="1 sequences"):
                    rig.add(PROMPT, group=refused)
                await rig.finished(other)
            await asyncio.sleep(500.0)
            assert rig.orchestrator.learnt.pauses.num_returned == 0
            await rig.finished(rig.add(PROMPT, group=rig.orchestrator.new_group("t1", 1, hints=hints)))
            assert rig.orchestrator.learnt.pauses.num_returned == 1
            learnt, expected = rig.orchestrator._sessions.pauses, PauseModel()
            expected.returned(None, "a", "search", 2.0)
            assert learnt.predict(None, "a", "search") == expected.predict(None, "a", "search")

    simulate(main)


def test_a_refused_request_leaves_no_session_behind() -> None:
    async def main() -> None:
        async with Rig(prefill=1, decode=1) as rig:
            rig.transport.remove("decode-0")
            await until(lambda: not rig.orchestrator.cluster.pool(Phase.DECODE, ready_only=True), "decode is gone")
            group = rig.orchestrator.new_group("r", 1, hints=Hints(session="s"))
            with pytest.raises(PlacementRejected):
                rig.add(PROMPT, 6, group=group)
            assert rig.orchestrator.learnt.num_sessions == 0

    simulate(main)
