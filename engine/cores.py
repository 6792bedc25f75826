"""Owns the choice of an engine's cores: of its pool's core sets on a node, one that no other replica has."""

import asyncio
import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass

POLL_S = 0.2


@dataclass(frozen=True)
class Cores:
    """A core set that is held for as long as this process lives, or until `hold` is closed."""

    numbers: tuple[int, ...]
    hold: socket.socket


async def take(pool: str, core_sets: Sequence[Sequence[int]], timeout_s: float) -> Cores:
    """The first core set that is free. `pool` names the pool and the node.

    Serve may start a replica while the one it takes the place of still finishes its requests, and gives it a rank that
    says nothing of the cores that will be free: it waits for that one, or two engines would share cores.
    Raises TimeoutError.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for index, cores in enumerate(core_sets):
                    if (hold := _held(f"{pool} {index}")) is not None:
                        return Cores(tuple(cores), hold)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimeoutError(
            f"other replicas have had all of cpu_cores, {[list(cores) for cores in core_sets]}, for {timeout_s:g} s; "
            "give the pool a core set for each replica on a node"
        ) from None


def _held(name: str) -> socket.socket | None:
    """None if another process has it. A name is bound, which ends with its process, however that ends."""
    hold = socket.socket(socket.AF_UNIX)
    try:
        hold.bind(f"\0baton-cores {name}")
    except OSError as error:
        hold.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return hold
