"""Owns the outbox of one report stream: it batches deltas, load and cache changes into at most one report per step."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from engine.blocks import BlockMirror, ChangeLog
from engine.protocol import BlockChanges, EngineInfo, EngineLoad, InFlight, Phase, TokenDelta, WorkerReport

LOAD_INTERVAL_S = 0.05
HEARTBEAT_S = 1.0
"""A report goes out at least so often: a gateway takes a worker that is silent for much longer for lost."""


class Outbox:
    """What one gateway has yet to be told by one worker.

    Deltas leave at once and in order; changes of load, of what others have in flight and of cached blocks wait up to
    LOAD_INTERVAL_S for company, and when nothing changes a heartbeat goes out after HEARTBEAT_S. A gateway that reads
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
        engine_silent_s: Callable[[], float] = lambda: 0.0,
    ):
        """`engine_silent_s` is asked for each report."""
        self._replica_id = replica_id
        self._phase = phase
        self._info: EngineInfo | None = info
        self._load = load
        self._others = InFlight()
        self._blocks = blocks
        self._engine_silent_s = engine_silent_s
        self._block_log = ChangeLog()
        self._snapshot_due = True
        self._deltas: list[TokenDelta] = []
        self._load_changed = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._beats = False
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
        sent_s = next_load_s = 0.0
        heartbeat: asyncio.TimerHandle | None = None

        def beat() -> None:
            # A timer that is set anew for each report would cost more than the report.
            nonlocal heartbeat
            heartbeat = None
            if (due_s := sent_s + HEARTBEAT_S) > loop.time():
                heartbeat = loop.call_at(due_s, beat)
            else:
                self._beats = True
                self._wake.set()

        try:
            while True:
                if heartbeat is None and not self._beats:
                    heartbeat = loop.call_at(max(sent_s, loop.time()) + HEARTBEAT_S, beat)
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
                if self._deltas or self._load_changed or self._snapshot_due or self._block_log or self._beats:
                    deltas, self._deltas = self._deltas, []
                    info, self._info = self._info, None
                    self._load_changed = self._beats = False
                    sent_s = loop.time()
                    next_load_s = sent_s + LOAD_INTERVAL_S
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
            if heartbeat is not None:
                heartbeat.cancel()

    def _take_blocks(self) -> BlockChanges | None:
        if not self._snapshot_due:
            return self._block_log.take()
        self._snapshot_due = False
        return self._blocks.snapshot()

    def _is_quiet(self) -> bool:
        """Nothing but load and cached blocks can have changed."""
        return not self._deltas and self._failure is None and not self._closed
