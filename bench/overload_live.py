"""Owns the experiment `overload` over real engines: `baton serve`, and more HTTP requests than it can answer.

First as many clients as keep it busy, each asking anew when it has its answer: that is the capacity. Then clients that
arrive when they like (Poisson), at a multiple of it, most of them streaming.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from bench import cpu
from bench.overload_report import Asked, LiveFigures, OverloadPlan, mean, refused_shares, retry_after_range, ttft_ms
from bench.streams import memory_mib
from bench.systems import System
from gateway.routing.types import Priority

CONCURRENCY = 16
STREAMING_SHARE = 0.75
PROMPT_TOKENS = (150, 350)
OUTPUT_TOKENS = 32
TOKEN_IDS = (20, 1500)
SHARES = {Priority.LOW: 0.3, Priority.NORMAL: 0.6, Priority.HIGH: 0.1}
MEMORY_EVERY_S = 2.0
AFTER_S = 5.0
AFTER_REQUESTS = 20
ANSWER_TIMEOUT_S = 120.0
ERRORS_KEPT = 5


class _Error(msgspec.Struct, frozen=True):
    message: str
    type: str
    code: int


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error


@dataclass
class LiveOverload:
    """Everything a run needs."""

    plan: OverloadPlan
    model: str
    system: System
    say: Callable[[str], None]
    _errors: Counter[str] = field(default_factory=Counter)

    def run(self) -> LiveFigures:
        """Starts the system, measures, and stops it, whatever is raised in between. Raises StartFailed."""
        try:
            self.say("starting")
            self.system.start()
            with cpu.first_in_line():
                return asyncio.run(self._measure())
        finally:
            self.say("stopping")
            self.system.stop()

    async def _measure(self) -> LiveFigures:
        plan, draw = self.plan, random.Random(self.plan.seed)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        ) as session:
            await self._closed_loop(session, draw, 5.0)
            self.say("measuring the capacity")
            at_capacity = await self._closed_loop(session, draw, plan.capacity_s)
            capacity_per_s = sum(one.is_answered for one in at_capacity) / plan.capacity_s
            self.say(f"{capacity_per_s:.1f} answers per second; asking {plan.factor:g} times as often")
            asked, memory = await self._overload(session, draw, capacity_per_s * plan.factor)
            await asyncio.sleep(AFTER_S)
            after = [await self._ask(session, draw, Priority.NORMAL, True) for _ in range(AFTER_REQUESTS)]
        streams = [one for one in asked if one.streams and one.is_answered]
        refused = [one for one in asked if one.is_refused]
        return LiveFigures(
            concurrency=CONCURRENCY,
            capacity_per_s=capacity_per_s,
            offered_per_s=len(asked) / plan.overload_s,
            answered_per_s=sum(one.is_answered for one in asked) / plan.overload_s,
            in_time_share=mean([one.ttft_s is not None and one.ttft_s <= plan.deadline_s for one in streams]),
            num_asked=len(asked),
            num_refused=len(refused),
            num_streams_refused=sum(one.streams for one in refused),
            num_untyped=sum(not one.is_typed for one in refused),
            num_failed=sum(not one.is_answered and not one.is_refused for one in (*at_capacity, *asked, *after)),
            refused_share=refused_shares(asked),
            retry_after_s=retry_after_range(asked),
            capacity_ttft_ms=ttft_ms(at_capacity),
            overload_ttft_ms=ttft_ms(asked),
            after_ttft_ms=ttft_ms(after),
            memory_mib=tuple(memory),
            errors=tuple(f"{count} x {text}" for text, count in self._errors.most_common(ERRORS_KEPT)),
        )

    async def _closed_loop(self, session: aiohttp.ClientSession, draw: random.Random, seconds: float) -> list[Asked]:
        """What was asked and answered within so many seconds."""
        end_s = time.monotonic() + seconds
        asked: list[Asked] = []

        async def ask_one_after_another() -> None:
            while time.monotonic() < end_s:
                one = await self._ask(session, draw, Priority.HIGH, draw.random() < STREAMING_SHARE, is_patient=True)
                if time.monotonic() < end_s:
                    asked.append(one)

        await asyncio.gather(*(ask_one_after_another() for _ in range(CONCURRENCY)))
        return asked

    async def _overload(
        self, session: aiohttp.ClientSession, draw: random.Random, rate_per_s: float
    ) -> tuple[list[Asked], list[float]]:
        memory: list[float] = []

        async def watch_memory() -> None:
            while True:
                memory.append((await asyncio.to_thread(memory_mib, self.system))["gateway"])
                await asyncio.sleep(MEMORY_EVERY_S)

        watch = asyncio.create_task(watch_memory())
        tasks: list[asyncio.Task[Asked]] = []
        next_s = time.monotonic()
        end_s = next_s + self.plan.overload_s
        while (next_s := next_s + draw.expovariate(rate_per_s)) < end_s:
            await asyncio.sleep(max(next_s - time.monotonic(), 0.0))
            (priority,) = draw.choices(list(SHARES), list(SHARES.values()))
            tasks.append(asyncio.create_task(self._ask(session, draw, priority, draw.random() < STREAMING_SHARE)))
        asked = list(await asyncio.gather(*tasks))
        watch.cancel()
        return asked, memory

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        draw: random.Random,
        priority: Priority,
        streams: bool,
        is_patient: bool = False,
    ) -> Asked:
        body = {
            "model": self.model,
            "prompt": [draw.randrange(*TOKEN_IDS) for _ in range(draw.randint(*PROMPT_TOKENS))],
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": streams,
        }
        headers = {"content-type": "application/json", "x-baton-priority": priority}
        if not is_patient:
            headers["x-baton-ttft-deadline-ms"] = str(round(self.plan.deadline_s * 1000))
        sent_s = time.monotonic()
        first_s: float | None = None
        try:
            async with session.post(
                f"{self.system.url}/v1/completions", data=msgspec.json.encode(body), headers=headers
            ) as response:
                data = b""
                async for piece in response.content.iter_any():
                    first_s = first_s or time.monotonic()
                    data += piece
                status = response.status
                if status in (429, 503):
                    return _refused(sent_s, priority, streams, status, response.headers, data)
                if status == 200 and (not streams or data.rstrip().endswith(b"[DONE]")) and b'"error":' not in data:
                    ttft_s = first_s - sent_s if streams and first_s is not None else None
                    return Asked(sent_s, priority, 200, ttft_s, streams=streams)
                self._errors[f"HTTP {status}: {data[-200:]!r}"] += 1
        except (TimeoutError, aiohttp.ClientError) as error:
            self._errors[f"{type(error).__name__}: {error}"] += 1
        return Asked(sent_s, priority, 0, streams=streams)


def _refused(sent_s: float, priority: Priority, streams: bool, status: int, headers: Any, data: bytes) -> Asked:
    """A refusal is typed if it is JSON of OpenAI's shape with the status, a message, and a Retry-After of seconds."""
    retry_after = headers.get("retry-after", "")
    retry_after_s = int(retry_after) if retry_after.isdecimal() else None
    try:
        error = msgspec.json.decode(data, type=_Refusal).error
        is_typed = error.code == status and bool(error.message) and bool(error.type)
    except msgspec.DecodeError:
        is_typed = False
    is_typed = is_typed and retry_after_s is not None and retry_after_s >= 1
    return Asked(sent_s, priority, status, retry_after_s=retry_after_s, is_typed=is_typed, streams=streams)
