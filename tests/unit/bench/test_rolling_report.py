"""A rolling update's report: who counts as replaced, which answers are bad, which targets are met."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.fault_asks import Answer, Choice, End
from bench.fault_report import ReceiptFacts
from bench.fault_view import GatewayView, InfoView, LoadView, ReplicaView
from bench.results import Setting, write_json
from bench.rolling_report import (
    Asked,
    Observed,
    Replaced,
    RollingPlan,
    RollingReport,
    Rollout,
    changed,
    evaluate,
    max_num_seqs,
    num_replicas,
    ready_replicas,
    table,
    targets,
)
from gateway.settings import load

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "faults.yaml"
SETTING = Setting("2026-11-24T00:00:00+00:00", {}, "", False, "cpu", 2, 8.0)
PLAN = RollingPlan("configs/faults.yaml", clients=1, before_s=15.0, seed=0)
REPLICAS = {"prefill": 2, "decode": 2, "gateway": 2}
REPLACED = tuple(Replaced(name, number, number, 60.0) for name, number in REPLICAS.items())
SEEN = Observed(20.0, REPLACED, 80.0, "", 0.1, "", "")
BEFORE = {"decode": ("d0", "d1"), "gateway": ("g0",)}


def answer(name: str, end: End = End.COMPLETE, token_ids: tuple[int, ...] = (1, 2, 3), sent_s: float = 25.0) -> Answer:
    choices = {0: Choice("", list(token_ids), "length" if end is End.COMPLETE else None)}
    times = {"sent_s": sent_s, "first_token_s": sent_s + 0.5, "ended_s": sent_s + 3.0, "longest_gap_s": 0.2}
    return Answer(name, end, 200, choices=choices, **times)


def asked(*more: Asked) -> list[Asked]:
    well = [Asked(answer(f"greedy-0-{number}"), ReceiptFacts("finished")) for number in range(5)]
    early = Asked(answer("seeded-0-9", sent_s=1.0), ReceiptFacts("finished"))
    return [early, *well, *more]


def report(*more: Asked, seen: Observed = SEEN, complete: bool = True, **references: Answer) -> RollingReport:
    everything = asked(*more)
    undisturbed = {one.answer.name: answer(one.answer.name) for one in everything} | references
    return evaluate(PLAN, SETTING, everything, undisturbed, seen, complete=complete)


def missed(of: RollingReport) -> list[str]:
    return [target.name for target in targets(PLAN, REPLICAS) if not target.is_met_by(of)]


def test_engines_of_both_pools_change_and_nothing_else() -> None:
    settings = load(CONFIG)
    after = changed(settings)
    assert (max_num_seqs(settings), max_num_seqs(after)) == (
        {"prefill": 64, "decode": 64},
        {"prefill": 63, "decode": 63},
    )
    assert num_replicas(after) == REPLICAS
    assert settings.model_dump_json() == after.model_dump_json().replace('"max_num_seqs":63', '"max_num_seqs":64')


# Who is replaced


def test_a_replica_is_replaced_when_it_has_gone_and_a_new_one_is_ready() -> None:
    rollout = Rollout(BEFORE)
    assert rollout.take(1.0, ("d0", "d1", "g0"), {"decode": {"d0", "d1", "d2"}, "gateway": {"g0"}}) == []
    assert rollout.take(2.0, ("d1", "g0"), {"decode": {"d1"}, "gateway": {"g0"}}) == []
    assert rollout.take(3.0, ("d1", "g0"), {"decode": {"d1", "d2"}, "gateway": {"g0"}}) == ["decode"]
    assert rollout.take(4.0, ("d1",), {"decode": {"d1", "d2"}, "gateway": {"g1"}}) == ["gateway"]
    assert rollout.take(5.0, (), {"decode": {"d2", "d3"}, "gateway": {"g1"}}) == ["decode"]
    assert rollout.take(6.0, (), {}) == []
    assert rollout.replaced() == (Replaced("decode", 2, 2, 5.0), Replaced("gateway", 1, 1, 4.0))


def replica(id: str, seqs: int = 63, *, ready: bool = True) -> ReplicaView:
    return ReplicaView(id, "decode", True, ready, 0, 0, LoadView(0, 0, 0), InfoView([1], seqs))


def test_a_replica_is_ready_when_every_gateway_can_use_it_with_its_new_settings() -> None:
    one = GatewayView("g0", [], {"decode": [replica("a"), replica("b", 64), replica("c"), replica("d")]})
    two = GatewayView("g1", [], {"decode": [replica("a"), replica("b", 64), replica("c", ready=False)]})
    assert ready_replicas([one, two], {"decode": 63}) == {"gateway": {"g0", "g1"}, "decode": {"a"}}
    assert ready_replicas([], {"decode": 63}) == {"gateway": set(), "decode": set()}


# What is judged


def test_an_update_that_nobody_noticed_meets_every_target() -> None:
    well = report()
    assert missed(well) == []
    assert (well.requests, well.failed, well.compared, well.differing, well.met_fault) == (6, 0, 6, 0, 0)
    assert well.before is not None
    assert well.during is not None
    assert (well.before.by_kind, well.during.by_kind) == ({"seeded": 1}, {"greedy": 5})
    assert (well.during.tokens, well.during.longest_gap_s, well.during.longest_first_token_s) == (15, 0.2, 0.5)
    assert well.troubles == ()


@pytest.mark.parametrize("end", [End.ERROR, End.REFUSED, End.BROKEN, End.CUT, End.HUNG])
def test_no_request_may_fail(end: End) -> None:
    bad = report(Asked(answer("tools-0-6", end, ()), None))
    assert missed(bad) == ["failed requests"]
    assert (bad.failed, bad.without_receipt, bad.troubles[0].end) == (1, 1, end.value)


def test_no_answer_may_differ_from_the_undisturbed_one() -> None:
    bad = report(Asked(answer("penalties-0-6", token_ids=(1, 2, 4)), None))
    assert missed(bad) == ["answers that differ from an undisturbed run"]
    assert "token 2" in bad.troubles[0].problem
    assert bad.troubles[0].sent_s == 5.0


def test_an_answer_that_cannot_be_compared_proves_nothing() -> None:
    name = "greedy-0-6"
    bad = report(Asked(answer(name), None), **{name: answer(name, End.BROKEN)})
    assert missed(bad) == ["answers without an undisturbed one to compare with"]
    assert bad.differing == 0


def test_a_fault_that_no_client_noticed_is_told_and_is_no_failure() -> None:
    met = report(Asked(answer("greedy-0-6"), ReceiptFacts("finished", ("pull_failed",), ("the pull failed",))))
    assert missed(met) == []
    assert (met.met_fault, met.fault_kinds) == (1, {"pull_failed": 1})
    assert met.troubles[0].faults == ("the pull failed",)


@pytest.mark.parametrize(
    ("change", "target"),
    [
        ({"replaced": (*REPLACED[:2], Replaced("gateway", 2, 1, None))}, "gateway replicas replaced"),
        ({"kv_back_s": None}, "KV blocks back at zero after the last answer"),
        ({"left_over": "3 of 2 gateway"}, "kinds of processes missing or left over"),
    ],
)
def test_what_the_update_leaves_undone_is_missed(change: dict[str, Any], target: str) -> None:
    assert missed(report(seen=replace(SEEN, **change))) == [target]


def test_a_run_that_is_never_whole_again_says_what_is_missing() -> None:
    bad = report(seen=replace(SEEN, whole_s=None, not_whole="1 of 2 gateways answer"))
    assert missed(bad) == ["whole again, and every old replica gone", "kinds of processes missing or left over"]
    assert "never: 1 of 2 gateways answer" in list(table(bad).columns[1].cells)


def test_a_longer_pause_than_a_client_should_see_is_missed() -> None:
    slow = answer("greedy-0-6")
    slow.longest_gap_s = 60.0
    assert missed(report(Asked(slow, None))) == ["longest time between two tokens of an answer"]


@pytest.mark.parametrize("make", [lambda: report(complete=False), lambda: RollingReport(False, PLAN, SETTING)])
def test_a_run_that_was_interrupted_meets_no_target(make: Callable[[], RollingReport]) -> None:
    assert len(missed(make())) == len(targets(PLAN, REPLICAS))


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(report(), path)
    assert msgspec.json.decode(path.read_bytes(), type=RollingReport) == report()
