"""Owns what a decode engine knows of the leases of hand-offs to be fetched: until when the blocks of each certainly
hold its prompt. Pure; no clock."""

LEASE_END_KEY = "baton_lease_end_s"
"""Among a decode request's KV-transfer parameters: the end of its hand-off's lease (`KVHandoff.expires_s`)."""

SAFE_SHARE = 0.8
"""Of a lease's extension that is counted on: the rest is for the way of the heartbeats that ask for it."""


class Leases:
    """By the producer's request id. A lease that has ended stays so: a heartbeat that comes too late renews nothing, as
    the blocks may hold another prompt by then. All times are seconds of one clock."""

    def __init__(self, extension_s: float) -> None:
        """`extension_s`: for how long a heartbeat makes the producer keep the blocks, counted from its arrival."""
        self._safe_s = SAFE_SHARE * extension_s
        self._ends_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._ends_s)

    def begin(self, request_id: str, end_s: float, now_s: float) -> None:
        self._ends_s = {key: end for key, end in self._ends_s.items() if end > now_s}
        self._ends_s[request_id] = end_s

    def renew(self, request_id: str, now_s: float) -> None:
        """A heartbeat was sent."""
        if self.holds(request_id, now_s):
            self._ends_s[request_id] = max(self._ends_s[request_id], now_s + self._safe_s)

    def holds(self, request_id: str, now_s: float) -> bool:
        return self._ends_s.get(request_id, now_s) > now_s

    def end(self, request_id: str) -> None:
        self._ends_s.pop(request_id, None)
