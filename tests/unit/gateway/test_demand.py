"""What the requests of a gateway ask of the pools."""

import dataclasses

import pytest

from gateway.routing.costs import Costs, PoolCosts, ReadCost, StepCost
from gateway.routing.types import ReplicaView
from gateway.scaling.demand import WINDOW_S, Demand, DemandMeter, ServiceLevel, writing_tokens_per_s

STEP = StepCost(fixed_s=0.01, request_s=0.0, context_token_s=1e-6)
COSTS = Costs(decode=PoolCosts(ReadCost(0.0, 1e-4, 0.0), STEP))
SLO = ServiceLevel(ttft_s=1.0, ttft_per_read=2.0, tpot_s=0.05)


def view(in_flight_tokens: int = 0, promised_tokens: float = 0.0, max_num_seqs: int = 256) -> ReplicaView:
    return ReplicaView(
        "decode-0",
        0,
        in_flight_tokens,
        num_kv_blocks=100,
        num_kv_blocks_used=0,
        block_size_tokens=10,
        max_num_seqs=max_num_seqs,
        promised_tokens=promised_tokens,
    )


def test_the_largest_batch_that_keeps_the_time_per_token_decides_what_an_engine_writes() -> None:
    # 0.01 s and 0.001 s for each request of 1,000 tokens: 40 of them take 0.05 s.
    assert writing_tokens_per_s(STEP, 1000, 256, 0.05) == pytest.approx(40 / 0.05)
    assert writing_tokens_per_s(STEP, 1000, 10, 0.05) == pytest.approx(10 / 0.02)


def test_one_request_is_written_however_slow_a_step_is() -> None:
    assert writing_tokens_per_s(STEP, 1000, 256, 0.001) == pytest.approx(1 / 0.011)


def test_the_work_that_comes_counts_and_not_what_is_open() -> None:
    meter = DemandMeter(SLO, 0.0)
    for second in range(60):
        meter.asked(float(second), 0.5, second % 2 == 0, 80, 960)
    demand = meter.demand(59.5, COSTS, [view(in_flight_tokens=0)])
    assert demand.read == pytest.approx(0.5, rel=0.02)
    assert demand.read_on_decode == pytest.approx(0.25, rel=0.02)
    # 80 tokens a second, of which an engine writes 800.
    assert demand.write == pytest.approx(0.1, rel=0.02)
    assert meter.demand(59.5, COSTS, [view(in_flight_tokens=900)]).read == demand.read


def test_what_came_before_the_window_is_forgotten() -> None:
    meter = DemandMeter(SLO, 0.0)
    meter.asked(0.0, 5.0, False, 100, 100)
    meter.ended(0.0, 0.1, 0.0, 0.01)
    assert meter.demand(WINDOW_S - 1, COSTS, []).read > 0
    demand = meter.demand(WINDOW_S + 1, COSTS, [])
    assert (demand.read, demand.write, demand.num_ended) == (0.0, 0.0, 0)


def test_a_young_gateway_divides_by_its_age() -> None:
    meter = DemandMeter(SLO, 100.0)
    meter.asked(105.0, 5.0, False, 0, 100)
    assert meter.demand(110.0, COSTS, []).read == pytest.approx(0.5)


def test_memory_does_not_grow_with_what_comes() -> None:
    meter = DemandMeter(SLO, 0.0)
    for number in range(10_000):
        meter.asked(number / 10, 0.1, False, 1, 10)
    assert len(meter._seconds) <= WINDOW_S + 1


def test_kv_is_what_runs_or_what_sessions_will_want_back_whichever_is_more() -> None:
    meter = DemandMeter(SLO, 0.0)
    keep = meter.demand(1.0, COSTS, [view(300, 200.0), view(100, 600.0), view()]).keep
    assert keep == pytest.approx((300 + 600) / 1000)


@pytest.mark.parametrize(("ttft_s", "tpot_s", "kept"), [(1.9, 0.04, (1, 1)), (2.1, 0.04, (0, 1)), (1.9, 0.06, (1, 0))])
def test_turns_are_in_time_by_their_first_token_and_by_the_others(
    ttft_s: float, tpot_s: float, kept: tuple[int, int]
) -> None:
    meter = DemandMeter(SLO, 0.0)
    meter.ended(1.0, ttft_s, 0.5, tpot_s)
    demand = meter.demand(1.0, COSTS, [])
    assert (demand.num_ended, demand.num_ttft_kept, demand.num_tpot_kept) == (1, *kept)


def test_gateways_add_up() -> None:
    one = Demand(1, 2, 3, 4, 5, 6, 7)
    assert dataclasses.astuple(one + one) == (2, 4, 6, 8, 10, 12, 14)
