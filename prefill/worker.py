"""Owns the producer half of the hand-off: reads prompts, keeps their KV blocks for a decode engine to fetch."""

from engine.protocol import EngineRequest, InvalidEngineRequestError, Phase
from engine.worker import Worker


class PrefillWorker(Worker):
    phase = Phase.PREFILL

    def _check(self, request: EngineRequest) -> None:
        if request.handoff is not None:
            raise InvalidEngineRequestError("a prefill request carries no hand-off; prefill makes them")
