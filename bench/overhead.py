"""Owns the experiment `overhead`: what each system costs around its engines, measured in alternating rounds.

Each system is started for its turn and stopped after it, so that nothing of another one runs while it is measured.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from bench import cpu
from bench.client import Client
from bench.results import Ledger, Round, StartFailure
from bench.stats import Cell, Exchange, figures, median_stages
from bench.systems import StartFailed, System

WARM_UP_OUTPUT_TOKENS = 8
WARM_UP_CONCURRENCY = 4
START_REQUESTS = 8
ERRORS_KEPT = 5

_Answers = dict[tuple[Cell, int], tuple[int, ...]]


class PromptMaker:
    """Prompts of random tokens: exact in length, the same for every system, never the same twice."""

    def __init__(self, model_path: str, trust_remote_code: bool, seed: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        # Added tokens steer chats and tool calls; the others are plain text.
        self._token_ids = [id for id in range(len(tokenizer)) if id not in tokenizer.added_tokens_decoder]
        self._seed = seed

    def make(self, purpose: str, round: int, cell: Cell, count: int) -> list[list[int]]:
        """`count` prompts of the cell's length; the arguments and the seed decide their tokens."""
        draw = random.Random(f"{self._seed}/{purpose}/{round}/{cell}")
        return [draw.choices(self._token_ids, k=cell.prompt_tokens) for _ in range(count)]


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs; what it measures goes to the ledger as it comes.

    `emitter_cpu_s_per_token` is by cell: what a simulated engine inside a server's process used of its CPU.
    """

    ledger: Ledger
    systems: Sequence[System]
    model: str
    prompts: PromptMaker
    console: Console
    save: Callable[[], None]
    emitter_cpu_s_per_token: Mapping[Cell, float] = field(default_factory=dict)

    def run(self) -> None:
        """Measures all that the ledger's plan asks for, and calls `save` after each cell.

        A system that does not start is noted and left out of that round. Whatever is raised in between (Ctrl-C), the
        system that runs is stopped first.
        """
        plan = self.ledger.plan
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=1) as progress:
            task = progress.add_task("", total=plan.rounds * len(self.systems) * len(plan.cells()))
            for number in range(1, plan.rounds + 1):
                answers: _Answers = {}
                for system in self.systems:
                    where = f"round {number}/{plan.rounds}, {system.name}"

                    def show(text: str, where: str = where) -> None:
                        progress.update(task, description=f"{where}: {text}")

                    try:
                        self._take_turn(system, number, answers, where, show, lambda: progress.advance(task))
                    except StartFailed as error:
                        self.ledger.add_start_failure(StartFailure(system.name, number, str(error), error.log_tail))
                        self.save()
                        self.console.print(f"[bold red]{where}: does not start:[/] {escape(str(error))}")
                        self.console.print(escape(error.log_tail), soft_wrap=True)
                        progress.advance(task, len(plan.cells()))
                    finally:
                        show("stopping")
                        system.stop()

    def _take_turn(
        self,
        system: System,
        number: int,
        answers: _Answers,
        where: str,
        show: Callable[[str], None],
        advance: Callable[[], None],
    ) -> None:
        """Starts the system and measures every cell. Raises StartFailed."""
        show("starting")
        began_s = time.monotonic()
        system.start()
        self.console.print(f"{where}: started in {time.monotonic() - began_s:.0f} s")
        cells = self.ledger.plan.cells()
        asyncio.run(self._wake(system, number, cells[0]))
        for cell in cells:
            show(str(cell))
            round = asyncio.run(self._measure(system, number, cell, answers))
            self.ledger.add(system.name, cell, round)
            self.save()
            self.console.print(f"{where}: {cell}: {_brief(round)}")
            advance()

    async def _wake(self, system: System, number: int, cell: Cell) -> None:
        """The first requests of a process are slow, and the first hand-off of a pair pays a handshake."""
        async with Client(system.url, self.model) as client:
            prompts = self.prompts.make("start", number, cell, START_REQUESTS)
            await client.run(prompts, WARM_UP_OUTPUT_TOKENS, WARM_UP_CONCURRENCY)

    async def _measure(self, system: System, number: int, cell: Cell, answers: _Answers) -> Round:
        plan = self.ledger.plan
        warm_up = self.prompts.make("warm-up", number, cell, WARM_UP_CONCURRENCY)
        prompts = self.prompts.make("measured", number, cell, plan.num_requests(cell))
        async with Client(system.url, self.model) as client:
            await client.run(warm_up, WARM_UP_OUTPUT_TOKENS, min(cell.concurrency, WARM_UP_CONCURRENCY))
            before = cpu.read(system.processes())
            client_before_s, machine_before_s = time.process_time(), cpu.machine_busy_s()
            waited_before_s = cpu.waited_s()
            with cpu.first_in_line():
                load = await client.run(prompts, cell.output_tokens, cell.concurrency, plan.cell_seconds)
            client_waited_s = cpu.waited_s() - waited_before_s
            client_cpu_s = time.process_time() - client_before_s
            machine_cpu_s = cpu.machine_busy_s() - machine_before_s
            used = cpu.spent(before, cpu.read(system.processes()))
            stages_ms = median_stages(await client.stages_ms(load.exchanges))
        failed = [exchange.error for exchange in load.exchanges if exchange.error is not None]
        compared, differing = _compare(load.exchanges, cell, answers)
        cpu_s = cpu.by_role(used)
        if system.engine_is_inside:
            num_tokens = sum(len(exchange.token_ids) for exchange in load.exchanges)
            cpu_s = cpu_s.moved_to_engine(self.emitter_cpu_s_per_token[cell] * num_tokens)
        return Round(
            number=number,
            num_requests=len(load.exchanges),
            num_failed=len(failed),
            errors=tuple(f"{count} x {text}" for text, count in Counter(failed).most_common(ERRORS_KEPT)),
            answers_compared=compared,
            answers_differing=differing,
            answers_unstreamed=sum(not answer.is_streamed for answer in load.exchanges if answer.error is None),
            figures=figures(load.exchanges, load.window_s, cpu_s, client_cpu_s, machine_cpu_s, client_waited_s),
            processes=tuple(process for process in used if process.cpu_s > 0),
            stages_ms=stages_ms,
        )


def _compare(exchanges: Sequence[Exchange], cell: Cell, answers: _Answers) -> tuple[int, int]:
    """How many answers could be compared with the round's first to the same prompt, and how many of them differ."""
    compared = differing = 0
    for index, exchange in enumerate(exchanges):
        if exchange.error is not None:
            continue
        first = answers.get((cell, index))
        if first is None:
            answers[cell, index] = exchange.token_ids
        else:
            compared += 1
            differing += first != exchange.token_ids
    return compared, differing


def _brief(round: Round) -> str:
    """One line of rich markup."""
    failed = f", [red]{round.num_failed} of {round.num_requests} failed[/]" if round.num_failed else ""
    failed += "".join(f"\n  [red]{escape(error)}[/]" for error in round.errors)
    if round.figures is None:
        return f"no figures{failed}"
    shown = round.figures
    return (
        f"TTFT {shown.ttft_ms.p50:.1f} ms, ITL {shown.itl_ms.p50:.1f} ms, {shown.tokens_per_s:.1f} tokens/s, "
        f"CPU outside engines {shown.outside_engine_cpu_s_per_1000_tokens:.2f} s per 1,000 tokens{failed}"
    )
