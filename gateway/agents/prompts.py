"""Owns what is remembered of a session's last prompt: its tokens and its blocks' hashes, so that the next prompt costs
only what is new in it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.blocks import TOKEN_BYTES, block_hashes

GENERATION_TOKENS = 4
"""So many tokens at the end of a prompt ask the model to begin; the next prompt may lack some of them."""


def packed(token_ids: Sequence[int]) -> bytes:
    """Raises OverflowError for a token id that no tokenizer has."""
    return array("I", token_ids).tobytes()


@dataclass(slots=True)
class Prompt:
    """`tokens` are of the whole prompt, packed; `hashes` of its full blocks."""

    tokens: bytes = b""
    hashes: list[bytes] = field(default_factory=list[bytes])
    block_size_tokens: int = 0
    salt: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def hashes_of(self, tokens: bytes, block_size_tokens: int, salt: str | None) -> list[bytes]:
        """The hashes of another prompt's full blocks; those that it begins with as this one does are not computed."""
        is_same_kind = (self.block_size_tokens, self.salt) == (block_size_tokens, salt)
        common = self._num_common_blocks(tokens) if is_same_kind else 0
        known = self.hashes if common == len(self.hashes) else self.hashes[:common]
        rest = array("I", tokens[common * block_size_tokens * TOKEN_BYTES :])
        return known + block_hashes(rest, block_size_tokens, salt, known[-1] if known else None)

    def goes_on_in(self, tokens: bytes) -> bool:
        """Whether another prompt that has the same full blocks contains all of this one, but for the tokens that asked
        the model to begin."""
        begin = len(self.hashes) * self.block_size_tokens * TOKEN_BYTES
        return tokens.startswith(self.tokens[begin : -GENERATION_TOKENS * TOKEN_BYTES], begin)

    def with_answer(self, written: Sequence[int]) -> tuple[int, bytes | None]:
        """How many full blocks this prompt and its answer have, and the hash of the last one; None if the answer
        completes none."""
        begin = len(self.hashes) * self.block_size_tokens * TOKEN_BYTES
        rest = array("I", self.tokens[begin:])
        rest.extend(written)
        more = block_hashes(rest, self.block_size_tokens, self.salt, self.hashes[-1]) if self.hashes else []
        return len(self.hashes) + len(more), more[-1] if more else None

    def _num_common_blocks(self, tokens: bytes) -> int:
        block_bytes = self.block_size_tokens * TOKEN_BYTES
        if tokens.startswith(self.tokens):
            return len(self.hashes)
        low, high = 0, min(len(self.hashes), len(tokens) // block_bytes)
        while low < high:
            middle = (low + high + 1) // 2
            if tokens.startswith(self.tokens[low * block_bytes : middle * block_bytes], low * block_bytes):
                low = middle
            else:
                high = middle - 1
        return low
