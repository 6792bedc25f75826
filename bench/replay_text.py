"""Owns what the prompts of a replay are made of: the same block id gives the same tokens, and answers stay in them."""

from dataclasses import dataclass, field

from bench.traces import Session, Turn

SHARED_TOKEN = 1 << 31
"""From here on tokens name blocks that all trajectories share; a token below names a block of one copy of one."""


class Texts:
    """Makes tokens. A block begins with a token that names it, and goes on like every other block: two blocks are the
    same if and only if their first tokens are."""

    def __init__(self, block_size_tokens: int):
        self._block_size_tokens = block_size_tokens
        self._filling = list(range(1, block_size_tokens))
        self._num_named = block_size_tokens

    def copy_of(self, num_own_ids: int) -> int:
        """Makes room for the blocks of one more trajectory; returns the name of its block 0."""
        first = self._num_named
        self._num_named += num_own_ids
        if self._num_named > SHARED_TOKEN:
            raise ValueError("the replay has more blocks than there are names for; replay fewer trajectories")
        return first

    def tokens(self, turn: Turn, first_name: int, start: int) -> list[int]:
        """The turn's recorded prompt from token `start` on."""
        size, tokens = self._block_size_tokens, list[int]()
        filling = self._filling
        for block in turn.block_ids[start // size :]:
            tokens.append(first_name + block if block >= 0 else SHARED_TOKEN - block)
            tokens += filling
        skipped = start % size
        return tokens[skipped : skipped + turn.num_prompt_tokens - start]


@dataclass
class SessionText:
    """What one session has said so far: the prompt and answer of each turn that a later one goes on with."""

    session: Session
    texts: Texts
    first_name: int
    _said: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    _last_use: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        for index, turn in enumerate(self.session.turns):
            if turn.keeps_of is not None:
                self._last_use[turn.keeps_of] = index

    def prompt(self, index: int) -> list[int]:
        """Of the turn. What it keeps of a turn that was not asked is made from the block ids."""
        turn = self.session.turns[index]
        said = None if turn.keeps_of is None else self._said.get(turn.keeps_of)
        kept = [] if said is None else said[: turn.num_kept_tokens]
        return kept + self.texts.tokens(turn, self.first_name, len(kept))

    def answered(self, index: int, prompt: list[int], answer: list[int]) -> None:
        if index in self._last_use:
            self._said[index] = prompt + answer
        for done in [one for one in self._said if self._last_use[one] <= index]:
            del self._said[done]
