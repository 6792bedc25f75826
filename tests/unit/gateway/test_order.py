"""The rank of a request: class, then slack, then attained service, and nobody starves."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import order
from gateway.routing.types import Hints, Priority, RequestView, SessionView

REQUEST = RequestView("r", 100, 10)
USUAL_S = 30.0
CLASS_S = order.CLASS_SHARE * USUAL_S


def rank_ms(request: RequestView, arrived_s: float, read_s: float) -> int:
    return order.rank_ms(request, arrived_s, read_s, USUAL_S)


def with_hints(priority: Priority, deadline_s: float | None = None, attained_s: float = 0.0) -> RequestView:
    return replace(REQUEST, hints=Hints(priority, deadline_s), session=SessionView(attained_s=attained_s))


requests = st.builds(
    with_hints,
    st.sampled_from(Priority),
    st.none() | st.floats(0.001, 3600),
    st.floats(0, 1e6),
)
reads = st.floats(0, 1000)


@given(requests, requests, reads, reads, st.floats(0, 1e6))
def test_whoever_comes_long_after_a_request_is_behind_it(
    first: RequestView, second: RequestView, first_read_s: float, second_read_s: float, at_s: float
) -> None:
    later = rank_ms(second, at_s + order.starvation_s(USUAL_S) + 0.001, second_read_s)
    assert rank_ms(first, at_s, first_read_s) <= later


@given(requests, requests, reads, reads)
def test_at_one_time_no_lower_class_is_before_a_higher_one(
    first: RequestView, second: RequestView, first_read_s: float, second_read_s: float
) -> None:
    higher = replace(first, hints=replace(first.hints, priority=Priority.HIGH))
    lower = replace(second, hints=replace(second.hints, priority=Priority.NORMAL))
    assert rank_ms(higher, 5.0, first_read_s) <= rank_ms(lower, 5.0, second_read_s)


def test_less_slack_goes_first_whatever_has_been_attained() -> None:
    urgent = with_hints(Priority.NORMAL, deadline_s=1.0, attained_s=1e6)
    calm = with_hints(Priority.NORMAL, deadline_s=20.0)
    assert rank_ms(urgent, 0.0, 0.5) < rank_ms(calm, 0.0, 0.5)
    assert rank_ms(calm, 0.0, 15.0) < rank_ms(calm, 0.0, 0.5), "reading uses slack up"


def test_naming_the_usual_deadline_or_a_later_one_gains_nothing() -> None:
    unnamed = rank_ms(with_hints(Priority.NORMAL), 0.0, 0.5)
    assert rank_ms(with_hints(Priority.NORMAL, deadline_s=USUAL_S), 0.0, 0.5) == unnamed
    assert rank_ms(with_hints(Priority.NORMAL, deadline_s=3600.0), 0.0, 0.5) == unnamed


def test_with_the_same_slack_less_attained_service_goes_first() -> None:
    attained = [with_hints(Priority.NORMAL, attained_s=seconds) for seconds in (0.0, 1.0, 10.0, 500.0)]
    ranks = [rank_ms(request, 0.0, 0.0) for request in attained]
    assert ranks == sorted(set(ranks))
    assert ranks[-1] - ranks[0] < CLASS_S * 1000


def test_a_session_that_its_parent_waits_for_is_as_urgent_as_the_parent() -> None:
    parent = with_hints(Priority.HIGH, deadline_s=2.0)
    child = with_hints(Priority.LOW)
    heir = replace(child, session=SessionView(inherited_priority=Priority.HIGH, inherited_deadline_s=2.0))
    assert rank_ms(heir, 0.0, 0.5) == rank_ms(parent, 0.0, 0.5) < rank_ms(child, 0.0, 0.5)
    proud = replace(parent, session=SessionView(inherited_priority=Priority.LOW, inherited_deadline_s=60.0))
    assert rank_ms(proud, 0.0, 0.5) == rank_ms(parent, 0.0, 0.5), "nobody inherits less than it has"
