"""Owns the experiment `faults`: it brings a request to a moment, strikes a process, and looks at what becomes of both.

What is decided is decided elsewhere (`fault_cases`, `fault_asks`, `fault_view`, `fault_report`); this module acts.
"""

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import psutil
from rich.markup import escape

from bench import cpu
from bench.fault_asks import FLOOD, Answer, Ask, Asks
from bench.fault_cases import ENGINES, PREFILLS, Blow, Case, Moment, Victim, rows
from bench.fault_clients import Client, all_ended, connections
from bench.fault_report import (
    KV_BACK_S,
    AnswerReport,
    CaseResult,
    Observed,
    ReceiptFacts,
    Struck,
    judge_answers,
    problems,
    state_hit,
    whole_limit_s,
)
from bench.fault_site import LOOK_UP_S, POLL_S, Site, is_running, measure_cold_start_s
from bench.fault_view import Views, held_by_gateway, in_flight, load_of, replicas_of, rise
from gateway.settings import Settings

STAGE_TIMEOUT_S = 30.0
MOMENT_TRIES = 3
"""How often a case is begun whose moment does not come about: then nothing was struck."""

MID_STREAM_TOKENS = 8
ANSWERS_TIMEOUT_S = 200.0
STOPPED_S = 10.0
"""How long a front door is stopped. An engine or its replica is stopped until all answers have ended."""

STOPPED_AT_MOST_S = 90.0
WHOLE_TIMEOUT_S = 240.0
WELL_TIMEOUT_S = 30.0
COLD_START_FILE = "cold-start.json"

_NUMBERS = {Blow.KILL: signal.SIGKILL, Blow.TERM: signal.SIGTERM, Blow.STOP: signal.SIGSTOP}


class StageFailed(RuntimeError):
    """The moment of a case did not come about."""


class ColdStart(msgspec.Struct, frozen=True):
    seconds: float


@dataclass
class Stage:
    """A case under way: its clients, where its target is, and the processes that are held to keep it there."""

    clients: list[Client] = field(default_factory=list)
    target: Client | None = None
    prefill: str | None = None
    decode: str | None = None
    gateway: str | None = None
    state: str = ""
    held: set[int] = field(default_factory=set)

    def hold(self, pids: Iterable[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self.held.add(pid)

    def let_go(self, pids: Iterable[int]) -> None:
        for pid in pids:
            self.held.discard(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class CaseRun:
    """One case on a run that is whole and idle."""

    def __init__(self, site: Site, case: Case, seed: str, http: httpx.AsyncClient) -> None:
        self._site = site
        self._case = case
        self._http = http
        self._asks = Asks(case, seed)
        self._sent: list[Ask] = []
        self._began_s = time.monotonic()
        self._stage = Stage()

    async def run(self) -> "Seen":
        """Raises StageFailed when the moment does not come about."""
        stage = self._stage
        leases = _leases_expired(await self._site.views())
        await self._look_up()
        try:
            await self._bring_about()
            struck = await self._strike()
            blow_s = time.monotonic()
            for client in stage.clients:
                client.count_from(blow_s)
            stage.let_go(stage.held - {process.pid for process in struck})
            self._come_late(blow_s)
            observed = await self._aftermath(struck, blow_s)
        finally:
            stage.let_go(set(stage.held))
            for client in stage.clients:
                client.give_up()
        receipts = await self._receipts()
        expired = _leases_expired(await self._site.views()) - leases
        references = await self._undisturbed() if observed.whole_s is not None else {}
        answers = [client.answer for client in stage.clients]
        return Seen(replace(observed, leases_expired=max(expired, 0)), answers, references, receipts)

    # -- up to the blow

    def _ask(self, ask: Ask, clock_s: float | None = None) -> Client:
        client = Client(self._http, self._site.url, ask, self._began_s if clock_s is None else clock_s)
        self._sent.append(ask)
        self._stage.clients.append(client)
        return client

    async def _bring_about(self) -> None:
        """Raises StageFailed."""
        if self._case.moment is Moment.IDLE:
            await self._at_idle()
            return
        background = [self._ask(ask) for ask in self._asks.background()]
        await self._until(lambda: all(client.has_begun for client in background), "every client has a token")
        match self._case.moment:
            case Moment.QUEUED:
                await self._at_queue()
            case Moment.PREFILLING:
                await self._at_prefill()
            case Moment.BEFORE_PULL:
                await self._before_pull()
            case Moment.BEFORE_TOKEN:
                await self._before_token()
            case _:
                await self._in_mid_stream()

    async def _at_idle(self) -> None:
        views = await self._site.views()
        self._stage.prefill = next(iter(replicas_of(views, "prefill")), None)
        self._stage.decode = next(iter(replicas_of(views, "decode")), None)
        self._stage.gateway = views[0].gateway
        self._stage.state = "nothing in flight"

    async def _in_mid_stream(self) -> None:
        await self._send_target()
        target = self._target
        await self._until(lambda: target.answer.num_tokens >= MID_STREAM_TOKENS, "the target is in mid-stream")
        receipt = await self._site.receipt(target.answer.receipt_id or "")
        if receipt is None:
            raise StageFailed("the target has no receipt")
        self._stage.prefill, self._stage.decode = receipt.placement.prefill, receipt.placement.decode
        self._stage.state = f"{target.answer.num_tokens} tokens at the client"

    async def _at_queue(self) -> None:
        prefills = list(replicas_of(await self._site.views(), "prefill"))
        for ask in self._asks.blockers():
            self._ask(ask)

        async def all_busy() -> bool:
            views = await self._site.views()
            loads = [load_of(views, replica_id) for replica_id in prefills]
            return all(load is not None and load.num_running_requests for load in loads)

        await self._until(all_busy, "every prefill engine reads a prompt")
        await self._send_target()

        async def is_queued() -> bool:
            load = load_of(await self._site.views(), self._stage.prefill or "")
            return load is not None and load.num_waiting_requests > 0

        await self._until(is_queued, "the target waits in a prefill engine")
        self._stage.state = f"waiting in {self._stage.prefill}"

    async def _at_prefill(self) -> None:
        await self._send_target()

        async def is_prefilling() -> bool:
            load = load_of(await self._site.views(), self._stage.prefill or "")
            return load is not None and load.num_running_requests > 0

        await self._until(is_prefilling, "the target is prefilled")
        self._stage.state = f"prefilling on {self._stage.prefill}"

    async def _before_pull(self) -> None:
        """The decode engines are stopped meanwhile, or the moment would be too short to be met."""
        before = in_flight(await self._site.views())
        await self._at_prefill()
        self._stage.hold(self._site.pids_of(Victim.DECODE_CORE))
        prefill = self._stage.prefill or ""

        async def has_finished() -> bool:
            return in_flight(await self._site.views()).get(prefill, 0) <= before.get(prefill, 0)

        await self._until(has_finished, "prefill has finished")
        self._stage.state = f"prefilled on {prefill}; the decode engines were held"

    async def _before_token(self) -> None:
        """The prefill engine is stopped meanwhile, so that the fetch takes its time."""
        await self._before_pull()
        stage = self._stage
        decodes = set(stage.held)
        core = self._core(stage.prefill)
        stage.hold([core])
        stage.let_go(decodes)

        async def is_fetching() -> bool:
            load = load_of(await self._site.views(), stage.decode or "")
            return load is not None and load.num_waiting_requests > 0

        await self._until(is_fetching, "the target is being fetched")
        if self._target.has_begun:
            raise StageFailed("the target has a token already")
        stage.state = f"{stage.decode} fetches from {stage.prefill}, which was held"

    async def _send_target(self) -> None:
        """Sends it and finds out where it goes. Raises StageFailed."""
        before = await self._site.views()
        self._stage.target = self._ask(self._asks.target())

        async def is_placed() -> bool:
            self._locate(before, await self._site.views())
            return bool(self._stage.decode and self._stage.gateway)

        await self._until(is_placed, "the target is placed")

    def _locate(self, before: Views, after: Views) -> None:
        stage = self._stage
        stage.gateway = rise(held_by_gateway(before), held_by_gateway(after), [view.gateway for view in after])
        for phase in ("prefill", "decode"):
            replica = rise(in_flight(before), in_flight(after), replicas_of(after, phase))
            setattr(stage, phase, replica)

    @property
    def _target(self) -> Client:
        assert self._stage.target is not None
        return self._stage.target

    async def _until(self, condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
        """Raises StageFailed."""
        began_s, num_looks = time.monotonic(), 0
        while True:
            holds = condition()
            if not isinstance(holds, bool):
                holds = await holds
            if holds:
                return
            num_looks += 1
            target = self._stage.target
            took_s = time.monotonic() - began_s
            if took_s > STAGE_TIMEOUT_S or (target is not None and target.has_ended):
                looks = f"in {took_s:.1f} s and {num_looks} looks not: {what}"
                raise StageFailed(f"{looks}; {await self._situation()}")
            await asyncio.sleep(POLL_S)

    async def _situation(self) -> str:
        """For a message: where the target was taken to be, and what every engine has."""
        views, stage = await self._site.views(), self._stage
        loads = {replica: load_of(views, replica) for replica in replicas_of(views)}
        target = stage.target.answer if stage.target else None
        seen = (target.end, target.num_tokens, target.first_token_s, target.ended_s) if target else None
        return f"placed on {stage.prefill}, {stage.decode}, {stage.gateway}; target {seen}; engines {loads}"

    # -- the blow

    async def _strike(self) -> tuple[Struck, ...]:
        case = self._case
        struck = await self._victims() if case.victim is not None and case.is_signal else ()
        if case.moment is Moment.CLIENT_LEFT or case.blow is Blow.LEAVE:
            self._target.leave()
            await asyncio.sleep(0)
        if case.is_signal:
            for process in struck:
                os.kill(process.pid, _NUMBERS[case.blow])
        elif case.blow is Blow.DRAIN:
            await self._site.scale(_deployment(case), 1)
        elif case.blow is Blow.FLOOD:
            for ask in self._asks.flood():
                self._ask(ask)
        return struck

    async def _victims(self) -> tuple[Struck, ...]:
        case, stage = self._case, self._stage
        assert case.victim is not None
        views = await self._site.views()
        counts = in_flight(views)
        if case.is_whole_pool:
            return tuple(Struck(case.victim, pid, None, 0) for pid in self._site.pids_of(case.victim))
        if case.victim is Victim.HAPROXY:
            held = sum(view.own_in_flight for view in views)
            return tuple(Struck(case.victim, pid, None, held) for pid in self._site.pids_of(case.victim)[:1])
        if case.victim is Victim.GATEWAY:
            pid = await self._site.gateway_pid(stage.gateway or "")
            if pid is None:
                raise StageFailed(f"the gateway {stage.gateway} is not found")
            return (Struck(case.victim, pid, stage.gateway, held_by_gateway(views).get(stage.gateway or "", 0)),)
        replica = stage.prefill if case.victim in PREFILLS else stage.decode
        if replica is None:
            raise StageFailed(f"the target has no {'prefill' if case.victim in PREFILLS else 'decode'} replica")
        core = self._core(replica)
        pid = core if case.victim in (Victim.PREFILL_CORE, Victim.DECODE_CORE) else psutil.Process(core).ppid()
        return (Struck(case.victim, pid, replica, counts.get(replica, 0)),)

    def _core(self, replica: str | None) -> int:
        """Raises StageFailed."""
        core = self._cores.get(replica or "")
        if core is None:
            raise StageFailed(f"the engine process of {replica} is not found")
        return core

    async def _look_up(self) -> None:
        """Which process is the engine of which replica. Raises StageFailed."""
        seen = replicas_of(await self._site.views())
        found = {id: self._site.core_of(views[0].info.pids) for id, views in seen.items() if views[0].info}
        self._cores = {id: core for id, core in found.items() if core is not None}

    def _come_late(self, blow_s: float) -> None:
        """Clients that come when it has happened."""
        if self._case.moment is Moment.IDLE and self._case.blow is not Blow.FLOOD:
            for ask in self._asks.background():
                self._ask(ask, blow_s)
        self._ask(self._asks.late(), blow_s)

    # -- after the blow

    async def _aftermath(self, struck: Sequence[Struck], blow_s: float) -> Observed:
        case, site, clients = self._case, self._site, self._stage.clients
        names = {process.replica for process in struck if process.replica and case.victim in ENGINES}
        if case.is_whole_pool:
            names = set(replicas_of(await site.views(), _deployment(case)))
        gone = _Gone()
        if case.blow in (Blow.KILL, Blow.TERM):
            known = names | {process.replica for process in struck if process.replica}
            gone = _Gone(tuple(process.pid for process in struck), frozenset(known))
        is_held = case.blow is Blow.STOP and case.victim in ENGINES
        from_s = blow_s
        if case.blow is Blow.STOP and not is_held:
            await asyncio.sleep(STOPPED_S)
            from_s = self._continue(struck)
        # Its time counts from the blow, whatever becomes of the answers meanwhile.
        is_struck_for_good = not is_held and case.blow is not Blow.DRAIN
        watch = asyncio.create_task(self._whole(from_s, gone)) if is_struck_for_good else None
        await all_ended(clients, STOPPED_AT_MOST_S if is_held else ANSWERS_TIMEOUT_S)
        kv_back_s, kv_wrong = await site.until_empty(KV_BACK_S, names)
        if is_held:
            from_s = self._continue(struck)
        if case.blow is Blow.DRAIN:
            await self._drained(_deployment(case))
            from_s = time.monotonic()
            await site.scale(_deployment(case), 2)
        whole_s, not_whole = await (watch or self._whole(from_s, gone))
        if whole_s is not None and watch is not None:
            # It was whole once; it must be whole now.
            _, not_whole = await self._whole(time.monotonic(), gone)
            whole_s = None if not_whole else whole_s
        kv_all_back_s, kv_all_wrong = await site.until_empty(KV_BACK_S)
        return Observed(
            state=self._stage.state,
            struck=tuple(struck),
            kv_back_s=kv_back_s,
            kv_wrong=kv_wrong,
            kv_all_back_s=kv_all_back_s,
            kv_all_wrong=kv_all_wrong,
            whole_s=whole_s,
            not_whole=not_whole,
            left_over=await site.left_over() if whole_s is not None else "",
        )

    def _continue(self, struck: Sequence[Struck]) -> float:
        for process in struck:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        return time.monotonic()

    async def _drained(self, phase: str) -> None:
        deadline_s = time.monotonic() + STAGE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            views = await self._site.views()
            if views and len(replicas_of(views, phase)) == 1:
                return
            await asyncio.sleep(POLL_S)

    async def _whole(self, from_s: float, gone: "_Gone") -> tuple[float | None, str]:
        """How long it takes until everything is there and what has died is forgotten, and else what is missing."""
        wrong, looked_s = "", time.monotonic()
        while time.monotonic() - from_s < WHOLE_TIMEOUT_S:
            wrong = self._site.not_whole_of(await self._site.views(), gone.ids)
            if not wrong and (living := [pid for pid in gone.pids if is_running(pid)]):
                wrong = f"the processes {living} were told to end and have not"
            if not wrong and not await self._site.front_door_opens():
                wrong = "HAProxy does not answer"
            if not wrong:
                return round(time.monotonic() - from_s, 3), ""
            if time.monotonic() - looked_s > LOOK_UP_S:
                looked_s = time.monotonic()
                if self._site.has_ended:
                    return None, "baton serve has ended"
            await asyncio.sleep(POLL_S * 5)
        return None, wrong

    async def _receipts(self) -> dict[str, ReceiptFacts]:
        found: dict[str, ReceiptFacts] = {}
        for client in self._stage.clients:
            if client.answer.receipt_id and (receipt := await self._site.receipt(client.answer.receipt_id)):
                outcome = receipt.outcome
                found[client.answer.name] = ReceiptFacts(outcome.status, outcome.fault_kinds, outcome.faults)
        return found

    async def _undisturbed(self) -> dict[str, Answer]:
        """The same requests again, and nothing struck; of a flood one, for its requests are all alike."""
        flood = [ask.name for ask in self._sent if ask.name.startswith(FLOOD)]
        asks = [ask for ask in self._sent if ask.name not in flood[1:]]
        clients = [Client(self._http, self._site.url, ask, time.monotonic()) for ask in asks]
        await all_ended(clients, ANSWERS_TIMEOUT_S)
        found = {client.ask.name: client.answer for client in clients}
        return found | {name: found[flood[0]] for name in flood}


@dataclass(frozen=True)
class _Gone:
    """Processes that must end, and the ids of the replicas and gateways that end with them."""

    pids: tuple[int, ...] = ()
    ids: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Seen:
    """Everything that one case has shown. By name: the undisturbed answers, and what receipts say."""

    observed: Observed
    answers: list[Answer]
    references: dict[str, Answer]
    receipts: dict[str, ReceiptFacts]


class Experiment:
    """Runs cases one after the other, on one run of Baton as long as it gets whole again. `results` grows."""

    def __init__(
        self,
        config: Path,
        settings: Settings,
        folder: Path,
        cases: Sequence[Case],
        again: bool,
        git_commit: str,
        say: Callable[[str], None],
    ) -> None:
        """A case with a result in `folder` is skipped, unless `again` says otherwise."""
        self._config = config
        self._settings = settings
        self._folder = folder
        self._git_commit = git_commit
        self._say = say
        self._site: Site | None = None
        self.cold_start_s: float | None = None
        self.results: dict[str, CaseResult] = {}
        self._cases = list(cases)
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            if not again and (result := read_result(folder, case)) is not None:
                self.results[case.name] = result

    async def run(self) -> None:
        """Raises StartFailed, TimeoutError, RuntimeError when nothing can be started."""
        todo = [case for case in self._cases if case.name not in self.results]
        self._say(f"{len(todo)} of {len(self._cases)} cases to run; results: {self._folder}")
        if not todo:
            with suppress(OSError, msgspec.DecodeError):
                self.cold_start_s = self._read_cold_start()
            return
        self.cold_start_s = await self._cold_start()
        try:
            for number, case in enumerate(todo, 1):
                logs = self._folder / f"{case.name}-logs"
                for _ in range(MOMENT_TRIES):
                    result = await run_case(await self._well_site(), case, self.cold_start_s, self._git_commit, logs)
                    if not result.never_struck:
                        break
                    self._say(f"{number}/{len(todo)} {case.name}: {escape('; '.join(result.problems))}")
                self.results[case.name] = result
                write_result(self._folder, result)
                verdict = "[green]ok[/]" if result.is_good else f"[red]{escape('; '.join(result.problems))}[/]"
                self._say(f"{number}/{len(todo)} {case.name} ({result.took_s:.0f} s): {verdict}")
        finally:
            if self._site is not None:
                await self._site.close()

    async def _cold_start(self) -> float:
        with suppress(OSError, msgspec.DecodeError):
            return self._read_cold_start()
        self._say("measuring a cold start of one engine, alone")
        seconds = await measure_cold_start_s(self._config)
        self._say(f"a cold start takes {seconds:.1f} s")
        (self._folder / COLD_START_FILE).write_bytes(msgspec.json.encode(ColdStart(seconds)))
        return seconds

    def _read_cold_start(self) -> float:
        return msgspec.json.decode((self._folder / COLD_START_FILE).read_bytes(), type=ColdStart).seconds

    async def _well_site(self) -> Site:
        """The run, a new one if it does not get well. Raises StartFailed, TimeoutError."""
        site = self._site
        if site is not None:
            deadline_s = time.monotonic() + WELL_TIMEOUT_S
            while why := await site.not_well():
                if time.monotonic() > deadline_s or site.has_ended:
                    self._say(f"a new run is started: {escape(why)}")
                    await site.stop()
                    break
                await asyncio.sleep(POLL_S * 5)
            else:
                return site
        else:
            site = self._site = Site(self._config, self._settings)
        await site.start()
        return site


async def run_case(
    site: Site, case: Case, cold_start_s: float | None = None, git_commit: str = "", logs: Path | None = None
) -> CaseResult:
    """Runs one case on a run that is whole and idle. Without a cold start's time the run may take any time to be whole
    again. Logs of a case that is not good are kept in `logs`."""
    began_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    seed = secrets.token_hex(4)
    limit_s = None if cold_start_s is None else whole_limit_s(case, cold_start_s)
    observed = Observed("", (), None, "", None, "", None, "", "")
    reports: list[AnswerReport] = []
    hit: bool | None = False
    never_struck = False
    try:
        async with connections() as http:
            # Engines take all cores; without this the moments pass before anybody looks.
            with cpu.first_in_line():
                seen = await CaseRun(site, case, seed, http).run()
    except StageFailed as error:
        never_struck = True
        found = (f"the moment did not come about: {error}",)
    else:
        observed = seen.observed
        reports = judge_answers(case, seen.answers, seen.references, seen.receipts, observed.struck)
        found = problems(reports, observed, limit_s)
        hit = state_hit(case, seen.receipts.get("target"))
    if found and logs is not None:
        site.keep_logs(logs)
    return CaseResult(
        name=case.name,
        victim=case.victim,
        blow=case.blow,
        moment=case.moment,
        kind=case.kind,
        rows=tuple(sorted(rows(case))),
        seed=seed,
        started_at=started_at,
        git_commit=git_commit,
        took_s=round(time.monotonic() - began_s, 1),
        state_hit=hit,
        whole_limit_s=limit_s,
        observed=observed,
        answers=tuple(reports),
        problems=found,
        never_struck=never_struck,
    )


def read_result(folder: Path, case: Case) -> CaseResult | None:
    """None if the case has none that can be read."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / f"{case.name}.json").read_bytes(), type=CaseResult)
    return None


def write_result(folder: Path, result: CaseResult) -> None:
    file = folder / f"{result.name}.json"
    draft = file.with_suffix(".draft")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    draft.rename(file)


def _deployment(case: Case) -> str:
    return "prefill" if case.victim in PREFILLS else "decode"


def _leases_expired(views: Views) -> int:
    return sum(seen[0].load.kv_leases_expired_total for seen in replicas_of(views).values())
