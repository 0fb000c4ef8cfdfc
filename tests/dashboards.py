"""The queries of the Grafana dashboards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from deploy.grafana.__main__ import Source

RATE_INTERVAL = "$__rate_interval"
"""Grafana's variable: the longer of four scrapes, and a graph step plus one scrape."""


class Query(NamedTuple):
    """One query of a panel or an annotation, without Grafana's variables.

    Attributes:
        where: Dashboard, panel and legend.
        expr: PromQL.
        may_be_empty: Why it may return nothing on a healthy system; empty if it always returns something.
    """

    where: str
    expr: str
    may_be_empty: str


def queries(source: Source, rate_interval: str = "1m") -> Iterator[Query]:
    """Yields the queries of all panels and annotations, with `rate_interval` in place of Grafana's variable."""
    for dashboard in source.dashboards:
        for panel in (panel for row in dashboard.rows for panel in row.panels):
            for legend, expr in panel.queries.items():
                where = f"{dashboard.uid}, {panel.title}, {legend}"
                yield Query(where, expr.replace(RATE_INTERVAL, rate_interval), panel.may_be_empty)
    for annotation in source.annotations:
        expr = annotation.expr.replace(RATE_INTERVAL, rate_interval)
        yield Query(f"annotation, {annotation.name}", expr, "nothing changed")
