"""The cores of the engines of a pool: each core set has one replica at a time, however that one ends."""

import asyncio
import sys
import uuid
from asyncio.subprocess import PIPE

import pytest

from engine.cores import Cores, take

SETS = [[0, 1], [2, 3]]
PATIENCE_S = 10.0
TAKE = """
import asyncio, sys
from engine.cores import take
cores = asyncio.run(take(sys.argv[1], [[0, 1], [2, 3]], 1.0))
print(cores.numbers, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def pool() -> str:
    return f"node {uuid.uuid4().hex}"


async def test_each_replica_has_cores_of_its_own(pool: str) -> None:
    first, second = await asyncio.gather(*(take(pool, SETS, PATIENCE_S) for _ in range(2)))
    assert {first.numbers, second.numbers} == {(0, 1), (2, 3)}
    other_pool = await take(pool + " other", SETS, PATIENCE_S)
    assert other_pool.numbers == (0, 1)
    for cores in (first, second, other_pool):
        cores.hold.close()


@pytest.mark.parametrize("leaves", [0, 1])
async def test_who_comes_while_another_leaves_waits_for_its_cores(pool: str, leaves: int) -> None:
    there = [await take(pool, SETS, PATIENCE_S) for _ in SETS]
    coming = asyncio.create_task(take(pool, SETS, PATIENCE_S))
    await asyncio.sleep(0)
    assert not coming.done()
    there[leaves].hold.close()
    cores = await coming
    assert cores.numbers == there[leaves].numbers
    for one in (there[1 - leaves], cores):
        one.hold.close()


async def test_cores_that_nobody_gives_back_are_an_error_that_says_what_to_do(pool: str) -> None:
    held: list[Cores] = [await take(pool, SETS[:1], PATIENCE_S)]
    with pytest.raises(TimeoutError, match="give the pool a core set for each replica"):
        await take(pool, SETS[:1], 0.01)
    held[0].hold.close()


async def test_a_process_that_is_killed_gives_its_cores_back(pool: str) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", TAKE, pool, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    assert (await process.stdout.readline()).strip() == b"(0, 1)"
    second = await take(pool, SETS, PATIENCE_S)
    assert second.numbers == (2, 3)
    process.kill()
    await process.communicate()
    first = await take(pool, SETS, PATIENCE_S)
    assert first.numbers == (0, 1)
    first.hold.close()
    second.hold.close()
