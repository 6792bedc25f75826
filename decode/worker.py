"""Owns the decode phase: fetches each prompt's KV blocks at most once, then writes the answer."""

from engine.consumer import ConsumingWorker
from engine.protocol import EngineRequest, InvalidEngineRequestError, Phase


class DecodeWorker(ConsumingWorker):
    """A PREFILL request asks it for a hand-off of what it has cached (docs/adr/0017)."""

    phase = Phase.DECODE
    takes = (Phase.DECODE, Phase.PREFILL)

    def _check(self, request: EngineRequest) -> None:
        if request.phase is Phase.PREFILL and request.handoff is not None:
            raise InvalidEngineRequestError("who asks decode for a hand-off of what it has cached gives it none")
        super()._check(request)
