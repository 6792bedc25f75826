"""Owns the simulated engine's KV blocks: who holds which, which can be found again, and how that changes."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from engine.blocks import ChangeLog
from engine.protocol import BlockChanges


@dataclass(eq=False, slots=True)
class Block:
    """One KV block. `content` stands for the KV: the tokens it was really computed from, 4 bytes each."""

    block_hash: bytes | None = None
    content: bytes = b""
    references: int = 0


class BlockPool:
    """Reference-counted blocks and the prefix cache: an unreferenced block can be found until it is evicted (LRU)."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.num_used = 0
        self._cached: dict[bytes, Block] = {}
        self._idle: OrderedDict[bytes, Block] = OrderedDict()
        self._blank: list[Block] = []
        self._told: set[bytes] = set()
        self._changes = ChangeLog()

    @property
    def cached(self) -> Set[bytes]:
        """The hashes of all blocks that can be found."""
        return self._cached.keys()

    def match(self, hashes: Iterable[bytes]) -> list[Block]:
        """The longest cached run of `hashes`; takes no reference."""
        hits: list[Block] = []
        for block_hash in hashes:
            if (block := self._cached.get(block_hash)) is None:
                break
            hits.append(block)
        return hits

    def has_room(self, num_new: int) -> bool:
        return self.num_used + num_new <= self.num_blocks

    def take(self, hits: list[Block], num_new: int) -> list[Block] | None:
        """References `hits` and `num_new` blank blocks; None, and nothing taken, if they do not fit."""
        num_idle_hits = sum(not block.references for block in hits)
        if self.num_used + num_idle_hits + num_new > self.num_blocks:
            return None
        self.num_used += num_idle_hits + num_new
        idle, blank = self._idle, self._blank
        for block in hits:
            if not block.references and block.block_hash is not None:
                del idle[block.block_hash]
            block.references += 1
        for _ in range(self.num_used + len(idle) - self.num_blocks):
            evicted, block = idle.popitem(last=False)
            del self._cached[evicted]
            blank.append(block)
            if evicted in self._told:
                self._told.remove(evicted)
                self._changes.remove(evicted)
        # Blocks are used again: with long prompts, making them anew is most of what a simulation costs.
        num_used_again = min(len(blank), num_new)
        used_again, blank[len(blank) - num_used_again :] = blank[len(blank) - num_used_again :], []
        for block in used_again:
            block.block_hash, block.content, block.references = None, b"", 1
        return [*hits, *used_again, *(Block(references=1) for _ in range(num_new - num_used_again))]

    def give_back(self, blocks: Sequence[Block]) -> None:
        for block in reversed(blocks):  # so that the end of a prompt is evicted before its beginning
            assert block.references > 0, "a block was given back twice"
            block.references -= 1
            if not block.references:
                self.num_used -= 1
                if block.block_hash is not None:
                    self._idle[block.block_hash] = block
                else:
                    self._blank.append(block)

    def cache(self, block: Block, block_hash: bytes) -> None:
        """Lets a full, referenced block be found, unless another one of its hash can be."""
        if block.block_hash is None and block_hash not in self._cached:
            block.block_hash = block_hash
            self._cached[block_hash] = block
            self._told.add(block_hash)
            self._changes.store(block_hash)

    def take_changes(self) -> BlockChanges | None:
        """What has changed among the cached blocks since the last call; None if nothing has."""
        return self._changes.take()

    def forget_told(self) -> None:
        """Whoever was told of blocks is to forget them; blocks cached before this are never told of again."""
        self._told.clear()
        self._changes.clear()
