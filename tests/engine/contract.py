"""Owns the contract of the Engine port: what every pair of engines, real or simulated, must do."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pytest
import pytest_asyncio

from engine.blocks import BlockMirror, block_hashes
from engine.protocol import (
    Engine,
    EngineLoad,
    EngineRequest,
    EngineStep,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
)

TIMEOUT_S = 60.0
TOTALS = [name for name in EngineLoad.__struct_fields__ if name.endswith("_total")]

_request_numbers = itertools.count()


class EnginePair(Protocol):
    """What the fixture `pair` gives: two engines of one model that can hand over, idle, with equal block sizes.

    `sampling` makes them decode greedily and never stop before max_tokens. `prompt` gives the same tokens for the
    same arguments.
    """

    prefill: Engine
    decode: Engine
    sampling: bytes

    def prompt(self, n_tokens: int, seed: int) -> list[int]: ...


@dataclass
class Answer:
    """Everything an engine has said about one request."""

    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def facts(self) -> PrefillFacts:
        (facts,) = [delta.prefill for delta in self.deltas if delta.prefill is not None]
        assert self.deltas[0].prefill is facts, "prefill facts must come with the first delta"
        return facts

    @property
    def handoff(self) -> KVHandoff:
        (handoff,) = [delta.handoff for delta in self.deltas if delta.handoff is not None]
        assert self.deltas[-1].handoff is handoff, "the hand-off must come with the last delta"
        return handoff


class Collector:
    """The one reader of an engine. Waits for conditions on what it has read, never for time to pass."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self.steps: list[EngineStep] = []
        self.mirror = BlockMirror(engine.info.num_kv_blocks)
        self.most_blocks = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Condition()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._read()), loop.create_task(self._read_blocks())]

    @property
    def load(self) -> EngineLoad:
        return self.steps[-1].load

    async def finished(self, request_id: str) -> Answer:
        """The answer, once the engine has ended it."""

        def is_finished() -> bool:
            return request_id in self.answers and bool(self.answers[request_id].finish_reasons)

        await self._until(is_finished, f"{request_id} to finish")
        return self.answers[request_id]

    async def started(self, request_id: str, num_tokens: int = 1) -> None:
        """Waits until the request has at least so many tokens."""
        await self._until(
            lambda: request_id in self.answers and len(self.answers[request_id].token_ids) >= num_tokens,
            f"{num_tokens} tokens of {request_id}",
        )

    async def next_step(self) -> None:
        """Waits until the engine tells another step."""
        num_told = len(self.steps)
        await self._until(lambda: len(self.steps) > num_told, "another step")

    async def load_where(self, predicate: Callable[[EngineLoad], bool], what: str) -> EngineLoad:
        """The latest load, once it satisfies the predicate."""
        await self._until(lambda: bool(self.steps) and predicate(self.load), what)
        return self.load

    async def idle(self) -> EngineLoad:
        """The load when nothing runs or waits and every block is free."""
        return await self.load_where(is_idle, "the engine to be idle with no block in use")

    async def blocks_where(self, predicate: Callable[[BlockMirror], bool], what: str) -> None:
        """Waits until the mirror of the engine's cached blocks satisfies the predicate."""
        await self._until(lambda: predicate(self.mirror), what)

    async def holds(self, hashes: Sequence[bytes]) -> None:
        await self.blocks_where(lambda mirror: all(h in mirror for h in hashes), f"{len(hashes)} blocks to be told")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: condition() or self._failure is not None)
        except TimeoutError:
            last = self.steps[-1] if self.steps else None
            raise AssertionError(f"waited {TIMEOUT_S:.0f} s in vain for {what}; the last step was {last}") from None
        if not condition():
            raise AssertionError(f"the engine failed before {what}") from self._failure

    async def _read(self) -> None:
        try:
            async for step in self.engine.steps():
                await self._take(step)
        except Exception as failure:
            self._failure = failure
            async with self._changed:
                self._changed.notify_all()

    async def _read_blocks(self) -> None:
        async for changes in self.engine.block_changes():
            async with self._changed:
                self.mirror.apply(changes)
                self.most_blocks = max(self.most_blocks, len(self.mirror))
                self._changed.notify_all()

    async def _take(self, step: EngineStep) -> None:
        async with self._changed:
            self.steps.append(step)
            for delta in step.deltas:
                self.answers.setdefault(delta.request_id, Answer()).deltas.append(delta)
            self._changed.notify_all()


@dataclass
class Bench:
    """A pair and the readers of its two engines, for one test. Its salt hides what earlier tests left in the caches."""

    pair: EnginePair
    prefill: Collector
    decode: Collector
    salt: str

    async def submit(
        self,
        on: Collector,
        phase: Phase,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        handoff: KVHandoff | None = None,
        salt: str = "",
    ) -> str:
        """Sends a request; returns its id, which no other request has."""
        request_id = f"contract-{next(_request_numbers)}"
        sampling = self.pair.sampling if phase is Phase.DECODE else b""
        cache_salt = self.salt + salt
        await on.engine.submit(
            EngineRequest(request_id, phase, list(prompt), max_tokens, sampling, handoff, cache_salt)
        )
        return request_id

    async def run_prefill(self, prompt: Sequence[int]) -> Answer:
        return await self.prefill.finished(await self.submit(self.prefill, Phase.PREFILL, prompt, 1))

    async def run_decode(
        self, prompt: Sequence[int], max_tokens: int = 8, handoff: KVHandoff | None = None, salt: str = ""
    ) -> Answer:
        request_id = await self.submit(self.decode, Phase.DECODE, prompt, max_tokens, handoff=handoff, salt=salt)
        return await self.decode.finished(request_id)

    async def serves(self, side: Collector) -> None:
        """One more request, without a salt, runs to its end on this engine."""
        request_id = f"contract-{next(_request_numbers)}"
        prompt = self.pair.prompt(6, seed=99)
        await side.engine.submit(EngineRequest(request_id, Phase.DECODE, prompt, 2, self.pair.sampling))
        assert len((await side.finished(request_id)).token_ids) == 2

    async def release(self, handoff: KVHandoff) -> None:
        await self.decode.engine.release(f"release-{next(_request_numbers)}", handoff)

    @property
    def block_size(self) -> int:
        return self.pair.decode.info.block_size_tokens

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hashes(self, token_ids: Sequence[int], salt: str = "") -> list[bytes]:
        return block_hashes(token_ids, self.block_size, self.salt + salt)

    def hashes_after(self, prompt: Sequence[int], answer: Answer, salt: str = "") -> list[bytes]:
        """The full blocks a request leaves behind: of an answer's last token no KV was ever computed."""
        return self.hashes([*prompt, *answer.token_ids[:-1]], salt)

    def predicted_cached_tokens(self, side: Collector, prompt: Sequence[int]) -> int:
        """What the mirror says a prompt would find; an engine computes its last token in any case."""
        findable = self.hashes(prompt[:-1])
        return side.mirror.num_leading(findable) * self.block_size


def is_idle(load: EngineLoad) -> bool:
    return load.num_running_requests == load.num_waiting_requests == load.num_kv_blocks_used == 0


class EngineContract:
    """Subclass it and give it a fixture `pair`. An engine is taken to use no block while it is idle.

    Every test ends with the check that both engines have become idle again, so each one also finds leaked blocks.
    """

    @pytest_asyncio.fixture
    async def bench(self, pair: EnginePair) -> AsyncIterator[Bench]:
        salt = f"test-{next(_request_numbers)}"
        bench = Bench(pair, Collector(pair.prefill), Collector(pair.decode), salt)
        try:
            yield bench
            for side in (bench.prefill, bench.decode):
                if side.steps:
                    load = await side.idle()
                    assert (load.num_queued_tokens, load.num_running_tokens) == (0, 0)
        finally:
            await bench.prefill.close()
            await bench.decode.close()

    async def test_local_decode_yields_exactly_max_tokens_and_one_finish(self, bench: Bench) -> None:
        answer = await bench.run_decode(bench.pair.prompt(20, seed=1), max_tokens=7)
        assert len(answer.token_ids) == 7
        assert answer.finish_reasons == [FinishReason.LENGTH]
        assert answer.deltas[-1].finish_reason is FinishReason.LENGTH
        assert all(delta.handoff is None for delta in answer.deltas)

    async def test_decode_stops_at_max_model_len(self, bench: Bench) -> None:
        limit = bench.pair.decode.info.max_model_len
        answer = await bench.run_decode(bench.pair.prompt(limit - 3, seed=2), max_tokens=50)
        assert len(answer.token_ids) == 3
        assert answer.finish_reasons == [FinishReason.LENGTH]

    @pytest.mark.parametrize(("blocks", "extra_tokens"), [(0, 1), (1, 0), (2, 3)])
    async def test_prefill_ends_with_one_handoff_over_the_whole_prompt(
        self, bench: Bench, blocks: int, extra_tokens: int
    ) -> None:
        num_tokens = blocks * bench.block_size + extra_tokens
        answer = await bench.run_prefill(bench.pair.prompt(num_tokens, seed=3))
        assert len(answer.token_ids) == 1
        assert answer.finish_reasons == [FinishReason.LENGTH]
        assert answer.handoff.num_tokens == num_tokens
        assert answer.handoff.num_blocks == bench.num_blocks(num_tokens)
        await bench.release(answer.handoff)

    @pytest.mark.parametrize(
        ("blocks", "extra_tokens"),
        [(0, 1), (1, -1), (1, 0), (1, 1), (3, 5)],
        ids=["1", "B-1", "B", "B+1", "3B+5"],
    )
    async def test_decode_after_a_handoff_writes_what_local_decode_writes(
        self, bench: Bench, blocks: int, extra_tokens: int
    ) -> None:
        prompt = bench.pair.prompt(blocks * bench.block_size + extra_tokens, seed=4)
        prefilled = await bench.run_prefill(prompt)
        split = await bench.run_decode(prompt, 12, prefilled.handoff)
        # A salt of its own: the reference must not read blocks that the hand-off brought.
        local = await bench.run_decode(prompt, 12, salt="-local")
        assert local.facts.num_computed_tokens == len(prompt)
        assert split.token_ids == local.token_ids
        assert split.token_ids[:1] == prefilled.token_ids

    async def test_facts_of_prefill_and_decode_add_up(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=5)
        first = await bench.run_prefill(prompt)
        again = await bench.run_prefill(prompt)
        answers = [
            first,
            again,
            await bench.run_decode(prompt, handoff=first.handoff),
            await bench.run_decode(prompt, handoff=again.handoff),
            await bench.run_decode(prompt),
        ]
        for answer in answers:
            facts = answer.facts
            parts = (facts.num_computed_tokens, facts.num_local_cached_tokens, facts.num_external_cached_tokens)
            assert facts.num_prompt_tokens == len(prompt)
            assert sum(parts) == len(prompt)
            assert min(parts) >= 0

    async def test_decode_after_a_handoff_computes_one_token_and_receives_its_blocks(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(3 * bench.block_size + 5, seed=6)
        await bench.run_decode(bench.pair.prompt(4, seed=7), max_tokens=1)
        before = await bench.decode.idle()
        handoff = (await bench.run_prefill(prompt)).handoff
        facts = (await bench.run_decode(prompt, handoff=handoff)).facts
        assert facts == PrefillFacts(len(prompt), 1, 0, len(prompt) - 1)
        after = await bench.decode.load_where(
            lambda load: is_idle(load) and load.kv_transfers_total > before.kv_transfers_total,
            "the transfer to be counted",
        )
        moved_bytes = 4 * bench.pair.decode.info.kv_block_bytes
        assert after.kv_bytes_received_total - before.kv_bytes_received_total == moved_bytes
        assert after.kv_transfers_total - before.kv_transfers_total == 1
        assert after.kv_transfer_failures_total == before.kv_transfer_failures_total
        assert after.prompt_tokens_computed_total - before.prompt_tokens_computed_total == 1

    async def test_blocks_that_decode_has_cached_are_not_moved(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(3 * bench.block_size + 5, seed=8)
        await bench.run_decode(prompt[: 2 * bench.block_size + 1], max_tokens=1)
        before = await bench.decode.idle()
        handoff = (await bench.run_prefill(prompt)).handoff
        facts = (await bench.run_decode(prompt, handoff=handoff)).facts
        assert facts == PrefillFacts(len(prompt), 1, 2 * bench.block_size, bench.block_size + 4)
        after = await bench.decode.load_where(
            lambda load: load.kv_transfers_total > before.kv_transfers_total, "the transfer to be counted"
        )
        moved_bytes = 2 * bench.pair.decode.info.kv_block_bytes
        assert after.kv_bytes_received_total - before.kv_bytes_received_total == moved_bytes

    async def test_a_second_identical_prefill_finds_full_blocks_in_the_cache(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=9)
        first = await bench.run_prefill(prompt)
        await bench.release(first.handoff)
        second = await bench.run_prefill(prompt)
        await bench.release(second.handoff)
        assert first.facts == PrefillFacts(len(prompt), len(prompt), 0, 0)
        assert second.facts == PrefillFacts(len(prompt), 7, 2 * bench.block_size, 0)
        assert second.token_ids == first.token_ids

    async def test_computed_prompt_tokens_are_counted(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(bench.block_size + 9, seed=10)
        await bench.run_decode(bench.pair.prompt(4, seed=11), max_tokens=1)
        before = await bench.decode.idle()
        await bench.run_decode(prompt)
        after = await bench.decode.idle()
        assert after.prompt_tokens_computed_total - before.prompt_tokens_computed_total == len(prompt)

    async def test_prefill_keeps_the_blocks_until_the_handoff_is_released(self, bench: Bench) -> None:
        answer = await bench.run_prefill(bench.pair.prompt(2 * bench.block_size + 7, seed=12))
        await bench.prefill.load_where(
            lambda load: load.num_kv_blocks_used == 3 and not load.num_running_requests, "three blocks to be kept"
        )
        await bench.release(answer.handoff)
        await bench.prefill.idle()

    async def test_prefill_keeps_the_blocks_until_decode_has_fetched_them(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=13)
        handoff = (await bench.run_prefill(prompt)).handoff
        await bench.prefill.load_where(lambda load: load.num_kv_blocks_used == 3, "three blocks to be kept")
        await bench.run_decode(prompt, handoff=handoff)
        await bench.prefill.idle()

    async def test_an_abort_before_a_request_runs_frees_its_blocks(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=14)
        for side, phase in ((bench.prefill, Phase.PREFILL), (bench.decode, Phase.DECODE)):
            request_id = await bench.submit(side, phase, prompt, max_tokens=64)
            await side.engine.abort([request_id])
            await side.engine.abort([request_id])
            await bench.serves(side)
            await self._give_back_if_it_finished(bench, request_id)
            await side.idle()

    async def test_an_abort_is_followed_by_a_step(self, bench: Bench) -> None:
        """Whoever waits for a sign of life of an engine waits no longer than for an answer."""
        for side, phase in ((bench.prefill, Phase.PREFILL), (bench.decode, Phase.DECODE)):
            request_id = await bench.submit(side, phase, bench.pair.prompt(20, seed=31), 64)
            await side.engine.abort([request_id])
            await side.next_step()

    async def test_an_abort_while_prefill_runs_frees_its_blocks(self, bench: Bench) -> None:
        limit = bench.pair.prefill.info.max_model_len
        request_id = await bench.submit(bench.prefill, Phase.PREFILL, bench.pair.prompt(limit - 1, seed=15), 1)
        await bench.prefill.load_where(
            lambda load: load.num_running_requests > 0 or request_id in bench.prefill.answers, "prefill to run"
        )
        await bench.prefill.engine.abort([request_id])
        await bench.prefill.engine.abort([request_id])
        await bench.serves(bench.prefill)
        await self._give_back_if_it_finished(bench, request_id)
        await bench.prefill.idle()

    async def test_an_abort_while_decode_runs_frees_its_blocks_and_ends_its_tokens(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(20, seed=16)
        max_tokens = bench.pair.decode.info.max_model_len - len(prompt)
        request_id = await bench.submit(bench.decode, Phase.DECODE, prompt, max_tokens)
        await bench.decode.started(request_id, num_tokens=3)
        await bench.decode.engine.abort([request_id])
        await bench.decode.engine.abort([request_id])
        await bench.decode.idle()
        answer = bench.decode.answers[request_id]
        num_tokens = len(answer.token_ids)
        assert num_tokens < max_tokens
        assert answer.finish_reasons in ([], [FinishReason.ABORT])
        await bench.serves(bench.decode)
        assert len(answer.token_ids) == num_tokens

    async def test_an_abort_of_decode_gives_the_handoff_back_to_prefill(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=17)
        handoff = (await bench.run_prefill(prompt)).handoff
        request_id = await bench.submit(bench.decode, Phase.DECODE, prompt, 64, handoff=handoff)
        await bench.decode.engine.abort([request_id])
        await bench.serves(bench.decode)
        await bench.decode.idle()
        await bench.prefill.idle()

    async def test_an_abort_of_an_unknown_request_is_ignored(self, bench: Bench) -> None:
        for side in (bench.prefill, bench.decode):
            await side.engine.abort(["never-submitted"])
            await bench.serves(side)
            assert "never-submitted" not in side.answers

    async def test_bad_requests_are_refused_and_the_engine_serves_on(self, bench: Bench) -> None:
        for side, phase in ((bench.prefill, Phase.PREFILL), (bench.decode, Phase.DECODE)):
            limit = side.engine.info.max_model_len
            for prompt, max_tokens in (
                ([], 4),
                (bench.pair.prompt(limit, seed=18), 4),
                (bench.pair.prompt(limit + 1, seed=18), 4),
                (bench.pair.prompt(5, seed=18), 0),
                (bench.pair.prompt(5, seed=18), -1),
            ):
                with pytest.raises(InvalidEngineRequestError):
                    await bench.submit(side, phase, prompt, max_tokens)
            await bench.serves(side)

    async def test_sixteen_concurrent_requests_get_each_token_once(self, bench: Bench) -> None:
        async def run(i: int) -> str:
            """Every fourth hand-off is given back and its prompt read by decode itself."""
            prompt = bench.pair.prompt(3 + 5 * i, seed=100 + i)
            handoff: KVHandoff | None = (await bench.run_prefill(prompt)).handoff
            if i % 4 == 0:
                await bench.release(handoff)
                handoff = None
            request_id = await bench.submit(bench.decode, Phase.DECODE, prompt, 20 + i, handoff=handoff)
            answer = await bench.decode.finished(request_id)
            assert len(answer.token_ids) == 20 + i
            assert answer.finish_reasons == [FinishReason.LENGTH]
            assert answer.deltas[-1].finish_reason is FinishReason.LENGTH
            assert answer.facts.num_prompt_tokens == len(prompt)
            return request_id

        decodes = await asyncio.gather(*(run(i) for i in range(16)))
        assert self._max_concurrent(bench.decode, decodes) > 1, "they ran one after the other"

    async def test_counters_never_fall(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=19)
        fetched = (await bench.run_prefill(prompt)).handoff
        await bench.run_decode(prompt, handoff=fetched)
        released = (await bench.run_prefill(prompt)).handoff
        await bench.release(released)
        request_id = await bench.submit(bench.decode, Phase.DECODE, bench.pair.prompt(30, seed=20), 200)
        await bench.decode.started(request_id)
        await bench.decode.engine.abort([request_id])
        await bench.serves(bench.decode)
        for side in (bench.prefill, bench.decode):
            await side.idle()
            loads = [step.load for step in side.steps]
            for earlier, later in itertools.pairwise(loads):
                assert all(getattr(earlier, name) <= getattr(later, name) for name in TOTALS), (earlier, later)
            assert loads[-1].prompt_tokens_computed_total > 0
            num_blocks = side.engine.info.num_kv_blocks
            assert all(0 <= load.num_kv_blocks_used <= num_blocks for load in loads)
            # vLLM keeps one block for itself.
            (all_blocks,) = {load.num_kv_blocks_used + load.num_kv_blocks_free for load in loads}
            assert num_blocks - 1 <= all_blocks <= num_blocks
            assert loads[-1].kv_event_gaps_total == 0

    # -- load

    async def test_running_tokens_are_the_prompt_and_what_is_written(self, bench: Bench) -> None:
        prompt, first = bench.pair.prompt(20, seed=30), len(bench.decode.steps)
        answer = await bench.run_decode(prompt, max_tokens=9)
        await bench.decode.idle()
        written, seen = 0, set[int]()
        for step in bench.decode.steps[first:]:
            written += sum(len(delta.token_ids) for delta in step.deltas)
            running = 20 + written if 0 < written < len(answer.token_ids) else 0
            assert step.load.num_running_tokens == running
            seen.add(running)
        assert len(seen) > 2

    async def test_tokens_of_prompts_that_wait_or_are_read_are_queued(self, bench: Bench) -> None:
        num_tokens = bench.pair.decode.info.max_model_len - 1
        # No step computes that many tokens at once.
        prompts = [bench.pair.prompt(num_tokens, seed=31 + index) for index in range(3)]
        ids = [await bench.submit(bench.decode, Phase.DECODE, prompt, 1) for prompt in prompts]
        first, finished = len(bench.decode.steps), 0
        for request_id in ids:
            await bench.decode.finished(request_id)
        for step in bench.decode.steps[first:]:
            finished += sum(delta.finish_reason is not None for delta in step.deltas)
            assert step.load.num_queued_tokens == (3 - finished) * num_tokens
        assert any(step.load.num_queued_tokens for step in bench.decode.steps[first:])

    async def test_an_aborted_request_is_neither_queued_nor_running(self, bench: Bench) -> None:
        request_id = await bench.submit(bench.decode, Phase.DECODE, bench.pair.prompt(20, seed=34), 200)
        await bench.decode.started(request_id)
        await bench.decode.engine.abort([request_id])
        await bench.serves(bench.decode)
        load = await bench.decode.idle()
        assert (load.num_queued_tokens, load.num_running_tokens) == (0, 0)

    async def test_steps_take_time_and_prompts_are_read_at_a_rate(self, bench: Bench) -> None:
        num_tokens = bench.pair.prefill.info.max_model_len - 1
        answer = await bench.run_prefill(bench.pair.prompt(num_tokens, seed=35))
        load = await bench.prefill.load_where(lambda load: not load.num_running_requests, "prefill to end")
        await bench.release(answer.handoff)
        assert 0 < load.step_duration_s < TIMEOUT_S
        assert num_tokens / TIMEOUT_S < load.prefill_tokens_per_s < float("inf")

    # -- cached blocks

    @pytest.mark.parametrize("extra_tokens", [-1, 0, 1])
    async def test_the_full_blocks_of_prompt_and_answer_are_told(self, bench: Bench, extra_tokens: int) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 7, seed=40)
        max_tokens = 2 * bench.block_size - 7 + 1 + extra_tokens
        answer = await bench.run_decode(prompt, max_tokens)
        hashes = bench.hashes_after(prompt, answer)
        assert len(hashes) == (3 if extra_tokens < 0 else 4)
        await bench.decode.holds(hashes)
        assert set(bench.hashes([*prompt, *answer.token_ids, *[1] * bench.block_size])) & set(bench.decode.mirror) == (
            set(hashes)
        )

    async def test_a_handoff_leaves_its_blocks_on_both_sides(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(3 * bench.block_size + 5, seed=41)
        prefilled = await bench.run_prefill(prompt)
        await bench.prefill.holds(bench.hashes(prompt))
        answer = await bench.run_decode(prompt, bench.block_size, prefilled.handoff)
        await bench.decode.holds(bench.hashes_after(prompt, answer))

    async def test_salts_keep_blocks_apart(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(2 * bench.block_size + 1, seed=42)
        for salt in ("-a", "-b"):
            await bench.run_decode(prompt, max_tokens=1, salt=salt)
            await bench.decode.holds(bench.hashes(prompt, salt))
        assert not set(bench.hashes(prompt)) & set(bench.decode.mirror)

    async def test_a_prompt_finds_as_many_cached_tokens_as_the_mirror_says(self, bench: Bench) -> None:
        whole = bench.pair.prompt(6 * bench.block_size, seed=43)
        other = bench.pair.prompt(6 * bench.block_size, seed=44)
        size = bench.block_size
        for prompt in (whole[:size], whole[: 2 * size + 3], [*whole[:size], *other[:size], 1], whole, whole, other[:5]):
            predicted = bench.predicted_cached_tokens(bench.decode, prompt)
            answer = await bench.run_decode(prompt, max_tokens=size)
            assert answer.facts.num_local_cached_tokens == predicted
            await bench.decode.holds(bench.hashes_after(prompt, answer))

    async def test_blocks_of_concurrent_equal_prompts_are_found_as_the_mirror_says(self, bench: Bench) -> None:
        prompt = bench.pair.prompt(4 * bench.block_size + 3, seed=45)
        ids = [await bench.submit(bench.decode, Phase.DECODE, prompt, 2) for _ in range(4)]
        for request_id in ids:
            await bench.decode.finished(request_id)
        await bench.decode.holds(bench.hashes(prompt))
        predicted = bench.predicted_cached_tokens(bench.decode, prompt)
        assert (await bench.run_decode(prompt, 1)).facts.num_local_cached_tokens == predicted == 4 * bench.block_size

    async def test_evicted_blocks_are_gone_from_the_mirror(self, bench: Bench) -> None:
        info = bench.pair.decode.info
        prompt = bench.pair.prompt(3 * bench.block_size + 1, seed=46)
        await bench.run_decode(prompt, max_tokens=1)
        await bench.decode.holds(bench.hashes(prompt))
        length = info.max_model_len - 1
        for index in range(info.num_kv_blocks * bench.block_size // length + 2):
            filler = bench.pair.prompt(length, seed=100 + index)
            answer = await bench.run_decode(filler, max_tokens=1)
            await bench.decode.holds(bench.hashes_after(filler, answer))
        assert not set(bench.hashes(prompt)) & set(bench.decode.mirror)
        assert bench.decode.mirror.num_overflows == 0
        assert bench.decode.most_blocks <= info.num_kv_blocks
        assert (await bench.run_decode(prompt, 1)).facts.num_local_cached_tokens == 0

    @staticmethod
    async def _give_back_if_it_finished(bench: Bench, request_id: str) -> None:
        """A prefill may end just before its abort arrives: then there is a hand-off to release."""
        answer = bench.prefill.answers.get(request_id)
        if answer and any(delta.handoff for delta in answer.deltas):
            await bench.release(answer.handoff)

    @staticmethod
    def _max_concurrent(side: Collector, request_ids: list[str]) -> int:
        """The largest number of these requests that had begun and not ended after one step."""
        open_ids: set[str] = set()
        most = 0
        for step in side.steps:
            for delta in step.deltas:
                if delta.request_id in request_ids:
                    (open_ids.discard if delta.finish_reason else open_ids.add)(delta.request_id)
            most = max(most, len(open_ids))
        return most


class ReverseContract:
    """What engines that hand over in both directions (docs/adr/0017) do beside `EngineContract`: mix it in."""

    async def asked_for(self, bench: Bench, known: Sequence[int]) -> KVHandoff:
        """Decode's hand-off of a session's tokens after a turn that it has written itself."""
        answer = await bench.decode.finished(await bench.submit(bench.decode, Phase.PREFILL, known, 1))
        assert answer.facts.num_computed_tokens <= bench.block_size
        assert (answer.handoff.num_tokens, answer.handoff.num_blocks) == (len(known), bench.num_blocks(len(known)))
        return answer.handoff

    async def after_a_turn(self, bench: Bench, seed: int) -> list[int]:
        """The full blocks that decode has cached of it, of which prefill has the first."""
        prompt = bench.pair.prompt(bench.block_size + 2, seed)
        answer = await bench.run_decode(prompt, 2 * bench.block_size, (await bench.run_prefill(prompt)).handoff)
        known = [*prompt, *answer.token_ids]
        return known[: (len(known) - 1) // bench.block_size * bench.block_size]

    async def read(self, bench: Bench, prompt: list[int], handoff: KVHandoff, salt: str = "") -> Answer:
        request_id = await bench.submit(bench.prefill, Phase.PREFILL, prompt, 1, handoff=handoff, salt=salt)
        return await bench.prefill.finished(request_id)

    async def test_prefill_fetches_what_it_has_not_cached_and_reads_the_rest(self, bench: Bench) -> None:
        known = await self.after_a_turn(bench, seed=300)
        prompt = [*known, *bench.pair.prompt(5, seed=301)]
        before = bench.prefill.load
        second = await self.read(bench, prompt, await self.asked_for(bench, known))
        size = bench.block_size
        assert second.facts == PrefillFacts(len(prompt), 5, size, len(known) - size)
        after = await bench.prefill.load_where(
            lambda load: load.kv_transfers_total > before.kv_transfers_total, "the transfer to be counted"
        )
        moved_bytes = (len(known) - size) // size * bench.pair.prefill.info.kv_block_bytes
        assert after.kv_bytes_received_total - before.kv_bytes_received_total == moved_bytes
        answer = await bench.run_decode(prompt, 6, second.handoff)
        alone = await bench.run_decode(prompt, 6, salt="-alone")
        assert answer.token_ids == alone.token_ids

    async def test_decode_keeps_what_it_was_asked_for_until_it_is_fetched_or_given_back(self, bench: Bench) -> None:
        known = await self.after_a_turn(bench, seed=302)
        num_blocks = bench.num_blocks(len(known))
        for is_fetched in (True, False):
            handoff = await self.asked_for(bench, known)
            await bench.decode.load_where(lambda load: load.num_kv_blocks_used == num_blocks, "the blocks to be kept")
            if is_fetched:
                await bench.release((await self.read(bench, [*known, 1], handoff, salt="-moved")).handoff)
            else:
                await bench.prefill.engine.release("given-back", handoff)
            await bench.decode.idle()

    async def test_an_abort_of_prefill_gives_back_what_it_was_to_fetch(self, bench: Bench) -> None:
        known = await self.after_a_turn(bench, seed=303)
        handoff = await self.asked_for(bench, known)
        request_id = await bench.submit(bench.prefill, Phase.PREFILL, [*known, 1], 1, handoff=handoff, salt="-moved")
        await bench.prefill.engine.abort([request_id])
        await bench.prefill.next_step()
        if request_id in bench.prefill.answers:
            await bench.release(bench.prefill.answers[request_id].handoff)
        await bench.decode.idle()
