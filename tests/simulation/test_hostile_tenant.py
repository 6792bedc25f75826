"""A tenant that asks for far more than its share and claims whatever it likes harms nobody beyond its limits.

Its requests pass the layers that ship, with its key, to an orchestrator over simulated engines, on virtual time.
Another tenant's clients run beside it; what they feel is compared with what they feel when the hostile tenant sends as
many plain requests, within the same limits, at the same moments.
"""

import asyncio
import dataclasses
import enum
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from bench import overload
from bench.overload import Scenario
from bench.stats import Percentiles, percentiles
from bench.virtual_time import VirtualTimeLoop
from engine.protocol import FinishReason
from gateway import orchestrator
from gateway.agents.tenants import Limiter, Tenant, Tenants, key_sha256
from gateway.api import context
from gateway.api.authentication import Authentication
from gateway.api.middleware import Departure, Intake, ResponseStart
from gateway.orchestrator import PlacementRejected, SequenceRequest
from gateway.routing.types import Priority

SCENARIO = Scenario("one engine of each", prefill=1, decode=1, about_per_s=20.0)
DEADLINE_S = 30.0
SEED = 7
SECONDS = 60.0
NORMAL_PER_S = 6.0
ATTACK_PER_S = 40.0
PROMPT_TOKENS, OUTPUT_TOKENS = 250, 8
DRAIN_S = 30.0
MAX_SESSIONS = 100
PATH = "/v1/completions"

NORMAL = Tenant("normal", (key_sha256(b"normal"),), max_ttft_deadline_s=DEADLINE_S)
LIMITED = Tenant(
    "attacker",
    (key_sha256(b"attacker"),),
    max_priority=Priority.NORMAL,
    max_ttft_deadline_s=DEADLINE_S,
    max_concurrent_requests=8,
    requests_per_minute=300,
)
FREE = dataclasses.replace(LIMITED, max_concurrent_requests=None, requests_per_minute=None)
UNCAPPED = dataclasses.replace(FREE, max_priority=Priority.HIGH, max_ttft_deadline_s=None)


@dataclass
class Felt:
    """What became of one tenant's requests: statuses, and times to the first token."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    ttft_s: list[float] = field(default_factory=list)

    @property
    def times(self) -> Percentiles:
        return percentiles(self.ttft_s)


@dataclass(frozen=True)
class Result:
    normal: Felt
    attacker: Felt
    capped: Counter[str]
    num_sessions: int
    num_held: int
    num_in_flight: int
    num_limiter_records: int


class FrontEnd:
    """In the place of vLLM's application: asks the orchestrator for what a body names, and streams what comes."""

    def __init__(self, cluster: overload.Cluster) -> None:
        self._orchestrator = cluster.orchestrator
        self._ends: dict[str, asyncio.Future[float | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._first_s: dict[str, float] = {}
        self.capped: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = context.current.get()
        assert http is not None
        body = json.loads((await receive())["body"])
        began_s = self._loop.time()
        hints = http.capped_hints
        self.capped.update(hints.capped)
        group = self._orchestrator.new_group(http.next_receipt_id(), 1, hints=hints)
        request = SequenceRequest(
            http.request_id, body["prompt"], body["max_tokens"], b"sampling", cache_salt=http.cache_salt, resumable=True
        )
        try:
            if refused := http.take_prompt(1):
                raise PlacementRejected(refused)
            end = self._ends[http.request_id] = self._loop.create_future()
            self._orchestrator.add(request, group)
        except PlacementRejected as error:
            self._ends.pop(http.request_id, None)
            http.rejection = error.rejection
            await _send(send, error.rejection.status, b"{}")
            return
        first_s = await end
        assert first_s is not None, "the answer failed"
        await _send(send, 200, json.dumps(first_s - began_s).encode())

    async def read(self) -> None:
        while True:
            for delta in await self._orchestrator.next_deltas():
                if delta.token_ids:
                    self._first_s.setdefault(delta.request_id, self._loop.time())
                if delta.finish_reason is not None:
                    first_s = self._first_s.pop(delta.request_id, None)
                    is_answered = delta.finish_reason is FinishReason.LENGTH
                    self._ends.pop(delta.request_id).set_result(first_s if is_answered else None)


async def _send(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


class QuietCluster(overload.Cluster):
    """Its deltas are read by the front end of this test."""

    async def _read(self) -> None:
        await self._loop.create_future()

    def _on_closed(self, receipt: Any) -> None:
        pass


class Site:
    def __init__(self, cluster: overload.Cluster, attacker: Tenant) -> None:
        self.front_end = FrontEnd(cluster)
        self.limiter = Limiter(asyncio.get_running_loop().time)
        self.felt = {tenant.name: Felt() for tenant in (NORMAL, attacker)}
        intake = Intake(self.front_end, max_body_bytes=100_000, max_choices=16)
        keys = Authentication(intake, Tenants([NORMAL, attacker]), self.limiter)
        self._app = Departure(ResponseStart(keys), send_timeout_s=60.0)

    async def ask(self, tenant: Tenant, prompt: list[int], headers: dict[str, str]) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
        incoming: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        sent: list[Message] = []

        async def receive() -> Message:
            return incoming.pop(0) if incoming else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in ({"x-api-key": tenant.name} | headers).items()]
        await self._app({"type": "http", "method": "POST", "path": PATH, "headers": raw}, receive, send)
        felt, status = self.felt[tenant.name], sent[0]["status"]
        felt.statuses[status] += 1
        if status == 200:
            felt.ttft_s.append(json.loads(sent[1]["body"]))
        else:
            assert b"retry-after" in dict(sent[0]["headers"])


class Claims(enum.Enum):
    """What the attacker says of its requests. HINTS: as high and as odd as there is. ALL: beside it, ever new sessions,
    or those of the other tenant, with parents that do not exist."""

    NONE = enum.auto()
    HINTS = enum.auto()
    ALL = enum.auto()


def headers_of(claims: Claims, draw: random.Random, number: int) -> dict[str, str]:
    hints = {"x-baton-priority": "high", "x-baton-ttft-deadline-ms": draw.choice(["1", "2000", "3600000"])}
    session = draw.choice([f"invented-{number}", f"normal-{draw.randrange(8)}"])
    sessions = {"x-session-id": session, "x-parent-session-id": f"forged-{number}"}
    return {Claims.NONE: {}, Claims.HINTS: hints, Claims.ALL: hints | sessions}[claims]


async def _run(attacker: Tenant, attack_per_s: float, claimed: Claims) -> Result:
    loop = asyncio.get_running_loop()
    async with QuietCluster(SCENARIO, DEADLINE_S, SEED) as cluster, asyncio.TaskGroup() as asks:
        site = Site(cluster, attacker)
        reading = asks.create_task(site.front_end.read())
        numbers = itertools.count()

        async def arrive(tenant: Tenant, per_s: float) -> None:
            draw, claims = random.Random(f"{SEED}:{tenant.name}"), random.Random(f"{SEED}:claims")
            next_s = loop.time()
            while per_s and (next_s := next_s + draw.expovariate(per_s)) < SECONDS:
                await asyncio.sleep(next_s - loop.time())
                number = next(numbers)
                # Its first tokens make each prompt one of its own: no cache helps.
                prompt = [draw.randrange(30_000) for _ in range(PROMPT_TOKENS)]
                headers = headers_of(claimed, claims, number)
                if tenant is NORMAL:
                    headers = {"x-session-id": f"normal-{number % 8}"}
                asks.create_task(site.ask(tenant, prompt, headers))

        await asyncio.gather(arrive(NORMAL, NORMAL_PER_S), arrive(attacker, attack_per_s))
        await asyncio.sleep(DRAIN_S)
        reading.cancel()
        return Result(
            site.felt[NORMAL.name],
            site.felt[attacker.name],
            site.front_end.capped,
            len(cluster.orchestrator._sessions),
            site.limiter.held(NORMAL) + site.limiter.held(attacker),
            cluster.orchestrator.num_in_flight,
            len(site.limiter._uses),
        )


@cache
def run(attacker: Tenant, attack_per_s: float = ATTACK_PER_S, claimed: Claims = Claims.ALL) -> Result:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_run(attacker, attack_per_s, claimed))


@pytest.fixture(autouse=True)
def _few_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "MAX_SESSIONS", MAX_SESSIONS)


@pytest.mark.parametrize("claims", [Claims.HINTS, Claims.ALL])
def test_claims_gain_nothing_over_plain_requests_within_the_same_limits(claims: Claims) -> None:
    hostile, plain = run(LIMITED, claimed=claims), run(LIMITED, claimed=Claims.NONE)
    assert hostile.normal.statuses == plain.normal.statuses
    assert hostile.normal.statuses.keys() == {200}
    assert hostile.capped["priority high to normal"] > hostile.capped["ttft_deadline_s 3600 to 30"] > 0
    assert plain.capped == {}
    assert hostile.normal.times.p50 <= 1.05 * plain.normal.times.p50
    assert hostile.normal.times.p90 <= 1.05 * plain.normal.times.p90
    # A deadline of two seconds is served before others of the class: a few of those notice it.
    assert hostile.normal.times.p99 <= 1.25 * plain.normal.times.p99


@pytest.mark.parametrize("claims", Claims)
def test_within_its_limits_an_attack_is_felt_as_its_share_and_no_more(claims: Claims) -> None:
    attacked, calm = run(LIMITED, claimed=claims), run(LIMITED, attack_per_s=0.0)
    assert sum(attacked.attacker.statuses.values()) > 0.9 * SECONDS * ATTACK_PER_S
    assert LIMITED.requests_per_minute is not None
    assert attacked.attacker.statuses[200] <= LIMITED.requests_per_minute / 60 * (SECONDS + 10)
    assert attacked.normal.statuses.keys() == calm.normal.statuses.keys() == {200}
    assert attacked.normal.times.p50 <= 2 * calm.normal.times.p50
    assert attacked.normal.times.p90 <= 3 * calm.normal.times.p90


def test_without_limits_the_same_attack_is_felt() -> None:
    """The comparisons can fail: it is the limits that keep the attack small."""
    limited, free, uncapped = run(LIMITED), run(FREE), run(UNCAPPED)
    assert free.normal.times.p50 > 3 * limited.normal.times.p50
    # Claims that nobody caps are served before the others.
    assert uncapped.normal.times.p50 > 1.5 * free.normal.times.p50


def test_nothing_is_left_and_memory_is_bounded() -> None:
    for result in (run(LIMITED), run(FREE), run(UNCAPPED)):
        assert (result.num_held, result.num_in_flight) == (0, 0)
        assert result.num_sessions <= MAX_SESSIONS
        assert result.num_limiter_records == 2
    assert run(FREE).num_sessions >= MAX_SESSIONS - 1
