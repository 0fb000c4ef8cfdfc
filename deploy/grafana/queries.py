"""Every query of the dashboards as Prometheus takes it, and whether it may select nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from deploy.grafana.boards import BOARDS
from deploy.grafana.marks import MARKS
from deploy.grafana.panel import RATE_INTERVAL


class BoardQuery(NamedTuple):
    """One query.

    Attributes:
        where: Board, panel and place in it, or the annotation.
        expr: PromQL, without Grafana's variables.
        empty: Why it may select nothing although nothing is wrong; empty where it always selects something.
    """

    where: str
    expr: str
    empty: str


def queries(window: str = "1m") -> Iterator[BoardQuery]:
    """Yields those of all panels, then those of the annotations.

    Args:
        window: Takes the place of Grafana's interval of rates.
    """
    for board in BOARDS:
        for panel in board.panels():
            for number, target in enumerate(panel.targets, 1):
                where = f"{board.uid}, {panel.title}, {number}"
                yield BoardQuery(where, filled(target.expr, window), target.empty)
    for mark in MARKS:
        yield BoardQuery(f"mark, {mark.name}", filled(mark.expr, window), "nothing has changed lately")


def filled(expr: str, window: str) -> str:
    """A query without Grafana's variables.

    Args:
        expr: As a panel has it.
        window: Takes the place of Grafana's interval of rates.

    >>> filled("rate(clicks_total[$__rate_interval])", "1m")
    'rate(clicks_total[1m])'
    """
    return expr.replace(RATE_INTERVAL, window)
