"""Owns a stand-in for a local run's driver: it takes orders in a thread, and keeps them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.runtime.control import Orders, Switch, Switched

POLL_S = 0.02


class Driver:
    """`carry_out` is what it does with an order."""

    def __init__(self, carry_out: Callable[[Switch], Switched]) -> None:
        self.taken: list[Switch] = []
        self.carry_out = carry_out

    def take(self, switch: Switch) -> Switched:
        self.taken.append(switch)
        return self.carry_out(switch)


@contextmanager
def taking_orders(path: Path, carry_out: Callable[[Switch], Switched]) -> Iterator[Driver]:
    driver = Driver(carry_out)
    ended = threading.Event()
    with Orders(path) as orders:

        def serve() -> None:
            while not ended.is_set():
                orders.take_for(POLL_S, driver.take)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield driver
        finally:
            ended.set()
            thread.join()
