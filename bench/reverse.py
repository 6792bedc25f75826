"""Owns the experiment on a session's second turn: where its KV comes from, and what that costs, on two real engines.

Prefill reads a first turn, decode writes the answer. Then one of the sources serves the second turn: the first prompt,
the answer, and new text. With another cache salt a prefill engine finds nothing of the session, as if it had moved.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams

from bench.reverse_report import Cell, ReversePlan, Source, Trial
from engine.protocol import EngineLoad, EngineRequest, KVHandoff, Phase, PrefillFacts, TokenDelta
from engine.vllm_codec import SamplingPayload, encode_sampling
from engine.vllm_engine import VllmEngine, VllmEngineConfig, engine_arguments
from gateway.app import engine_spec
from gateway.runtime.environment import LOOPBACK
from gateway.settings import Settings

PIN_S = 20
"""How long decode keeps the blocks of an answer that nobody fetches: longer than one second turn takes."""
TIMEOUT_S = 60.0
OTHERS_PROMPT_TOKENS = 100
OTHERS_ANSWER_TOKENS = 4000
GREEDY = encode_sampling(SamplingPayload(SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)))


class PinningEngine(VllmEngine):
    """An engine that offers what vLLM's own reverse transfer keeps of a decode request that came with a hand-off."""

    def _handoff(self, params: dict[str, Any] | None, told_s: float) -> KVHandoff | None:
        if not params or not params.get("do_remote_decode"):
            return super()._handoff(params, told_s)
        return KVHandoff(
            source_replica=self._config.replica_id,
            source_request_id=params["remote_request_id"],
            num_tokens=params["remote_num_tokens"],
            num_blocks=len(params["remote_block_ids"][0]),
            params=msgspec.msgpack.encode(params),
            expires_s=time.time() + PIN_S,
        )


def pinning(config: VllmEngineConfig) -> VllmEngineConfig:
    """With vLLM's own reverse transfer, also where it would rather compute."""
    config = replace(config, reverse=True)
    transfer: Any = engine_arguments(config).kv_transfer_config
    reverse = {"bidirectional_kv_xfer": True, "decoder_kv_blocks_ttl": PIN_S, "kv_recompute_threshold": 0}
    transfer |= {"kv_connector_extra_config": transfer["kv_connector_extra_config"] | reverse}
    return replace(config, engine_args=config.engine_args | {"kv_transfer_config": transfer})


@dataclass
class Told:
    """Everything an engine has said about one request, and when."""

    times_s: list[float] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def facts(self) -> PrefillFacts:
        facts = self.deltas[0].prefill
        assert facts is not None
        return facts

    @property
    def handoff(self) -> KVHandoff:
        handoff = self.deltas[-1].handoff
        if handoff is None:
            raise RuntimeError(f"{self.deltas[-1].request_id} ended without a hand-off: {self.deltas[-1].error}")
        return handoff


class Reader:
    """The one reader of an engine."""

    _ids = itertools.count()

    def __init__(self, engine: VllmEngine):
        self.engine = engine
        self.load = EngineLoad()
        self.told: dict[str, Told] = {}
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._read())

    async def submit(
        self,
        phase: Phase,
        prompt: Sequence[int],
        max_tokens: int,
        salt: str,
        handoff: KVHandoff | None = None,
        num_written_tokens: int = 0,
    ) -> str:
        request = EngineRequest(
            f"turn-{next(self._ids)}",
            phase,
            list(prompt),
            max_tokens,
            GREEDY,
            handoff,
            salt,
            num_written_tokens=num_written_tokens,
        )
        self.told[request.request_id] = Told()
        await self.engine.submit(request)
        return request.request_id

    async def run(self, *args: Any, **kwargs: Any) -> Told:
        """Submits a request and waits for its end. Raises TimeoutError."""
        told = self.told[request_id := await self.submit(*args, **kwargs)]
        await self.until(lambda: bool(told.deltas) and told.deltas[-1].finish_reason is not None)
        del self.told[request_id]
        return told

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what a step makes true. Raises TimeoutError, and what has ended the engine."""
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(lambda: condition() or self._task.done())
        if self._task.done():
            self._task.result()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.engine.shutdown()

    async def _read(self) -> None:
        try:
            async for step in self.engine.steps():
                now_s = time.perf_counter()
                async with self._changed:
                    self.load = step.load
                    for delta in step.deltas:
                        if told := self.told.get(delta.request_id):
                            told.times_s.append(now_s)
                            told.deltas.append(delta)
                    self._changed.notify_all()
        finally:
            async with self._changed:
                self._changed.notify_all()


class ReverseExperiment:
    """`trials` holds what has been measured so far. `say` is told of every round."""

    def __init__(self, plan: ReversePlan, settings: Settings, say: Callable[[str], None]):
        self.trials: list[Trial] = []
        self._plan = plan
        self._settings = settings
        self._say = say
        self._rng = random.Random(plan.seed)

    async def run(self) -> None:
        """Raises RuntimeError when an engine does not start, EngineGoneError, TimeoutError."""
        readers: dict[Phase, Reader] = {}
        try:
            for phase in Phase:
                spec = engine_spec(self._settings, phase)
                config = pinning(spec.engine_config(phase, spec.cpu_cores[0] if spec.cpu_cores else [], LOOPBACK))
                readers[phase] = Reader(await PinningEngine.start(config))
            turns = SecondTurns(readers[Phase.PREFILL], readers[Phase.DECODE], self._rng)
            # Either engine's first fetch from the other pays a handshake.
            await turns.measure(replace(self._plan.cells[0], others=0), 0)
            for number in range(1, self._plan.rounds + 1):
                for cell in self._plan.cells:
                    self.trials += await turns.measure(cell, number)
                    self._say(f"round {number} of {self._plan.rounds}: {cell}")
        finally:
            for reader in readers.values():
                await reader.close()


class SecondTurns:
    def __init__(self, prefill: Reader, decode: Reader, rng: random.Random):
        self._prefill = prefill
        self._decode = decode
        self._rng = rng
        self._salts = itertools.count()

    async def measure(self, cell: Cell, number: int) -> list[Trial]:
        """One trial of each source, in an order that is drawn, over the same tokens."""
        prompt, new = self._tokens(cell.prompt_tokens), self._tokens(cell.new_tokens)
        sources = self._rng.sample(list(Source), len(Source))
        return [await self._trial(cell, source, number, prompt, new) for source in sources]

    async def _trial(self, cell: Cell, source: Source, number: int, prompt: list[int], new: list[int]) -> Trial:
        salt = f"trial-{next(self._salts)}"
        read = await self._prefill.run(Phase.PREFILL, prompt, 1, salt)
        first = await self._decode.run(Phase.DECODE, prompt, cell.answer_tokens, salt, read.handoff)
        others = await self._start_others(cell.others)
        before = self._prefill.load, self._decode.load
        start_s = time.perf_counter()
        trial = await self._second_turn(cell, source, number, [*prompt, *first.token_ids], new, first.handoff, salt)
        end_s = time.perf_counter()
        gap_s = max((_longest_gap_s(told, start_s, end_s) for told in others.values()), default=0.0)
        await self._decode.engine.abort(list(others))
        for request_id in others:
            del self._decode.told[request_id]
        moved = [
            await self._bytes_received(self._prefill, before[0], int(source.fetches)),
            await self._bytes_received(self._decode, before[1], int(source is not Source.DECODE)),
        ]
        return replace(trial, bytes_to_prefill=moved[0], bytes_to_decode=moved[1], others_gap_s=gap_s)

    async def _second_turn(
        self,
        cell: Cell,
        source: Source,
        number: int,
        known: list[int],
        new: list[int],
        pinned: KVHandoff,
        salt: str,
    ) -> Trial:
        """`known` are the tokens of the first turn; of the last one no KV has been computed."""
        start_s, asked_s, prompt = time.perf_counter(), 0.0, [*known, *new]
        if source is Source.DECODE:
            written = await self._decode.run(Phase.DECODE, prompt, 2, salt)
            times_s, token_ids, read = written.times_s, written.token_ids, None
        else:
            handoff = pinned if source.is_pinned else None
            if source.fetches and not source.is_pinned:
                handoff = (await self._decode.run(Phase.PREFILL, known[:-1], 1, salt)).handoff
                asked_s = time.perf_counter() - start_s
            prefill_salt = f"{salt}-moved" if source.has_moved else salt
            read = await self._prefill.run(Phase.PREFILL, prompt, 1, prefill_salt, handoff)
            written = await self._decode.run(Phase.DECODE, [*prompt, *read.token_ids], 1, salt, read.handoff, 1)
            times_s, token_ids = read.times_s + written.times_s, read.token_ids + written.token_ids
        return Trial(
            cell,
            source,
            number,
            tuple(token_ids),
            first_token_s=times_s[0] - start_s,
            second_token_s=times_s[1] - start_s,
            asked_s=asked_s,
            prefill_computed_tokens=read.facts.num_computed_tokens if read else 0,
            prefill_fetched_tokens=read.facts.num_external_cached_tokens if read else 0,
            decode_computed_tokens=written.facts.num_computed_tokens,
            bytes_to_prefill=0,
            bytes_to_decode=0,
            others_gap_s=0.0,
        )

    async def _start_others(self, number: int) -> dict[str, Told]:
        """Streams that decode writes while a second turn runs; returns when all have begun."""
        others: dict[str, Told] = {}
        for _ in range(number):
            prompt = self._tokens(OTHERS_PROMPT_TOKENS)
            request_id = await self._decode.submit(Phase.DECODE, prompt, OTHERS_ANSWER_TOKENS, "others")
            others[request_id] = self._decode.told[request_id]
        await self._decode.until(lambda: all(len(told.deltas) > 1 for told in others.values()))
        return others

    @staticmethod
    async def _bytes_received(reader: Reader, before: EngineLoad, num_transfers: int) -> int:
        """Once that many transfers since `before` are counted."""
        await reader.until(lambda: reader.load.kv_transfers_total - before.kv_transfers_total >= num_transfers)
        return reader.load.kv_bytes_received_total - before.kv_bytes_received_total

    def _tokens(self, number: int) -> list[int]:
        return [self._rng.randrange(20, 1500) for _ in range(number)]


def _longest_gap_s(told: Told, start_s: float, end_s: float) -> float:
    """Between two tokens, the second of which came while a second turn ran."""
    pairs = itertools.pairwise(told.times_s)
    return max((later - earlier for earlier, later in pairs if start_s < later <= end_s), default=0.0)
