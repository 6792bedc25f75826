"""What a decode engine knows of the leases of the hand-offs that it fetches."""

from engine.leases import Leases


def test_a_lease_holds_until_its_end():
    leases = Leases()
    leases.begin("r", 24.0, now_s=0.0)
    assert leases.holds("r", 23.9)
    assert not leases.holds("r", 24.0)


def test_a_lease_that_nobody_told_of_does_not_hold():
    assert not Leases().holds("r", 0.0)


def test_what_was_fetched_or_has_ended_is_forgotten():
    leases = Leases()
    for number in range(10):
        leases.begin(f"r{number}", 24.0, now_s=0.0)
    leases.end("r0")
    assert not leases.holds("r0", 0.0)
    assert len(leases) == 9
    leases.begin("late", 50.0, now_s=30.0)
    assert len(leases) == 1
