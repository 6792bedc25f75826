"""Owns how a conversation is recognised that has no name: by the hashes of its last prompt's, or answer's, last block.

A block's hash stands for everything before it, so a prompt that contains the last block of an earlier one goes on with
the same text under the same salt.
"""

import zlib
from collections.abc import Iterator, Sequence

from engine.blocks import TOKEN_BYTES

MIN_BLOCKS = 2
"""Shorter prompts are no conversation: too many would be alike."""
MAX_TWINS = 8
"""So many sessions may end with one block; of more, the others are not recognised."""
CHECKPOINT_TOKENS = 1024


class Tips:
    """The last blocks of sessions without a name, and whose they are. A turn uses its session's tips up: the next ones
    are its own."""

    def __init__(self) -> None:
        self._owners: dict[bytes, list[str]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, tip: bytes, name: str) -> bool:
        """Whether there was room."""
        owners = self._owners.setdefault(tip, [])
        if len(owners) >= MAX_TWINS:
            return False
        owners.append(name)
        return True

    def remove(self, tip: bytes, name: str) -> None:
        owners = self._owners[tip]
        owners.remove(name)
        if not owners:
            del self._owners[tip]

    def owners(self, hashes: Sequence[bytes]) -> Iterator[str]:
        """The sessions that a prompt may be the next turn of, longest common text first."""
        for block_hash in reversed(hashes):
            if block_hash in self._owners:
                yield from self._owners[block_hash]


def checkpoints(tokens: bytes, salt: str | None) -> list[tuple[int, int]]:
    """A checksum of a packed prompt up to each multiple of `CHECKPOINT_TOKENS`, with its position."""
    step, text, checksum = CHECKPOINT_TOKENS * TOKEN_BYTES, memoryview(tokens), zlib.crc32((salt or "").encode())
    found: list[tuple[int, int]] = []
    for end in range(step, len(tokens) + 1, step):
        checksum = zlib.crc32(text[end - step : end], checksum)
        found.append((end, checksum))
    return found


class Beginnings:
    """Whose prompt another one may begin with, found without hashing its blocks: a checksum can be wrong, so whoever
    asks compares the prompts. Each session is found by the last checkpoint of its prompt."""

    def __init__(self) -> None:
        self._owners: dict[tuple[int, int], str] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, marks: Sequence[tuple[int, int]]) -> str:
        """The session with the longest such prompt; an empty name if there is none."""
        return next((self._owners[mark] for mark in reversed(marks) if mark in self._owners), "")

    def replace(
        self, old: tuple[int, int] | None, marks: Sequence[tuple[int, int]], name: str
    ) -> tuple[int, int] | None:
        """A session's prompt has become another one; returns what it is found by now."""
        if old is not None and self._owners.get(old) == name:
            del self._owners[old]
        if not marks:
            return None
        self._owners[marks[-1]] = name
        return marks[-1]
