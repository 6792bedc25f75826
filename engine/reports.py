"""Owns the outbox of one report stream: it batches deltas and load into at most one report per engine step."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from engine.protocol import EngineInfo, EngineLoad, Phase, TokenDelta, WorkerReport

LOAD_INTERVAL_S = 0.05


class Outbox:
    """What one gateway has yet to be told by one worker.

    Deltas leave at once and in order; a change of load alone waits up to LOAD_INTERVAL_S for company. A gateway
    that reads slowly gets fewer, larger reports: what is held is bounded by the tokens its own requests produce.
    """

    def __init__(self, replica_id: str, phase: Phase, info: EngineInfo, load: EngineLoad):
        self._replica_id = replica_id
        self._phase = phase
        self._info: EngineInfo | None = info
        self._load = load
        self._deltas: list[TokenDelta] = []
        self._load_changed = True
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._wake.set()

    def put(self, deltas: Iterable[TokenDelta], load: EngineLoad) -> None:
        self._deltas.extend(deltas)
        if load != self._load:
            self._load = load
            self._load_changed = True
        if self._deltas or self._load_changed:
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
        while True:
            await self._wake.wait()
            if self._is_quiet() and (pause_s := next_load_s - loop.time()) > 0:
                # Only load has changed: let it wait for a delta, but not for long.
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
            if self._deltas or self._load_changed:
                deltas, self._deltas = self._deltas, []
                self._load_changed = False
                next_load_s = loop.time() + LOAD_INTERVAL_S
                yield WorkerReport(self._replica_id, self._phase, sequence, deltas, self._load, self._info)
                self._info = None
                sequence += 1
                if self._deltas or self._failure:
                    self._wake.set()
            elif self._failure is not None:
                raise self._failure

    def _is_quiet(self) -> bool:
        """Nothing but load can have changed."""
        return not self._deltas and self._failure is None and not self._closed
