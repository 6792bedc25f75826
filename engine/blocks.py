"""Owns Baton's names for KV blocks: the hash of a block, who holds which hashes, and what of that is yet to be told."""

import hashlib
import sys
from array import array
from collections.abc import Iterator, KeysView, Sequence
from dataclasses import dataclass

from engine.protocol import BlockChanges

HASH_BYTES = 8
TOKEN_BYTES = array("I").itemsize


def block_hashes(
    token_ids: Sequence[int], block_size_tokens: int, salt: str | None = None, parent: bytes | None = None
) -> list[bytes]:
    """The hashes of the full blocks of `token_ids`; what is left over at the end has none.

    A block's hash is BLAKE2b, 8 bytes long, of its parent's hash and then its token ids, 4 bytes each, little-endian.
    The first block's parent is the hash of the cache salt, so a salt changes every block of a prompt (no salt and an
    empty one are the same). With `parent`, the tokens go on after the block of that hash and `salt` is not read: so
    the hashes of a growing text can be computed piece by piece.

    Eight bytes: among a million blocks the chance of any collision is 3e-8, and one costs a prefix that is looked for
    on the wrong replica, never a wrong answer. Raises OverflowError for a token id outside 0 to 2**32 - 1.
    """
    packed = _packed(token_ids[: len(token_ids) - len(token_ids) % block_size_tokens])
    last = _digest((salt or "").encode()) if parent is None else parent
    hashes: list[bytes] = []
    # Prompts are long: what is looked up once here would be looked up thousands of times in the loop.
    blake2b, add, block_bytes = hashlib.blake2b, hashes.append, TOKEN_BYTES * block_size_tokens
    for start in range(0, len(packed), block_bytes):
        last = blake2b(last + packed[start : start + block_bytes], digest_size=HASH_BYTES).digest()
        add(last)
    return hashes


def _packed(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


class ChangeLog:
    """Changes of a set of blocks that nobody has read yet, merged: a block that came and went does not appear.

    It holds at most two hashes for each block of the set, as long as only real changes are noted: a block is stored
    only while it is not held, and removed only while it is.
    """

    def __init__(self) -> None:
        self._cleared = False
        # Dictionaries keep the order: what is told does not depend on how sets are laid out in memory.
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._stored) + len(self._removed) + self._cleared

    def store(self, block_hash: bytes) -> None:
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def remove(self, block_hash: bytes) -> None:
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def clear(self) -> None:
        self._cleared = True
        self._stored, self._removed = {}, {}

    def add(self, changes: BlockChanges) -> None:
        if changes.cleared:
            self.clear()
        for block_hash in changes.removed:
            self.remove(block_hash)
        for block_hash in changes.stored:
            self.store(block_hash)

    def take(self) -> BlockChanges | None:
        """What has changed since the last call; None if nothing has."""
        if not len(self):
            return None
        changes = BlockChanges(list(self._stored), list(self._removed), self._cleared)
        self._cleared, self._stored, self._removed = False, {}, {}
        return changes


class BlockMirror:
    """The blocks one engine holds, as its changes tell. It never holds more than `capacity_blocks`.

    An engine that seems to hold more than it has means that removals were lost: then everything is forgotten and
    counted in `num_overflows`.
    """

    def __init__(self, capacity_blocks: int):
        self.num_overflows = 0
        self._capacity_blocks = capacity_blocks
        self._held: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._held

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._held)

    @property
    def held(self) -> KeysView[bytes]:
        """What it holds, until it is cleared: then the view still shows what was held before."""
        return self._held.keys()

    def apply(self, changes: BlockChanges) -> BlockChanges | None:
        """Takes changes over; returns those that changed anything here, None if none did."""
        if changes.cleared:
            self._held = {}
        removed = [block_hash for block_hash in changes.removed if block_hash in self._held]
        for block_hash in removed:
            del self._held[block_hash]
        stored = [block_hash for block_hash in changes.stored if block_hash not in self._held]
        self._held.update(dict.fromkeys(stored))
        if len(self._held) > self._capacity_blocks:
            self._held = {}
            self.num_overflows += 1
            return BlockChanges([], [], cleared=True)
        return BlockChanges(stored, removed, changes.cleared) if stored or removed or changes.cleared else None

    def snapshot(self) -> BlockChanges:
        """Everything that is held, for somebody who knows nothing."""
        return BlockChanges(list(self._held), [], cleared=True)

    def num_leading(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, are held without a break: blocks a prompt would find here."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._held:
                return index
        return len(hashes)


@dataclass(slots=True)
class _Named:
    block_hash: bytes
    num_references: int


class NamedBlocks:
    """An engine's cached blocks by the names it gives them, translated into Baton's hashes.

    Several blocks may bear one name, because their content is the same: the hash is held until the last one goes.
    """

    def __init__(self, block_size_tokens: int):
        self._block_size_tokens = block_size_tokens
        self._blocks: dict[bytes | int, _Named] = {}

    def store(
        self, names: Sequence[bytes | int], parent: bytes | int | None, token_ids: Sequence[int], salt: str | None
    ) -> list[bytes]:
        """Notes consecutive blocks stored after the block named `parent`; returns the hashes that are new.

        Blocks after a parent nobody knows are left out, and so are blocks with gaps between them: their hash cannot
        be told. The first happens only after lost events, the second only where layers do not see the whole text.
        """
        named_parent = None if parent is None else self._blocks.get(parent)
        if (parent is not None and named_parent is None) or len(token_ids) != len(names) * self._block_size_tokens:
            return []
        parent_hash = named_parent.block_hash if named_parent else None
        new: list[bytes] = []
        for name, block_hash in zip(
            names, block_hashes(token_ids, self._block_size_tokens, salt, parent_hash), strict=True
        ):
            if (block := self._blocks.get(name)) is None:
                self._blocks[name] = _Named(block_hash, 1)
                new.append(block_hash)
            else:
                block.num_references += 1
        return new

    def remove(self, names: Sequence[bytes | int]) -> list[bytes]:
        """Notes one block less of each name; returns the hashes that are gone. Unknown names are ignored."""
        gone: list[bytes] = []
        for name in names:
            if block := self._blocks.get(name):
                block.num_references -= 1
                if not block.num_references:
                    del self._blocks[name]
                    gone.append(block.block_hash)
        return gone

    def clear(self) -> None:
        self._blocks = {}
