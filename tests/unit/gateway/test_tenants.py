"""Tenants: whose key it is, what is left of what hints claim, and who may ask once more."""

import dataclasses
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.agents.tenants import BURST_S, OWN_NAMES, Entry, Limiter, Tenant, Tenants, key_sha256, new_key
from gateway.routing.types import Cause, Hints, Priority, Rejection

ALICE = Tenant("alice", (key_sha256(b"alice-1"), key_sha256(b"alice-2")))
BOB = Tenant("bob", (key_sha256(b"bob-1"),))


# -- keys


def test_each_of_a_tenants_keys_is_the_tenants() -> None:
    tenants = Tenants([ALICE, BOB])
    assert [tenants.of(key) for key in (b"alice-1", b"alice-2", b"bob-1")] == [ALICE, ALICE, BOB]


@pytest.mark.parametrize("key", [b"", b"alice", b"alice-1 ", b"ALICE-1", b"alice-3", b"alice-1\xff", b"\xff" * 10_000])
def test_what_is_nobodys_key_is_nobodys(key: bytes) -> None:
    assert Tenants([ALICE, BOB]).of(key) is None


def test_the_digest_of_a_key_is_no_key() -> None:
    digest = key_sha256(b"alice-1")
    assert Tenants([ALICE]).of(digest) is None
    assert Tenants([ALICE]).of(digest.hex().encode()) is None


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 40 and key.isascii() and key.isprintable() and " " not in key for key in keys)


# -- what hints may claim


def test_claims_within_the_limits_are_left_as_they_are() -> None:
    hints = Hints(Priority.LOW, 5.0)
    assert ALICE.cap(hints) == dataclasses.replace(hints, tenant="alice")


@pytest.mark.parametrize(
    ("max_priority", "asked", "given"),
    [
        (Priority.LOW, Priority.HIGH, Priority.LOW),
        (Priority.NORMAL, Priority.HIGH, Priority.NORMAL),
        (Priority.HIGH, Priority.HIGH, Priority.HIGH),
        (Priority.NORMAL, Priority.LOW, Priority.LOW),
    ],
)
def test_a_priority_above_the_highest_is_lowered_and_noted(max_priority: Priority, asked: Priority, given: str) -> None:
    hints = dataclasses.replace(ALICE, max_priority=max_priority).cap(Hints(asked))
    assert hints.priority == given
    assert hints.capped == ((f"priority {asked} to {given}",) if asked != given else ())


def test_a_deadline_beyond_the_limits_is_brought_within_and_noted() -> None:
    tenant = dataclasses.replace(ALICE, min_ttft_deadline_s=0.5, max_ttft_deadline_s=30.0)
    long, short, within = (tenant.cap(Hints(ttft_deadline_s=deadline_s)) for deadline_s in (3600.0, 0.001, 2.0))
    assert (long.ttft_deadline_s, long.capped) == (30.0, ("ttft_deadline_s 3600 to 30",))
    assert (short.ttft_deadline_s, short.capped) == (0.5, ("ttft_deadline_s 0.001 to 0.5",))
    assert (within.ttft_deadline_s, within.capped) == (2.0, ())
    assert tenant.cap(Hints()).ttft_deadline_s is None


# -- what is a tenant's own


def test_salts_differ_between_tenants_and_come_from_the_name_alone() -> None:
    assert ALICE.cache_salt != BOB.cache_salt
    changed = dataclasses.replace(ALICE, key_digests=BOB.key_digests, max_priority=Priority.LOW)
    assert changed.cache_salt == ALICE.cache_salt
    assert "alice" not in ALICE.cache_salt


@pytest.mark.parametrize("name", OWN_NAMES)
def test_the_same_name_of_two_tenants_names_two_things(name: str) -> None:
    hints = dataclasses.replace(Hints(), **{name: "conversation"})
    alices, bobs = getattr(ALICE.cap(hints), name), getattr(BOB.cap(hints), name)
    assert len({alices, bobs, "conversation"}) == 3
    assert getattr(ALICE.cap(hints), name) == alices


def test_whatever_a_client_may_name_is_its_tenants_own() -> None:
    """A hint that is a name of the client's choosing would let a tenant join what is another's. What is learnt of
    agents and tools is kept for each tenant (`gateway.agents.pauses`): their names need not differ."""
    types = typing.get_type_hints(Hints)
    names = {field.name for field in dataclasses.fields(Hints) if types[field.name] in (str, str | None)} - {"tenant"}
    assert names == {*OWN_NAMES, "agent", "tool"}


def test_what_joins_two_names_does_not_move_between_them() -> None:
    one, other = Tenant("a", ()), Tenant("ab", ())
    assert one.cap(Hints(session="bc")).session != other.cap(Hints(session="c")).session


# -- limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def entered(limiter: Limiter, tenant: Tenant) -> Entry:
    entry = limiter.enter(tenant)
    assert isinstance(entry, Entry), entry
    return entry


def refused(limiter: Limiter, tenant: Tenant) -> Rejection:
    rejection = limiter.enter(tenant)
    assert isinstance(rejection, Rejection)
    return rejection


def test_a_tenant_has_as_many_requests_at_once_as_it_may() -> None:
    limiter, tenant = Limiter(Clock()), dataclasses.replace(ALICE, max_concurrent_requests=2)
    first, _ = entered(limiter, tenant), entered(limiter, tenant)
    rejection = refused(limiter, tenant)
    assert (rejection.status, rejection.cause) == (429, Cause.TENANT_CONCURRENCY)
    assert rejection.retry_after_s >= 1
    assert (
        "tenant alice may have 2 requests at once here, each choice counted; it has 2, and this is 1 more"
        in rejection.reason
    )
    first.close()
    entered(limiter, tenant)


def test_one_tenants_requests_take_nothing_of_anothers() -> None:
    limiter = Limiter(Clock())
    alice, bob = (dataclasses.replace(t, max_concurrent_requests=1, requests_per_minute=6) for t in (ALICE, BOB))
    entered(limiter, alice)
    assert isinstance(limiter.enter(alice), Rejection)
    entered(limiter, bob)


def test_an_entry_is_given_back_once() -> None:
    limiter, tenant = Limiter(Clock()), dataclasses.replace(ALICE, max_concurrent_requests=3)
    kept, ended = entered(limiter, tenant), entered(limiter, tenant)
    ended.close()
    ended.close()
    assert limiter.held(tenant) == 1
    kept.close()
    assert limiter.held(tenant) == 0


def test_a_request_counts_once_for_each_choice_of_each_prompt() -> None:
    limiter, tenant = Limiter(Clock()), dataclasses.replace(ALICE, max_concurrent_requests=5)
    entry = entered(limiter, tenant)
    assert entry.prompt(1) is None
    assert limiter.held(tenant) == 1
    assert entry.prompt(3) is None
    assert limiter.held(tenant) == 4
    rejection = entry.prompt(2)
    assert rejection is not None
    assert rejection.cause is Cause.TENANT_CONCURRENCY
    assert limiter.held(tenant) == 4
    assert entry.prompt(1) is None
    entry.close()
    assert limiter.held(tenant) == 0


def test_more_choices_than_a_tenant_may_ever_have_are_refused_with_how_many_it_may() -> None:
    limiter, tenant = Limiter(Clock()), dataclasses.replace(ALICE, max_concurrent_requests=2)
    rejection = entered(limiter, tenant).prompt(16)
    assert rejection is not None
    assert "may have 2 requests at once here, each choice counted; it has 1, and this is 15 more" in rejection.reason


def test_after_its_end_a_request_takes_nothing_more() -> None:
    limiter = Limiter(Clock())
    entry = entered(limiter, ALICE)
    entry.close()
    assert entry.prompt(2) is not None
    assert limiter.held(ALICE) == 0


def test_a_rate_allows_a_burst_and_then_one_at_a_time() -> None:
    clock = Clock()
    limiter, tenant = Limiter(clock), dataclasses.replace(ALICE, requests_per_minute=60)
    for _ in range(int(BURST_S)):
        entered(limiter, tenant)
    rejection = refused(limiter, tenant)
    assert (rejection.status, rejection.cause, rejection.retry_after_s) == (429, Cause.TENANT_RATE, 1)
    clock.now_s += rejection.retry_after_s
    entered(limiter, tenant)
    assert isinstance(limiter.enter(tenant), Rejection)


def test_a_slow_rate_says_when_the_next_request_may_come() -> None:
    clock = Clock()
    limiter, tenant = Limiter(clock), dataclasses.replace(ALICE, requests_per_minute=2)
    entered(limiter, tenant)
    assert refused(limiter, tenant).retry_after_s == 30
    clock.now_s += 29
    assert isinstance(limiter.enter(tenant), Rejection)
    clock.now_s += 1
    entered(limiter, tenant)


def test_many_choices_leave_a_debt() -> None:
    clock = Clock()
    limiter, tenant = Limiter(clock), dataclasses.replace(ALICE, requests_per_minute=60)
    assert entered(limiter, tenant).prompt(30) is None
    assert refused(limiter, tenant).retry_after_s == 30 - int(BURST_S) + 1


def test_what_is_refused_costs_nothing() -> None:
    clock = Clock()
    tenant = dataclasses.replace(ALICE, max_concurrent_requests=1, requests_per_minute=60)
    limiter = Limiter(clock)
    entry = entered(limiter, tenant)
    for _ in range(1000):
        assert refused(limiter, tenant).cause is Cause.TENANT_CONCURRENCY
    entry.close()
    for _ in range(int(BURST_S) - 1):
        entered(limiter, tenant).close()
    assert refused(limiter, tenant).cause is Cause.TENANT_RATE
    assert limiter.held(tenant) == 0


@given(
    per_minute=st.integers(1, 600),
    gaps_s=st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=200),
)
def test_no_minute_has_more_than_its_rate_and_a_burst(per_minute: int, gaps_s: list[float]) -> None:
    clock = Clock()
    limiter, tenant = Limiter(clock), dataclasses.replace(ALICE, requests_per_minute=per_minute)
    taken_s: list[float] = []
    for gap_s in gaps_s:
        clock.now_s += gap_s
        if isinstance(limiter.enter(tenant), Entry):
            taken_s.append(clock.now_s)
    most = per_minute + max(per_minute / 60 * BURST_S, 1.0)
    for begin_s in taken_s:
        assert sum(begin_s <= at_s < begin_s + 60 for at_s in taken_s) <= most + 1e-6


@pytest.mark.parametrize(("limit", "gateways", "each"), [(8, 1, 8), (8, 2, 4), (8, 3, 3), (1, 4, 1)])
def test_each_of_several_gateways_enforces_its_part(limit: int, gateways: int, each: int) -> None:
    limiter = Limiter(Clock(), num_gateways=lambda: gateways)
    tenant = dataclasses.replace(ALICE, max_concurrent_requests=limit)
    for _ in range(each):
        entered(limiter, tenant)
    assert isinstance(limiter.enter(tenant), Rejection)
    rate = dataclasses.replace(BOB, requests_per_minute=60 * limit)
    burst = max(limit / gateways * BURST_S, 1)
    for _ in range(math.floor(burst)):
        entered(limiter, rate)
    assert isinstance(limiter.enter(rate), Rejection)
