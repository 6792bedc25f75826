"""The dashboard and the alerts ask for what gateways export, and each alert has a runbook."""

import re
from collections.abc import Iterator

import promql_parser as promql
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine.protocol import Phase
from gateway import cli, gauges, metrics, scrape
from tests import monitoring
from tests.monitoring import Query
from tests.unit.gateway.rig import Rig
from tests.unit.virtual_time import simulate

FROM_PROMETHEUS = {"job": {monitoring.JOB}, "instance": set[str]()}
"""The labels that a scrape adds, and `up`, which it makes."""
TENANTS = ("alice", "bob")
QUERIES = [*monitoring.dashboard_queries(), *monitoring.alert_queries()]
RULES = [Query(rule["alert"], rule["expr"]) for rule in monitoring.alerts()]
PARTS = ("It means:", "First look:", "What to do:")

Labels = dict[str, set[str]]


@pytest.fixture(scope="module")
def exported() -> dict[str, Labels]:
    """What one gateway exports before its first request: names of samples, their labels, and the labels' values."""
    families: list[Metric] = []

    async def main() -> None:
        async with Rig() as rig:
            expected = gauges.Expected({Phase.PREFILL: 1, Phase.DECODE: 1}, 1, 30.0, TENANTS)
            families.extend(gauges.families(rig.orchestrator, expected))

    simulate(main)
    metrics.expect_tenants(TENANTS)
    text = scrape.exposition({"gateway-1": [*metrics.collect(), *families]}).decode()
    found: dict[str, Labels] = {"up": {name: set(values) for name, values in FROM_PROMETHEUS.items()}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {name: set(values) for name, values in FROM_PROMETHEUS.items()})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def by_query(query: Query) -> str:
    return query.where


@pytest.mark.parametrize("query", [*QUERIES, *RULES], ids=by_query)
def test_what_is_asked_for_is_exported_with_these_labels_and_values(query: Query, exported: dict[str, Labels]) -> None:
    selectors = monitoring.nodes(query.tree, promql.VectorSelector)
    assert selectors
    for selector in selectors:
        assert selector.name in exported, f"nobody exports {selector.name}"
        labels = exported[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            assert any(holds(matcher, value) for value in labels[matcher.name]), (
                f"no {selector.name} has {matcher.name} {matcher.value}: {sorted(labels[matcher.name])}"
            )


def holds(matcher: promql.Matcher, value: str) -> bool:
    """Whether a matcher names this value, be it to choose or to leave out."""
    if matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual):
        return matcher.value == value
    return re.fullmatch(matcher.value, value) is not None


@pytest.mark.parametrize("query", [*QUERIES, *RULES], ids=by_query)
def test_what_is_summed_up_by_a_label_has_it(query: Query, exported: dict[str, Labels]) -> None:
    for aggregate in monitoring.nodes(query.tree, promql.AggregateExpr):
        wanted = set(aggregate.modifier.labels if aggregate.modifier else ())
        for selector in monitoring.nodes(aggregate.expr, promql.VectorSelector):
            assert wanted <= exported[selector.name].keys(), f"{aggregate} of {selector.name}"


@pytest.mark.parametrize("query", [*QUERIES, *RULES], ids=by_query)
def test_what_all_gateways_see_alike_is_never_added_up(query: Query) -> None:
    for aggregate in monitoring.nodes(query.tree, promql.AggregateExpr):
        for selector in monitoring.nodes(aggregate.expr, promql.VectorSelector):
            is_shared = selector.name.startswith("baton_pool_") or selector.name.endswith("_wanted")
            assert not is_shared or str(aggregate.op) in ("max", "min"), str(aggregate)


def test_every_choice_of_pace_is_a_bucket(exported: dict[str, Labels]) -> None:
    (variable,) = (v for v in monitoring.dashboard()["templating"]["list"] if v["name"] == "tpot_slo")
    assert set(variable["query"].split(",")) <= exported["baton_tpot_seconds_bucket"]["le"]


def test_panels_have_ids_of_their_own_and_cover_no_other() -> None:
    panels = monitoring.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [cell for panel in panels for cell in cells_of(panel["gridPos"])]
    assert len(cells) == len(set(cells))
    assert all(0 <= x < 24 for x, _ in cells)


def cells_of(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


def test_every_panel_asks_the_data_source_that_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in monitoring.panels():
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )


def test_the_dashboard_answers_its_four_questions() -> None:
    rows = [panel["title"] for panel in monitoring.dashboard()["panels"] if panel["type"] == "row"]
    assert rows == [
        "Is it healthy?", "Where does the time go?", "Is splitting paying?", "Who is being starved?",
    ]  # fmt: skip


def runbooks() -> dict[str, str]:
    """The text below each alert's heading."""
    _, _, section = monitoring.RUNBOOKS.read_text().partition("\n## Alerts\n")
    section = re.split(r"\n## ", section)[0]
    _, *parts = re.split(r"^### ", section, flags=re.MULTILINE)
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert list(runbooks()) == [rule["alert"] for rule in monitoring.alerts()]


@pytest.mark.parametrize("rule", monitoring.alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happens_and_where_its_runbook_is(rule: dict) -> None:
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
    assert rule["labels"]["severity"] in ("critical", "warning")


@pytest.mark.parametrize("alert", [rule["alert"] for rule in monitoring.alerts()])
def test_a_runbook_says_what_it_means_where_to_look_and_what_to_do(alert: str) -> None:
    text = runbooks()[alert]
    places = [text.find(f"**{part}**") for part in PARTS]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("alert", [rule["alert"] for rule in monitoring.alerts()])
def test_a_runbook_names_commands_and_metrics_that_exist(alert: str, exported: dict[str, Labels]) -> None:
    text = runbooks()[alert]
    commands = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    }
    assert set(re.findall(r"\bbaton ([a-z]+)", text)) <= commands | {"serve"}
    families = {name.removesuffix("_total") for name in exported}
    for name in re.findall(r"\bbaton_[a-z_]+", text):
        assert name in exported or name.removesuffix("_total") in families, name
