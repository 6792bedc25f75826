"""Owns how tests read what watches Baton: the expressions of dashboard and alerts, and the tools for them."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "configs/grafana/baton.json"
PROMETHEUS = ROOT / "configs/prometheus/prometheus.yaml"
ALERTS = ROOT / "configs/prometheus/alerts.yaml"
RUNBOOKS = ROOT / "docs/operations.md"

JOB = "baton"
VARIABLES = {"$job": JOB, "$__rate_interval": "1m", "$tpot_slo": "0.1"}
TOOLS_VARIABLE = "BATON_PROMETHEUS"
COMPARISONS = {"==", "!=", "<", "<=", ">", ">="}
SETS = {"and", "or", "unless"}


@dataclass(frozen=True)
class Query:
    """One expression, and whose it is."""

    where: str
    text: str

    @property
    def tree(self) -> Any:
        return promql.parse(self.text)


def tool(name: str) -> str | None:
    """Where `prometheus` or `promtool` is: in the folder that BATON_PROMETHEUS names, or on PATH."""
    return shutil.which(name, path=os.environ.get(TOOLS_VARIABLE)) or shutil.which(name)


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """With a value for each of Grafana's variables."""
    found: list[Query] = []
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in VARIABLES.items():
                text = text.replace(variable, value)
            found.append(Query(f"{panel['title']}, {target['refId']}", text))
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def alert_queries() -> list[Query]:
    """What alerts compare, each side for itself: a comparison that does not hold has no more to show than one of series
    that nobody exports."""
    return [
        Query(rule["alert"], operand.prettify())
        for rule in alerts()
        for operand in _operands(promql.parse(rule["expr"]))
    ]


def _operands(tree: Any) -> Iterator[Any]:
    if isinstance(tree, promql.ParenExpr):
        yield from _operands(tree.expr)
    elif isinstance(tree, promql.BinaryExpr) and str(tree.op) in COMPARISONS | SETS:
        yield from _operands(tree.lhs)
        yield from _operands(tree.rhs)
    elif not isinstance(tree, promql.NumberLiteral):
        yield tree


def nodes(tree: Any, kind: type) -> list[Any]:
    """All of a kind in an expression."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return True

    promql.walk(tree, visit)
    return found
