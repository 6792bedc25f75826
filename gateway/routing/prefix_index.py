"""Owns the answer to "who has how much of this prompt cached": every replica's blocks by their hashes. Pure.

A replica is a bit, and each block has an integer of its holders' bits: so a prompt's blocks are looked up once for all
replicas.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from operator import and_  # pyright: ignore[reportUnknownVariableType]  typeshed leaves its arguments open
from typing import cast

_BOTH = cast("Callable[[int, int], int]", and_)  # half the time of int.__and__

CHUNK_BLOCKS = 256
"""How many blocks are looked up before it is asked whether anybody has them all: the rest of a cold prompt is not."""


class _Holders(dict[bytes, int]):
    """By block, the bits of its holders; nobody holds a block that is not there."""

    def __missing__(self, block_hash: bytes) -> int:
        return 0


class PrefixIndex:
    """The cached blocks of all replicas.

    The caller tells only real changes: a block is stored only while it is not held, and removed only while it is
    (`engine.blocks.BlockMirror.apply` gives such changes).
    """

    def __init__(self) -> None:
        self._holders = _Holders()
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._all = 0

    def __len__(self) -> int:
        """How many different blocks are held."""
        return len(self._holders)

    def store(self, replica_id: str, hashes: Iterable[bytes]) -> None:
        bit, holders = self._bit(replica_id), self._holders
        for block_hash in hashes:
            holders[block_hash] |= bit

    def remove(self, replica_id: str, hashes: Iterable[bytes]) -> None:
        bit, holders = self._bit(replica_id), self._holders
        for block_hash in hashes:
            if left := holders[block_hash] & ~bit:
                holders[block_hash] = left
            else:
                holders.pop(block_hash, None)

    def forget(self, replica_id: str, hashes: Iterable[bytes]) -> None:
        """`hashes`: all that the replica holds."""
        self.remove(replica_id, hashes)
        bit = self._bits.pop(replica_id)
        del self._names[bit]
        self._all &= ~bit

    def num_leading(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many of `hashes`, from the first on, each replica holds without a break; who has none is left out."""
        found: dict[str, int] = {}
        having = self._all
        for start in range(0, len(hashes), CHUNK_BLOCKS):
            chunk = hashes[start : start + CHUNK_BLOCKS]
            after_each = list(accumulate(map(self._holders.__getitem__, chunk), _BOTH, initial=having))
            if after_each[-1] != having:
                for index, after in enumerate(after_each):
                    if after != having:
                        number = start + index - 1
                        found.update((name, number) for name in self._named(having & ~after) if number)
                        having = after
            if not having:
                return found
        found.update((name, len(hashes)) for name in self._named(having) if hashes)
        return found

    def _bit(self, replica_id: str) -> int:
        if (bit := self._bits.get(replica_id)) is None:
            # The lowest that is free: the integers stay as short as there are replicas.
            bit = ~self._all & (self._all + 1)
            self._bits[replica_id], self._names[bit] = bit, replica_id
            self._all |= bit
        return bit

    def _named(self, bits: int) -> Iterator[str]:
        while bits:
            lowest = bits & -bits
            yield self._names[lowest]
            bits ^= lowest
