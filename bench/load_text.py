"""Owns what the prompts of `bench load` are made of: the same block id gives the same tokens of the model, others do
not."""

import hashlib
from collections.abc import Sequence

import numpy as np

from bench.replay_text import Texts
from bench.traces import Turn

PLAIN_TOKENS = tuple(range(300, 1_500))
"""Plain text in the vocabularies of the models that are served today: bytes and what steers chats stand before or far
behind."""
_BYTES_PER_TOKEN = 4


class DrawnTexts(Texts):
    """Draws the tokens of each block from `vocabulary` by a hash of its name and `salt`. With another salt no block is
    like one before, so no run finds what an earlier one has left in a cache."""

    def __init__(self, block_size_tokens: int, vocabulary: Sequence[int], salt: str):
        super().__init__(block_size_tokens)
        self._size = block_size_tokens
        self._vocabulary = np.array(vocabulary, dtype=np.int64)
        self._salted = hashlib.shake_128(salt.encode())

    def tokens(self, turn: Turn, first_name: int, start: int) -> list[int]:
        drawn: list[bytes] = []
        for block in turn.block_ids[start // self._size :]:
            shake = self._salted.copy()
            shake.update(b" %d" % (first_name + block if block >= 0 else block))
            drawn.append(shake.digest(_BYTES_PER_TOKEN * self._size))
        numbers = np.frombuffer(b"".join(drawn), dtype="<u4") % len(self._vocabulary)
        skipped = start % self._size
        return self._vocabulary[numbers[skipped : skipped + turn.num_prompt_tokens - start]].tolist()
