"""Owns the outbox of one report stream: it batches deltas, load and cache changes into at most one report per step."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from engine.blocks import BlockMirror, ChangeLog
from engine.protocol import BlockChanges, EngineInfo, EngineLoad, InFlight, Phase, TokenDelta, WorkerReport

LOAD_INTERVAL_S = 0.05
HEARTBEAT_S = 1.0


class Outbox:
    """What one gateway has yet to be told by one worker.

    Deltas leave at once and in order; changes of load, of what others have in flight and of cached blocks wait up to
    LOAD_INTERVAL_S for company. Without any news a report leaves HEARTBEAT_S after the one before. A gateway that reads
    slowly gets fewer, larger reports. What is held for it is bounded by the tokens its own requests produce and by the
    blocks of the engine: changes of blocks are merged, and as soon as they outnumber the blocks that are held, it is
    sent all of those instead.
    """

    def __init__(
        self,
        replica_id: str,
        phase: Phase,
        info: EngineInfo,
        load: EngineLoad,
        blocks: BlockMirror,
        engine_silent_s: Callable[[], float],
    ):
        """`engine_silent_s` is asked when a report leaves."""
        self._replica_id = replica_id
        self._phase = phase
        self._info: EngineInfo | None = info
        self._load = load
        self._others = InFlight()
        self._blocks = blocks
        self._block_log = ChangeLog()
        self._snapshot_due = True
        self._engine_silent_s = engine_silent_s
        self._deltas: list[TokenDelta] = []
        self._load_changed = False
        self._told_s = 0.0
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_due = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._wake.set()

    def put(self, deltas: Iterable[TokenDelta], load: EngineLoad, others: InFlight) -> None:
        self._deltas.extend(deltas)
        if load != self._load or others != self._others:
            self._load, self._others = load, others
            self._load_changed = True
        if self._deltas or self._load_changed:
            self._wake.set()

    def put_blocks(self, changes: BlockChanges) -> None:
        """Takes changes that the mirror this outbox was made with has taken already."""
        if not self._snapshot_due:
            self._block_log.add(changes)
            if len(self._block_log) > len(self._blocks):
                self._block_log = ChangeLog()
                self._snapshot_due = True
        self._wake.set()

    def close(self) -> None:
        """Ends the stream; what was not read yet is dropped."""
        self._closed = True
        self._wake.set()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with `error` once the reports before it are read."""
        self._failure = error
        self._wake.set()

    async def reports(self) -> AsyncIterator[WorkerReport]:
        """Ends at `close`; the first report carries the engine's info. Raises what `fail` was given."""
        loop = asyncio.get_running_loop()
        sequence = 0
        next_load_s = 0.0
        self._await_heartbeat(loop, loop.time())
        try:
            while True:
                await self._wake.wait()
                if self._is_quiet() and (pause_s := next_load_s - loop.time()) > 0:
                    # Only state has changed: let it wait for a delta, but not for long.
                    self._wake.clear()
                    try:
                        async with asyncio.timeout(pause_s):
                            while self._is_quiet():
                                await self._wake.wait()
                                self._wake.clear()
                    except TimeoutError:
                        pass
                self._wake.clear()
                if self._closed:
                    return
                if self._has_news() or self._heartbeat_due:
                    deltas, self._deltas = self._deltas, []
                    info, self._info = self._info, None
                    self._load_changed = self._heartbeat_due = False
                    self._told_s = loop.time()
                    next_load_s = self._told_s + LOAD_INTERVAL_S
                    yield WorkerReport(
                        self._replica_id,
                        self._phase,
                        sequence,
                        deltas,
                        self._load,
                        info,
                        self._others,
                        self._take_blocks(),
                        self._engine_silent_s(),
                    )
                    sequence += 1
                    if self._deltas or self._failure:
                        self._wake.set()
                elif self._failure is not None:
                    raise self._failure
        finally:
            if self._heartbeat is not None:
                self._heartbeat.cancel()

    def _await_heartbeat(self, loop: asyncio.AbstractEventLoop, since_s: float) -> None:
        """One timer at a time, set anew only when it fires: a busy stream pays nothing for it."""

        def fired() -> None:
            if self._told_s > since_s:
                self._await_heartbeat(loop, self._told_s)
            else:
                self._heartbeat_due = True
                self._wake.set()
                self._await_heartbeat(loop, loop.time())

        self._heartbeat = loop.call_at(since_s + HEARTBEAT_S, fired)

    def _take_blocks(self) -> BlockChanges | None:
        if not self._snapshot_due:
            return self._block_log.take()
        self._snapshot_due = False
        return self._blocks.snapshot()

    def _has_news(self) -> bool:
        return bool(self._deltas or self._load_changed or self._snapshot_due or self._block_log)

    def _is_quiet(self) -> bool:
        """Nothing but load and cached blocks can have changed."""
        return not self._deltas and self._failure is None and not self._closed
