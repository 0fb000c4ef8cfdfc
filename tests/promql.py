"""Which series and labels an expression of PromQL uses."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import promql_parser as promql
from prometheus_client import CollectorRegistry

from state import metrics
from tests.rules import RECORDED

Labels = tuple[tuple[str, str], ...]
Series = Mapping[tuple[str, Labels], float]
Vector = dict[Labels, float]
ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {"/": operator.truediv, "*": operator.mul}
COMPARISON: Mapping[str, Callable[[float, float], bool]] = {">": operator.gt, ">=": operator.ge, "==": operator.eq}


def value(expression: str, series: Series) -> Vector:
    """What the expression gives: labels -> value, empty where an alert would not fire.

    >>> now = {("used", (("part", "a"),)): 9.0, ("limit", (("part", "a"),)): 10.0}
    >>> value("used / limit > 0.8", now), value("used / limit > 0.95", now)
    ({(('part', 'a'),): 0.9}, {})
    """
    found = _value(promql.parse(expression), series)
    assert isinstance(found, dict)
    return found


def _value(node: Any, series: Series) -> Vector | float:
    if isinstance(node, promql.ParenExpr):
        return _value(node.expr, series)
    if isinstance(node, promql.NumberLiteral):
        return float(node.val)
    if isinstance(node, promql.VectorSelector):
        assert not node.matchers.matchers, "matchers are not computed"
        return {labels: number for (name, labels), number in series.items() if name == node.name}
    assert isinstance(node, promql.BinaryExpr), f"{type(node).__name__} is not computed"
    return _binary(str(node.op), _vector(node.lhs, series), _value(node.rhs, series))


def _vector(node: Any, series: Series) -> Vector:
    found = _value(node, series)
    assert isinstance(found, dict)
    return found


def _binary(op: str, left: Vector, right: Vector | float) -> Vector:
    pairs = {
        one: (number, right[one] if isinstance(right, dict) else right)
        for one, number in left.items()
        if not isinstance(right, dict) or one in right
    }
    if op in COMPARISON:
        return {one: number for one, (number, other) in pairs.items() if COMPARISON[op](number, other)}
    return {one: ARITHMETIC[op](number, other) for one, (number, other) in pairs.items()}


def selectors(node: Any, around: str = "") -> Iterator[tuple[Any, str]]:
    """Yields each vector selector and the function that it is an argument of."""
    if isinstance(node, promql.VectorSelector):
        yield node, around
    elif isinstance(node, promql.MatrixSelector):
        yield from selectors(node.vector_selector, around)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from selectors(argument, node.func.name)
    elif isinstance(node, promql.BinaryExpr):
        yield from selectors(node.lhs)
        yield from selectors(node.rhs)
    elif isinstance(node, (promql.AggregateExpr, promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
        yield from selectors(node.expr)


# Series that Prometheus itself makes.
PROMETHEUS_OWN = {"up", "ALERTS"}
OF_ALERTS = {"alertname", "severity"}
GROWING = {"rate", "irate", "increase"}
EVERYWHERE = {"job", "instance"}


@functools.cache
def series() -> dict[str, tuple[str, frozenset[str]]]:
    """Series name -> (type, labels), from the metrics that the processes make."""
    registry = CollectorRegistry()
    for process in (*metrics.PROCESSES, *metrics.OF_EACH_PROCESS):
        process(registry)
    found: dict[str, tuple[str, frozenset[str]]] = {
        name: ("counter" if name.endswith("_total") else "gauge", frozenset()) for name in metrics.OF_ANY_PROCESS
    }
    for collector in list(registry._collector_to_names):
        labels = frozenset(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            if family.type == "counter":
                found[family.name + "_total"] = ("counter", labels)
            elif family.type == "histogram":
                found[family.name + "_bucket"] = ("counter", labels | {"le"})
                found[family.name + "_sum"] = found[family.name + "_count"] = ("counter", labels)
            else:
                found[family.name] = (family.type, labels)
    return found


def misused(expression: str) -> list[str]:
    """What is wrong with an expression; nothing where it is right.

    >>> misused("springtide_stream_events_total")
    ['springtide_stream_events_total is a counter and stands in no function']
    >>> misused('sum by (reason) (rate(springtide_stream_events_total{route="x"}[1m]))')
    ['springtide_stream_events_total has no label route', 'nothing in it has the label reason']
    """
    used = list(selectors(promql.parse(expression)))
    ours = [(selector, function) for selector, function in used if selector.name not in {*PROMETHEUS_OWN, *RECORDED}]
    found = [] if used else ["selects nothing"]
    for selector, function in ours:
        found += _misused(selector, function)
    return found + list(_grouped(expression, {selector.name for selector, _ in used}))


def _misused(selector: promql.VectorSelector, function: str) -> Iterator[str]:
    name = selector.name
    if name not in series():
        yield f"{name} is no metric of state/metrics.py"
        return
    kind, labels = series()[name]
    if (function in GROWING) != (kind == "counter"):
        yield f"{name} is a {kind} and stands in {function or 'no function'}"
    for matcher in selector.matchers.matchers:
        if matcher.name not in labels | EVERYWHERE:
            yield f"{name} has no label {matcher.name}"


def _grouped(expression: str, names: set[str]) -> Iterator[str]:
    if names & RECORDED.keys():
        return
    offered = {label for name in names for label in series().get(name, ("", frozenset()))[1]} | EVERYWHERE
    offered |= OF_ALERTS if "ALERTS" in names else set()
    wanted = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")}
    yield from (f"nothing in it has the label {label}" for label in sorted(wanted - offered))
