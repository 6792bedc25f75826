"""A worker between one engine and any number of gateways: who is told what, who may do what, and what ends when."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from decode.worker import DecodeWorker
from engine.blocks import BlockMirror
from engine.protocol import (
    BlockChanges,
    EngineGoneError,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStep,
    FinishReason,
    InFlight,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    TokenDelta,
    WorkerReport,
)
from engine.reports import HEARTBEAT_S, LOAD_INTERVAL_S
from engine.worker import ENGINE_CALL_TIMEOUT_S, Worker
from prefill.worker import PrefillWorker
from tests.unit.virtual_time import now_s, simulate

HANDOFF = KVHandoff("prefill-0", "r", 3, 1, b"")


class ScriptedEngine:
    """An engine that does nothing but what the test tells it to, and notes what it is asked for."""

    info = EngineInfo("scripted", "model", 256, 8, 64, 1024, [])

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.handoffs: list[KVHandoff | None] = []
        self.aborted: list[str] = []
        self.released: list[KVHandoff] = []
        self.is_shut_down = False
        self.refusal: Exception | None = None
        self.gate: asyncio.Event | None = None
        """No call is taken before it is set."""
        self._steps: asyncio.Queue[EngineStep | Exception] = asyncio.Queue()
        self._changes: asyncio.Queue[BlockChanges | Exception] = asyncio.Queue()

    async def step(self, *deltas: TokenDelta, running: int = 0) -> None:
        """One engine step; returns when the worker has folded it."""
        self._steps.put_nowait(EngineStep(list(deltas), EngineLoad(num_running_requests=running)))
        await settled()

    async def change_blocks(self, changes: BlockChanges | Exception) -> None:
        """A change of the engine's cached blocks; returns when the worker has taken it."""
        self._changes.put_nowait(changes)
        await settled()

    async def fail(self, error: Exception) -> None:
        self._steps.put_nowait(error)
        await settled()

    async def submit(self, request: EngineRequest) -> None:
        await self._take_calls()
        if self.refusal:
            raise self.refusal
        self.submitted.append(request.request_id)
        self.handoffs.append(request.handoff)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._take_calls()
        self.aborted += request_ids

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        await self._take_calls()
        self.released.append(handoff)

    async def _take_calls(self) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def steps(self) -> AsyncIterator[EngineStep]:
        while True:
            step = await self._steps.get()
            if isinstance(step, Exception):
                raise step
            yield step

    async def block_changes(self) -> AsyncIterator[BlockChanges]:
        while True:
            changes = await self._changes.get()
            if isinstance(changes, Exception):
                raise changes
            yield changes

    async def shutdown(self) -> None:
        self.is_shut_down = True


class Gateway:
    """A gateway that reads its report stream all the time."""

    def __init__(self, worker: Worker, gateway_id: str):
        self.reports: list[WorkerReport] = []
        self.error: BaseException | None = None
        self.task = asyncio.create_task(self._read(worker, gateway_id))

    async def _read(self, worker: Worker, gateway_id: str) -> None:
        try:
            async for report in worker.attach(gateway_id):
                self.reports.append(report)
        except EngineGoneError as error:
            self.error = error

    @property
    def deltas(self) -> list[TokenDelta]:
        return [delta for report in self.reports for delta in report.deltas]

    @property
    def blocks(self) -> set[bytes]:
        """The cached blocks, as this gateway was told of them."""
        mirror = BlockMirror(64)
        for report in self.reports:
            if report.blocks is not None:
                mirror.apply(report.blocks)
        return set(mirror)

    async def vanish(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Rig:
    """A worker of one phase over a scripted engine, with the gateways `a` and `b` attached."""

    def __init__(self, phase: Phase = Phase.DECODE):
        self.phase = phase
        self.engine = ScriptedEngine()
        worker_class = DecodeWorker if phase is Phase.DECODE else PrefillWorker
        self.worker = worker_class(f"{phase}-0", self.engine)

    async def __aenter__(self) -> "Rig":
        self.a, self.b = Gateway(self.worker, "a"), Gateway(self.worker, "b")
        await settled()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.a.vanish()
        await self.b.vanish()
        await self.worker.shutdown()

    async def submit(self, gateway_id: str, request_id: str, handoff: KVHandoff | None = None) -> None:
        await self.worker.submit(gateway_id, EngineRequest(request_id, self.phase, [1, 2, 3], 5, handoff=handoff))


async def settled() -> None:
    """Lets every task do what it can do now; time stands still."""
    for _ in range(10):
        await asyncio.sleep(0)


def delta(request_id: str, number: int, finish: FinishReason | None = None, **more: KVHandoff) -> TokenDelta:
    return TokenDelta(request_id, [number], finish, **more)


def test_each_gateway_is_told_of_its_own_requests_in_order_and_once() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "a1")
            await rig.submit("b", "b1")
            await rig.submit("a", "a2")
            for number in range(5):
                await rig.engine.step(*(delta(r, number) for r in ("b1", "a1", "a2")), running=3)
            numbers = range(5)
            assert rig.a.deltas == [delta(r, number) for number in numbers for r in ("a1", "a2")]
            assert rig.b.deltas == [delta("b1", number) for number in numbers]
            assert all(report.load.num_running_requests == 3 for report in rig.a.reports[1:])
            assert [report.sequence for report in rig.a.reports] == list(range(6))

    simulate(main)


def test_a_gateway_that_attaches_learns_the_engines_info_and_its_load() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.engine.step(running=7)
            late = Gateway(rig.worker, "late")
            await settled()
            (report,) = late.reports
            assert report.info == rig.engine.info
            assert (report.replica_id, report.phase) == ("decode-0", Phase.DECODE)
            assert report.load.num_running_requests == 7
            await late.vanish()

    simulate(main)


def test_requests_that_are_refused_do_not_reach_the_engine() -> None:
    async def main() -> None:
        async with Rig(Phase.PREFILL) as rig:
            await rig.submit("a", "r")
            for gateway_id, request_id, phase, why in (
                ("nobody", "x", Phase.PREFILL, "gateway nobody is not attached to prefill-0"),
                ("a", "x", Phase.DECODE, "prefill-0 does prefill, not decode"),
                ("a", "r", Phase.PREFILL, "request r is already on prefill-0"),
                ("b", "r", Phase.PREFILL, "request r is already on prefill-0"),
            ):
                with pytest.raises(InvalidEngineRequestError, match=why):
                    await rig.worker.submit(gateway_id, EngineRequest(request_id, phase, [1], 5))
            assert rig.engine.submitted == ["r"]

    simulate(main)


def test_a_request_id_is_free_again_when_its_request_has_ended() -> None:
    async def main() -> None:
        async with Rig() as rig:
            for end in ("finished", "aborted", "refused"):
                if end == "refused":
                    rig.engine.refusal = InvalidEngineRequestError("no room")
                    with pytest.raises(InvalidEngineRequestError, match="no room"):
                        await rig.submit("a", "r")
                    rig.engine.refusal = None
                else:
                    await rig.submit("a", "r")
                    if end == "finished":
                        await rig.engine.step(delta("r", 1, FinishReason.STOP))
                    else:
                        await rig.worker.abort("a", ["r"])
            await rig.submit("b", "r")
            await rig.engine.step(delta("r", 2))
            assert rig.b.deltas == [delta("r", 2)]
            assert rig.a.deltas == [delta("r", 1, FinishReason.STOP)]

    simulate(main)


def test_a_gateway_aborts_its_own_requests_only() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "mine")
            await rig.submit("b", "theirs")
            await rig.worker.abort("a", ["theirs", "unknown"])
            assert rig.engine.aborted == []
            await rig.worker.abort("a", ["mine", "theirs"])
            await rig.worker.abort("a", ["mine"])
            assert rig.engine.aborted == ["mine"]
            await rig.engine.step(delta("mine", 1), delta("theirs", 2))
            assert (rig.a.deltas, rig.b.deltas) == ([], [delta("theirs", 2)])

    simulate(main)


def test_a_gateway_that_vanishes_has_its_requests_aborted() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "a1")
            await rig.submit("b", "b1")
            await rig.submit("a", "a2")
            await rig.a.vanish()
            assert rig.engine.aborted == ["a1", "a2"]
            with pytest.raises(InvalidEngineRequestError, match="attach first"):
                await rig.submit("a", "a3")
            await rig.engine.step(delta("b1", 1))
            assert rig.b.deltas == [delta("b1", 1)]

    simulate(main)


def test_a_second_attachment_replaces_the_first() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "old")
            again = Gateway(rig.worker, "a")
            await settled()
            assert rig.engine.aborted == ["old"]
            assert rig.a.task.done()
            assert rig.a.error is None
            await rig.submit("a", "new")
            await rig.a.vanish()
            await rig.engine.step(delta("new", 1))
            assert again.deltas == [delta("new", 1)]
            assert rig.engine.aborted == ["old"]
            await again.vanish()

    simulate(main)


@pytest.mark.parametrize("error", [EngineGoneError("died"), ZeroDivisionError("a bug")])
def test_the_engines_end_is_told_after_what_was_before_and_refuses_everything_after(error: Exception) -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            rig.engine._steps.put_nowait(EngineStep([delta("r", 1)], EngineLoad()))
            await rig.engine.fail(error)
            assert rig.a.deltas == [delta("r", 1)]
            for gateway in (rig.a, rig.b):
                assert isinstance(gateway.error, EngineGoneError)
                assert str(error) in str(gateway.error)
            assert rig.worker.failure is rig.a.error
            with pytest.raises(EngineGoneError):
                await rig.submit("a", "x")
            with pytest.raises(EngineGoneError):
                await anext(rig.worker.attach("a"))
        assert rig.engine.is_shut_down

    simulate(main)


# -- what others have in flight


async def told() -> None:
    """Lets reports that wait for company leave."""
    await asyncio.sleep(LOAD_INTERVAL_S)
    await settled()


def others(*gateways: Gateway) -> list[InFlight]:
    return [gateway.reports[-1].others_in_flight for gateway in gateways]


def test_each_gateway_is_told_what_the_others_have_in_flight() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "a1")
            await rig.submit("a", "a2")
            await rig.submit("b", "b1")
            await told()
            assert others(rig.a, rig.b) == [InFlight(1, 3, 3), InFlight(2, 6, 6)]
            await rig.engine.step(delta("a1", 1), delta("b1", 1))
            await told()
            assert others(rig.a, rig.b) == [InFlight(1, 4, 0), InFlight(2, 7, 3)]
            await rig.engine.step(delta("a1", 2), delta("a2", 1, FinishReason.STOP))
            await told()
            assert others(rig.a, rig.b) == [InFlight(1, 4, 0), InFlight(1, 5, 0)]
            await rig.worker.abort("b", ["b1"])
            await rig.engine.step(delta("a1", 3, FinishReason.STOP), delta("b1", 3))
            await told()
            assert others(rig.a, rig.b) == [InFlight(0, 0), InFlight(0, 0)]

    simulate(main)


def test_what_others_send_is_told_before_the_engine_steps() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await told()
            await rig.submit("a", "r")
            await settled()
            assert others(rig.b) == [InFlight(1, 3, 3)]

    simulate(main)


def test_a_refused_request_is_not_in_flight() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engine.refusal = InvalidEngineRequestError("no room")
            with pytest.raises(InvalidEngineRequestError, match="no room"):
                await rig.submit("a", "r")
            await told()
            assert others(rig.b) == [InFlight(0, 0)]

    simulate(main)


def test_a_gateway_that_vanishes_has_nothing_in_flight() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            await told()
            await rig.a.vanish()
            await told()
            assert others(rig.b) == [InFlight(0, 0)]

    simulate(main)


def test_a_gateway_that_attaches_learns_at_once_what_is_in_flight() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            late = Gateway(rig.worker, "late")
            await settled()
            (report,) = late.reports
            assert report.others_in_flight == InFlight(1, 3, 3)
            await late.vanish()

    simulate(main)


# -- cached blocks


def test_every_gateway_is_told_of_the_cached_blocks_whenever_it_attaches() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.engine.change_blocks(BlockChanges([b"1", b"2", b"3"], []))
            late = Gateway(rig.worker, "late")
            await rig.engine.change_blocks(BlockChanges([b"4"], [b"1"]))
            await told()
            for gateway in (rig.a, rig.b, late):
                assert gateway.blocks == {b"2", b"3", b"4"}
            assert late.reports[0].blocks == BlockChanges([b"1", b"2", b"3"], [], cleared=True)
            await late.vanish()

    simulate(main)


def test_blocks_travel_with_the_deltas_after_them() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            await told()
            rig.engine._changes.put_nowait(BlockChanges([b"1"], []))
            await rig.engine.step(delta("r", 1))
            report = rig.a.reports[-1]
            assert (report.deltas, report.blocks) == ([delta("r", 1)], BlockChanges([b"1"], []))

    simulate(main)


def test_what_an_engine_has_lost_is_forgotten_by_all() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.engine.change_blocks(BlockChanges([b"1", b"2"], []))
            await told()
            await rig.engine.change_blocks(BlockChanges([b"9"], [], cleared=True))
            await told()
            assert rig.a.blocks == rig.b.blocks == {b"9"}

    simulate(main)


def test_a_worker_that_cannot_follow_its_engines_blocks_says_so_and_ends() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.engine.change_blocks(ZeroDivisionError("a bug"))
            assert "a bug" in str(rig.a.error)
            assert rig.worker.failure is rig.a.error

    simulate(main)


# -- hand-offs


def test_decode_is_asked_for_a_handoff_without_giving_it_one() -> None:
    async def main() -> None:
        async with Rig(Phase.DECODE) as rig:
            asked = EngineRequest("r", Phase.PREFILL, [1, 2, 3], 1)
            with pytest.raises(InvalidEngineRequestError, match="gives it none"):
                await rig.worker.submit("a", msgspec.structs.replace(asked, handoff=HANDOFF))
            await rig.worker.submit("a", asked)
            made = delta("r", 1, FinishReason.LENGTH, handoff=HANDOFF)
            await rig.engine.step(made)
            assert rig.engine.submitted == ["r"]
            assert rig.a.deltas == [made]

    simulate(main)


@pytest.mark.parametrize("owner", ["attached", "gone"])
def test_a_handoff_that_overtakes_its_abort_is_told_so_that_it_can_be_given_back(owner: str) -> None:
    async def main() -> None:
        async with Rig(Phase.PREFILL) as rig:
            await rig.submit("b", "r")
            if owner == "attached":
                await rig.worker.abort("b", ["r"])
            else:
                await rig.b.vanish()
            late = delta("r", 1, FinishReason.LENGTH, handoff=HANDOFF)
            await rig.engine.step(late)
            assert rig.b.deltas == ([late] if owner == "attached" else [])
            assert rig.a.deltas == ([] if owner == "attached" else [late])

    simulate(main)


# -- hand-offs are good for one use (invariant I1)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_handoff_is_taken_once_whoever_comes_with_it(phase: Phase) -> None:
    async def main() -> None:
        async with Rig(phase) as rig:
            await rig.submit("a", "r1", HANDOFF)
            for gateway_id in ("a", "b"):
                with pytest.raises(InvalidEngineRequestError, match="hand-off r of prefill-0 was consumed before"):
                    await rig.submit(gateway_id, "r2", HANDOFF)
            with pytest.raises(InvalidEngineRequestError, match="consumed before"):
                await rig.worker.release("release-r", HANDOFF)
            assert (rig.engine.submitted, rig.engine.released) == (["r1"], [])
            await rig.submit("a", "r2")

    simulate(main)


def test_a_released_handoff_cannot_be_taken() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.worker.release("release-r", HANDOFF)
            with pytest.raises(InvalidEngineRequestError, match="consumed before"):
                await rig.submit("a", "r", HANDOFF)
            assert (rig.engine.submitted, rig.engine.released) == ([], [HANDOFF])

    simulate(main)


def test_handoffs_of_other_replicas_and_requests_are_other_handoffs() -> None:
    async def main() -> None:
        async with Rig() as rig:
            for number, (replica, request_id) in enumerate([("p0", "r0"), ("p0", "r1"), ("p1", "r0")]):
                await rig.submit("a", f"d{number}", KVHandoff(replica, request_id, 3, 1, b""))
            assert len(rig.engine.submitted) == 3

    simulate(main)


def test_a_handoff_of_a_longer_prompt_is_refused_and_not_consumed() -> None:
    async def main() -> None:
        async with Rig() as rig:
            longer = KVHandoff("prefill-0", "r", 4, 1, b"")
            with pytest.raises(InvalidEngineRequestError, match="covers 4 tokens, the prompt has only 3"):
                await rig.submit("a", "r", longer)
            await rig.worker.release("release-r", longer)

    simulate(main)


def test_a_handoff_that_the_engine_refuses_can_still_be_given_back() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engine.refusal = InvalidEngineRequestError("no room")
            with pytest.raises(InvalidEngineRequestError, match="no room"):
                await rig.submit("a", "r", HANDOFF)
            await rig.worker.release("release-r", HANDOFF)
            assert rig.engine.released == [HANDOFF]

    simulate(main)


def test_a_handoff_whose_fate_is_unknown_is_not_given_back() -> None:
    """The engine may have begun to fetch it: its blocks must not be freed under the pull."""

    async def main() -> None:
        async with Rig() as rig:
            rig.engine.refusal = EngineGoneError("died")
            with pytest.raises(EngineGoneError):
                await rig.submit("a", "r", HANDOFF)
            with pytest.raises(InvalidEngineRequestError, match="consumed before"):
                await rig.worker.release("release-r", HANDOFF)

    simulate(main)


# -- an engine that hangs


async def told_a_while_ago(seconds: float) -> None:
    await asyncio.sleep(seconds)
    await settled()


def test_an_engine_is_silent_from_its_first_request_and_then_from_its_last_step() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await told_a_while_ago(100.0)
            assert rig.worker.engine_silent_s == 0.0
            await rig.submit("a", "r1")
            await told_a_while_ago(2.0)
            await rig.submit("b", "r2")
            await told_a_while_ago(3.0)
            assert rig.worker.engine_silent_s == pytest.approx(5.0)
            await rig.engine.step(delta("r1", 1))
            assert (rig.worker.engine_silent_s, rig.a.reports[-1].engine_silent_s) == (0.0, 0.0)
            await told_a_while_ago(4.0)
            assert rig.worker.engine_silent_s == pytest.approx(4.0)
            await rig.engine.step(delta("r1", 2, FinishReason.STOP), delta("r2", 1, FinishReason.STOP))
            await told_a_while_ago(100.0)
            assert rig.worker.engine_silent_s == 0.0

    simulate(main)


def test_every_gateway_is_told_how_long_the_engine_has_been_silent_at_least_once_a_second() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            await told_a_while_ago(10.0)
            for gateway in (rig.a, rig.b):
                silences_s = [report.engine_silent_s for report in gateway.reports]
                assert silences_s == sorted(silences_s)
                assert silences_s[-1] > 10.0 - HEARTBEAT_S - LOAD_INTERVAL_S
                gaps_s = [later - sooner for sooner, later in itertools.pairwise(silences_s)]
                assert max(gaps_s) <= HEARTBEAT_S + 1e-9

    simulate(main)


def test_an_engine_that_hangs_stays_silent_when_its_requests_are_taken_elsewhere() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            await told_a_while_ago(2.0)
            await rig.worker.abort("a", ["r"])
            await told_a_while_ago(3.0)
            assert rig.worker.engine_silent_s == pytest.approx(5.0)
            await rig.engine.step()
            await told_a_while_ago(3.0)
            assert rig.worker.engine_silent_s == 0.0

    simulate(main)


def test_a_request_that_the_engine_refuses_is_nothing_to_tell_of() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engine.refusal = InvalidEngineRequestError("no room")
            with pytest.raises(InvalidEngineRequestError):
                await rig.submit("a", "r")
            await told_a_while_ago(3.0)
            assert rig.worker.engine_silent_s == 0.0

    simulate(main)


def test_an_engine_that_is_silent_for_too_long_is_given_up_like_a_dead_one() -> None:
    async def main() -> None:
        async with Rig() as rig:
            failed = asyncio.create_task(rig.worker.failed())
            await rig.submit("a", "r")
            await told_a_while_ago(9.9)
            rig.worker.check_engine(10.0)
            assert not failed.done()
            await told_a_while_ago(0.2)
            with pytest.raises(EngineGoneError, match=r"decode-0 hangs: it has told nothing for 10 s"):
                rig.worker.check_engine(10.0)
            await settled()
            assert failed.result() is rig.worker.failure
            for gateway in (rig.a, rig.b):
                assert gateway.error is rig.worker.failure
            with pytest.raises(EngineGoneError):
                await rig.submit("a", "x")

    simulate(main)


def test_a_dead_engine_fails_the_check_whether_or_not_it_was_silent() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.engine.fail(EngineGoneError("died"))
            with pytest.raises(EngineGoneError, match="died"):
                rig.worker.check_engine(10.0)
            assert str(await rig.worker.failed()) == "died"

    simulate(main)


# -- an engine that does not take calls


def test_a_request_that_the_engine_does_not_take_fails_after_a_while_and_is_aborted() -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engine.gate = asyncio.Event()
            with pytest.raises(EngineGoneError, match="did not take a call within"):
                await rig.submit("a", "r")
            assert now_s() == pytest.approx(ENGINE_CALL_TIMEOUT_S)
            await told()
            assert others(rig.b) == [InFlight()]
            rig.engine.gate.set()
            await settled()
            assert (rig.engine.submitted, rig.engine.aborted) == ([], ["r"])
            assert rig.worker.failure is None

    simulate(main)


@pytest.mark.parametrize("who", ["the gateway", "only the call"])
def test_a_request_is_aborted_when_its_submission_is_cut_off(who: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            rig.engine.gate = asyncio.Event()
            submission = asyncio.create_task(rig.submit("a", "r"))
            await settled()
            if who == "the gateway":
                rig.a.task.cancel()
            submission.cancel()
            await settled()
            rig.engine.gate.set()
            await settled()
            assert submission.cancelled()
            assert rig.engine.submitted == []
            assert set(rig.engine.aborted) == {"r"}
            await told()
            assert others(rig.b) == [InFlight()]

    simulate(main)


@pytest.mark.parametrize("call", ["abort", "release"])
def test_other_calls_that_the_engine_does_not_take_fail_after_a_while(call: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            rig.engine.gate = asyncio.Event()
            with pytest.raises(EngineGoneError, match="did not take a call within"):
                await (rig.worker.abort("a", ["r"]) if call == "abort" else rig.worker.release("release-r", HANDOFF))
            assert now_s() == pytest.approx(ENGINE_CALL_TIMEOUT_S)

    simulate(main)


def test_a_gateway_can_attach_again_although_the_engine_takes_no_call() -> None:
    async def main() -> None:
        async with Rig() as rig:
            await rig.submit("a", "r")
            rig.engine.gate = asyncio.Event()
            again = Gateway(rig.worker, "a")
            await told_a_while_ago(ENGINE_CALL_TIMEOUT_S)
            assert rig.a.task.done()
            assert again.reports
            await again.vanish()

    simulate(main)


def test_a_handoff_that_comes_after_its_time_is_left_alone_and_the_prompt_is_read() -> None:
    """Its blocks may hold another prompt by then: nothing would notice."""

    async def main() -> None:
        async with Rig() as rig:
            late = KVHandoff("prefill-0", "late", 3, 1, b"", expires_s=time.time() - 0.001)
            in_time = KVHandoff("prefill-0", "in-time", 3, 1, b"", expires_s=time.time() + 60)
            await rig.submit("a", "r1", late)
            await rig.submit("a", "r2", in_time)
            assert rig.engine.handoffs == [None, in_time]

    simulate(main)
