"""The agents over a server that needs no engine: what they send, what they note, and what the command line refuses."""

import asyncio
import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from bench import agents
from bench.agent_asks import Agent
from bench.agents_report import AgentsPlan
from bench.commands.app import app
from bench.fault_asks import Answer, Choice
from bench.systems import StartFailed
from gateway.runtime import processes
from gateway.runtime.control import Switch, Switched
from gateway.runtime.processes import HealPlan
from tests.unit.bench.fake_server import PACE_S, STREAM, Body, FakeServer, http_chunk
from tests.unit.bench.test_agents_report import SETTING

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CALL = {"index": 0, "id": "x", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}


async def call_a_tool(body: Body, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM.replace(b"\r\n\r\n", b"\r\nx-baton-request-id: id\r\n\r\n"))
    for choice in ({"delta": {"content": "so"}}, {"delta": {"tool_calls": [CALL]}, "finish_reason": "tool_calls"}):
        data = json.dumps({"choices": [{"index": 0} | choice]}).encode()
        writer.write(http_chunk(b"data: " + data + b"\n\n"))
    writer.write(http_chunk(b"data: [DONE]\n\n") + http_chunk(b""))
    await writer.drain()


async def refuse(_body: Body, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull")
    await writer.drain()


def run(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, float]:
    monkeypatch.setattr("bench.agent_asks.PAUSE_S", (0.0, 0.0))
    monkeypatch.setattr("bench.agent_asks.START_WITHIN_S", 0.0)

    async def main() -> tuple[Any, float]:
        async with server.serving(), httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
            return await agents._run_agent(http, Agent(0, "a", 1, 3, 3))

    return asyncio.run(main())


def test_an_agent_runs_its_turns_and_sends_each_the_answers_and_results_before(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(call_a_tool)
    turns, took_s = run(server, monkeypatch)
    assert [(turn.number, turn.error, turn.called_tool, receipt) for turn, receipt in turns] == [
        (number, "", True, "id") for number in range(3)
    ]
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies]
    assert roles == [["system", "user"] + ["assistant", "tool"] * number for number in range(3)]
    assert server.bodies[1]["messages"][2]["tool_calls"][0]["function"] == CALL["function"]
    assert all(0 < turn.ttft_s <= turn.turn_s <= took_s for turn, _ in turns)


def test_a_refused_turn_is_told_and_the_agents_last(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, _ = run(FakeServer(refuse), monkeypatch)
    assert [turn.error for turn, _ in turns] == ["503: full"]


class FakeRun:
    """A run of Baton that switches at once, and answers every request."""

    url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.policy = "none yet"
        self.is_started = False
        self.asked: list[tuple[str, str]] = []

    def start(self) -> None:
        self.is_started = True

    def stop(self) -> None:
        self.is_started = False

    def order(self, path: Path, switch: Switch) -> Switched:
        assert path.parent.name == "1"
        self.policy = str(switch.policy)
        return Switched(self.policy, None)

    def policies(self, url: str) -> dict[str, Any]:
        return {"gateways": {"g": {"policy": self.policy, "shadow_policy": None}}, "missing": []}

    async def ask(self, _http: Any, _request: Any, session: str) -> tuple[Answer, str | None, str]:
        self.asked.append((self.policy, session))
        await asyncio.sleep(PACE_S)
        answer = Answer(session)
        answer.choices[0] = Choice("well", finish_reason="stop")
        return answer, None, ""


def test_each_block_is_warmed_up_in_turn_and_then_decided_by_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    monkeypatch.setattr("bench.agent_asks.PAUSE_S", (0.0, 0.0))
    monkeypatch.setattr("bench.agent_asks.START_WITHIN_S", 0.0)
    monkeypatch.setattr(agents, "order", run.order)
    monkeypatch.setattr(agents.client, "policies", run.policies)
    monkeypatch.setattr(agents, "_ask", run.ask)
    plan = AgentsPlan("c", ("least-tokens", "llm-d"), agents=2, turns=(3, 3), rounds=2, seed=4)
    experiment = agents.AgentsExperiment(plan, run, SETTING, lambda _: None)  # type: ignore[arg-type]
    taken: list[int] = []
    experiment.run(lambda: taken.append(len(experiment.report.blocks)))
    assert taken == [1, 2, 3, 4]
    assert experiment.report.complete
    assert not run.is_started
    blocks = [(name, policy) for name, policy in itertools.groupby(run.asked, lambda ask: (ask[0], ask[1][:7]))]
    order = ["least-tokens", "llm-d", "llm-d", "least-tokens"]
    assert [name for (name, _), _ in blocks] == [one for policy in order for one in ("round-robin", policy)]
    assert [(block.policy, block.round, len(block.turns)) for block in experiment.report.blocks] == [
        (policy, number, 6) for policy, number in zip(order, (0, 0, 1, 1), strict=True)
    ]


@pytest.fixture(autouse=True)
def _signals_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def bench(*options: str) -> Any:
    return CliRunner().invoke(app, ["agents", *options])


@pytest.mark.parametrize("policies", ["least-tokens", "least-tokens,least-tokens", "least-tokens,best", "a,b,c"])
def test_other_than_two_known_policies_are_refused(policies: str) -> None:
    done = bench("--policies", policies)
    assert done.exit_code == 2
    assert "session-affinity" in done.stderr


@pytest.mark.parametrize("config", ["simulated.yaml", "local.yaml"])
def test_a_configuration_without_two_real_engines_in_each_pool_is_refused(config: str) -> None:
    done = bench("--policies", "least-tokens,llm-d", "--config", str(CONFIGS / config))
    assert done.exit_code == 2
    assert "local-2p2d.yaml" in done.stderr


@pytest.mark.parametrize(("error", "code"), [(StartFailed("no engine"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_does_not_end_leaves_a_valid_file(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(agents.AgentsExperiment, "run", fail)
    monkeypatch.setattr(processes, "heal", lambda _: HealPlan([], []))
    file = tmp_path / "a.json"
    done = bench("--policies", "least-tokens,llm-d", "--json", str(file), "--config", str(CONFIGS / "local-2p2d.yaml"))
    assert done.exit_code == code, done.output
    assert json.loads(file.read_text())["complete"] is False
