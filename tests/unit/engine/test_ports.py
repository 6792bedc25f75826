"""Ports for servers that are told a number."""

import socket
from pathlib import Path

import pytest
import zmq

from engine import ports


def test_ports_are_different_and_free() -> None:
    found = ports.free_ports("127.0.0.1", 5)
    assert len(set(found)) == 5
    for port in found:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_no_outgoing_connection_can_take_them() -> None:
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert max(ports.free_ports("127.0.0.1", 20)) < lowest


def test_a_held_port_is_nobody_elses_but_its_server_can_listen_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    context = zmq.Context()
    with ports.held_ports("127.0.0.1") as (held,), context.socket(zmq.ROUTER) as server:
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [held])
        with pytest.raises(OSError, match="no 1 free ports"):
            ports.free_ports("127.0.0.1")
        server.bind(f"tcp://127.0.0.1:{held}")
    context.term()
    assert ports.free_ports("127.0.0.1") == [held]


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = ports.free_ports("127.0.0.1", 2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", taken))
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [taken, free])
        assert ports.free_ports("127.0.0.1") == [free]
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [taken])
        with pytest.raises(OSError, match="no 1 free ports"):
            ports.free_ports("127.0.0.1")
