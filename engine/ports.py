"""Owns the choice of ports for servers that are told a number: free now, and not for outgoing connections."""

import random
import socket
from contextlib import ExitStack

FIRST, LAST = 20_000, 29_999
"""Below what Linux gives to outgoing connections (32,768 and up by default) and Serve to its replicas (30,000 up)."""

_TRIES = 200


def free_ports(host: str, count: int = 1) -> list[int]:
    """Different ports of `host` that nobody listens on. Raises OSError when too few can be found."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(FIRST, LAST + 1), _TRIES):
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind((host, port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError(f"no {count} free ports on {host} among {_TRIES} tried between {FIRST} and {LAST}")
