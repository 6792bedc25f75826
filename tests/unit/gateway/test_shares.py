"""Who makes room in a table that tenants share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.shares import Shares

# Each key is one tenant's, as the names of sessions are.
KEYS = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), (None, 0), (None, 1)]
uses = st.tuples(st.sampled_from(KEYS), st.integers(0, 4))


@given(st.lists(uses | st.sampled_from(KEYS), max_size=40))
def test_the_largest_holder_s_oldest_is_the_first(steps) -> None:
    shares: Shares[tuple[str | None, int]] = Shares()
    held: dict[tuple[str | None, int], int] = {}
    for step in steps:
        key, size = step if isinstance(step[0], tuple) else (step, None)
        held.pop(key, None)
        if size is None:
            shares.discard(key)
        else:
            held[key] = size
            shares.use(key, key[0], size)
        assert (len(shares), shares.total) == (len(held), sum(held.values()))
        if held:
            totals = {tenant: sum(s for k, s in held.items() if k[0] == tenant) for tenant, _ in held}
            largest = [tenant for tenant, total in totals.items() if total == max(totals.values())]
            assert shares.first == next(key for key in held if key[0] in largest)


def test_of_nothing_there_is_no_first() -> None:
    shares: Shares[str] = Shares()
    shares.use("k", "t")
    shares.discard("k")
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        _ = shares.first
