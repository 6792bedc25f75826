"""Owns the choice of ports for servers that are told a number: free, and not for outgoing connections."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

FIRST, LAST = 20_000, 29_999
"""Below what Linux gives to outgoing connections (32,768 and up by default) and Serve to its replicas (30,000 up)."""

_TRIES = 200


def free_ports(host: str, count: int = 1) -> list[int]:
    """Different ports of `host` that nobody has now. Raises OSError when too few can be found."""
    with held_ports(host, count) as ports:
        return ports


@contextmanager
def held_ports(host: str, count: int = 1) -> Iterator[list[int]]:
    """Different ports of `host` that nobody has, and that nobody else on this machine gets here until the block ends:
    for a server that listens only after a while. It must set SO_REUSEADDR, as ZMQ, asyncio and HAProxy do.

    Raises OSError when too few can be found.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(FIRST, LAST + 1), _TRIES):
            if len(ports) == count:
                break
            holder = stack.enter_context(socket.socket())
            try:
                holder.bind((host, port))
            except OSError:
                continue
            # Now, for with it this bind would have shared a port that another holder has.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(port)
        if len(ports) < count:
            raise OSError(f"no {count} free ports on {host} among {_TRIES} tried between {FIRST} and {LAST}")
        yield ports
