"""Baton's names for KV blocks: what enters a hash, and that mirrors and change logs lose nothing."""

import hashlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockMirror, ChangeLog, NamedBlocks, block_hashes
from engine.protocol import BlockChanges

B = 4
TOKENS = random.Random(1).sample(range(100_000), 3 * B + 2)


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(8, "big") for number in numbers]


def mirror_of(*numbers: int, capacity_blocks: int = 10) -> BlockMirror:
    mirror = BlockMirror(capacity_blocks)
    mirror.apply(BlockChanges(hashes(*numbers), []))
    return mirror


# -- hashes


def test_a_hash_is_what_its_definition_says() -> None:
    def digest(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=8).digest()

    first = digest(digest(b"salt") + struct.pack("<4I", *TOKENS[:4]))
    second = digest(first + struct.pack("<4I", *TOKENS[4:8]))
    assert block_hashes(TOKENS[:9], B, "salt") == [first, second]


def test_hashes_are_the_same_in_every_process_and_release() -> None:
    found = [block_hash.hex() for block_hash in block_hashes([1, 2, 3, 4, 5, 6, 7, 8], B)]
    assert found == ["b6d5da731ce2d97b", "0aeb34d7afcad3cd"]


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(block_hashes(TOKENS[:n], B)) for n in (0, B - 1, B, 2 * B - 1, 2 * B)] == [0, 0, 1, 1, 2]


def test_a_block_has_another_hash_after_another_beginning() -> None:
    first, second = block_hashes(TOKENS[: 2 * B], B)
    other_first, other_second = block_hashes([TOKENS[0] + 1, *TOKENS[1 : 2 * B]], B)
    assert len({first, second, other_first, other_second}) == 4


def test_a_salt_changes_every_block_and_an_empty_one_is_none() -> None:
    plain, salted, other = (block_hashes(TOKENS, B, salt) for salt in (None, "a", "b"))
    assert len({*plain, *salted, *other}) == 9
    assert block_hashes(TOKENS, B, "") == plain


@given(cut=st.integers(0, 3), salt=st.sampled_from([None, "a"]))
def test_hashes_can_be_computed_piece_by_piece(cut: int, salt: str | None) -> None:
    whole = block_hashes(TOKENS, B, salt)
    beginning = block_hashes(TOKENS[: cut * B], B, salt)
    rest = block_hashes(TOKENS[cut * B :], B, salt, beginning[-1] if beginning else None)
    assert beginning + rest == whole


# -- mirrors


def test_a_mirror_returns_only_what_changed_something() -> None:
    mirror = mirror_of(1, 2)
    assert mirror.apply(BlockChanges(hashes(2, 3), hashes(1, 9))) == BlockChanges(hashes(3), hashes(1))
    assert mirror.apply(BlockChanges(hashes(2), hashes(9))) is None
    assert set(mirror) == set(hashes(2, 3))


def test_a_snapshot_replaces_what_was_held() -> None:
    mirror = mirror_of(1, 2)
    mirror.apply(mirror_of(2, 3).snapshot())
    assert set(mirror) == set(hashes(2, 3))


def test_a_mirror_beyond_its_capacity_forgets_everything_and_counts_it() -> None:
    mirror = mirror_of(1, 2, 3, capacity_blocks=3)
    assert mirror.apply(BlockChanges(hashes(4), [])) == BlockChanges([], [], cleared=True)
    assert (len(mirror), mirror.num_overflows) == (0, 1)


def test_a_mirror_at_its_capacity_takes_an_exchange() -> None:
    mirror = mirror_of(1, 2, 3, capacity_blocks=3)
    mirror.apply(BlockChanges(hashes(4), hashes(1)))
    assert (set(mirror), mirror.num_overflows) == (set(hashes(2, 3, 4)), 0)


def test_a_prompt_finds_the_blocks_up_to_the_first_that_is_missing() -> None:
    mirror = mirror_of(1, 2, 4)
    assert [mirror.num_leading(hashes(*wanted)) for wanted in ([1, 2, 3, 4], [1, 2, 4], [3, 1], [])] == [2, 3, 0, 0]


# -- change logs


def test_an_empty_log_has_nothing_to_tell() -> None:
    assert ChangeLog().take() is None


def test_a_log_is_empty_once_it_is_taken() -> None:
    log = ChangeLog()
    log.store(b"a")
    assert log.take() == BlockChanges([b"a"], [])
    assert log.take() is None


# Few blocks, so that they come and go again between two readings.
log_events = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "remove", "clear", "take"]), st.integers(0, 2)),
    min_size=10,
    max_size=50,
)


@given(events=log_events)
def test_a_log_leads_its_reader_to_where_the_blocks_are(events: list[tuple[str, int]]) -> None:
    held, log, reader = set(hashes(0, 1)), ChangeLog(), mirror_of(0, 1)
    for what, number in [*events, ("take", 0)]:
        (block_hash,) = hashes(number)
        if what == "take":
            if changes := log.take():
                assert not set(changes.stored) & set(changes.removed)
                assert reader.apply(changes) is not None
            assert set(reader) == held
        elif what == "clear":
            held.clear()
            log.clear()
        elif what == "store" and block_hash not in held:
            held.add(block_hash)
            log.store(block_hash)
        elif what == "remove" and block_hash in held:
            held.remove(block_hash)
            log.remove(block_hash)


# -- an engine's own names


def test_blocks_are_held_under_the_hashes_of_their_tokens() -> None:
    blocks = NamedBlocks(B)
    expected = block_hashes(TOKENS, B, "salt")
    assert blocks.store([b"x", b"y"], None, TOKENS[: 2 * B], "salt") == expected[:2]
    assert blocks.store([b"z"], b"y", TOKENS[2 * B : 3 * B], None) == expected[2:]
    assert blocks.remove([b"z", b"x"]) == [expected[2], expected[0]]


def test_a_block_is_gone_when_its_last_copy_is() -> None:
    blocks = NamedBlocks(B)
    (block_hash,) = blocks.store([b"x"], None, TOKENS[:B], None)
    assert blocks.store([b"x"], None, TOKENS[:B], None) == []
    assert blocks.remove([b"x"]) == []
    assert blocks.remove([b"x"]) == [block_hash]
    assert blocks.remove([b"x"]) == []


def test_blocks_after_an_unknown_parent_are_left_out() -> None:
    blocks = NamedBlocks(B)
    blocks.store([b"x"], None, TOKENS[:B], None)
    blocks.clear()
    assert blocks.store([b"y"], b"x", TOKENS[B : 2 * B], None) == []
    assert blocks.remove([b"x", b"y"]) == []


@pytest.mark.parametrize("num_tokens", [B, 3 * B])
def test_blocks_that_do_not_cover_their_tokens_are_left_out(num_tokens: int) -> None:
    assert NamedBlocks(B).store([b"x", b"y"], None, TOKENS[:num_tokens], None) == []
