"""Owns the experiment `load`: sessions that arrive over HTTP at any OpenAI-compatible server, whether it keeps up or
not, and what came back when.

Arrivals wait for nothing. Within a session a turn waits for the answer to the one before, its pause, and the sub-agents
that it needs. A session whose request is refused or fails ends there: it asks neither again nor anything more.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import msgspec
import uvloop

from bench import cpu, load_server
from bench.client import Client, Question
from bench.garbage import collected_at
from bench.load_metrics import ONLY_POOL, pool_samples
from bench.load_plan import LoadPlan, ServerFacts
from bench.load_report import AskedSession, AskedTurn, End, LoadReport, ProcessUse, Use, evaluate, read_turn
from bench.load_text import DrawnTexts
from bench.replay_text import SessionText
from bench.results import Setting
from bench.traces import Child, Session, Trace, Trajectory, arrivals
from gateway.runtime.processes import ProcessId

SESSION_HEADER = "x-session-id"
PARENT_HEADER = "x-parent-session-id"
START_IN_S = 0.5
AHEAD_S = 0.25
"""A trajectory is begun so long before it is due: its first prompt is ready then."""
PROGRESS_S = 1.0
WATCHED_EVERY_S = 1.0
GC_THRESHOLDS = (50_000, *gc.get_threshold()[1:])
"""Looking for garbage among all that a run keeps takes tens of milliseconds, in which nothing is sent."""


class StreamOptions(msgspec.Struct, frozen=True):
    """With it a server tells the prompt's cached tokens, and its own count of them all."""

    include_usage: bool = True


class LoadQuestion(Question, frozen=True):
    stream_options: StreamOptions = StreamOptions()


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    at_s: float
    num_turns: int
    num_refused: int
    num_failed: int
    in_flight: int
    lateness_ms: float
    """The largest since the last time."""


@dataclass(frozen=True)
class _Client:
    """One trajectory that has arrived, and the name of its block 0."""

    name: str
    first_name: int


@dataclass
class LoadExperiment:
    """Everything a run needs."""

    plan: LoadPlan
    trace: Trace
    vocabulary: Sequence[int]
    server: ServerFacts
    api_key: str | None
    setting: Setting
    progress: Callable[[Progress], None]
    pages: Mapping[str, str] = field(default_factory=dict[str, str])
    """Prometheus pages that tell of the server's engines, by the pool they are of; none: its own `/metrics`."""
    processes: Sequence[ProcessId] | None = None
    """The server's; None looks for them by its port."""
    write: Callable[[list[int]], str] | None = None
    """Prompts are sent as this text, which the server must read as the same tokens again; None: as token ids."""
    _seen: list[tuple[float, str, bytes]] = field(default_factory=list[tuple[float, str, bytes]])
    _turns: list[AskedTurn] = field(default_factory=list[AskedTurn])
    _sessions: list[AskedSession] = field(default_factory=list[AskedSession])
    _in_flight: int = 0
    _num_refused: int = 0
    _num_failed: int = 0
    _late_s: float = 0.0

    def run(self) -> LoadReport:
        """Ctrl-C ends it; what was measured until then is in the report, which is not complete."""
        url = self.server.url
        processes = load_server.local_processes(url) if self.processes is None else self.processes
        self._pages = dict(self.pages) or {ONLY_POOL: f"{url}/metrics"}
        kv_before = load_server.counters(self._pages.values(), self.api_key)
        cpu_before, own_before_s, waited_before_s = cpu.read(processes), time.process_time(), cpu.waited_s()
        self._texts = DrawnTexts(self.trace.block_size_tokens, self.vocabulary, self.plan.salt)
        self._names = itertools.count()
        self._began_s = time.perf_counter() + START_IN_S
        complete = False
        try:
            with (
                cpu.first_in_line() if self.plan.first_in_line else nullcontext(),
                collected_at(*GC_THRESHOLDS),
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                runner.run(self._load())
            complete = True
        except KeyboardInterrupt:
            pass
        ran_s = self._now_s()
        after, memory = cpu.read(processes), load_server.memory_mib(processes)
        kv_after = load_server.counters(self._pages.values(), self.api_key)
        return evaluate(
            self.plan,
            self.setting,
            self.server,
            self._turns,
            self._sessions,
            self._in_flight,
            Use(
                ran_s=ran_s,
                generator_cpu_s=time.process_time() - own_before_s,
                generator_waited=(cpu.waited_s() - waited_before_s) / ran_s,
                processes=tuple(
                    ProcessUse(one.role, one.title, one.cpu_s, memory.get(id, 0.0))
                    for id, read in after.items()
                    for one in cpu.spent(cpu_before, {id: read})
                ),
                kv_moved_bytes=kv_after and kv_before and kv_after.kv_moved_bytes - kv_before.kv_moved_bytes,
                kv_asked_bytes=kv_after and kv_before and kv_after.kv_asked_bytes - kv_before.kv_asked_bytes,
            ),
            [one for at_s, pool, page in self._seen for one in pool_samples(page.decode(), pool, at_s)],
            complete,
        )

    # -- the run

    async def _load(self) -> None:
        plan = self.plan
        async with Client(self.server.url, self.server.model, self.api_key, plan.request_timeout_s) as self._client:
            self._timer = asyncio.get_running_loop().call_later(PROGRESS_S, self._tell)
            watching = asyncio.create_task(self._watch())
            async with asyncio.TaskGroup() as self._group:
                if plan.concurrency is None:
                    await self._arrive()
                else:
                    drawn = arrivals(self.trace, 1.0, f"load {plan.seed}")
                    await self._until(0.0)
                    for _ in range(plan.concurrency):
                        self._group.create_task(self._one_after_another(drawn))
            self._timer.cancel()
            watching.cancel()

    async def _watch(self) -> None:
        """Keeps the pages as they come; reading them waits until nobody is kept waiting by that."""
        while True:
            for pool, url in self._pages.items():
                if (page := await self._client.page(url)) is not None:
                    self._seen.append((self._now_s(), pool, page))
            await asyncio.sleep(WATCHED_EVERY_S)

    async def _arrive(self) -> None:
        plan = self.plan
        assert plan.rate_per_s is not None
        for at_s, trajectory in arrivals(self.trace, plan.rate_per_s, f"load {plan.seed}"):
            if at_s >= plan.duration_s:
                return
            await self._until(at_s - AHEAD_S)
            self._group.create_task(self._trajectory(trajectory, at_s))

    async def _one_after_another(self, drawn: Iterator[tuple[float, Trajectory]]) -> None:
        due_s = 0.0
        while due_s < self.plan.duration_s:
            await self._trajectory(next(drawn)[1], due_s)
            due_s = self._now_s()

    async def _trajectory(self, trajectory: Trajectory, due_s: float) -> None:
        client = _Client(f"{self.plan.salt}-{next(self._names)}", self._texts.copy_of(trajectory.num_own_ids))
        await self._session(client, trajectory.root, client.name, None, due_s)

    async def _session(
        self, client: "_Client", session: Session, name: str, parent: str | None, due_s: float
    ) -> tuple[float, End]:
        """When the session and all below it have ended, and how."""
        text = SessionText(session, self._texts, client.first_name)
        children: dict[int | None, list[asyncio.Task[tuple[float, End]]]] = {}
        began_s = now_s = due_s
        end = End.ANSWERED
        for index, turn in enumerate(session.turns):
            for ended_s, child_end in await asyncio.gather(*children.pop(index, ())):
                now_s, end = max(now_s, ended_s), child_end if end is End.ANSWERED else end
            if index:
                wait_s = turn.pause_s if turn.arrives_s is None else max(began_s + turn.arrives_s - now_s, 0.0)
                due_s = now_s + min(wait_s, self.plan.max_pause_s)
            if end is End.ANSWERED and due_s > self.plan.duration_s + self.plan.drain_s:
                end = End.CUT_OFF
            if end is not End.ANSWERED:
                break
            asked = await self._turn(text, index, name, parent, due_s)
            now_s, end = asked.ended_s, asked.end
            if end is not End.ANSWERED:
                break
            for number, child in enumerate(session.children):
                if child.after_turn == index:
                    below = self._child(client, child, f"{name}.{number}", name, now_s)
                    children.setdefault(child.joined_by, []).append(self._group.create_task(below))
        below = await asyncio.gather(*itertools.chain.from_iterable(children.values()))
        ended_s = max([now_s, *(one for one, _ in below)])
        whole = end is End.ANSWERED and all(one is End.ANSWERED for _, one in below)
        self._sessions.append(
            AskedSession(name, parent, began_s, now_s, end, ended_s if whole and parent is None else None)
        )
        return ended_s, end if end is not End.ANSWERED or whole else next(e for _, e in below if e is not End.ANSWERED)

    async def _child(
        self, client: "_Client", child: Child, name: str, parent: str, began_s: float
    ) -> tuple[float, End]:
        return await self._session(client, child.session, name, parent, began_s + child.delay_s)

    async def _turn(self, text: SessionText, index: int, name: str, parent: str | None, due_s: float) -> AskedTurn:
        plan = self.plan
        prompt, max_tokens = text.prompt(index), text.session.turns[index].num_output_tokens
        sent = prompt if self.write is None else self.write(prompt)
        body = msgspec.json.encode(LoadQuestion(self.server.model, sent, max_tokens))
        headers = {SESSION_HEADER: name} if parent is None else {SESSION_HEADER: name, PARENT_HEADER: parent}
        await self._until(due_s)
        self._in_flight += 1
        recording = await self._client.ask(body, headers)
        self._in_flight -= 1
        window = plan.warm_up_s, plan.duration_s
        turn, answer = read_turn(recording, prompt, max_tokens, self._began_s, due_s, window, (name, parent, index))
        text.answered(index, prompt, list(answer))
        self._turns.append(turn)
        self._num_refused += turn.end is End.REFUSED
        self._num_failed += turn.end is End.FAILED
        self._late_s = max(self._late_s, turn.sent_s - due_s)
        return turn

    # -- time, tasks, progress

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - self._now_s(), 0.0))

    def _tell(self) -> None:
        self.progress(
            Progress(
                self._now_s(),
                len(self._turns),
                self._num_refused,
                self._num_failed,
                self._in_flight,
                self._late_s * 1000,
            )
        )
        self._late_s = 0.0
        self._timer = asyncio.get_running_loop().call_later(PROGRESS_S, self._tell)
