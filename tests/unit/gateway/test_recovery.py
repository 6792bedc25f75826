"""What a fault costs the client: nothing. Each row of the table of faults, on real workers and simulated engines."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.protocol import FinishReason, KVHandoff, Phase, TokenDelta, WorkerReport
from gateway.lifecycle import FaultKind
from gateway.routing.policies import least_tokens, place
from gateway.transport import ReplicaGoneError
from tests.unit.gateway.rig import OTHER_PROMPT, PROMPT, Answer, Rig, answer_to, until
from tests.unit.simulated_config import CONFIG
from tests.unit.virtual_time import now_s, simulate

LENGTH = 60
ENGINE_TIMEOUT_S = 20.0


def kinds(rig: Rig, receipt_id: str) -> tuple[str, ...]:
    return rig.receipt(receipt_id).outcome.fault_kinds


def decode_of(rig: Rig, request_id: str) -> str:
    return rig.receipt(request_id).placement.decode


async def finishes_whole(rig: Rig, request_id: str, prompt: list[int] = PROMPT, length: int = LENGTH) -> Answer:
    answer = await rig.finished(request_id)
    assert (answer.error, answer.finish_reason) == (None, FinishReason.LENGTH)
    assert answer.token_ids == answer_to(prompt, length)
    assert rig.receipt(request_id).outcome.output_tokens == length
    assert rig.receipt(request_id).outcome.status == "finished"
    return answer


@pytest.mark.parametrize("resumable", [True, False], ids=["continued", "replayed"])
def test_a_decode_replica_that_dies_in_mid_stream_costs_the_client_nothing(resumable: bool) -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=resumable)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_lost_mid_stream",)
            (later,) = rig.receipt(request_id).later
            assert later.placement.decode != decode_of(rig, request_id)
            assert place(least_tokens, later.request, later.snapshot, later.seed) == later.placement

    simulate(main)


@pytest.mark.parametrize("resumable", [True, False])
def test_a_second_loss_in_mid_stream_costs_nothing_either(resumable: bool) -> None:
    async def main() -> None:
        async with Rig(decode=3) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=resumable)
            for number in (10, 25):
                await until(lambda n=number: len(rig.answers[request_id].token_ids) > n, "some tokens")
                receipt = rig.receipt(request_id)
                rig.engines[
                    (*receipt.later, receipt)[0].placement.decode
                    if number == 10
                    else receipt.later[-1].placement.decode
                ].die()
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_lost_mid_stream",) * 2

    simulate(main)


def test_a_continued_answer_is_given_to_engines_as_a_prompt_with_what_is_left_to_write() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=True)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            (prefill,) = rig.transport.sent_to("prefill-0", f"{request_id}~2")
            num_written = len(prefill.prompt_token_ids) - len(PROMPT)
            assert num_written > 10
            assert prefill.prompt_token_ids == PROMPT + answer_to(PROMPT, num_written)
            assert (prefill.num_written_tokens, prefill.max_tokens) == (num_written, 1)
            (later,) = rig.receipt(request_id).later
            (decode,) = rig.transport.sent_to(later.placement.decode, f"{request_id}~2")
            assert decode.prompt_token_ids == PROMPT + answer_to(PROMPT, num_written + 1)
            assert (decode.num_written_tokens, decode.max_tokens) == (num_written + 1, LENGTH - num_written - 1)

    simulate(main)


def test_a_replayed_answer_starts_from_its_prompt() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            (later,) = rig.receipt(request_id).later
            (decode,) = rig.transport.sent_to(later.placement.decode, f"{request_id}~2")
            assert (decode.prompt_token_ids, decode.max_tokens) == (PROMPT, LENGTH)
            assert decode.num_written_tokens == 0

    simulate(main)


def in_turn() -> Callable[..., int]:
    """Ranks that no two requests share, and none would get again."""
    numbers = itertools.count(1)
    return lambda *_: next(numbers)


@pytest.mark.parametrize("resumable", [True, False], ids=["continued", "replayed"])
def test_all_that_becomes_of_a_request_waits_by_the_rank_in_its_receipt(resumable: bool) -> None:
    async def main() -> None:
        async with Rig(decode=2, rank=in_turn()) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=resumable)
            other_id = rig.add(OTHER_PROMPT, 1)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            assert (rig.receipt(request_id).rank_ms, rig.receipt(other_id).rank_ms) == (1, 2)
            sent = [request for _, _, request in rig.transport.submitted if request.request_id.startswith(request_id)]
            assert {(request.request_id, request.phase) for request in sent} == {
                (name, phase) for name in (request_id, f"{request_id}~2") for phase in Phase
            }
            assert {request.priority for request in sent} == {1}

    simulate(main)


def test_an_answer_that_goes_on_elsewhere_is_before_those_that_came_after_it_and_wait_there() -> None:
    async def main() -> None:
        one_at_a_time = {f"decode-{number}": replace(CONFIG, max_num_seqs=1) for number in range(2)}
        async with Rig(prefill=0, decode=2, engines=one_at_a_time, rank=in_turn()) as rig:
            ids = [rig.add([number, *PROMPT], LENGTH, resumable=True) for number in range(6)]
            await until(lambda: len(rig.answers[ids[0]].token_ids) > 10, "some tokens")
            lost = decode_of(rig, ids[0])
            survivor = next(rig.answers[one] for one in ids if decode_of(rig, one) != lost)
            rig.engines[lost].die()
            await rig.finished(ids[0], 600.0)
            finished = [one for one in ids if rig.answers[one].finish_reason is not None]
            assert len(finished) == 2, "the one that ran there, and this one"
            assert survivor.finish_reason is not None
            for number, one in enumerate(ids):
                await rig.finished(one, 600.0)
                assert rig.answers[one].token_ids == answer_to([number, *PROMPT], LENGTH)

    simulate(main)


def test_a_replay_that_differs_is_an_error_and_never_a_wrong_continuation() -> None:
    async def main() -> None:
        engines = {"decode-1": replace(CONFIG, seed=2), "decode-0": CONFIG}
        async with Rig(decode=2, engines=engines) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            if decode_of(rig, request_id) == "decode-1":
                rig.orchestrator.abort([request_id])
                rig.add(OTHER_PROMPT, LENGTH)
                request_id = rig.add(PROMPT, LENGTH)
            assert decode_of(rig, request_id) == "decode-0"
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines["decode-0"].die()
            answer = await rig.finished(request_id)
            assert answer.finish_reason is FinishReason.ERROR
            assert answer.error == "decode-1 began the answer again and wrote other tokens than the client has"
            assert answer.token_ids == answer_to(PROMPT, len(answer.token_ids))
            assert kinds(rig, request_id) == ("decode_lost_mid_stream", "replay_differs")
            rig.orchestrator.abort(list(rig.answers))

    simulate(main)


def test_a_replay_that_ends_before_what_the_client_has_is_an_error() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")

            def on_report(report: WorkerReport) -> None:
                for index, delta in enumerate(report.deltas):
                    if delta.request_id == f"{request_id}~2" and report.phase is Phase.DECODE:
                        report.deltas[index] = TokenDelta(delta.request_id, delta.token_ids, FinishReason.STOP)

            rig.transport.on_report = on_report
            rig.engines[decode_of(rig, request_id)].die()
            assert (await rig.finished(request_id)).finish_reason is FinishReason.ERROR
            assert kinds(rig, request_id) == ("decode_lost_mid_stream", "replay_differs")

    simulate(main)


def test_suppressed_tokens_lose_their_logprobs() -> None:
    async def main() -> None:
        dropped: list[int] = []

        def drop(logprobs: bytes, num_tokens: int) -> bytes:
            dropped.append(num_tokens)
            return logprobs[num_tokens:]

        async with Rig(decode=2, drop_logprobs=drop) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            held: list[int] = []

            def on_report(report: WorkerReport) -> None:
                # A byte of logprobs for each token, and ten tokens at a time from the second attempt.
                for index, delta in enumerate(report.deltas):
                    if report.phase is Phase.DECODE and delta.request_id.startswith(request_id):
                        token_ids = delta.token_ids
                        if delta.request_id != request_id:
                            held.extend(token_ids)
                            is_due = len(held) >= 10 or delta.finish_reason is not None
                            token_ids = held[:] if is_due else []
                            del held[: len(token_ids)]
                        report.deltas[index] = TokenDelta(
                            delta.request_id, token_ids, delta.finish_reason, logprobs=bytes(t % 256 for t in token_ids)
                        )

            rig.transport.on_report = on_report
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            assert dropped, "no delta brought known and new tokens together"
            logprobs = b"".join(rig.answers[request_id].logprobs)
            assert logprobs == bytes(token % 256 for token in answer_to(PROMPT, LENGTH))

    simulate(main)


def test_a_decode_replica_that_dies_before_the_first_token_is_replaced() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.placed_on(request_id, decode_of(rig, request_id))
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_lost_before_token",)
            # The dead replica never fetched the blocks; they are back without waiting for their lease.
            assert [handoff.source_request_id for handoff in rig.transport.released] == [request_id]

    simulate(main)


def test_a_pool_that_is_lost_bit_by_bit_does_not_use_up_a_requests_placements() -> None:
    async def main() -> None:
        async with Rig(decode=7) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.writing(request_id)
            alive = [replica_id for replica_id in rig.engines if replica_id.startswith("decode")]
            while alive:
                receipt = rig.receipt(request_id)
                last = receipt.later[-1].placement if receipt.later else receipt.placement
                victim = last.decode if last.decode in alive else alive[0]
                alive.remove(victim)
                rig.engines[victim].die()
                await asyncio.sleep(0.05)
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-7"))
            await finishes_whole(rig, request_id)
            assert len(kinds(rig, request_id)) == 2

    simulate(main)


@pytest.mark.parametrize("num_turns", range(4))
def test_a_hand_off_is_given_back_once_however_close_the_loss_of_decode_is_to_the_end_of_prefill(
    num_turns: int,
) -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            assert decode_of(rig, request_id) == "decode-0"
            survivor, given_back = rig.workers["decode-1"], list[str]()
            release = survivor.release

            async def counted(request_id: str, handoff: KVHandoff) -> None:
                given_back.append(handoff.source_request_id)
                await release(request_id, handoff)

            survivor.release = counted
            await rig.placed_on(request_id, "prefill-0")
            told = asyncio.Event()
            rig.transport.hang("prefill-0", told)
            await asyncio.sleep(0.2)
            # The news of the death and of the hand-off reach the gateway in neighbouring turns of its loop, or in one.
            rig.engines["decode-0"].die()
            for _ in range(num_turns):
                await asyncio.sleep(0)
            told.set()
            await finishes_whole(rig, request_id)
            assert given_back == [request_id]

    simulate(main)


@pytest.mark.parametrize("resumable", [True, False])
def test_a_request_that_its_decode_engine_gives_up_goes_on_elsewhere(resumable: bool) -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=resumable)

            def on_report(report: WorkerReport) -> None:
                for index, delta in enumerate(report.deltas):
                    if delta.request_id == request_id and len(rig.answers[request_id].token_ids) > 10:
                        error = TokenDelta(request_id, [], FinishReason.ERROR, error="out of memory")
                        report.deltas[index] = error
                        rig.engines[report.replica_id].die()

            rig.transport.on_report = on_report
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_failed",)

    simulate(main)


def test_a_decode_replica_that_dies_while_prefill_reads_is_replaced() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.placed_on(request_id, "prefill-0")
            rig.engines[decode_of(rig, request_id)].die()
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_lost_before_token",)

    simulate(main)


def test_a_prefill_replica_that_dies_is_replaced_by_another() -> None:
    async def main() -> None:
        async with Rig(prefill=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            first = rig.receipt(request_id).placement.prefill
            assert first
            await rig.placed_on(request_id, first)
            rig.engines[first].die()
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("prefill_lost",)
            (later,) = rig.receipt(request_id).later
            assert later.placement.prefill not in (None, first)
            assert rig.receipt(request_id).outcome.kv_blocks_moved == 6
            assert rig.losses == [("prefill", "dead")]

    simulate(main)


def test_without_any_decode_replica_a_request_waits_for_the_next_one() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=True)
            await until(lambda: len(rig.answers[request_id].token_ids) > 10, "some tokens")
            rig.engines["decode-0"].die()
            rig.transport.remove("decode-0")
            await asyncio.sleep(30)
            assert rig.answers[request_id].finish_reason is None
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-9"))
            await finishes_whole(rig, request_id)
            (later,) = rig.receipt(request_id).later
            assert later.placement.decode == "decode-9"

    simulate(main)


def test_a_hand_off_that_nobody_can_give_back_is_given_back_by_the_next_decode_replica() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.transport.before_submit["decode-0"] = asyncio.Event()
            request_id = rig.add(PROMPT, LENGTH, resumable=True)
            await rig.placed_on(request_id, "decode-0")
            rig.engines["decode-0"].die()
            rig.transport.remove("decode-0")
            await rig.lost("decode-0")
            assert rig.transport.released == []
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-9"))
            await finishes_whole(rig, request_id)
            assert [handoff.source_request_id for handoff in rig.transport.released] == [request_id]

    simulate(main)


def test_a_replica_that_leaves_its_pool_is_told_once_and_not_as_lost() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.writing(request_id)
            rig.transport.remove(decode_of(rig, request_id))
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ()
            assert rig.losses == [("decode", "left")]

    simulate(main)


def test_a_request_that_no_replica_can_take_fails_in_time() -> None:
    async def main() -> None:
        async with Rig(recovery_timeout_s=50.0) as rig:
            writing = rig.add(PROMPT, LENGTH)
            await until(lambda: len(rig.answers[writing].token_ids) > 10, "some tokens")
            rig.engines["decode-0"].die()
            rig.transport.remove("decode-0")
            start_s = now_s()
            answer = await rig.finished(writing, 60.0)
            assert answer.error == "no replica could take it within 50 s after a fault"
            assert now_s() - start_s == pytest.approx(50.0, abs=0.1)
            assert kinds(rig, writing) == ("decode_lost_mid_stream", "unplaceable")
            assert answer.token_ids == answer_to(PROMPT, len(answer.token_ids))

    simulate(main)


def test_an_abort_while_a_request_waits_for_a_replica_ends_it() -> None:
    async def main() -> None:
        async with Rig() as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.writing(request_id)
            rig.engines["decode-0"].die()
            rig.transport.remove("decode-0")
            await asyncio.sleep(1)
            rig.orchestrator.abort([request_id])
            assert rig.orchestrator.num_in_flight == 0
            rig.transport.add(rig.new_worker(Phase.DECODE, "decode-9"))
            await rig.ready("decode-9")
            assert not rig.transport.sent_to("decode-9", f"{request_id}~2")

    simulate(main)


@pytest.mark.parametrize("resumable", [True, False])
def test_all_choices_of_a_prompt_survive_a_loss(resumable: bool) -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            group = rig.orchestrator.new_group("the-group", 3)
            ids = [rig.add(PROMPT, LENGTH, group, resumable=resumable) for _ in range(3)]
            await until(lambda: all(len(rig.answers[id].token_ids) > 3 for id in ids), "some tokens of each")
            rig.engines[decode_of(rig, "the-group")].die()
            for request_id in ids:
                answer = await rig.finished(request_id)
                assert (answer.token_ids, answer.error) == (answer_to(PROMPT, LENGTH), None)
            assert kinds(rig, "the-group") == ("decode_lost_mid_stream",) * 3

    simulate(main)


def test_choices_that_wait_for_their_leader_survive_the_loss_of_its_replica() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            group = rig.orchestrator.new_group("the-group", 3)
            ids = [rig.add(PROMPT, LENGTH, group) for _ in range(3)]
            await rig.placed_on(ids[0], "prefill-0")
            rig.engines[decode_of(rig, "the-group")].die()
            for request_id in ids:
                answer = await rig.finished(request_id)
                assert (answer.token_ids, answer.error) == (answer_to(PROMPT, LENGTH), None)

    simulate(main)


class Silence:
    """Swallows what a worker reports, from when it is told to."""

    def __init__(self, rig: Rig, replica_id: str):
        self._gate = asyncio.Event()
        rig.transport.hang(replica_id, self._gate)
        self.end = self._gate.set


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_worker_that_falls_silent_is_put_out_and_let_back_when_it_proves_well(phase: Phase) -> None:
    async def main() -> None:
        async with Rig(prefill=2, decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=True)
            placement = rig.receipt(request_id).placement
            hung = placement.prefill if phase is Phase.PREFILL else placement.decode
            assert hung
            if phase is Phase.DECODE:
                await rig.writing(request_id)
            silence = Silence(rig, hung)
            start_s = now_s()
            await rig.finished(request_id, 30.0)
            await finishes_whole(rig, request_id)
            assert now_s() - start_s < 10.0
            assert kinds(rig, request_id)[0] in ("prefill_lost", "prefill_slow", "decode_lost_mid_stream")
            replica = rig.cluster.get(hung)
            await until(lambda: replica and not replica.ready, "the silent replica to be put out")
            silence.end()
            await rig.ready(hung)
            assert rig.losses == [(phase.value, "silent")]

    simulate(main)


def test_an_engine_that_falls_silent_is_put_out_and_let_back_when_it_proves_well() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            request_id = rig.add(PROMPT, LENGTH, resumable=True)
            await rig.writing(request_id)
            hung = decode_of(rig, request_id)
            rig.engines[hung].hang()
            start_s = now_s()
            await rig.finished(request_id, 30.0)
            assert now_s() - start_s > ENGINE_TIMEOUT_S
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ("decode_lost_mid_stream",)
            replica = rig.cluster.get(hung)
            assert replica
            await asyncio.sleep(30.0)
            assert not replica.ready
            assert rig.losses == [("decode", "silent")]
            rig.engines[hung].go_on()
            await until(lambda: replica.ready, "it to be let back", 60.0)

    simulate(main)


def test_a_gateway_that_did_not_run_itself_blames_no_worker() -> None:
    async def main() -> None:
        async with Rig(engine_timeout_s=1000.0) as rig:
            request_id = rig.add(PROMPT, LENGTH)
            await rig.writing(request_id)
            loop: Any = asyncio.get_running_loop()
            loop.skip(100.0)
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == ()

    simulate(main)


def test_a_refused_submission_ends_the_request_with_the_reason() -> None:
    async def main() -> None:
        async with Rig(decode=2) as rig:
            gone = ReplicaGoneError("no answer")
            request_id = rig.add(PROMPT, LENGTH)
            decode = decode_of(rig, request_id)
            submit = rig.workers[decode].submit

            async def fail_once(gateway_id: str, request: Any) -> None:
                rig.workers[decode].submit = submit
                raise gone

            rig.workers[decode].submit = fail_once
            await finishes_whole(rig, request_id)
            assert kinds(rig, request_id) == (FaultKind.DECODE_LOST_BEFORE_TOKEN.value,)
            rig.leases_may_end = 1
            await until(lambda: all(load.num_kv_blocks_used == 0 for load in rig.loads.values()), "the lease", 60.0)

    simulate(main)
