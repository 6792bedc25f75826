"""Owns the experiment `rolling`: clients stream, and meanwhile the application is deployed anew with other engine
arguments, so that Serve replaces every replica of both pools and of the gateway."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import httpx

from bench import cpu
from bench.fault_asks import Answer, Ask, End, LoopAsks
from bench.fault_clients import Client, connections
from bench.fault_report import KV_BACK_S, ReceiptFacts
from bench.fault_site import Site, is_running
from bench.results import Setting
from bench.rolling_report import (
    DEPLOYMENTS,
    WHOLE_LIMIT_S,
    Asked,
    Observed,
    RollingPlan,
    RollingReport,
    Rollout,
    changed,
    evaluate,
    max_num_seqs,
    ready_replicas,
)
from gateway.launcher import root_cause
from gateway.settings import Settings

POLL_S = 1.0
LOOK_AT_SERVE_EVERY_S = 5.0
SAY_EVERY_S = 15.0
RECEIPT_S = 5.0
RECEIPT_POLL_S = 0.3
AFTER_FAILURE_S = 1.0
LAST_ANSWERS_S = 60.0
UNDISTURBED_AT_ONCE = 8


class Load:
    """Clients that stream one answer after the other. `ended` grows."""

    def __init__(self, http: httpx.AsyncClient, site: Site, num_clients: int, seed: int, clock_s: float) -> None:
        self.ended: list[tuple[Ask, Answer]] = []
        self._http = http
        self._site = site
        self._clock_s = clock_s
        self._is_ending = False
        self._receipts: dict[str, asyncio.Task[ReceiptFacts | None]] = {}
        self._tasks = [asyncio.create_task(self._ask_on(LoopAsks(number, seed))) for number in range(num_clients)]

    @property
    def num_failed(self) -> int:
        return sum(answer.end is not End.COMPLETE for _, answer in self.ended)

    async def end(self) -> None:
        """Returns when the answers that are under way have ended."""
        self._is_ending = True
        done, _ = await asyncio.wait(self._tasks, timeout=LAST_ANSWERS_S)
        self.give_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in done:
            if not task.cancelled():
                task.result()

    async def asked(self) -> list[Asked]:
        """With their receipts."""
        receipts = {name: await task for name, task in self._receipts.items()}
        return [Asked(answer, receipts.get(ask.name)) for ask, answer in self.ended]

    def give_up(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _ask_on(self, asks: LoopAsks) -> None:
        while not self._is_ending:
            ask = asks.next()
            client = Client(self._http, self._site.url, ask, self._clock_s)
            try:
                await client.ended()
            finally:
                client.give_up()
                self.ended.append((ask, client.answer))
            self._receipts[ask.name] = asyncio.create_task(self._receipt(client.answer))
            if client.answer.end is not End.COMPLETE:
                await asyncio.sleep(AFTER_FAILURE_S)

    async def _receipt(self, answer: Answer) -> ReceiptFacts | None:
        """Read at once: the gateway that has it may be about to end."""
        deadline_s = time.monotonic() + RECEIPT_S
        while answer.receipt_id and time.monotonic() < deadline_s:
            if receipt := await self._site.receipt(answer.receipt_id):
                outcome = receipt.outcome
                return ReceiptFacts(outcome.status, outcome.fault_kinds, outcome.faults)
            await asyncio.sleep(RECEIPT_POLL_S)
        return None


class RollingUpdate:
    """One run of Baton, and one update of it."""

    def __init__(
        self, plan: RollingPlan, config: Path, settings: Settings, setting: Setting, say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._site = Site(config, settings)
        self._wanted = max_num_seqs(changed(settings))
        self._say = say
        self._setting = setting
        self.report = RollingReport(False, plan, setting)

    async def run(self, logs: Path | None = None) -> None:
        """`report` is the result. Logs of an update that went wrong are kept in `logs`. Raises StartFailed,
        TimeoutError, RuntimeError when nothing can be started."""
        try:
            self._say("starting")
            await self._site.start()
            async with connections() as http:
                # Engines take all cores; without this clients see tokens later than they come.
                with cpu.first_in_line():
                    await self._update(http)
            if logs is not None and (self.report.failed or self.report.differing or self.report.not_whole):
                self._site.keep_logs(logs)
        finally:
            self._say("stopping")
            await self._site.close()

    async def _update(self, http: httpx.AsyncClient) -> None:
        plan, site = self._plan, self._site
        before = {name: await site.replicas(name) for name in DEPLOYMENTS}
        clock_s = time.monotonic()
        load = Load(http, site, plan.clients, plan.seed, clock_s)
        try:
            self._say(f"{plan.clients} clients stream; the update is in {plan.before_s:g} s")
            await asyncio.sleep(plan.before_s)
            began_s = time.monotonic()
            await site.update(lambda settings: changed(settings, plan.other_format))
            self._say(f"updating {', '.join(f'{len(pids)} {name}' for name, pids in before.items())} replicas")
            rollout = Rollout(before)
            whole_s, not_whole = await self._watch(before, rollout, load, began_s)
            await load.end()
        finally:
            load.give_up()
        kv_back_s, kv_wrong = await site.until_empty(KV_BACK_S)
        site.let_go_of_serve()
        left_over = await site.left_over() if whole_s is not None else ""
        seen = Observed(began_s - clock_s, rollout.replaced(), whole_s, not_whole, kv_back_s, kv_wrong, left_over)
        asked = await load.asked()
        self.report = evaluate(plan, self._setting, asked, {}, seen, complete=False)
        self._say(f"{len(asked)} answers; asking for each of them again, undisturbed")
        references = await self._undisturbed(http, [ask for ask, _ in load.ended])
        self.report = evaluate(plan, self._setting, asked, references, seen, complete=True)

    async def _watch(
        self, before: Mapping[str, Mapping[str, int]], rollout: Rollout, load: Load, began_s: float
    ) -> tuple[float | None, str]:
        """How long it takes until everything is there and everything of before is gone, and else what is missing."""
        pids = {id: pid for replicas in before.values() for id, pid in replicas.items()}
        said_s = looked_s = began_s
        while True:
            views, living = await self._site.views(), [id for id, pid in pids.items() if is_running(pid)]
            now_s = time.monotonic()
            grown = rollout.take(round(now_s - began_s, 1), living, ready_replicas(views, self._wanted))
            wrong = self._site.not_whole_of(views, pids)
            if not wrong and living:
                wrong = f"{living} run still"
            if not wrong and not await self._site.front_door_opens():
                wrong = "HAProxy does not answer"
            if grown or now_s - said_s > SAY_EVERY_S:
                said_s = now_s
                self._say(_progress(now_s - began_s, rollout, load))
            if not wrong and all(one.took_s is not None for one in rollout.replaced()):
                return round(now_s - began_s, 1), ""
            if now_s - looked_s > LOOK_AT_SERVE_EVERY_S:
                looked_s = now_s
                if self._site.has_ended:
                    return None, "baton serve has ended"
                if failure := await self._site.update_failure():
                    return None, f"Serve has given the update up: {root_cause(failure)}"
            if now_s - began_s > WHOLE_LIMIT_S:
                return None, wrong or "not every replica was replaced"
            await asyncio.sleep(POLL_S)

    async def _undisturbed(self, http: httpx.AsyncClient, asks: list[Ask]) -> dict[str, Answer]:
        found: dict[str, Answer] = {}
        waiting = iter(asks)

        async def ask_on() -> None:
            for ask in waiting:
                client = Client(http, self._site.url, ask, time.monotonic())
                try:
                    await client.ended()
                finally:
                    client.give_up()
                found[ask.name] = client.answer

        tasks = [asyncio.create_task(ask_on()) for _ in range(UNDISTURBED_AT_ONCE)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
        return found


def _progress(now_s: float, rollout: Rollout, load: Load) -> str:
    parts = ", ".join(f"{one.deployment} {one.num_replaced}/{one.num_before}" for one in rollout.replaced())
    return f"{now_s:5.0f} s: replaced: {parts}; {len(load.ended)} answers, {load.num_failed} failed"
