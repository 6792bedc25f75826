"""How many replicas each pool gets, from the work that comes."""

import dataclasses

import pytest

from gateway.scaling.demand import Demand
from gateway.scaling.sizing import Bounds, Memory, PoolSizes, SizingConfig, size_pools

SPLIT = Bounds(PoolSizes(1, 1), PoolSizes(10, 10))
TOGETHER = Bounds(PoolSizes(0, 1), PoolSizes(0, 10))
FULL = PoolSizes(10, 10)
"""Every replica that could be wanted serves."""

EXACT = SizingConfig(read_share=1.0, write_share=1.0, keep_share=1.0)


def sizes(demand: Demand, bounds: Bounds = SPLIT) -> tuple[int, int]:
    return dataclasses.astuple(size_pools(demand, bounds, FULL, Memory(), 0.0, EXACT).sizes)


def test_where_every_request_is_split_reading_sizes_prefill_and_writing_decode() -> None:
    assert sizes(Demand(read=2.5, write=1.2)) == (3, 2)


def test_what_decode_has_room_for_it_reads_itself() -> None:
    assert sizes(Demand(read=2.5, read_on_decode=1.0, write=0.5, keep=3.0)) == (1, 3)


def test_kv_that_sessions_want_back_sizes_decode() -> None:
    assert sizes(Demand(read=0.5, write=0.5, keep=4.1)) == (1, 5)


def test_without_a_prefill_pool_decode_does_both() -> None:
    assert sizes(Demand(read=2.5, read_on_decode=2.5, write=1.2), TOGETHER) == (0, 4)


def test_a_full_prefill_pool_leaves_reading_to_decode_if_the_policy_lets_it() -> None:
    bounds = Bounds(PoolSizes(1, 1), PoolSizes(2, 10))
    assert sizes(Demand(read=5.0, read_on_decode=1.0, write=1.0), bounds) == (2, 4)
    assert sizes(Demand(read=5.0, write=1.0), bounds) == (2, 1)


def test_every_pool_stays_within_its_bounds() -> None:
    assert sizes(Demand()) == (1, 1)
    assert sizes(Demand(read=99.0, write=99.0)) == (10, 10)


def test_it_grows_at_once_and_shrinks_to_what_was_needed_lately() -> None:
    memory = Memory()
    seen: list[int] = []
    for at_s, write in ((0, 0.5), (10, 3.5), (20, 0.5), (600, 0.5), (611, 0.5)):
        sizing = size_pools(Demand(write=write), SPLIT, FULL, memory, float(at_s), EXACT)
        memory = sizing.memory
        seen.append(sizing.sizes.decode)
    assert seen == [1, 4, 4, 4, 1]
    assert "held" not in sizing.reason


def test_why_a_pool_is_held_is_said() -> None:
    memory = size_pools(Demand(write=3.5), SPLIT, FULL, Memory(), 0.0, EXACT).memory
    assert "held at 1+4 by the last 600 s" in size_pools(Demand(write=0.5), SPLIT, FULL, memory, 10.0, EXACT).reason


@pytest.mark.parametrize(
    ("ttft_kept", "tpot_kept", "reads_more", "writes_more"),
    [(50, 100, True, False), (100, 50, False, True), (50, 50, True, True)],
)
def test_turns_that_are_late_widen_the_margin_of_what_made_them_late(
    ttft_kept: int, tpot_kept: int, reads_more: bool, writes_more: bool
) -> None:
    demand = Demand(num_ended=100, num_ttft_kept=ttft_kept, num_tpot_kept=tpot_kept)
    memory = size_pools(demand, SPLIT, FULL, Memory(), 0.0).memory
    memory = size_pools(demand, SPLIT, FULL, memory, 30.0).memory
    assert (memory.read_margin > 1, memory.write_margin > 1) == (reads_more, writes_more)


@pytest.mark.parametrize("serving", [PoolSizes(2, 4), PoolSizes(1, 5)])
def test_turns_that_are_late_while_replicas_start_widen_no_margin(serving: PoolSizes) -> None:
    late = Demand(read=1.2, write=3.5, num_ended=100, num_ttft_kept=50, num_tpot_kept=50)
    memory = size_pools(late, SPLIT, PoolSizes(1, 1), Memory(), 0.0).memory
    assert memory.needs[-1].sizes == PoolSizes(2, 5)
    waited = size_pools(late, SPLIT, serving, memory, 30.0).memory
    assert (waited.read_margin, waited.write_margin) == (1.0, 1.0)
    whole = size_pools(late, SPLIT, PoolSizes(2, 5), waited, 60.0).memory
    assert min(whole.read_margin, whole.write_margin) > 1.0


def test_turns_in_time_narrow_it_slower_than_late_ones_widen_it() -> None:
    config = SizingConfig()
    late = Demand(num_ended=100, num_ttft_kept=90, num_tpot_kept=100)
    in_time = Demand(num_ended=100, num_ttft_kept=100, num_tpot_kept=100)

    def moved(demand: Demand) -> float:
        memory = size_pools(demand, SPLIT, FULL, Memory(), 0.0, config).memory
        return size_pools(demand, SPLIT, FULL, memory, 10.0, config).memory.read_margin - 1

    assert moved(late) > -5 * moved(in_time) > 0


def test_margins_are_bounded() -> None:
    memory = Memory(at_s=0.0)
    for demand, bound in (
        (Demand(num_ended=100), SizingConfig().most_margin),
        (Demand(num_ended=100, num_ttft_kept=100, num_tpot_kept=100), SizingConfig().least_margin),
    ):
        memory = size_pools(demand, SPLIT, FULL, memory, (memory.at_s or 0.0) + 1e6).memory
        assert (memory.read_margin, memory.write_margin) == (bound, bound)


def test_a_few_turns_prove_nothing() -> None:
    demand = Demand(num_ended=SizingConfig().min_ended - 1)
    memory = size_pools(demand, SPLIT, FULL, Memory(at_s=0.0), 100.0).memory
    assert (memory.read_margin, memory.write_margin) == (1.0, 1.0)


def test_the_same_arguments_give_the_same_sizes() -> None:
    demand = Demand(1.1, 0.3, 2.2, 3.3, 40, 39, 38)
    memory = size_pools(demand, SPLIT, FULL, Memory(), 0.0).memory
    assert size_pools(demand, SPLIT, FULL, memory, 5.0) == size_pools(demand, SPLIT, FULL, memory, 5.0)
