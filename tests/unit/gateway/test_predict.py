"""The room on a decode replica: who has it at once, who waits for it, and for how long."""

import math
from typing import Any

import pytest

from gateway.routing.predict import decode_slots, room_s
from gateway.routing.types import ReplicaView


def decode(**measured: Any) -> ReplicaView:
    known: dict[str, Any] = {"in_flight_requests": 0, "in_flight_tokens": 0, "num_kv_blocks": 0}
    return ReplicaView("d", num_kv_blocks_used=0, **known | measured)


def test_places_are_waited_for_at_the_pace_at_which_requests_end() -> None:
    full = decode(in_flight_requests=8, max_num_seqs=8)
    assert room_s(full, 1, 100.0, 0.0, slot_s=4.0) == pytest.approx(4.0 / 8)
    assert room_s(full, 3, 100.0, 0.0, slot_s=4.0) == pytest.approx(3 * 4.0 / 8)
    assert room_s(decode(in_flight_requests=7, max_num_seqs=8), 1, 100.0, 0.0, slot_s=4.0) == 0.0


def test_kv_blocks_are_waited_for_in_requests_of_the_size_of_those_in_flight() -> None:
    """Each request leaves half a block empty: ten of 95 tokens fill a hundred blocks of ten."""
    nine = {"in_flight_requests": 9, "in_flight_tokens": 9 * 95, "block_size_tokens": 10}
    assert decode_slots(decode(**nine, num_kv_blocks=100), 1, 95.0, 0.0) == pytest.approx(10.0)
    assert room_s(decode(**nine, num_kv_blocks=100), 1, 95.0, 0.0, slot_s=3.0) == 0.0
    assert room_s(decode(**nine, num_kv_blocks=100), 1, 95.0, 0.5, slot_s=3.0) == pytest.approx(0.5 * 3.0 / 9.5)
    assert room_s(decode(**nine, num_kv_blocks=50), 1, 95.0, 0.0, slot_s=3.0) == pytest.approx(5 * 3.0 / 5)


def test_a_request_that_fits_no_cache_waits_for_all_that_are_there() -> None:
    small = decode(in_flight_requests=1, in_flight_tokens=10, num_kv_blocks=10, block_size_tokens=10)
    assert decode_slots(small, 1, 10_000.0, 0.0) == 1.0
    assert room_s(small, 1, 10_000.0, 0.0, slot_s=3.0) == pytest.approx(3.0)


def test_what_is_not_known_delays_nobody() -> None:
    unknown = decode(in_flight_requests=1_000, in_flight_tokens=10**6)
    assert decode_slots(unknown, 1, 1_000.0, 0.0) == math.inf
    assert room_s(unknown, 1, 1_000.0, 0.0, slot_s=9.0) == 0.0
    assert room_s(decode(in_flight_requests=9, max_num_seqs=8), 1, 100.0, 0.0, slot_s=0.0) == 0.0
