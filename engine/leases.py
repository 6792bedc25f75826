"""Owns what a decode engine knows of the leases of hand-offs to be fetched: until when the blocks of each certainly
hold its prompt. Pure; no clock."""

LEASE_END_KEY = "baton_lease_end_s"
"""Among a decode request's KV-transfer parameters: the end of its hand-off's lease (`KVHandoff.expires_s`)."""


class Leases:
    """By the producer's request id. All times are seconds of one clock.

    The heartbeats that decode sends while a request waits make the producer keep the blocks for longer. They are not
    counted on: nobody confirms them, and a producer that did not hear one in time has given the blocks away.
    """

    def __init__(self) -> None:
        self._ends_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._ends_s)

    def begin(self, request_id: str, end_s: float, now_s: float) -> None:
        self._ends_s = {key: end for key, end in self._ends_s.items() if end > now_s}
        self._ends_s[request_id] = end_s

    def holds(self, request_id: str, now_s: float) -> bool:
        return self._ends_s.get(request_id, now_s) > now_s

    def end(self, request_id: str) -> None:
        self._ends_s.pop(request_id, None)
