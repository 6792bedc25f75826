"""Owns what stands in for Baton's orchestrator in `bench.front_end`: one engine, and nothing between it and vLLM."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass

from engine.protocol import Engine, EngineRequest, FinishReason, Phase, TokenDelta
from gateway.orchestrator import SequenceRequest


@dataclass(frozen=True)
class _Group:
    num_choices: int


class OneEngine:
    """What `SplitEngineClient` asks of an orchestrator, done by handing everything to one engine: nothing is placed,
    counted or recorded."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = engine.steps()
        self._calls: set[asyncio.Future[None]] = set()
        self._live: set[str] = set()

    @property
    def num_in_flight(self) -> int:
        return len(self._live)

    def new_group(self, receipt_id: str, num_choices: int, received_s: float | None = None) -> _Group:
        return _Group(num_choices)

    def add(self, sequence: SequenceRequest, group: _Group) -> None:
        self._live.add(sequence.request_id)
        request = EngineRequest(
            sequence.request_id, Phase.DECODE, sequence.prompt_token_ids, sequence.max_tokens, sequence.sampling
        )
        self._call(self._engine.submit(request))

    def abort(self, request_ids: list[str], reason: FinishReason) -> None:
        self._live.difference_update(request_ids)
        self._call(self._engine.abort(request_ids))

    async def next_deltas(self) -> list[TokenDelta]:
        """Those of the next step that has any."""
        async for step in self._steps:
            if step.deltas:
                self._live.difference_update(delta.request_id for delta in step.deltas if delta.finish_reason)
                return step.deltas
        raise AssertionError("an engine's steps are endless")

    def _call(self, call: Awaitable[None]) -> None:
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
