"""What `bench compare` is asked for: words for systems, turns, and rates that a short run really asks."""

from dataclasses import replace

import pytest

from bench.compare_plan import ComparePlan, Contestant, SystemKind, parse_contestants, plan, turns_in_window
from bench.load_plan import LoadPlan, Slo
from bench.traces import Child, Session, Trace, Trajectory, Turn

LOAD = LoadPlan("agents", None, None, 10.0, 2.0, 1.0, 5, "salt", (Slo("own", 100, 10),))
COMPARED = plan(
    parse_contestants(["aggregated", "split"]), "c.yaml", (0.5, 1.0), (), 2, LOAD, calibration_s=7.0, concurrency=9
)


@pytest.mark.parametrize(
    ("text", "contestant"),
    [
        ("split", Contestant("split", SystemKind.SPLIT)),
        ("split:baton", Contestant("split:baton", SystemKind.SPLIT, "baton")),
        ("aggregated:512", Contestant("aggregated:512", SystemKind.AGGREGATED, "512")),
        ("router-stock", Contestant("router-stock", SystemKind.ROUTER_STOCK)),
        ("new=a/b.yaml", Contestant("new", SystemKind.CONFIG, "a/b.yaml")),
        ("theirs=http://there:1", Contestant("theirs", SystemKind.SERVER, "http://there:1")),
    ],
)
def test_words_for_systems(text: str, contestant: Contestant) -> None:
    assert Contestant.parse(text) == contestant


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["split", "no"], "there is no system 'no'; there are aggregated, split"),
        (["split", "config"], "there is no system 'config'"),
        (["split", "bare:2"], "bare takes nothing after a colon"),
        (["split", "aggregated:many"], "after the colon comes a number of tokens"),
        (["split", "split:clever"], "there is no such policy; there are baton, least-tokens"),
        (["split", "x=y"], "'x=y' must be NAME=FILE.yaml or NAME=http"),
        (["split", "=http://x"], "must be NAME="),
        (["split", "split"], "each system once"),
        (["split"], "name two systems at least"),
    ],
)
def test_what_is_no_comparison_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_contestants(texts)


def test_systems_take_turns_and_the_order_changes() -> None:
    assert COMPARED.turns() == [(0, "aggregated"), (0, "split"), (1, "split"), (1, "aggregated")]


def test_all_systems_of_a_round_get_the_same_load_and_rounds_and_rates_other_text() -> None:
    loads = [COMPARED.load_of(round, rate) for round in (0, 1) for rate in (0.5, 1.0)]
    assert [(load.seed, load.rate_per_s) for load in loads] == [(5, 0.5), (5, 1.0), (6, 0.5), (6, 1.0)]
    assert len({load.salt for load in (*loads, COMPARED.wake_of(0), COMPARED.wake_of(1), COMPARED.calibration)}) == 7


def test_capacity_is_found_in_a_closed_loop_without_pauses() -> None:
    found = COMPARED.calibration
    assert (found.rate_per_s, found.concurrency, found.duration_s, found.warm_up_s) == (None, 9, 7.0, 0.0)
    assert found.max_pause_s == 0
    assert COMPARED.wake.concurrency == 4


def one(*roots: Session) -> Trace:
    return Trace("t", 4, tuple(Trajectory(str(number), root, 9) for number, root in enumerate(roots)))


TURN = Turn(4, 1, (0,))


def test_single_requests_are_all_asked_for() -> None:
    assert turns_in_window(one(Session((TURN,))), 2.0, 10.0, 5.0, 1.0) == 8.0


def test_of_long_trajectories_a_short_run_sees_the_beginning_only() -> None:
    paused = replace(TURN, pause_s=100.0)
    assert turns_in_window(one(Session((TURN, paused))), 2.0, 10.0, 100.0, 1.0) == 8.0, "the second turn comes too late"
    assert turns_in_window(one(Session((TURN, paused))), 2.0, 10.0, 3.0, 1.0) == 8.0 + 6.0, "pauses are cut"


def test_sub_agents_ask_as_well() -> None:
    session = Session((TURN,), (Child(Session((TURN,)), 0, 0.5, None),))
    assert turns_in_window(one(session), 0.0, 10.0, 0.0, 1.5) == 10.0 + 8.0


def test_rates_are_shares_of_what_a_system_can_do() -> None:
    compared = replace(COMPARED, rates_per_s=(), shares=(0.5, 1.0))
    found: ComparePlan = compared.with_rates(one(Session((TURN, TURN))), turns_per_s=20.0, turn_s=0.0)
    assert found.rates_per_s == (5.0, 10.0), "two turns a trajectory"
