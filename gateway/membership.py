"""Owns who is in the pools: it follows their reports, warms hand-off pairs, and puts out who is lost or silent."""

import asyncio
import enum
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from engine.protocol import (
    EngineRequest,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    TokenDelta,
    WorkerReport,
)
from gateway.cluster import Cluster, Replica
from gateway.transport import Members, ReplicaGoneError, WorkerTransport

log = logging.getLogger("baton.membership")

REATTACH_PAUSE_S = (0.1, 0.5, 1.0, 2.0, 5.0)
WARM_UP_PAUSE_S = (0.1, 0.5, 1.0, 5.0, 30.0)
WARM_UP_TIMEOUT_S = 60.0
LOOKS = 4
"""How often within a time-out the watch looks for silent replicas."""


class Loss(enum.StrEnum):
    """How a replica that this gateway heard was lost to it."""

    DEAD = "dead"
    """Its engine or its process has ended."""
    SILENT = "silent"
    """It, or its engine, has told nothing for too long."""
    UNREACHABLE = "unreachable"
    """The link ended, and nobody knows why."""
    LEFT = "left"
    """Serve has taken it out of its pool; what it has runs on."""


@dataclass(frozen=True)
class MembershipConfig:
    """`report_timeout_s`: a worker that reports nothing for so long is lost; `engine_timeout_s`: so is one whose engine
    tells nothing for so long although it holds requests. `reverse`: pairs are warmed in both directions."""

    warm_up_sampling: bytes
    report_timeout_s: float
    engine_timeout_s: float
    reverse: bool = False


class Membership:
    """Keeps `cluster` up to date with the transport's members. Everything runs on one event loop.

    A replica is ready once its reports arrive and every pair that it is part of has handed a small request over. One
    that is lost, or silent, is not ready until it has proven the same again; that is tried while it is a member.
    """

    def __init__(
        self,
        cluster: Cluster,
        transport: WorkerTransport,
        config: MembershipConfig,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        *,
        on_report: Callable[[WorkerReport], None],
        on_lost: Callable[[str, bool], None],
        on_ready: Callable[[], None],
        is_needed: Callable[[Replica], bool],
        count_loss: Callable[[Phase, Loss], None],
    ):
        """`on_lost` is told the replica's id and whether its engine is certainly dead; `count_loss` only of replicas
        that were heard. `is_needed` says whether requests still hold a replica that has left its pool. `spawn` runs a
        task until the owner closes."""
        self._cluster = cluster
        self._transport = transport
        self._config = config
        self._spawn = spawn
        self._on_report = on_report
        self._on_lost = on_lost
        self._on_ready = on_ready
        self._is_needed = is_needed
        self._count_loss = count_loss
        self._members: Members = {}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._streams: dict[str, asyncio.Timeout] = {}
        self._heard_s: dict[str, float] = {}
        self._probes: dict[str, tuple[str, asyncio.Future[TokenDelta]]] = {}
        self._warming = asyncio.Lock()
        self._readiness = asyncio.Condition()
        self._watch: asyncio.TimerHandle | None = None
        self._closed = False

    async def start(self, expected: Mapping[Phase, int], timeout_s: float) -> None:
        """Waits until every pool has its expected replicas ready, and every present member is. Raises TimeoutError."""
        self._transport.watch(self._on_members)

        def num_ready(phase: Phase) -> int:
            return len(self._cluster.pool(phase, ready_only=True))

        def ready() -> bool:
            wanted = all(num_ready(phase) >= number for phase, number in expected.items())
            return wanted and all((r := self._cluster.get(id)) and r.ready for id in self._members)

        try:
            async with asyncio.timeout(timeout_s), self._readiness:
                await self._readiness.wait_for(ready)
        except TimeoutError as error:
            have = (f"{num_ready(p)} of {max(n, self._num_members(p))} {p}" for p, n in expected.items())
            raise TimeoutError(f"after {timeout_s:.0f} s only {' and '.join(have)} replicas are ready") from error

    async def close(self) -> None:
        self._closed = True
        if self._watch:
            self._watch.cancel()
        followers = list(self._followers.values())
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    def let_go_of_leavers(self) -> None:
        """Closes the stream of a replica that left its pool once its last request here has ended: then it can drain."""
        for replica_id in [r for r in self._followers if r not in self._members]:
            replica = self._cluster.get(replica_id)
            if replica is None or not self._is_needed(replica):
                follower = self._followers.pop(replica_id)
                follower.cancel()
                self._spawn(_ended(follower))
                self._cluster.remove(replica_id)
                log.info("let go of %s", replica_id)

    def is_probe(self, request_id: str) -> bool:
        """Whether a request is a warm-up that somebody waits for."""
        return request_id in self._probes

    def _num_members(self, phase: Phase) -> int:
        return sum(member is phase for member in self._members.values())

    def _on_members(self, members: Members) -> None:
        if self._closed:
            return
        before, self._members = self._members, dict(members)
        for replica_id, phase in members.items():
            replica = self._cluster.get(replica_id)
            if replica is None:
                log.info("%s replica %s joined", phase, replica_id)
                replica = self._cluster.add(replica_id, phase)
                self._followers[replica_id] = asyncio.create_task(self._follow(replica))
            elif replica_id not in before and replica.attached:
                log.info("%s came back before its last request had ended", replica_id)
                self._spawn(self._make_ready(replica))
        for replica_id in self._followers:
            if replica_id not in members and (replica := self._cluster.get(replica_id)):
                if replica_id in before and replica.attached:
                    self._count_loss(replica.phase, Loss.LEFT)
                replica.ready = False
        self.let_go_of_leavers()
        self._spawn(self._tell_readiness())

    # -- reports

    async def _follow(self, replica: Replica) -> None:
        """Keeps one replica's report stream attached for as long as it is a member."""
        failures = 0
        while True:
            loss = Loss.UNREACHABLE
            try:
                async with asyncio.timeout(None) as stream:
                    self._streams[replica.replica_id] = stream
                    self._hear(replica.replica_id)
                    is_warming = False
                    async for report in self._transport.reports(replica.replica_id):
                        self._hear(replica.replica_id)
                        is_silent = report.engine_silent_s >= self._config.engine_timeout_s
                        if is_silent and (replica.ready or replica.in_flight):
                            stream.reschedule(asyncio.get_running_loop().time())
                        self._take(report)
                        if not (is_silent or is_warming):
                            is_warming, failures = True, 0
                            self._spawn(self._make_ready(replica))
            except ReplicaGoneError as error:
                log.warning("report stream of %s broke: %s", replica.replica_id, error)
                loss = Loss.DEAD if error.is_dead else Loss.UNREACHABLE
            except TimeoutError:
                loss = Loss.SILENT
                log.warning("%s is given up for now: it or its engine is silent", replica.replica_id)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.warning("the transport cancelled the report stream of %s", replica.replica_id)
            except Exception:
                # Nobody else would notice: the requests on this replica would wait without end.
                log.exception("the reports of %s cannot be read", replica.replica_id)
            finally:
                self._streams.pop(replica.replica_id, None)
                self._heard_s.pop(replica.replica_id, None)
            self._lose(replica, loss)
            if replica.replica_id not in self._members:
                self.let_go_of_leavers()
                return
            await asyncio.sleep(REATTACH_PAUSE_S[min(failures, len(REATTACH_PAUSE_S) - 1)])
            failures += 1

    def _take(self, report: WorkerReport) -> None:
        self._cluster.fold(report)
        if self._probes:
            for delta in report.deltas:
                if (probe := self._probes.get(delta.request_id)) and delta.finish_reason is not None:
                    _answer(probe[1], delta)
        self._on_report(report)

    def _hear(self, replica_id: str) -> None:
        loop = asyncio.get_running_loop()
        self._heard_s[replica_id] = loop.time()
        if self._watch is None and not self._closed:
            self._watch = loop.call_later(self._config.report_timeout_s / LOOKS, self._look)

    def _look(self) -> None:
        """Ends the streams of replicas that have been silent for too long; one timer looks after all of them."""
        assert self._watch is not None
        loop, interval_s = asyncio.get_running_loop(), self._config.report_timeout_s / LOOKS
        now_s, late_s = loop.time(), loop.time() - self._watch.when()
        for replica_id, stream in self._streams.items():
            if late_s > interval_s:
                # This process has not been listening itself.
                self._heard_s[replica_id] = now_s
            elif now_s - self._heard_s[replica_id] >= self._config.report_timeout_s and not stream.expired():
                stream.reschedule(now_s)
        self._watch = loop.call_later(interval_s, self._look) if self._streams else None

    def _lose(self, replica: Replica, loss: Loss) -> None:
        # One that has left is counted.
        if replica.attached and replica.replica_id in self._members:
            self._count_loss(replica.phase, loss)
        self._cluster.detach(replica.replica_id)
        for key, (replica_id, probe) in self._probes.items():
            if replica_id == replica.replica_id:
                _answer(probe, TokenDelta(key, [], FinishReason.ERROR, error=f"{replica_id} was lost"))
        self._on_lost(replica.replica_id, loss is Loss.DEAD)
        replica.in_flight.clear()
        replica.in_flight_tokens = 0

    # -- readiness

    async def _make_ready(self, replica: Replica) -> None:
        """Warms every pair this replica is part of: the first hand-off of a pair pays a handshake. Replicas that
        cannot hand over to each other are no pair."""
        failures = 0
        while self._takes_requests(replica) and not replica.ready:
            stream = self._streams.get(replica.replica_id)
            async with self._warming:
                try:
                    await self._warm_up(replica)
                    replica.ready = self._takes_requests(replica) and self._streams.get(replica.replica_id) is stream
                except (ReplicaGoneError, InvalidEngineRequestError, TimeoutError) as error:
                    log.warning("a warm-up of %s failed: %r", replica.replica_id, error)
            if self._streams.get(replica.replica_id) is not stream:
                # Its next stream has a warm-up of its own.
                return
            if not replica.ready:
                await asyncio.sleep(WARM_UP_PAUSE_S[min(failures, len(WARM_UP_PAUSE_S) - 1)])
                failures += 1
        if replica.ready:
            log.info("%s is ready", replica.replica_id)
            self._on_ready()
        await self._tell_readiness()

    async def _tell_readiness(self) -> None:
        async with self._readiness:
            self._readiness.notify_all()

    def _takes_requests(self, replica: Replica) -> bool:
        return replica.attached and replica.replica_id in self._members

    async def _warm_up(self, replica: Replica) -> None:
        """Raises ReplicaGoneError, InvalidEngineRequestError, TimeoutError."""
        decode = replica.phase is Phase.DECODE
        pool = self._cluster.pool(Phase.PREFILL if decode else Phase.DECODE)
        others = [other for other in pool if self._takes_requests(other) and other.hands_over_to(replica)]
        if decode and not others:
            await self._probe(replica, None)
        for other in others:
            prefill, decoder = (other, replica) if decode else (replica, other)
            try:
                directions = [self._warm_up_pair(prefill, decoder)]
                if self._config.reverse:
                    directions.append(self._warm_up_reverse(prefill, decoder))
                for error in await asyncio.gather(*directions, return_exceptions=True):
                    if error is not None:
                        raise error
            except (ReplicaGoneError, TimeoutError):
                if self._takes_requests(other) or not self._takes_requests(replica):
                    raise
                # The partner has gone meanwhile; if it comes back, it is warmed with this one.

    async def _warm_up_pair(self, prefill: Replica, decoder: Replica) -> None:
        """Decode fetches from prefill. Raises as `_warm_up` does."""
        handoff = (await self._probe(prefill, None)).handoff
        if handoff is None:
            raise ReplicaGoneError(f"{prefill.replica_id} gave no hand-off")
        await self._probe(decoder, handoff)

    async def _warm_up_reverse(self, prefill: Replica, decoder: Replica) -> None:
        """Prefill fetches from decode, and what it hands over itself is given back. Raises as `_warm_up` does."""
        asked = (await self._probe(decoder, None, Phase.PREFILL)).handoff
        if asked is None:
            raise ReplicaGoneError(f"{decoder.replica_id} gave no hand-off")
        handoff = (await self._probe(prefill, asked)).handoff
        if handoff is None:
            raise ReplicaGoneError(f"{prefill.replica_id} gave no hand-off")
        await self._transport.release(decoder.replica_id, f"release-{handoff.source_request_id}", handoff)

    async def _probe(self, replica: Replica, handoff: KVHandoff | None, phase: Phase | None = None) -> TokenDelta:
        """Runs one small request on a replica. A prompt is unique to its hand-off, so nothing is cached beforehand.
        `phase`: of what is asked, if it is not the replica's."""
        if replica.info is None:
            raise ReplicaGoneError(f"{replica.replica_id} was lost")
        key = handoff.source_request_id if handoff else f"warm-up-{secrets.token_hex(8)}"
        length = min(replica.info.block_size_tokens + 1, replica.info.max_model_len - 2)
        prompt = [int(digit, 16) + 1 for digit in (key.removeprefix("warm-up-") * length)[:length]]
        request = EngineRequest(key, phase or replica.phase, prompt, 1, self._config.warm_up_sampling, handoff)
        future: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
        self._probes[key] = (replica.replica_id, future)
        try:
            async with asyncio.timeout(WARM_UP_TIMEOUT_S):
                await self._transport.submit(replica.replica_id, request)
                delta = await future
        finally:
            del self._probes[key]
        if delta.finish_reason is FinishReason.ERROR:
            raise ReplicaGoneError(f"{replica.replica_id} failed a warm-up: {delta.error}")
        return delta


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.gather(task, return_exceptions=True)


def _answer(probe: asyncio.Future[TokenDelta], delta: TokenDelta) -> None:
    if not probe.done():
        probe.set_result(delta)
