"""Split output equals one engine's output (invariant I8), and the KV cache really moves. Real vLLM, real NIXL."""

import asyncio
import math
import os
import random
import time

import psutil
import pytest
from vllm import LLM, TokensPrompt
from vllm.sampling_params import SamplingParams

from engine.protocol import EngineRequest, FinishReason, InvalidEngineRequestError, KVHandoff, Phase
from engine.vllm_codec import SamplingPayload, encode_sampling
from engine.vllm_engine import CPU_WORKER
from tests.engine.local_cluster import BLOCK, ENGINE_ARGS, MODEL, LocalCluster, local_cluster

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 4000]
MAX_TOKENS = 12
LOGPROB_TOLERANCE = 2e-3
"""Same float32 kernels over other batch shapes: sums are taken in another order."""


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)


def prompt(length: int, salt: int = 0) -> list[int]:
    rng = random.Random(length * 1000 + salt)
    return [rng.randrange(20, 1500) for _ in range(length)]


SAMPLING = encode_sampling(SamplingPayload(SamplingParams(temperature=0.0, max_tokens=1)))
PROMPTS_16 = [prompt(4000, salt) for salt in range(16)]


class Expected:
    """What one vLLM engine answers, alone, one request at a time."""

    def __init__(self) -> None:
        llm = LLM(model=MODEL, worker_cls=CPU_WORKER, disable_log_stats=True, **ENGINE_ARGS)
        self._answers: dict[tuple[tuple[int, ...], int | None], tuple[list[int], list[float]]] = {}
        for length in LENGTHS:
            self._ask(llm, prompt(length), None)
            self._ask(llm, prompt(length), 7)
        for number, tokens in enumerate(PROMPTS_16):
            self._ask(llm, tokens, number)
        llm.llm_engine.engine_core.shutdown()

    def _ask(self, llm: LLM, tokens: list[int], seed: int | None) -> None:
        params = greedy() if seed is None else seeded(seed)
        (result,) = llm.generate(TokensPrompt(prompt_token_ids=tokens), params, use_tqdm=False)
        output = result.outputs[0]
        assert output.logprobs is not None
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        self._answers[tuple(tokens), seed] = list(output.token_ids), logprobs

    def check(self, answer, tokens: list[int], seed: int | None) -> None:
        token_ids, logprobs = self._answers[tuple(tokens), seed]
        where = f"{len(tokens)}-token prompt, seed {seed}, receipt {answer.receipt}"
        assert answer.token_ids == token_ids, where
        worst = max(abs(a - b) for a, b in zip(answer.logprobs, logprobs, strict=True))
        assert worst <= LOGPROB_TOLERANCE, f"logprobs differ by {worst}: {where}"


@pytest.fixture(scope="module")
def expected():
    return Expected()


@pytest.fixture(scope="module")
async def split(expected):
    async with local_cluster(prefill=1, decode=1) as cluster:
        yield cluster


async def handoff_of(cluster: LocalCluster, tokens: list[int]) -> KVHandoff:
    """Prefills a prompt as another gateway would, so that this one's orchestrator knows nothing of the hand-off."""
    worker = cluster.workers["prefill-0"]
    reports = worker.attach("another-gateway")
    try:
        async for report in reports:
            if report.sequence == 0:
                await worker.submit("another-gateway", EngineRequest("by-hand", Phase.PREFILL, tokens, 1))
            for delta in report.deltas:
                assert delta.handoff is not None
                return delta.handoff
    finally:
        await reports.aclose()
    raise AssertionError("the report stream ended")


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def forget(cluster: LocalCluster) -> None:
    """Empties every engine's prefix cache."""
    await cluster.quiet()
    for engine in cluster.engines.values():
        assert await engine._client.reset_prefix_cache_async()


@pytest.mark.parametrize("length", LENGTHS)
async def test_cold_prompts_give_one_engines_tokens_and_logprobs(split, expected, length):
    await forget(split)
    expected.check(await split.ask(prompt(length), greedy()), prompt(length), None)
    await forget(split)
    expected.check(await split.ask(prompt(length), seeded(7)), prompt(length), 7)


@pytest.mark.parametrize("length", LENGTHS)
async def test_fully_cached_prompts_give_the_same(split, expected, length):
    await split.ask(prompt(length), greedy())
    again = await split.ask(prompt(length), greedy())
    expected.check(again, prompt(length), None)
    assert again.receipt.outcome.reused_tokens == (length - 1) // BLOCK * BLOCK
    expected.check(await split.ask(prompt(length), seeded(7)), prompt(length), 7)


@pytest.mark.parametrize("length", [65, 1024, 2049, 4000])
async def test_prompts_half_cached_on_prefill_give_the_same(split, expected, length):
    await forget(split)
    half = prompt(length)[: length // 2]
    await split.transport.submit("prefill-0", EngineRequest(f"half-{length}", Phase.PREFILL, half, 1))
    # Nobody asked the orchestrator for it, so that the orchestrator gives its blocks back.
    await split.until(lambda: split.load("prefill-0").num_kv_blocks_used == 0, "the half prompt is given back")
    answer = await split.ask(prompt(length), greedy())
    expected.check(answer, prompt(length), None)
    assert answer.receipt.outcome.reused_tokens == length // 2 // BLOCK * BLOCK


@pytest.mark.parametrize("length", [65, 1024, 2049, 4000])
async def test_prompts_half_cached_on_decode_give_the_same_and_move_only_the_rest(split, expected, length):
    await forget(split)
    half = prompt(length)[: length // 2]
    local = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    assert (await split.ask(half, local)).receipt.placement.prefill is None
    answer = await split.ask(prompt(length), greedy())
    expected.check(answer, prompt(length), None)
    outcome = answer.receipt.outcome
    assert outcome.kv_blocks_moved == math.ceil(length / BLOCK) - length // 2 // BLOCK
    assert outcome.reused_tokens == 0, "prefill has computed the whole prompt: nothing was reused"


async def test_sixteen_at_once_give_what_each_gives_alone(split, expected):
    await forget(split)
    tokens = [prompt(length) for length in LENGTHS[:16]]
    for one, answer in zip(tokens, await asyncio.gather(*(split.ask(t, greedy()) for t in tokens)), strict=True):
        expected.check(answer, one, None)


async def test_sixteen_seeded_4k_prompts_at_once_give_what_each_gives_alone(split, expected):
    await forget(split)
    answers = await asyncio.gather(*(split.ask(t, seeded(n)) for n, t in enumerate(PROMPTS_16)))
    for number, (tokens, answer) in enumerate(zip(PROMPTS_16, answers, strict=True)):
        expected.check(answer, tokens, number)


async def test_seeded_prompts_prefilled_in_chunks_by_decode_itself_give_the_same(split, expected):
    """A chunked seeded prompt kills vLLM's CPU engine without our worker: see engine/vllm_cpu_worker.py."""
    await forget(split)
    sequences = []
    for number, tokens in enumerate(PROMPTS_16[:4]):
        params = seeded(number)
        params.prompt_logprobs = 0
        sequences.append(split.ask(tokens, params))
    for number, answer in enumerate(await asyncio.gather(*sequences)):
        assert answer.receipt.placement.prefill is None
        expected.check(answer, PROMPTS_16[number], number)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1024, 1025, 4000])
async def test_the_bytes_moved_are_the_prompts_blocks_and_decode_computes_no_prompt(split, length):
    await forget(split)
    before = split.load("decode-0")
    answer = await split.ask(prompt(length, salt=5), greedy())
    await split.quiet()
    after = split.load("decode-0")
    blocks = math.ceil(length / BLOCK)
    moved = after.kv_bytes_received_total - before.kv_bytes_received_total
    assert moved == blocks * split.info("decode-0").kv_block_bytes
    assert answer.receipt.outcome.kv_bytes_moved == moved
    computed = after.prompt_tokens_computed_total - before.prompt_tokens_computed_total
    assert computed == 1, "the last token is computed again for its logits, and nothing else"
    assert answer.receipt.outcome.prefill_computed_tokens == length


async def test_aborts_at_any_moment_leave_no_block_on_either_side(split):
    await forget(split)
    for turns in range(40):
        request_id, _, _ = split.submit(prompt(1500, salt=100 + turns), greedy())
        for _ in range(turns * 20):
            await asyncio.sleep(0)
        split.orchestrator.abort([request_id])
        receipt = split.orchestrator.receipts.get(request_id)
        assert receipt.outcome.status in ("aborted", "finished")
    await split.quiet()


async def test_a_handoff_is_good_for_one_use(split):
    await forget(split)
    handoff = await handoff_of(split, prompt(100))
    await split.transport.submit("decode-0", EngineRequest("first", Phase.DECODE, prompt(100), 1, SAMPLING, handoff))
    with pytest.raises(InvalidEngineRequestError, match="consumed before"):
        await split.transport.submit(
            "decode-0", EngineRequest("twice", Phase.DECODE, prompt(100), 1, SAMPLING, handoff)
        )
    await split.quiet()


async def test_an_idle_engine_settles_below_five_percent_of_a_core(split):
    await split.quiet()
    for replica_id in split.engines:
        processes = [psutil.Process(pid) for pid in split.info(replica_id).pids]
        shares: list[float] = []
        # What came before may take some seconds to die away; a spinning thread never does.
        while not shares or (shares[-1] >= 0.05 and len(shares) < 10):
            start_s, began_s = cpu_seconds(processes), time.monotonic()
            await asyncio.sleep(4)
            shares.append((cpu_seconds(processes) - start_s) / (time.monotonic() - began_s))
        assert shares[-1] < 0.05, f"{replica_id} takes these shares of a core while idle: {shares}"


def test_every_engine_computes_on_the_core_it_was_given(split):
    """The connector would move all of them to the machine's last core (docs/adr/0009)."""
    for replica_id, core in (("prefill-0", 0), ("decode-0", 1)):
        cores = [os.sched_getaffinity(pid) for pid in split.info(replica_id).pids if is_engine(pid)]
        assert cores == [{core}], f"{replica_id} runs on {cores}"
    # What this process starts next must not be bound to an engine's core.
    assert not {"GOMP_CPU_AFFINITY", "OMP_NUM_THREADS"} & set(os.environ)


def is_engine(pid: int) -> bool:
    return psutil.Process(pid).name().startswith("VLLM::")


async def test_two_prefill_and_two_decode_engines_give_one_engines_tokens(expected):
    async with local_cluster(prefill=2, decode=2, kv_cache_memory_bytes=1 << 29) as cluster:
        tokens = [prompt(length) for length in LENGTHS]
        answers = await asyncio.gather(*(cluster.ask(t, greedy()) for t in tokens))
        for one, answer in zip(tokens, answers, strict=True):
            expected.check(answer, one, None)
            assert answer.finish_reason is FinishReason.LENGTH
        pairs = {(a.receipt.placement.prefill, a.receipt.placement.decode) for a in answers}
        assert {p for p, _ in pairs} == {"prefill-0", "prefill-1"}
        assert {d for _, d in pairs} == {"decode-0", "decode-1"}
        for number, tokens_4k in enumerate(PROMPTS_16[:2]):
            expected.check(await cluster.ask(tokens_4k, seeded(number)), tokens_4k, number)
        await cluster.quiet()
