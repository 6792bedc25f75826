"""Owns the experiment `agents`: tool-looping agents on a run of Baton with real engines, whose policy is switched from
block to block while engines stay up."""

import asyncio
import dataclasses
import time
from collections.abc import Callable

import httpx
import msgspec

from bench import cpu
from bench.agent_asks import CHAT, SESSION_HEADER, Agent, ToolCall, body, shared_messages
from bench.agents_report import AgentsPlan, AgentsReport, Block, ReceiptFacts, Turn, evaluate
from bench.fault_asks import Answer, End
from bench.results import Setting
from bench.systems import System
from gateway import client
from gateway.runtime.control import Switch, order
from gateway.runtime.environment import RunPaths
from gateway.runtime.local import base_dir

READ_S = 120.0
CONNECT_S = 10.0
FOLLOW_S = 30.0
RECEIPT_S = 10.0
POLL_S = 0.1
WARM_UP_POLICY = "round-robin"
WARM_UP_ROUNDS = 4
WARM_UP_TOKENS = 2
RECEIPT_HEADER = "x-baton-request-id"


class AgentsExperiment:
    """Blocks of agents on one run. `report` is the result so far."""

    def __init__(self, plan: AgentsPlan, system: System, setting: Setting, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._system = system
        self._setting = setting
        self._say = say
        self._blocks: list[Block] = []
        self.report = AgentsReport(False, plan, setting)

    def run(self, took_block: Callable[[], None]) -> None:
        """`took_block` is called when `report` has grown. Raises StartFailed, TimeoutError,
        OrderFailed, GatewayError, RuntimeError."""
        try:
            self._say("starting")
            self._system.start()
            # Engines take all cores; without this clients see tokens later than they come.
            with cpu.first_in_line():
                asyncio.run(self._run_blocks(took_block))
        finally:
            self._say("stopping")
            self._system.stop()

    async def _run_blocks(self, took_block: Callable[[], None]) -> None:
        blocks = self._plan.blocks()
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._plan.agents)
        async with httpx.AsyncClient(
            base_url=self._system.url, timeout=timeout, limits=limits, trust_env=False
        ) as http:
            for done, (number, policy) in enumerate(blocks, 1):
                name = f"{self._plan.seed}-{number}-{policy}"
                await self._warm_up(http, name, number)
                await self._use(policy)
                block = await self._block(http, name, number, policy)
                self._blocks.append(block)
                self.report = evaluate(self._plan, self._setting, self._blocks, complete=done == len(blocks))
                took_block()
                whole = [turn.turn_s for turn in block.turns if not turn.error]
                mean_ms = 1000 * sum(whole) / max(len(whole), 1)
                self._say(f"block {done} of {len(blocks)}: {policy}, {len(block.turns)} turns, {mean_ms:.0f} ms each")

    async def _use(self, policy: str) -> None:
        """As `baton policy` does it. Returns when every gateway has followed."""
        paths = RunPaths(base_dir() / self._system.url.rpartition(":")[2])
        switched = await asyncio.to_thread(order, paths.control, Switch(policy, None))
        async with asyncio.timeout(FOLLOW_S):
            while True:
                told = await asyncio.to_thread(client.policies, self._system.url)
                if client.follow(told, switched.policy, switched.shadow_policy, 1):
                    return
                await asyncio.sleep(POLL_S)

    async def _warm_up(self, http: httpx.AsyncClient, name: str, number: int) -> None:
        """Has every engine read what the agents of a block share: at a start that all make at once, what is cached
        where would change between a decision and the reading."""
        await self._use(WARM_UP_POLICY)
        messages = [*shared_messages(name, self._seed(number)), {"role": "user", "content": "Hello"}]
        for _ in range(WARM_UP_ROUNDS):
            answer, _, error = await _ask(http, body(messages, WARM_UP_TOKENS), f"{name}-warm-up")
            if error:
                raise RuntimeError(f"a request to warm up failed: {error or answer.error}")

    async def _block(self, http: httpx.AsyncClient, name: str, number: int, policy: str) -> Block:
        plan = self._plan
        agents = [Agent(one, name, self._seed(number), *plan.turns) for one in range(plan.agents)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_run_agent(http, agent)) for agent in agents]
        found = [task.result() for task in tasks]
        turns = [await _with_receipt(http, turn, receipt_id) for turns, _ in found for turn, receipt_id in turns]
        return Block(number, policy, tuple(turns), tuple(took_s for _, took_s in found))

    def _seed(self, number: int) -> int:
        return self._plan.seed * 1000 + number


async def _run_agent(http: httpx.AsyncClient, agent: Agent) -> tuple[list[tuple[Turn, str | None]], float]:
    """Its turns with their receipts' ids, and how long it took. A turn that fails is its last."""
    turns: list[tuple[Turn, str | None]] = []
    await asyncio.sleep(agent.start_s)
    began_s = ended_s = time.monotonic()
    while not agent.has_ended:
        sent_s = time.monotonic()
        answer, receipt_id, error = await _ask(http, body(agent.messages), agent.session)
        ended_s = time.monotonic()
        choice = answer.choices.get(0)
        calls = [
            ToolCall(f"call-{agent.num_done}-{i}", *call) for i, call in (choice.tool_calls if choice else {}).items()
        ]
        ttft_s = None if answer.first_token_s is None else round(answer.first_token_s - sent_s, 5)
        turn = Turn(agent.number, agent.num_done, round(ended_s - sent_s, 5), ttft_s, bool(calls), error)
        turns.append((turn, receipt_id))
        if error or choice is None:
            break
        await asyncio.sleep(agent.took(choice.text, calls))
    return turns, round(ended_s - began_s, 4)


async def _ask(http: httpx.AsyncClient, request: dict[str, object], session: str) -> tuple[Answer, str | None, str]:
    """The answer, the id of its receipt, and why it is not whole; empty if it is."""
    answer, receipt_id = Answer(session), None
    try:
        async with http.stream("POST", CHAT, json=request, headers={SESSION_HEADER: session}) as response:
            receipt_id = response.headers.get(RECEIPT_HEADER)
            if response.status_code != httpx.codes.OK:
                told = (await response.aread()).decode(errors="replace")
                return answer, receipt_id, f"{response.status_code}: {told[:300]}"
            async for line in response.aiter_lines():
                answer.take(line)
                if answer.first_token_s is None and any(c.text or c.tool_calls for c in answer.choices.values()):
                    answer.first_token_s = time.monotonic()
        answer.close()
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return answer, receipt_id, repr(error)
    return answer, receipt_id, "" if answer.end is End.COMPLETE else answer.error or "the answer is not whole"


async def _with_receipt(http: httpx.AsyncClient, turn: Turn, receipt_id: str | None) -> Turn:
    """With what its receipt says, when it is closed; as it is if there is none."""
    deadline_s = time.monotonic() + RECEIPT_S
    while receipt_id is not None and time.monotonic() < deadline_s:
        response = await http.get(f"/baton/receipts/{receipt_id}")
        if response.status_code != httpx.codes.OK:
            break
        receipt = msgspec.json.decode(response.content, type=ReceiptFacts)
        if receipt.outcome.status != "running":
            return dataclasses.replace(
                turn,
                decided_by=receipt.policy,
                prompt_tokens=receipt.request.num_prompt_tokens,
                predicted_tokens=receipt.predicted.cached_tokens if receipt.predicted else None,
                reused_tokens=receipt.outcome.reused_tokens,
                kv_blocks_moved=receipt.outcome.kv_blocks_moved,
                is_split=receipt.placement.prefill is not None,
            )
        await asyncio.sleep(POLL_S)
    return turn
