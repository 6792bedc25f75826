"""The prefix index finds what the mirrors of all replicas would find one by one."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockMirror, block_hashes
from engine.protocol import BlockChanges
from gateway.routing import prefix_index
from gateway.routing.prefix_index import CHUNK_BLOCKS, PrefixIndex

B = 4
PROMPTS = [[shared] * (5 * B) + [own] * (3 * B) for shared in (1, 2) for own in (3, 4)]
HASHES = [block_hashes(prompt, B) for prompt in PROMPTS]
BLOCKS = sorted({block_hash for hashes in HASHES for block_hash in hashes})
REPLICAS = ("a", "b", "c")


def index_of(**held: list[bytes]) -> PrefixIndex:
    index = PrefixIndex()
    for replica_id, hashes in held.items():
        index.store(replica_id, hashes)
    return index


def test_each_replica_is_found_with_what_it_holds_from_the_first_block_on() -> None:
    first, second = HASHES[:2]
    index = index_of(whole=first, half=first[:4], other=second, gap=first[:2] + first[3:], none=first[1:])
    assert index.num_leading(first) == {"whole": 8, "half": 4, "other": 5, "gap": 2}


def test_a_prompt_without_a_full_block_is_cached_nowhere() -> None:
    assert index_of(a=HASHES[0]).num_leading([]) == {}


def test_prompts_of_many_chunks_are_followed_to_their_end() -> None:
    hashes = block_hashes(list(range(3 * CHUNK_BLOCKS * B + B)), B)
    index = index_of(whole=hashes, chunk=hashes[:CHUNK_BLOCKS], more=hashes[: CHUNK_BLOCKS + 1], one=hashes[:1])
    expected = {"whole": 3 * CHUNK_BLOCKS + 1, "chunk": CHUNK_BLOCKS, "more": CHUNK_BLOCKS + 1, "one": 1}
    assert index.num_leading(hashes) == expected


def test_a_replica_that_is_forgotten_leaves_nothing_and_its_place_is_used_again() -> None:
    index = index_of(a=HASHES[0], b=HASHES[0])
    index.forget("a", HASHES[0])
    assert index.num_leading(HASHES[0]) == {"b": 8}
    index.store("c", HASHES[0][:1])
    assert index.num_leading(HASHES[0]) == {"b": 8, "c": 1}
    index.forget("b", HASHES[0])
    index.forget("c", HASHES[0][:1])
    assert len(index) == 0


changes = st.builds(
    BlockChanges,
    st.lists(st.sampled_from(BLOCKS), unique=True, max_size=8),
    st.lists(st.sampled_from(BLOCKS), unique=True, max_size=4),
    st.booleans(),
)


@given(st.lists(st.tuples(st.sampled_from(REPLICAS), changes), max_size=20), st.sampled_from([1, 3, CHUNK_BLOCKS]))
def test_the_index_agrees_with_mirrors(told: list[tuple[str, BlockChanges]], chunk_blocks: int) -> None:
    index, mirrors = PrefixIndex(), {replica_id: BlockMirror(100) for replica_id in REPLICAS}
    for replica_id, change in told:
        held = list(mirrors[replica_id])
        news = mirrors[replica_id].apply(change)
        if news is None:
            continue
        index.remove(replica_id, held if news.cleared else news.removed)
        index.store(replica_id, news.stored)
    before, prefix_index.CHUNK_BLOCKS = prefix_index.CHUNK_BLOCKS, chunk_blocks
    try:
        for hashes in (*HASHES, random.Random(0).sample(BLOCKS, 5)):
            expected = {replica_id: mirror.num_leading(hashes) for replica_id, mirror in mirrors.items()}
            assert index.num_leading(hashes) == {name: number for name, number in expected.items() if number}
    finally:
        prefix_index.CHUNK_BLOCKS = before
