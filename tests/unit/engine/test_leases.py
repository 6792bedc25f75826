"""What a decode engine knows of the leases of the hand-offs that it fetches."""

from engine.leases import SAFE_SHARE, Leases

EXTENSION_S = 20.0


def test_a_lease_holds_until_its_end():
    leases = Leases(EXTENSION_S)
    leases.begin("r", 24.0, now_s=0.0)
    assert leases.holds("r", 23.9)
    assert not leases.holds("r", 24.0)


def test_a_lease_that_nobody_told_of_does_not_hold():
    assert not Leases(EXTENSION_S).holds("r", 0.0)


def test_a_heartbeat_in_time_makes_it_longer_and_never_shorter():
    leases = Leases(EXTENSION_S)
    leases.begin("r", 24.0, now_s=0.0)
    leases.renew("r", 1.0)
    assert leases.holds("r", 23.9)
    leases.renew("r", 20.0)
    assert leases.holds("r", 20.0 + SAFE_SHARE * EXTENSION_S - 0.1)
    assert not leases.holds("r", 20.0 + SAFE_SHARE * EXTENSION_S)


def test_a_heartbeat_that_comes_too_late_renews_nothing():
    leases = Leases(EXTENSION_S)
    leases.begin("r", 24.0, now_s=0.0)
    leases.renew("r", 24.0)
    assert not leases.holds("r", 24.0)


def test_what_was_fetched_or_has_ended_is_forgotten():
    leases = Leases(EXTENSION_S)
    for number in range(10):
        leases.begin(f"r{number}", 24.0, now_s=0.0)
    leases.end("r0")
    assert not leases.holds("r0", 0.0)
    assert len(leases) == 9
    leases.begin("late", 50.0, now_s=30.0)
    assert len(leases) == 1
