"""Owns the orders that a local run takes: one line of JSON each way, over a socket in its run dir.

The run dir is its user's alone, and so is the socket.
"""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import msgspec

log = logging.getLogger("baton.control")

_READ_S = 1.0
_ANSWER_S = 30.0
SPANS_S = 2.0
"""So long gateways may take to send their last spans before they are ended."""

_BACKLOG = 8
_LONGEST_LINE = 4096


class Switch(msgspec.Struct, frozen=True, tag="switch"):
    """The order to decide placements by other policies. What is unset stays as it is."""

    policy: str | msgspec.UnsetType = msgspec.UNSET
    shadow_policy: str | msgspec.UnsetType | None = msgspec.UNSET


class Switched(msgspec.Struct, frozen=True, tag="switched"):
    """The policies that gateways are told from now on."""

    policy: str
    shadow_policy: str | None


class SendSpans(msgspec.Struct, frozen=True, tag="send_spans"):
    """The order that gateways send what they have of traces: the run is about to end."""


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    """Gateways have sent it, or could not in the time that they have for it."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Nothing was changed, and why."""

    reason: str


class OrderFailed(RuntimeError):
    """An order was not carried out; the message is one readable line."""


Order = Switch | SendSpans
Done = Switched | Sent
_Answer = TypeVar("_Answer", Switched, Sent)

_encoder = msgspec.json.Encoder()
_orders: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
_switched: msgspec.json.Decoder[Switched | Refused] = msgspec.json.Decoder(Switched | Refused)
_sent: msgspec.json.Decoder[Sent | Refused] = msgspec.json.Decoder(Sent | Refused)


def order(path: Path, switch: Switch) -> Switched:
    """Has a run switch its policies. Raises OrderFailed."""
    return _ask(path, switch, _switched, _ANSWER_S)


def send_spans(path: Path, timeout_s: float) -> None:
    """Has a run's gateways send their spans. Raises OrderFailed, also after `timeout_s`."""
    _ask(path, SendSpans(), _sent, timeout_s)


def _ask(path: Path, order: Order, answers: msgspec.json.Decoder[_Answer | Refused], timeout_s: float) -> _Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(_encoder.encode(order) + b"\n")
            answer = answers.decode(_line(connection))
        except (OSError, msgspec.DecodeError) as error:
            raise OrderFailed(f"the run's driver at {path} does not answer: {error or type(error).__name__}") from error
    if isinstance(answer, Refused):
        raise OrderFailed(answer.reason)
    return answer


class Orders:
    """The run's end of the socket. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._socket.bind(str(self._path))
        self._socket.listen(_BACKLOG)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def take_for(self, duration_s: float, carry_out: Callable[[Order], Done]) -> None:
        """Carries out what is ordered within that time. What an order raises is its refusal."""
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                return
            with connection:
                connection.settimeout(_READ_S)
                # Who goes away without an order, or before the answer, harms no one else.
                with suppress(OSError):
                    connection.sendall(_encoder.encode(_answer(_line(connection), carry_out)) + b"\n")


def _answer(line: bytes, carry_out: Callable[[Order], Done]) -> Done | Refused:
    try:
        return carry_out(_orders.decode(line))
    except Exception as error:
        log.exception("an order failed: %r", line)
        return Refused(str(error) or type(error).__name__)


def _line(connection: socket.socket) -> bytes:
    """One line. Raises OSError when the other end says nothing in time, too much, or goes away."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = connection.recv(_LONGEST_LINE)
        line += chunk
        if not chunk or len(line) > _LONGEST_LINE:
            raise ConnectionError("the connection ended before the line" if not chunk else "the line is too long")
    return line
