"""What is wrong with how an expression uses our metrics: names, types and labels are those of `state/metrics.py`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import promql_parser as promql
from prometheus_client import CollectorRegistry

from state import metrics
from tests.promql import selectors
from tests.rules import RECORDED

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
