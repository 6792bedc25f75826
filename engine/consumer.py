"""Owns what a worker does with hand-offs that it is given: each is consumed at most once, and not after its time."""

import logging
import time
from collections import OrderedDict
from typing import Any

import msgspec

from engine.protocol import EngineRequest, InvalidEngineRequestError, KVHandoff
from engine.worker import Worker

log = logging.getLogger("baton.consumer")

REMEMBERED_HANDOFFS = 100_000


class ConsumingWorker(Worker):
    """A request without a hand-off is read here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._consumed: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def submit(self, gateway_id: str, request: EngineRequest) -> None:
        """A hand-off that came too late is left alone: the prompt is read here. Raises as `Worker.submit` does."""
        if request.handoff is not None and request.handoff.expires_s <= time.time():
            log.warning("the hand-off of %s came after its time", request.request_id)
            request = msgspec.structs.replace(request, handoff=None)
        await super().submit(gateway_id, request)

    def _check(self, request: EngineRequest) -> None:
        if request.handoff is None:
            return
        if request.handoff.num_tokens > len(request.prompt_token_ids):
            raise InvalidEngineRequestError(
                f"the hand-off covers {request.handoff.num_tokens} tokens, the prompt has only "
                f"{len(request.prompt_token_ids)}"
            )
        self._consume(request.handoff)

    def _refused(self, request: EngineRequest) -> None:
        if request.handoff is not None:
            self._consumed.pop(_key(request.handoff), None)

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        self._consume(handoff)
        await super().release(request_id, handoff)

    def _consume(self, handoff: KVHandoff) -> None:
        """Invariant I1: vLLM does not check that blocks still hold this prompt, so a handle is good for one use."""
        key = _key(handoff)
        if key in self._consumed:
            raise InvalidEngineRequestError(
                f"hand-off {handoff.source_request_id} of {handoff.source_replica} was consumed before"
            )
        self._consumed[key] = None
        while len(self._consumed) > REMEMBERED_HANDOFFS:
            self._consumed.popitem(last=False)


def _key(handoff: KVHandoff) -> tuple[str, str]:
    return handoff.source_replica, handoff.source_request_id
