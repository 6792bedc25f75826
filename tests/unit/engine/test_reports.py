"""The outbox of one report stream: what leaves when, in which order, and what a slow reader gets."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BlockMirror
from engine.protocol import (
    BlockChanges,
    EngineGoneError,
    EngineInfo,
    EngineLoad,
    InFlight,
    Phase,
    TokenDelta,
    WorkerReport,
)
from engine.reports import HEARTBEAT_S, LOAD_INTERVAL_S, Outbox
from tests.unit.virtual_time import now_s, simulate

INFO = EngineInfo("simulated", "model", 256, 8, 64, 1024, [])
NOBODY = InFlight()
NO_BLOCKS = BlockChanges([], [], cleared=True)


def load(number: int) -> EngineLoad:
    return EngineLoad(num_running_requests=number)


def delta(number: int) -> TokenDelta:
    return TokenDelta("r", [number])


class Reader:
    """Reads a stream as fast as it can; notes when each report came."""

    def __init__(self, stream: AsyncIterator[WorkerReport]):
        self.reports: list[WorkerReport] = []
        self.times_s: list[float] = []
        self.error: BaseException | None = None
        self.task = asyncio.create_task(self._read(stream))

    async def _read(self, stream: AsyncIterator[WorkerReport]) -> None:
        try:
            async for report in stream:
                self.reports.append(report)
                self.times_s.append(now_s())
        except EngineGoneError as error:
            self.error = error

    @property
    def tokens(self) -> list[list[int]]:
        return [[token for delta in report.deltas for token in delta.token_ids] for report in self.reports]

    async def caught_up(self) -> None:
        """Lets everything happen that can happen now."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def new_outbox(blocks: BlockMirror | None = None) -> Outbox:
    return Outbox("decode-0", Phase.DECODE, INFO, load(0), blocks or BlockMirror(64), lambda: 0.0)


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(8, "big") for number in numbers]


def test_the_first_report_comes_at_once_and_alone_carries_the_engines_info() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        outbox.put([delta(1)], load(1), NOBODY)
        await reader.caught_up()
        outbox.close()
        await reader.task
        assert reader.reports == [
            WorkerReport("decode-0", Phase.DECODE, 0, [], load(0), INFO, NOBODY, NO_BLOCKS),
            WorkerReport("decode-0", Phase.DECODE, 1, [delta(1)], load(1), None, NOBODY, None),
        ]

    simulate(main)


def test_deltas_leave_at_once_one_report_per_step() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        for step in range(1, 6):
            outbox.put([delta(2 * step), delta(2 * step + 1)], load(step), NOBODY)
            await reader.caught_up()
        assert reader.tokens == [[], *([2 * step, 2 * step + 1] for step in range(1, 6))]
        assert reader.times_s == [0.0] * 6
        assert [report.sequence for report in reader.reports] == list(range(6))
        outbox.close()
        await reader.task

    simulate(main)


def test_load_alone_waits_for_company_but_not_for_long() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        for step in range(1, 101):
            await asyncio.sleep(0.01)
            outbox.put([], load(step), NOBODY)
        await asyncio.sleep(1.0)
        outbox.close()
        await reader.task
        gaps_s = [later - earlier for earlier, later in zip(reader.times_s, reader.times_s[1:], strict=False)]
        assert min(gaps_s) >= LOAD_INTERVAL_S - 1e-9
        assert len(reader.reports) == pytest.approx(1.0 / LOAD_INTERVAL_S + 1, abs=2)
        assert reader.reports[-1].load == load(100)
        assert reader.times_s[-1] <= 1.0 + LOAD_INTERVAL_S + 1e-9

    simulate(main)


def test_a_load_that_waits_leaves_with_the_next_delta() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        outbox.put([], load(1), NOBODY)
        await asyncio.sleep(LOAD_INTERVAL_S / 2)
        assert len(reader.reports) == 1
        outbox.put([delta(1)], load(1), NOBODY)
        await reader.caught_up()
        assert reader.reports[1:] == [WorkerReport("decode-0", Phase.DECODE, 1, [delta(1)], load(1))]
        assert reader.times_s[1] == pytest.approx(LOAD_INTERVAL_S / 2)
        outbox.close()
        await reader.task

    simulate(main)


def test_an_unchanged_load_is_not_reported() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        for _ in range(10):
            await asyncio.sleep(LOAD_INTERVAL_S)
            outbox.put([], load(0), NOBODY)
        assert len(reader.reports) == 1
        outbox.close()
        await reader.task

    simulate(main)


def test_what_others_have_in_flight_is_told_like_load() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        outbox.put([], load(0), InFlight(2, 30))
        outbox.put([], load(0), InFlight(3, 50))
        await asyncio.sleep(LOAD_INTERVAL_S)
        await reader.caught_up()
        assert [report.others_in_flight for report in reader.reports] == [NOBODY, InFlight(3, 50)]
        assert reader.times_s[-1] == pytest.approx(LOAD_INTERVAL_S)
        outbox.close()
        await reader.task

    simulate(main)


def test_a_slow_reader_gets_what_it_missed_in_one_report() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reports = outbox.reports()
        await anext(reports)
        for step in range(1, 51):
            outbox.put([delta(step)], load(step), NOBODY)
        report = await anext(reports)
        assert report.deltas == [delta(step) for step in range(1, 51)]
        assert (report.sequence, report.load) == (1, load(50))

    simulate(main)


def test_a_failure_ends_the_stream_after_what_was_before() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        outbox.put([delta(1)], load(1), NOBODY)
        outbox.fail(EngineGoneError("died"))
        await reader.task
        assert reader.tokens == [[], [1]]
        assert str(reader.error) == "died"

    simulate(main)


@pytest.mark.parametrize("waiting_for", ["anything", "company for its load"])
def test_a_failure_reaches_a_reader_that_waits(waiting_for: str) -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        if waiting_for == "company for its load":
            outbox.put([], load(1), NOBODY)
            await reader.caught_up()
        outbox.fail(EngineGoneError("died"))
        await reader.task
        assert str(reader.error) == "died"
        assert now_s() == 0.0

    simulate(main)


@pytest.mark.parametrize("waiting_for", ["anything", "company for its load"])
def test_a_closed_outbox_ends_its_stream(waiting_for: str) -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await reader.caught_up()
        if waiting_for == "company for its load":
            outbox.put([], load(1), NOBODY)
            await reader.caught_up()
        outbox.close()
        await reader.task
        assert (len(reader.reports), reader.error) == (1, None)
        assert now_s() == 0.0

    simulate(main)


# -- cached blocks


class Blocks:
    """A mirror, and the outbox that tells of it."""

    def __init__(self, *held: int):
        self.mirror = BlockMirror(64)
        self.mirror.apply(BlockChanges(hashes(*held), []))
        self.outbox = new_outbox(self.mirror)

    def change(self, stored: list[int] | None = None, removed: list[int] | None = None, cleared: bool = False) -> None:
        changes = BlockChanges(hashes(*(stored or [])), hashes(*(removed or [])), cleared)
        news = self.mirror.apply(changes)
        assert news == changes, "the test told of a change that is none"
        self.outbox.put_blocks(news)


def test_a_reader_is_told_all_blocks_first_and_then_what_changes() -> None:
    async def main() -> None:
        blocks = Blocks(1, 2, 3)
        reports = blocks.outbox.reports()
        assert (await anext(reports)).blocks == BlockChanges(hashes(1, 2, 3), [], cleared=True)
        blocks.change(stored=[4], removed=[1])
        blocks.outbox.put([delta(1)], load(1), NOBODY)
        report = await anext(reports)
        assert (report.blocks, report.deltas) == (BlockChanges(hashes(4), hashes(1)), [delta(1)])
        blocks.outbox.put([delta(2)], load(2), NOBODY)
        assert (await anext(reports)).blocks is None

    simulate(main)


def test_blocks_before_the_first_report_are_part_of_its_snapshot() -> None:
    async def main() -> None:
        blocks = Blocks(1)
        blocks.change(stored=[2])
        reports = blocks.outbox.reports()
        assert (await anext(reports)).blocks == BlockChanges(hashes(1, 2), [], cleared=True)
        blocks.outbox.put([delta(1)], load(1), NOBODY)
        assert (await anext(reports)).blocks is None

    simulate(main)


def test_changes_of_blocks_alone_wait_for_company_but_not_for_long() -> None:
    async def main() -> None:
        blocks = Blocks(1, 2)
        reader = Reader(blocks.outbox.reports())
        await reader.caught_up()
        blocks.change(stored=[3])
        await asyncio.sleep(LOAD_INTERVAL_S)
        await reader.caught_up()
        assert [report.blocks for report in reader.reports[1:]] == [BlockChanges(hashes(3), [])]
        assert reader.times_s == [0.0, pytest.approx(LOAD_INTERVAL_S)]
        blocks.outbox.close()
        await reader.task

    simulate(main)


def test_a_slow_reader_is_not_told_of_blocks_that_came_and_went() -> None:
    async def main() -> None:
        blocks = Blocks(1, 2, 3, 4)
        reports = blocks.outbox.reports()
        await anext(reports)
        blocks.change(stored=[5])
        blocks.change(removed=[5, 1])
        blocks.change(stored=[1, 6])
        assert (await anext(reports)).blocks == BlockChanges(hashes(6), [])

    simulate(main)


@pytest.mark.parametrize("removed", [[1, 2], [1, 2, 3]])
def test_changes_that_outnumber_the_blocks_give_way_to_a_snapshot(removed: list[int]) -> None:
    async def main() -> None:
        blocks = Blocks(1, 2, 3, 4)
        reports = blocks.outbox.reports()
        await anext(reports)
        blocks.change(removed=removed)
        left = [number for number in (1, 2, 3, 4) if number not in removed]
        changes = BlockChanges([], hashes(*removed)) if len(removed) == 2 else BlockChanges(hashes(*left), [], True)
        assert (await anext(reports)).blocks == changes
        blocks.change(stored=[9])
        assert (await anext(reports)).blocks == BlockChanges(hashes(9), [])

    simulate(main)


def test_a_cleared_cache_is_told_with_what_it_holds_since() -> None:
    async def main() -> None:
        blocks = Blocks(1, 2, 3)
        reports = blocks.outbox.reports()
        await anext(reports)
        blocks.change(cleared=True)
        blocks.change(stored=[7])
        assert (await anext(reports)).blocks == BlockChanges(hashes(7), [], cleared=True)

    simulate(main)


block_events = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "clear", "read"]), st.integers(0, 5)), max_size=60
)


@given(events=block_events)
@settings(max_examples=200, deadline=None)
def test_at_any_pace_a_reader_ends_up_with_the_workers_blocks(events: list[tuple[str, int]]) -> None:
    async def main() -> None:
        blocks, theirs = Blocks(1, 2, 3), BlockMirror(64)
        reports = blocks.outbox.reports()
        for what, number in events:
            (block_hash,) = hashes(number)
            if what == "read":
                blocks.outbox.put([delta(number)], load(0), NOBODY)
                report = await anext(reports)
                if report.blocks is not None:
                    theirs.apply(report.blocks)
                    assert len(report.blocks.stored) + len(report.blocks.removed) <= max(len(blocks.mirror), 1)
                assert set(theirs) == set(blocks.mirror)
            elif what == "clear":
                blocks.change(cleared=True)
            elif (block_hash in blocks.mirror) == (what == "remove"):
                blocks.change(**{"stored" if what == "store" else "removed": [number]})

    simulate(main)


# -- all of it


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 3),  # deltas
            st.integers(0, 2),  # load
            st.sampled_from([0.0, 0.001, 0.03, 0.1]),  # pause before it
            st.booleans(),  # whether a reader that dawdles reads one report after it
        )
    )
)
@settings(max_examples=150, deadline=None)
def test_every_delta_comes_once_and_in_order_at_any_pace(steps: list[tuple[int, int, float, bool]]) -> None:
    async def main() -> None:
        slow_outbox, quick_outbox = new_outbox(), new_outbox()
        quick, slow = Reader(quick_outbox.reports()), slow_outbox.reports()
        slow_reports = [await anext(slow)]
        number, last = 0, load(0)
        for num_deltas, next_load, pause_s, reads in steps:
            await asyncio.sleep(pause_s)
            deltas = [delta(number + index) for index in range(num_deltas)]
            number, last = number + num_deltas, load(next_load)
            for outbox in (slow_outbox, quick_outbox):
                outbox.put(deltas, last, NOBODY)
            if reads and deltas:
                slow_reports.append(await anext(slow))
        for outbox in (slow_outbox, quick_outbox):
            outbox.fail(EngineGoneError("died"))
        await quick.task
        slow_end = Reader(slow)
        await slow_end.task
        slow_reports += slow_end.reports
        for reports in (quick.reports, slow_reports):
            tokens = [token for report in reports for delta in report.deltas for token in delta.token_ids]
            assert tokens == list(range(number))
            assert [report.sequence for report in reports] == list(range(len(reports)))
            assert reports[-1].load == last
        assert len(quick.reports) <= len(steps) + 1

    simulate(main)


# -- heartbeats


def test_a_stream_without_news_brings_a_report_a_second() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        await asyncio.sleep(4.5 * HEARTBEAT_S)
        outbox.close()
        await reader.task
        assert reader.times_s == [number * HEARTBEAT_S for number in range(5)]
        assert [report.sequence for report in reader.reports] == list(range(5))
        assert reader.reports[4] == WorkerReport("decode-0", Phase.DECODE, 4, [], load(0))

    simulate(main)


@pytest.mark.parametrize("news", ["delta", "load", "blocks"])
def test_a_heartbeat_is_due_a_second_after_the_report_before_it(news: str) -> None:
    async def main() -> None:
        blocks = Blocks(1, 2)
        reader = Reader(blocks.outbox.reports())
        await asyncio.sleep(0.7 * HEARTBEAT_S)
        if news == "blocks":
            blocks.change(stored=[3])
        else:
            blocks.outbox.put([delta(1)] if news == "delta" else [], load(1), NOBODY)
        await asyncio.sleep(1.2 * HEARTBEAT_S)
        blocks.outbox.close()
        await reader.task
        assert reader.times_s == pytest.approx([0.0, 0.7 * HEARTBEAT_S, 1.7 * HEARTBEAT_S])

    simulate(main)


def test_a_heartbeat_is_one_report_and_the_stream_can_fail_after_it() -> None:
    async def main() -> None:
        blocks = Blocks(1, 2, 3)
        reader = Reader(blocks.outbox.reports())
        await asyncio.sleep(1.5 * HEARTBEAT_S)
        blocks.change(stored=[4])
        blocks.change(removed=[4])
        await reader.caught_up()
        assert len(reader.reports) == 2
        blocks.outbox.fail(EngineGoneError("died"))
        await reader.task
        assert (str(reader.error), len(reader.reports)) == ("died", 2)

    simulate(main)


def test_a_slow_reader_finds_one_heartbeat() -> None:
    async def main() -> None:
        outbox = new_outbox()
        reports = outbox.reports()
        await anext(reports)
        await asyncio.sleep(10 * HEARTBEAT_S)
        assert (await anext(reports)).sequence == 1
        began_s = now_s()
        await anext(reports)
        assert now_s() - began_s == pytest.approx(HEARTBEAT_S)

    simulate(main)


def test_a_busy_stream_sets_no_more_timers_than_an_idle_one_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        heartbeats: list[asyncio.TimerHandle] = []
        call_at = loop.call_at

        def counted(when: float, callback, *arguments, **more) -> asyncio.TimerHandle:
            timer = call_at(when, callback, *arguments, **more)
            if "heartbeat" in callback.__qualname__:
                heartbeats.append(timer)
            return timer

        monkeypatch.setattr(loop, "call_at", counted)
        outbox = new_outbox()
        reader = Reader(outbox.reports())
        for step in range(1000):
            outbox.put([delta(step)], load(0), NOBODY)
            await asyncio.sleep(3 * HEARTBEAT_S / 1000)
        assert len(reader.reports) >= 1000
        assert len(heartbeats) <= 4
        outbox.close()
        await reader.task
        assert all(timer.cancelled() or timer.when() <= loop.time() for timer in heartbeats)

    simulate(main)


def test_a_report_tells_for_how_long_the_engine_has_been_silent() -> None:
    async def main() -> None:
        outbox = Outbox("decode-0", Phase.DECODE, INFO, load(0), BlockMirror(64), now_s)
        reader = Reader(outbox.reports())
        await asyncio.sleep(0.25)
        outbox.put([delta(1)], load(1), NOBODY)
        await asyncio.sleep(2.0)
        outbox.close()
        await reader.task
        assert [report.engine_silent_s for report in reader.reports] == reader.times_s == [0.0, 0.25, 1.25]

    simulate(main)
