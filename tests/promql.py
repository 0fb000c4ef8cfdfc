"""What an expression selects, and what an alert's gives of one moment's series where it needs no past: no Prometheus is asked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import promql_parser as promql

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
