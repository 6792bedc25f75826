"""Owns what `bench agents` leaves behind: its plan, each turn, figures by policy, targets, the JSON file, the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

import msgspec
from rich import box
from rich.table import Table

from bench.results import Setting
from bench.stats import in_turns
from bench.targets import ReportTarget

LEAST_EXACT = 0.95
MOST_TURN_RATIO = 0.999
"""Less than as long."""

MAX_ERRORS = 20


@dataclass(frozen=True)
class AgentsPlan:
    """In each of `rounds` every policy has a block: `agents` at once, each from `turns[0]` to `turns[1]` turns. The
    first policy is what the second is compared with."""

    config: str
    policies: tuple[str, str]
    agents: int
    turns: tuple[int, int]
    rounds: int
    seed: int

    def blocks(self) -> list[tuple[int, str]]:
        """Round and policy of each, in the order of the run."""
        return in_turns(self.policies, self.rounds)


# -- receipts


class RequestFacts(msgspec.Struct, frozen=True):
    num_prompt_tokens: int


class PlacementFacts(msgspec.Struct, frozen=True):
    prefill: str | None = None


class PredictionFacts(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutcomeFacts(msgspec.Struct, frozen=True):
    status: str
    reused_tokens: int = 0
    kv_blocks_moved: int = 0


class ReceiptFacts(msgspec.Struct, frozen=True):
    """What this benchmark reads of a receipt."""

    policy: str
    request: RequestFacts
    placement: PlacementFacts
    outcome: OutcomeFacts
    predicted: PredictionFacts | None = None


# -- what was measured


@dataclass(frozen=True)
class Turn:
    """One request. Times are as the client saw them. `error`: why it did not come whole. The rest is from its receipt
    and None without one; `decided_by` is its policy."""

    agent: int
    number: int
    turn_s: float
    ttft_s: float | None = None
    called_tool: bool = False
    error: str = ""
    decided_by: str | None = None
    prompt_tokens: int | None = None
    predicted_tokens: int | None = None
    reused_tokens: int | None = None
    kv_blocks_moved: int | None = None
    is_split: bool | None = None


@dataclass(frozen=True)
class Block:
    """One policy's share of a round. `agents_s`: from each agent's first request to its last answer."""

    round: int
    policy: str
    turns: tuple[Turn, ...]
    agents_s: tuple[float, ...]


@dataclass(frozen=True)
class Figures:
    """Of one policy: medians over its blocks; counts and shares are of all of them. Times in seconds.

    `exact_share`: of the turns with a receipt, where as many tokens were reused as predicted. `error_tokens`: the mean
    distance of the two. `reused_share`: of all prompt tokens.
    """

    policy: str
    num_turns: int
    num_failed: int
    turn_mean_s: float
    turn_p50_s: float
    turn_p90_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    agent_mean_s: float
    agent_max_s: float
    reused_share: float
    exact_share: float
    error_tokens: float
    split_share: float
    kv_blocks_moved: int
    tool_share: float


@dataclass(frozen=True)
class AgentsReport:
    """The content of the JSON file. Ratios are the second policy's figure to the first's, of each round; `complete` is
    false when the run was interrupted."""

    complete: bool
    plan: AgentsPlan
    setting: Setting
    blocks: tuple[Block, ...] = ()
    figures: tuple[Figures, ...] = ()
    turn_ratios: tuple[float, ...] = ()
    turn_p50_ratios: tuple[float, ...] = ()
    agent_ratios: tuple[float, ...] = ()
    wrong_policy: int = 0
    errors: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        return sum(figures.num_failed for figures in self.figures)


def evaluate(plan: AgentsPlan, setting: Setting, blocks: Sequence[Block], *, complete: bool) -> AgentsReport:
    by_policy = [[block for block in blocks if block.policy == policy] for policy in plan.policies]
    turns = [(block, turn) for block in blocks for turn in block.turns]
    errors = [f"{block.policy}, agent {turn.agent}: {turn.error}" for block, turn in turns if turn.error]
    return AgentsReport(
        complete,
        plan,
        setting,
        tuple(blocks),
        tuple(_figures(own) for own in by_policy if any(_whole(block) for block in own)),
        _ratios(plan, blocks, _turn_mean_s),
        _ratios(plan, blocks, lambda block: median(_turn_times_s(block))),
        _ratios(plan, blocks, lambda block: fmean(block.agents_s)),
        sum(turn.decided_by not in (None, block.policy) for block, turn in turns),
        tuple(errors[:MAX_ERRORS]),
    )


def _whole(block: Block) -> list[Turn]:
    return [turn for turn in block.turns if not turn.error]


def _turn_times_s(block: Block) -> list[float]:
    return [turn.turn_s for turn in _whole(block)]


def _turn_mean_s(block: Block) -> float:
    return fmean(_turn_times_s(block))


def _ratios(plan: AgentsPlan, blocks: Sequence[Block], figure: Callable[[Block], float]) -> tuple[float, ...]:
    """Of the rounds in which both policies have answered."""
    found: list[float] = []
    for number in range(plan.rounds):
        of_round = {block.policy: block for block in blocks if block.round == number and _whole(block)}
        pair = [of_round.get(policy) for policy in plan.policies]
        if pair[0] is not None and pair[1] is not None:
            found.append(round(figure(pair[1]) / figure(pair[0]), 4))
    return tuple(found)


def _p90(values: Sequence[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def _figures(blocks: Sequence[Block]) -> Figures:
    """Of at least one block with an answer."""
    answered = [block for block in blocks if _whole(block)]
    turns = [turn for block in answered for turn in _whole(block)]
    told = [(t.prompt_tokens, t.predicted_tokens, t.reused_tokens) for t in turns]
    known = [(p, d, r) for p, d, r in told if p is not None and d is not None and r is not None]

    def typical(figure: Callable[[Block], float]) -> float:
        return round(median(figure(block) for block in answered), 4)

    def ttfts_s(block: Block) -> list[float]:
        return [turn.ttft_s for turn in _whole(block) if turn.ttft_s is not None] or [0.0]

    def share(of: Sequence[bool]) -> float:
        return round(sum(of) / len(of), 4) if of else 0.0

    return Figures(
        policy=answered[0].policy,
        num_turns=sum(len(block.turns) for block in blocks),
        num_failed=sum(bool(turn.error) for block in blocks for turn in block.turns),
        turn_mean_s=typical(_turn_mean_s),
        turn_p50_s=typical(lambda block: median(_turn_times_s(block))),
        turn_p90_s=typical(lambda block: _p90(_turn_times_s(block))),
        ttft_p50_s=typical(lambda block: median(ttfts_s(block))),
        ttft_p90_s=typical(lambda block: _p90(ttfts_s(block))),
        agent_mean_s=typical(lambda block: fmean(block.agents_s)),
        agent_max_s=typical(lambda block: max(block.agents_s)),
        reused_share=round(sum(r for _, _, r in known) / max(sum(p for p, _, _ in known), 1), 4),
        exact_share=share([predicted == reused for _, predicted, reused in known]),
        error_tokens=round(fmean(abs(d - r) for _, d, r in known), 2) if known else 0.0,
        split_share=share([turn.is_split for turn in turns if turn.is_split is not None]),
        kv_blocks_moved=sum(turn.kv_blocks_moved or 0 for turn in turns),
        tool_share=share([turn.called_tool for turn in turns]),
    )


# -- targets


def _least_exact(report: AgentsReport) -> float | None:
    return min((figures.exact_share for figures in report.figures), default=None)


def _median_ratio(report: AgentsReport) -> float | None:
    return median(report.turn_ratios) if report.turn_ratios else None


TARGETS: tuple[ReportTarget[AgentsReport], ...] = (
    ReportTarget("turns that failed", lambda report: float(report.num_failed) if report.figures else None, 0),
    ReportTarget("turns that another policy decided", lambda report: float(report.wrong_policy), 0),
    ReportTarget("turns that reused what the receipt predicted", _least_exact, LEAST_EXACT, is_floor=True),
    ReportTarget("turn time, of the first policy's", _median_ratio, MOST_TURN_RATIO),
)


# -- output


def table(report: AgentsReport) -> Table:
    plan = report.plan
    title = f"{plan.agents} agents at once, {plan.rounds} rounds of each policy; medians over rounds"
    drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    drawn.add_column("policy", no_wrap=True)
    columns = (
        "turns\nfailed", "turn ms\nmean/p50/p90", "TTFT ms\np50/p90", "agent s\nmean/max", "prompt\nreused",
        "as predicted\nerror, tokens", "split", "blocks\nmoved", "tool\ncalls",
    )  # fmt: skip
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    for one in report.figures:
        drawn.add_row(
            one.policy,
            f"{one.num_turns}\n{one.num_failed}",
            "/".join(f"{1000 * time_s:.0f}" for time_s in (one.turn_mean_s, one.turn_p50_s, one.turn_p90_s)),
            f"{1000 * one.ttft_p50_s:.0f}/{1000 * one.ttft_p90_s:.0f}",
            f"{one.agent_mean_s:.1f}/{one.agent_max_s:.1f}",
            f"{one.reused_share:.1%}",
            f"{one.exact_share:.1%}\n{one.error_tokens:.1f}",
            f"{one.split_share:.0%}",
            str(one.kv_blocks_moved),
            f"{one.tool_share:.0%}",
        )
    return drawn


def ratio_lines(report: AgentsReport) -> list[str]:
    """The second policy to the first, and how far rounds differ."""
    baseline, subject = report.plan.policies
    return [
        f"{subject} to {baseline}, {name}: {median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})"
        for name, ratios in (
            ("mean turn time", report.turn_ratios),
            ("median turn time", report.turn_p50_ratios),
            ("agents' completion", report.agent_ratios),
        )
        if ratios
    ]
