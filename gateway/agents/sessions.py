"""Owns what is remembered of sessions: where each one's last turn was placed, and the hashes of its prompt's blocks.

A session is one conversation: one growing prompt. Memory is bounded by the number of sessions and by their tokens; the
session that was used last is forgotten last.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.blocks import block_hashes
from gateway.routing.types import Placement, SessionView


@dataclass(slots=True)
class _Session:
    """`tokens` are those of the full blocks of the last prompt, `hashes` their blocks'."""

    view: SessionView = field(default_factory=SessionView)
    block_size_tokens: int = 0
    salt: str | None = None
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    hashes: list[bytes] = field(default_factory=list[bytes])


class Sessions:
    """By the name that clients give a session (`Hints.session`)."""

    def __init__(self, max_sessions: int, max_tokens: int) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def view(self, name: str | None) -> SessionView | None:
        """None for requests of no session; a session's first turn finds an empty view."""
        if name is None:
            return None
        session = self._sessions.get(name)
        return session.view if session else SessionView()

    def hashes(
        self, name: str | None, token_ids: Sequence[int], block_size_tokens: int, salt: str | None = None
    ) -> list[bytes]:
        """The hashes of a prompt's full blocks. Of a session's next turn only what is new is computed.

        Raises OverflowError for a token id that no tokenizer has (`engine.blocks.block_hashes`).
        """
        if name is None:
            return block_hashes(token_ids, block_size_tokens, salt)
        tokens = array("I", token_ids[: len(token_ids) - len(token_ids) % block_size_tokens])
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        known = session.tokens
        is_same_kind = (session.block_size_tokens, session.salt) == (block_size_tokens, salt)
        is_next = is_same_kind and tokens[: len(known)] == known
        hashes = session.hashes if is_next else []
        rest = tokens[len(known) :] if is_next else tokens
        session.hashes = hashes + block_hashes(rest, block_size_tokens, salt, hashes[-1] if hashes else None)
        session.block_size_tokens, session.salt = block_size_tokens, salt
        self._num_tokens += len(tokens) - len(known)
        session.tokens = tokens
        self._forget_oldest()
        return session.hashes

    def placed(self, name: str | None, placement: Placement) -> None:
        """Remembers where a turn went."""
        if name is None:
            return
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        prefill = placement.prefill or session.view.prefill
        session.view = SessionView(session.view.num_turns + 1, prefill, placement.decode)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """The tokens of the one that is in use may be more than are allowed in all; they are kept until the next."""
        while len(self._sessions) > self._max_sessions or (
            self._num_tokens > self._max_tokens and len(self._sessions) > 1
        ):
            _, session = self._sessions.popitem(last=False)
            self._num_tokens -= len(session.tokens)
