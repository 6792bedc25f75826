"""The experiment, with small servers in the place of systems: turns, failures, interruption, equal prompts."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench.overhead import Experiment, PromptMaker
from bench.results import Ledger, Plan, Setting
from bench.stats import Cell
from bench.systems import StartFailed
from gateway.runtime import processes
from gateway.runtime.processes import ProcessId
from tests.unit.bench.fake_server import STREAM, Body, FakeServer, answer_well, event, http_chunk

MODEL = Path(__file__).resolve().parents[3] / "configs" / "models" / "mini"
CELL = Cell(prompt_tokens=5, output_tokens=3, concurrency=2)
SETTING = Setting("2026-01-01T00:00:00+00:00", {}, "", False, "a CPU", 2, 24.0)


def nothing() -> None:
    pass


@dataclass
class FakeSystem:
    """A system that is a server in a thread. `diary` is what happened to all systems, in order."""

    name: str
    diary: list[str]
    on_start: Callable[[], None] = nothing
    engine_is_inside: bool = False
    server: FakeServer = field(default_factory=FakeServer)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def url(self) -> str:
        return self.server.url

    def start(self) -> None:
        self.diary.append(f"start {self.name}")
        self.on_start()
        self._stack.enter_context(self.server.serving_in_a_thread())

    def stop(self) -> None:
        self.diary.append(f"stop {self.name}")
        self._stack.close()

    def processes(self) -> list[ProcessId]:
        return [processes.this_process()]


@pytest.fixture(scope="module")
def prompts() -> PromptMaker:
    return PromptMaker(str(MODEL), trust_remote_code=False, seed=0)


def experiment(prompts: PromptMaker, systems: list[FakeSystem], rounds: int = 1) -> Experiment:
    plan = Plan(
        config="c",
        systems=tuple(system.name for system in systems),
        concurrency=(CELL.concurrency,),
        prompt_tokens=(CELL.prompt_tokens,),
        output_tokens=(CELL.output_tokens,),
        rounds=rounds,
        requests=6,
        cell_seconds=30.0,
    )
    return Experiment(Ledger(plan, SETTING), systems, "m", prompts, Console(file=StringIO()), nothing)


def measured_prompts(server: FakeServer) -> list[list[int]]:
    """Those of the last cell: its requests came last."""
    return sorted(body["prompt"] for body in server.bodies[-6:])


def test_systems_take_turns_and_only_one_runs_at_a_time(prompts: PromptMaker) -> None:
    diary: list[str] = []
    experiment(prompts, [FakeSystem("a", diary), FakeSystem("b", diary)], rounds=2).run()
    assert diary == ["start a", "stop a", "start b", "stop b"] * 2


def test_every_system_gets_the_same_prompts_and_no_prompt_comes_twice(prompts: PromptMaker) -> None:
    diary: list[str] = []
    a, b = FakeSystem("a", diary), FakeSystem("b", diary)
    run = experiment(prompts, [a, b])
    run.run()
    assert measured_prompts(a.server) == measured_prompts(b.server)
    sent = [tuple(body["prompt"]) for body in a.server.bodies]
    assert len(set(sent)) == len(sent)
    first, second = run.ledger.report(complete=True).cells
    assert (first.num_failed, second.num_failed) == (0, 0)
    assert first.rounds[0].num_requests == 6
    assert (first.rounds[0].answers_compared, second.rounds[0].answers_compared) == (0, 6)
    assert second.rounds[0].answers_differing == 0


def test_an_answer_with_other_tokens_is_counted_as_differing(prompts: PromptMaker) -> None:
    diary: list[str] = []
    a, b = FakeSystem("a", diary), FakeSystem("b", diary)

    async def answer_with_other_tokens(body: Body, writer: asyncio.StreamWriter) -> None:
        await answer_well(body, writer, first_token=100)

    b.server.answer = answer_with_other_tokens
    run = experiment(prompts, [a, b])
    run.run()
    _, second = run.ledger.report(complete=True).cells
    assert (second.rounds[0].answers_compared, second.rounds[0].answers_differing) == (6, 6)


def test_an_answer_that_comes_in_one_piece_is_counted_and_gives_no_figures(prompts: PromptMaker) -> None:
    async def answer_at_once(body: Body, writer: asyncio.StreamWriter) -> None:
        everything = event(body, list(range(body["max_tokens"])), first=True) + b"data: [DONE]\n\n"
        writer.write(STREAM + http_chunk(everything) + http_chunk(b""))

    run = experiment(prompts, [FakeSystem("a", [], server=FakeServer(answer_at_once))])
    run.run()
    (entry,) = run.ledger.report(complete=True).cells
    assert (entry.num_failed, entry.rounds[0].answers_unstreamed, entry.median) == (0, 6, None)


def test_what_a_simulated_engine_inside_costs_is_the_engines_not_the_servers(prompts: PromptMaker) -> None:
    inside, outside = FakeSystem("a", [], engine_is_inside=True), FakeSystem("b", [])
    run = replace(experiment(prompts, [inside, outside]), emitter_cpu_s_per_token={CELL: 1000.0})
    run.run()
    first, second = (entry.median for entry in run.ledger.report(complete=True).cells)
    assert first is not None
    assert second is not None
    assert first.cpu_s_per_1000_tokens.server_s == 0.0
    assert first.cpu_s_per_1000_tokens.engine_s >= 0.0
    assert second.cpu_s_per_1000_tokens.engine_s == 0.0


def test_a_system_that_does_not_start_is_noted_and_the_others_go_on(prompts: PromptMaker) -> None:
    diary: list[str] = []

    def fail() -> None:
        raise StartFailed("a: server ended with code 1", "no memory")

    run = experiment(prompts, [FakeSystem("a", diary, fail), FakeSystem("b", diary)])
    run.run()
    report = run.ledger.report(complete=True)
    assert diary == ["start a", "stop a", "start b", "stop b"]
    assert [(failure.system, failure.round, failure.log_tail) for failure in report.start_failures] == [
        ("a", 1, "no memory")
    ]
    assert [entry.system for entry in report.cells] == ["b"]
    assert "no memory" in str(run.console.file.getvalue())  # type: ignore[attr-defined]


def test_an_interruption_stops_the_system_and_keeps_what_was_measured(prompts: PromptMaker) -> None:
    diary: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    run = experiment(prompts, [FakeSystem("a", diary), FakeSystem("b", diary, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert diary == ["start a", "stop a", "start b", "stop b"]
    assert [entry.system for entry in run.ledger.report(complete=False).cells] == ["a"]


def test_prompts_are_exact_and_decided_by_seed_round_and_cell(prompts: PromptMaker) -> None:
    made = prompts.make("measured", 1, CELL, 4)
    assert [len(prompt) for prompt in made] == [5] * 4
    assert made == PromptMaker(str(MODEL), False, 0).make("measured", 1, CELL, 4)
    assert made == prompts.make("measured", 1, CELL, 9)[:4]
    others = [
        prompts.make("warm-up", 1, CELL, 4),
        prompts.make("measured", 2, CELL, 4),
        PromptMaker(str(MODEL), False, 1).make("measured", 1, CELL, 4),
    ]
    assert made not in others


def test_prompts_hold_text_and_no_tokens_that_steer_the_model(prompts: PromptMaker) -> None:
    (prompt,) = prompts.make("measured", 1, Cell(20_000, 1, 1), 1)
    assert (min(prompt), max(prompt)) == (8, 2045)  # the shipped model's added tokens lie around these
