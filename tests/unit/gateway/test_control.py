"""The orders of a local run: each is answered, and whoever says nothing or nonsense harms no one else."""

import socket
from pathlib import Path

import pytest

from gateway.runtime import control
from gateway.runtime.control import Done, Order, OrderFailed, SendSpans, Sent, Switch, Switched, order, send_spans
from tests.unit.gateway.driver import taking_orders


def agree(_: Order) -> Done:
    return Switched("llm-d", None)


def say(path: Path, line: bytes) -> bytes:
    """What a run answers to a client that is not Baton's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        connection.sendall(line)
        return connection.recv(4096)


@pytest.mark.parametrize("switch", [Switch(policy="llm-d"), Switch(shadow_policy=None), Switch("dynamo", "llm-d")])
def test_an_order_arrives_as_it_was_given_and_its_answer_comes_back(tmp_path: Path, switch: Switch) -> None:
    with taking_orders(tmp_path / "control", agree) as driver:
        assert order(tmp_path / "control", switch) == Switched("llm-d", None)
    assert driver.taken == [switch]


def test_gateways_are_told_to_send_their_spans(tmp_path: Path) -> None:
    with taking_orders(tmp_path / "control", lambda _: Sent()) as driver:
        send_spans(tmp_path / "control", timeout_s=5.0)
    assert driver.taken == [SendSpans()]


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hanging:
        hanging.bind(str(tmp_path / "control"))
        hanging.listen()
        with pytest.raises(OrderFailed, match="does not answer"):
            send_spans(tmp_path / "control", timeout_s=0.01)


def test_what_an_order_raises_is_told_and_the_next_one_is_taken(tmp_path: Path) -> None:
    def refuse(_: Order) -> Done:
        raise RuntimeError("the controller is gone")

    with taking_orders(tmp_path / "control", refuse) as driver:
        with pytest.raises(OrderFailed, match="the controller is gone"):
            order(tmp_path / "control", Switch("llm-d"))
        driver.carry_out = agree
        assert order(tmp_path / "control", Switch("llm-d")) == Switched("llm-d", None)


@pytest.mark.parametrize("line", [b"no json\n", b'{"type": "reboot"}\n', b'{"type": "switch", "policy": 3}\n'])
def test_nonsense_is_refused_and_carried_out_by_nobody(tmp_path: Path, line: bytes) -> None:
    with taking_orders(tmp_path / "control", agree) as driver:
        assert say(tmp_path / "control", line).startswith(b'{"type":"refused"')
        assert order(tmp_path / "control", Switch("llm-d")) == Switched("llm-d", None)
    assert driver.taken == [Switch("llm-d")]


@pytest.mark.parametrize("line", [b"", b'{"type": "switch"', b"x" * 8192])
def test_who_does_not_end_a_line_is_left(tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_READ_S", 0.05)
    with taking_orders(tmp_path / "control", agree) as driver:
        assert say(tmp_path / "control", line) == b""
        assert order(tmp_path / "control", Switch("llm-d")) == Switched("llm-d", None)
    assert driver.taken == [Switch("llm-d")]


def test_a_socket_that_a_crashed_run_has_left_is_taken_over(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(tmp_path / "control"))
    left.close()
    with pytest.raises(OrderFailed, match="does not answer"):
        order(tmp_path / "control", Switch("llm-d"))
    with taking_orders(tmp_path / "control", agree):
        assert order(tmp_path / "control", Switch("llm-d")) == Switched("llm-d", None)
    assert not (tmp_path / "control").exists()
