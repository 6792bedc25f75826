"""Owns tenants: whose key a request came with, what its hints may claim at most, and how much each may ask at once.

Deciding takes values and a clock. What is remembered is one record per configured tenant, whatever clients send.
"""

import dataclasses
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.routing.types import Cause, Hints, Priority, Rejection

TOO_MANY_REQUESTS = 429
BURST_S = 10.0
"""What a tenant has not asked for in so long it may ask for at once: a minute has at most 7/6 of its rate."""
CONCURRENCY_RETRY_S = 1
SALT_BYTES = 16
SESSION_BYTES = 16
KEY_PREFIX = "baton-"
"""Tells scanners for leaked secrets, and people, what a key is for."""
KEY_BYTES = 32
OWN_NAMES = ("session", "parent")
"""The hints that name something of a tenant's own. Another tenant's of the same name is another one."""


def new_key() -> str:
    """A key that nobody has, of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def key_sha256(key: bytes) -> bytes:
    """What is kept of a key. A plain hash is enough, for keys are random and long."""
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class Tenant:
    """`key_digests` are the SHA-256 of its keys. `operator`: it sees what concerns all tenants. Limits are of all
    gateways together; None: there is none."""

    name: str
    key_digests: tuple[bytes, ...]
    operator: bool = False
    max_priority: Priority = Priority.NORMAL
    min_ttft_deadline_s: float | None = None
    max_ttft_deadline_s: float | None = None
    max_concurrent_requests: int | None = None
    requests_per_minute: float | None = None

    @property
    def cache_salt(self) -> str:
        """What its blocks' hashes begin with (invariant I7). It depends on nothing that a client sends."""
        return hashlib.blake2b(b"tenant:" + self.name.encode(), digest_size=SALT_BYTES).hexdigest()

    def cap(self, hints: Hints) -> Hints:
        """The hints of a request of this tenant: no claim above its limits, and no name of another's session."""
        capped: list[str] = []
        priority, deadline_s = hints.priority, hints.ttft_deadline_s
        if priority.urgency > self.max_priority.urgency:
            priority = self.max_priority
            capped.append(f"priority {hints.priority} to {priority}")
        if deadline_s is not None:
            deadline_s = max(deadline_s, self.min_ttft_deadline_s or 0.0)
            deadline_s = min(deadline_s, self.max_ttft_deadline_s or math.inf)
            if deadline_s != hints.ttft_deadline_s:
                capped.append(f"ttft_deadline_s {hints.ttft_deadline_s:g} to {deadline_s:g}")
        own = {name: self._own(value) for name in OWN_NAMES if (value := getattr(hints, name)) is not None}
        return dataclasses.replace(
            hints,
            priority=priority,
            ttft_deadline_s=deadline_s,
            tenant=self.name,
            capped=tuple(capped),
            **own,
        )

    def _own(self, name: str) -> str:
        # A digest of a digest: the boundary between the two names cannot be moved.
        key = hashlib.blake2b(self.name.encode(), digest_size=SALT_BYTES).digest()
        return hashlib.blake2b(name.encode(), key=key, digest_size=SESSION_BYTES).hexdigest()


class Tenants:
    """Who has which key."""

    def __init__(self, tenants: Sequence[Tenant]) -> None:
        self._by_digest = [(digest, tenant) for tenant in tenants for digest in tenant.key_digests]

    def of(self, key: bytes) -> Tenant | None:
        """Whose key this is. How long it takes does not depend on how much of a key is right, or on whose it is."""
        digest = key_sha256(key)
        found: Tenant | None = None
        for known, tenant in self._by_digest:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


@dataclass(slots=True)
class _Use:
    """What one tenant uses of its limits here. `level` of the bucket was right at `at_s`; below 0 it is in debt."""

    num_held: int = 0
    level: float = math.inf
    at_s: float = 0.0


class Limiter:
    """Counts what each tenant asks. With several gateways each enforces an equal part, rounded up: together they take
    at most a request each more than the limit says."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, num_gateways: Callable[[], int] = lambda: 1
    ) -> None:
        self._clock = clock
        self._num_gateways = num_gateways
        self._uses: dict[str, _Use] = {}

    def enter(self, tenant: Tenant) -> "Entry | Rejection":
        """Takes a request in, or says why not. The entry has to be closed when the request has ended."""
        entry = Entry(self, tenant)
        return entry.take(1) or entry

    def held(self, tenant: Tenant) -> int:
        """What is in now, as `max_concurrent_requests` counts it."""
        use = self._uses.get(tenant.name)
        return use.num_held if use else 0

    def _take(self, tenant: Tenant, number: int) -> Rejection | None:
        """Both limits take them all, or neither takes any."""
        use = self._uses.setdefault(tenant.name, _Use())
        gateways = max(self._num_gateways(), 1)
        limit = tenant.max_concurrent_requests
        if limit is not None and use.num_held + number > (share := math.ceil(limit / gateways)):
            return _too_many_at_once(tenant, number, use.num_held, share)
        if (per_minute := tenant.requests_per_minute) is not None:
            rate_per_s = per_minute / 60 / gateways
            now_s = self._clock()
            use.level = min(use.level + (now_s - use.at_s) * rate_per_s, max(rate_per_s * BURST_S, 1.0))
            use.at_s = now_s
            if use.level < 1:
                wait_s = (1 - use.level) / rate_per_s
                reason = f"tenant {tenant.name} may send {per_minute:g} requests a minute and has sent more"
                return Rejection(TOO_MANY_REQUESTS, reason, max(math.ceil(wait_s), 1), Cause.TENANT_RATE)
            # A request that counts many times leaves a debt, or it could never be taken.
            use.level -= number
        use.num_held += number
        return None

    def _release(self, tenant: Tenant, number: int) -> None:
        self._uses[tenant.name].num_held -= number


class Entry:
    """One HTTP request within its tenant's limits. It came in as one; its prompts say how much it really is."""

    def __init__(self, limiter: Limiter, tenant: Tenant) -> None:
        self.tenant = tenant
        self._limiter = limiter
        self._num_held = 0
        self._num_prompted = 0
        self._is_closed = False

    def take(self, number: int) -> Rejection | None:
        """Takes in so many more. Nothing is taken where the limits do not allow it, or after the request's end."""
        if self._is_closed:
            return Rejection(TOO_MANY_REQUESTS, "its HTTP request has ended", CONCURRENCY_RETRY_S)
        refused = self._limiter._take(self.tenant, number)
        if refused is None:
            self._num_held += number
        return refused

    def prompt(self, num_choices: int) -> Rejection | None:
        """Takes in a prompt with so many choices, as far as what the request came in with does not cover it."""
        missing = self._num_prompted + num_choices - self._num_held
        if missing > 0 and (refused := self.take(missing)) is not None:
            return refused
        self._num_prompted += num_choices
        return None

    def close(self) -> None:
        """Gives back what is held; again: nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._limiter._release(self.tenant, self._num_held)


def _too_many_at_once(tenant: Tenant, number: int, num_held: int, share: int) -> Rejection:
    reason = (
        f"tenant {tenant.name} may have {share} requests at once here, each choice counted; it has {num_held}, and "
        f"this is {number} more"
    )
    return Rejection(TOO_MANY_REQUESTS, reason, CONCURRENCY_RETRY_S, Cause.TENANT_CONCURRENCY)
