"""Owns the prefill phase: reads prompts, keeps their KV blocks for a decode engine to fetch."""

from engine.consumer import ConsumingWorker
from engine.protocol import Phase


class PrefillWorker(ConsumingWorker):
    """With a hand-off it fetches the beginning of a prompt instead of reading it (docs/adr/0017)."""

    phase = Phase.PREFILL
    takes = (Phase.PREFILL,)
