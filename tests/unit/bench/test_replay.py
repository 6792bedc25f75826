"""A replay asks every recorded turn once, in order, with the tokens that the engines know; it can be repeated."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import replay_experiment
from bench.asking import asks_when_it_can
from bench.commands.app import app
from bench.oracle import Limits, session_spans, turn_s
from bench.replay import REPLAYED, Replay, run
from bench.replay_experiment import Experiment
from bench.replay_plan import RunFigures, RunPlan, Shape, TurnResult, figures
from bench.replay_report import ReplayPlan, ReplayReport
from bench.replay_search import Goodput, Job, Result, Task, Tuned, at_load, bound_per_s, fitted, search, tune
from bench.replay_text import SessionText, Texts
from bench.replay_tuning import TUNABLE, TUNING_LOAD, TUNING_SEED
from bench.results import gather_setting
from bench.traces import Session, Trace, Turn, linked
from bench.virtual_time import VirtualTimeLoop
from engine.roofline import ROOFLINES
from engine.simulated import SimulatedEngine
from gateway.orchestrator import Orchestrator
from gateway.routing.policies import POLICIES
from gateway.scaling.demand import ServiceLevel
from tests.unit.bench.traces import write_sessions

MODEL = "qwen3-coder-30b-a3b-fp8-h100"
LIMITS = Limits(ROOFLINES[MODEL], 8192, 300.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sessions(tmp_path / "sessions", 4)


def plan(folder: Path, **more: object) -> RunPlan:
    usual = RunPlan(str(folder), "least-tokens", Shape(1, 1), 0.05, 0, MODEL, 8, warm_up_s=30.0)
    return dataclasses.replace(usual, **more)


def without_cpu(figures: RunFigures) -> RunFigures:
    return dataclasses.replace(figures, cpu_s=0.0)


def replayed(plan: RunPlan, trace: Trace) -> Replay:
    async def main() -> Replay:
        replay = Replay(plan, trace)
        await replay.run()
        return replay

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


# -- one run


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(0, 2)], ids=str)
def test_with_room_sessions_take_little_more_than_the_least(folder: Path, shape: Shape) -> None:
    trace = fitted(str(folder), MODEL)
    measured = run(plan(folder, shape=shape, policy="session-affinity", rate_per_s=0.01), trace)
    assert (measured.num_failed, measured.num_refusals) == (0, 0)
    assert 1.0 <= measured.slowdown.p50 < 1.5
    assert measured.session_s.p50 < measured.least_session_s.p50 + 0.5
    assert measured.slo_share == 1.0
    assert 0 < measured.hit_rate <= measured.hit_rate_ceiling < 1
    assert (measured.prefill_gpu_s > 0) == (shape.prefill > 0)
    assert measured.decode_gpu_s > 0


def test_the_same_seed_gives_the_same_figures_and_another_one_others(folder: Path) -> None:
    trace = fitted(str(folder), MODEL)
    first = run(plan(folder), trace)
    assert without_cpu(run(plan(folder), trace)) == without_cpu(first)
    other = run(plan(folder, seed=1), trace)
    assert other.ttft_mean_s != first.ttft_mean_s


def test_every_turn_of_the_cohort_is_asked_once_and_children_are_waited_for(folder: Path) -> None:
    trace = fitted(str(folder), MODEL)
    replay = replayed(plan(folder), trace)
    assert sorted(one.name for one in replay.trajectories) == sorted(2 * [f"trace_{index}" for index in range(4)])
    for one in replay.trajectories:
        assert one.session_s >= one.least_session_s
        assert one.busy_s >= one.least_busy_s
        assert one.trajectory_s == pytest.approx(one.session_s), "the last turn waits for the child"
    assert replay.num_turns >= 8 * 5


def test_the_cohort_comes_in_the_same_order_at_every_rate(folder: Path) -> None:
    trace = fitted(str(folder), MODEL)
    # Without a warm-up, the first to come are the cohort.
    slow, fast = (replayed(plan(folder, rate_per_s=rate, num_trajectories=3), trace) for rate in (0.01, 1))
    assert {one.name for one in slow.trajectories} == {one.name for one in fast.trajectories}


def test_a_run_that_does_not_drain_ends_with_its_measured_turns(folder: Path) -> None:
    trace = fitted(str(folder), MODEL)
    drained, cut = run(plan(folder), trace), run(plan(folder, drains=False), trace)
    assert (cut.num_turns, cut.slo_share) == (drained.num_turns, drained.slo_share)
    assert cut.ttft_s == drained.ttft_s
    assert cut.num_turns_in_all < drained.num_turns_in_all


def test_leaps_change_no_figure(folder: Path) -> None:
    """But by where a decision saw an older load; with one replica of each kind none depends on it."""
    trace = fitted(str(folder), MODEL)
    leaping, single = run(plan(folder), trace), run(plan(folder, max_leap_steps=1), trace)
    assert leaping.turn_mean_s == pytest.approx(single.turn_mean_s)
    assert leaping.session_s.p99 == pytest.approx(single.session_s.p99)
    assert leaping.decode_gpu_s == pytest.approx(single.decode_gpu_s)


def test_a_shape_is_read_from_its_name() -> None:
    assert [Shape.parse(text) for text in ("2x6", "aggregated-4")] == [Shape(2, 6), Shape(0, 4)]
    assert str(Shape.parse("aggregated-4")) == "aggregated-4"
    for text in ("2x", "0x4", "4", "aggregated-0", "aggregated"):
        with pytest.raises(ValueError, match="is no shape"):
            Shape.parse(text)


def test_a_turn_keeps_the_service_level_with_both_its_times_and_without_a_refusal() -> None:
    slo = ServiceLevel(ttft_s=1.0, ttft_per_read=2.0, tpot_s=0.1)
    good = TurnResult(0.0, 2.9, 3.8, 100, 10, 0, 0, 100, 0, cold_s=1.0, num_refusals=0)
    assert good.tpot_s == pytest.approx(0.1)
    assert good.keeps(slo)
    for worse in ({"ttft_s": 3.1, "turn_s": 3.9}, {"turn_s": 3.9}, {"num_refusals": 1}, {"failed": True}):
        assert not dataclasses.replace(good, **worse).keeps(slo)


# -- what is asked


def test_a_prompt_holds_what_the_engine_wrote_where_the_record_has_grown_by_it() -> None:
    texts = Texts(64)
    turns = linked([Turn(130, 5, (-1, 0, 1)), Turn(200, 5, (-1, 0, 2, 3)), Turn(128, 5, (-1, 9))], 64)
    text = SessionText(Session(turns), texts, texts.copy_of(10))
    first = text.prompt(0)
    text.answered(0, first, [7, 7, 7, 7, 7])
    second = text.prompt(1)
    assert second[:135] == [*first, 7, 7, 7, 7, 7]
    text.answered(1, second, [8] * 5)
    assert text.prompt(2)[:64] == first[:64]
    assert [len(first), len(second), len(text.prompt(2))] == [130, 200, 128]


def test_blocks_of_a_copy_are_its_own_and_shared_ones_everybodys() -> None:
    texts, turn = Texts(64), Turn(128, 1, (-1, 0))
    one, other = (texts.tokens(turn, texts.copy_of(1), 0) for _ in range(2))
    assert one[:64] == other[:64]
    assert one[64] != other[64]
    assert texts.tokens(turn, 100, 70) == texts.tokens(turn, 100, 0)[70:]


# -- the search


def figures_of(plan: RunPlan) -> RunFigures:
    turn = TurnResult(0.0, 1.0, 2.0, 100, 10, 90, 80, 20, 5, cold_s=1.0, num_refusals=0)
    return figures(plan, [turn], [], 1, 10.0, (5.0, 20.0), 1.0)


@pytest.mark.parametrize("capacity", [0.013, 0.2, 0.61, 5.0])
def test_the_search_finds_the_highest_load_that_keeps_the_level(folder: Path, capacity: float) -> None:
    def runs(plan: RunPlan) -> RunFigures:
        return dataclasses.replace(figures_of(plan), slo_share=1.0 if plan.load <= capacity else 0.5)

    goodput = list(search(plan(folder), runs))[-1]
    assert isinstance(goodput, Goodput)
    assert goodput.plan.load <= capacity
    assert goodput.plan.load >= min(capacity / 1.05, 1.0)
    assert goodput.rate_per_s == pytest.approx(goodput.plan.load * bound_per_s(plan(folder)))
    assert goodput.num_runs <= 12


def test_a_policy_that_never_keeps_the_level_has_no_goodput(folder: Path) -> None:
    *_, goodput = search(plan(folder), lambda plan: dataclasses.replace(figures_of(plan), slo_share=0.0))
    assert isinstance(goodput, Goodput)
    assert goodput.rate_per_s == 0.0


# -- tuning


def test_constants_are_tuned_above_the_policy_s_own_goodput_with_a_seed_of_their_own(folder: Path) -> None:
    best, plans = list(TUNABLE["llm-d"])[3], list[RunPlan]()

    def runs(plan: RunPlan) -> RunFigures:
        plans.append(plan)
        slo_share = 0.99 if plan.load <= 0.4 else 0.9 if plan.constants == best else 0.8
        return dataclasses.replace(figures_of(plan), slo_share=slo_share)

    *_, tuned = tune(plan(folder, policy="llm-d"), runs)
    assert isinstance(tuned, Tuned)
    assert (tuned.plan.constants, tuned.plan.policy) == (best, "llm-d")
    assert tuned.tried == tuple((name, 0.9 if name == best else 0.8) for name in ("", *TUNABLE["llm-d"]))
    assert 0.4 < tuned.plan.load <= 0.4 * TUNING_LOAD
    assert {plan.seed for plan in plans} == {TUNING_SEED}


def test_constants_that_are_no_better_leave_the_policy_s_own(folder: Path) -> None:
    *_, tuned = tune(plan(folder, policy="dynamo"), lambda plan: dataclasses.replace(figures_of(plan), slo_share=0.5))
    assert isinstance(tuned, Tuned)
    assert tuned.plan.constants == ""


def test_every_policy_with_constants_has_as_many_to_be_tuned_over() -> None:
    assert {len(settings) for settings in TUNABLE.values()} == {8}
    assert all(policy not in {POLICIES[name]} for name, settings in TUNABLE.items() for policy in settings.values())


def test_a_run_places_by_the_constants_of_its_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = Orchestrator.__init__

    def spied(self: Orchestrator, transport: Any, policy: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(repr(policy))
        original(self, transport, policy, *args, **kwargs)

    monkeypatch.setattr(Orchestrator, "__init__", spied)
    constants = next(iter(TUNABLE["dynamo"]))
    for one in (plan(folder, policy="dynamo"), plan(folder, policy="dynamo", constants=constants)):
        run(one, fitted(str(folder), MODEL))
    assert seen == [repr(POLICIES["dynamo"]), repr(TUNABLE["dynamo"][constants])]


def test_engines_have_as_much_kv_memory_as_the_plan_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = SimulatedEngine.__init__

    def spied(self: SimulatedEngine, replica_id: str, config: Any, fabric: Any) -> None:
        seen.append(config.num_kv_blocks)
        original(self, replica_id, config, fabric)

    monkeypatch.setattr(SimulatedEngine, "__init__", spied)
    run(plan(folder, kv_factor=3.0), fitted(str(folder), MODEL))
    assert seen == [plan(folder, kv_factor=3.0).roofline.num_kv_blocks] * 2
    assert seen[0] == pytest.approx(3 * ROOFLINES[MODEL].num_kv_blocks, abs=3)


# -- the least


def test_the_first_turn_alone_on_idle_engines_takes_what_the_oracle_says(folder: Path) -> None:
    trace = fitted(str(folder), MODEL)
    session = trace.trajectories[0].root
    alone = dataclasses.replace(
        trace, trajectories=(dataclasses.replace(trace.trajectories[0], root=Session(session.turns[:1])),)
    )
    measured = run(plan(folder, shape=Shape(0, 1), rate_per_s=0.001, num_trajectories=2), alone)
    starts_s, span, _ = session_spans(LIMITS, alone.trajectories[0].root, trace.block_size_tokens)
    ttft_s, decode_s = turn_s(LIMITS, session.turns[0], trace.block_size_tokens)
    assert starts_s == [0.0]
    assert span.total_s == ttft_s + decode_s
    assert ttft_s + decode_s <= measured.turn_mean_s < ttft_s + decode_s + 0.05


# -- the command


def test_the_command_searches_compares_and_writes_its_report(folder: Path, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "r.json", tmp_path / "r.html"
    options = ["--policies", "round-robin", "--shapes", "1x1", "--seeds", "0", "--turns", "12", "--shards", "1"]
    more = ["--rates", "0.05", "--json", str(json_file), "--plot", str(plot)]
    result = CliRunner().invoke(app, ["replay", str(folder), *options, *more])
    assert result.exit_code == 0, result.output
    assert "trajectories a minute" in result.output
    report = json.loads(json_file.read_text())
    assert report["complete"]
    assert [one["plan"]["policy"] for one in report["runs"]] == ["round-robin"]
    assert plot.stat().st_size > 1000


def test_what_an_earlier_report_has_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list[Job]()
    best = next(iter(TUNABLE["dynamo"]))

    def found(asked: Sequence[Job], shards: int, took: Callable[[Result], None]) -> None:
        for job in asked:
            jobs.append(job)
            match job.task:
                case Task.TUNE:
                    tuning = dataclasses.replace(job.plan, seed=TUNING_SEED, constants=best)
                    took(Tuned(tuning, (("", 0.8), (best, 0.9)), 1.0))
                case Task.SEARCH:
                    took(Goodput(at_load(job.plan, 0.5), 3, 1.0))
                case Task.RUN:
                    took(figures_of(job.plan))

    monkeypatch.setattr(replay_experiment, "spread", found)

    def report(*policies: str, earlier: ReplayReport | None = None) -> ReplayReport:
        asked = ReplayPlan(
            (str(folder),), policies, (Shape(1, 1),), (0, 1), MODEL, 12, (0.25, 1.0), (), (), 1, tunes=True
        )
        experiment = Experiment(asked, gather_setting(), lambda words: None, lambda report: None, earlier)
        experiment.run()
        return experiment.report

    first = report("baton", "dynamo")
    assert len(jobs) == 1 + 4 + 8
    jobs.clear()
    second = report("baton", "dynamo", "round-robin", earlier=first)
    assert {job.plan.policy for job in jobs} == {"round-robin"}
    assert len(jobs) == 2 + 4
    assert second.tuned == first.tuned
    assert set(second.goodputs) > set(first.goodputs)
    jobs.clear()
    report("dynamo", earlier=dataclasses.replace(first, tuned=()))
    assert [job.task for job in jobs] == [Task.TUNE], "it came to the same constants: what was found with them holds"


def test_what_is_no_report_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    done = CliRunner().invoke(app, ["replay", str(folder), "--resume", str(tmp_path / "r.json")])
    assert done.exit_code == 2
    assert "is no report of a replay" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policies", "best"], "--policies names best"),
        (["--shapes", "2x2,1x1"], "the same number of GPUs"),
        (["--shapes", "two"], "is no shape"),
        (["--model", "m"], "--model is 'm'"),
        (["--load", "much"], "--load is 'much'"),
        (["--tune", "--seeds", "0,1000"], "--seeds has 1000"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["replay", str(folder), *options])
    assert result.exit_code == 2
    assert words in result.output


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[]")
    result = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert result.exit_code == 2
    assert "a JSON object is needed" in result.output


def test_prefill_fetches_from_decode_only_where_the_plan_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = fitted(str(folder), MODEL)
    # These sessions are too short to pay for it by themselves.
    monkeypatch.setitem(REPLAYED, "asks", asks_when_it_can)
    usual = plan(folder, shape=Shape(2, 2), policy="asks")
    without, reverse = run(usual, trace), run(dataclasses.replace(usual, reverse=True), trace)
    assert (without.num_asked_turns, without.kv_asked_bytes) == (0, 0)
    assert reverse.num_asked_turns > 0
    assert reverse.kv_asked_bytes >= reverse.num_asked_turns * ROOFLINES[MODEL].kv_block_bytes
    assert (reverse.num_failed, reverse.num_refusals) == (0, 0)
