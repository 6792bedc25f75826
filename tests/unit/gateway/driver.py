"""Owns a stand-in for a local run's driver: it takes orders in a thread, and keeps them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.runtime.control import Done, Order, Orders

POLL_S = 0.02


class Driver:
    """`carry_out` is what it does with an order."""

    def __init__(self, carry_out: Callable[[Order], Done]) -> None:
        self.taken: list[Order] = []
        self.carry_out = carry_out

    def take(self, order: Order) -> Done:
        self.taken.append(order)
        return self.carry_out(order)


@contextmanager
def taking_orders(path: Path, carry_out: Callable[[Order], Done]) -> Iterator[Driver]:
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
