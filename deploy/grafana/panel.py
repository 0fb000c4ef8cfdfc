"""What a dashboard consists of, without Grafana's JSON: targets, panels, groups, boards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

RATE_INTERVAL = "$__rate_interval"
"""Grafana's own: four scrapes, or a step of the graph and one scrape where that is longer."""


class PanelKind(StrEnum):
    """How a panel draws its targets, by the name of Grafana's plugin."""

    SERIES = "timeseries"
    STAT = "stat"
    STATES = "state-timeline"
    BARS = "bargauge"


@dataclass(frozen=True)
class PanelQuery:
    """One query of a panel.

    Attributes:
        expr: PromQL.
        legend: What the series are called; `{{label}}` is a label's value.
        empty: Why it may select nothing although nothing is wrong; empty where it always selects something.
        dashed: Drawn as a dashed line: a limit.
    """

    expr: str
    legend: str = ""
    empty: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel; its description is made of `says`, `normal` and `otherwise`.

    Attributes:
        title: Its name, once on a board.
        targets: Its queries.
        unit: Of all of them, by Grafana's name of it.
        says: What is shown.
        normal: What one sees when nothing is wrong.
        otherwise: What to do when one sees something else.
        runbook: Anchor of the runbook's section.
        kind: How it is drawn.
        goal: From here on it is orange.
        alarm: From here on it is red; the number of the alert where there is one.
        falling: Low is bad: red below `alarm`, orange below `goal`.
        alerts: The alerts that say the same, the one of that section first.
        states: A number -> what it means and its colour.
        width: Of the 24 columns; the last one of a line takes what is left of it.
    """

    title: str
    targets: tuple[PanelQuery, ...]
    unit: str
    says: str
    normal: str
    otherwise: str
    runbook: str
    kind: PanelKind = PanelKind.SERIES
    goal: float | None = None
    alarm: float | None = None
    falling: bool = False
    alerts: tuple[str, ...] = ()
    states: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    width: int = 8

    @property
    def height(self) -> int:
        """Grafana's rows of 30 pixels that it takes."""
        return 4 if self.kind is PanelKind.STAT else 8

    @property
    def description(self) -> str:
        """Markdown: what is shown, what is normal, what to do, and where more is said of it."""
        where = f"deploy/RUNBOOK.md#{self.runbook}"
        alerts = f"Alerts: {', '.join(self.alerts)}. " if self.alerts else ""
        return f"{self.says}\n\nNormal: {self.normal}\n\nOtherwise: {self.otherwise}\n\n{alerts}Runbook: {where}"


class PanelRow(NamedTuple):
    """Panels under one heading, from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard.

    Attributes:
        uid: Its address in Grafana, which stays: `/d/UID`.
        title: Its name.
        says: The question that it answers.
        groups: From top to bottom.
    """

    uid: str
    title: str
    says: str
    groups: tuple[PanelRow, ...]

    @property
    def file(self) -> str:
        """The name of its JSON file.

        >>> Board("springtide-stream", "Springtide: stream", "", ()).file
        'stream.json'
        """
        return self.uid.removeprefix("springtide-") + ".json"

    def panels(self) -> Iterator[Panel]:
        """All panels, in order."""
        for group in self.groups:
            yield from group.panels


def quantile(share: float, histogram: str, *by: str, only: str = "") -> str:
    """The value below which `share` of what a histogram counted lately lies.

    Args:
        share: Such as 0.99.
        histogram: Its name.
        by: Labels that are kept.
        only: Matchers in braces.

    >>> quantile(0.99, "step_seconds")
    'histogram_quantile(0.99, sum by (le) (rate(step_seconds_bucket[$__rate_interval])))'
    """
    labels = ", ".join(("le", *by))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}_bucket{only}[{RATE_INTERVAL}])))"


def rate(counter: str, *by: str) -> str:
    """How fast a counter grows, each second, summed over all processes.

    >>> rate("clicks_total", "outcome")
    'sum by (outcome) (rate(clicks_total[$__rate_interval]))'
    """
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({counter}[{RATE_INTERVAL}]))"


def both(histogram: str, *by: str, name: str = "", only: str = "") -> tuple[PanelQuery, PanelQuery]:
    """Median and 99th percentile of a histogram.

    Args:
        histogram: Its name.
        by: Labels that are kept.
        name: Begins the legends.
        only: Matchers in braces.
    """
    start = " ".join(filter(None, (name, *(f"{{{{{label}}}}}" for label in by))))
    return (
        PanelQuery(quantile(0.5, histogram, *by, only=only), f"{start} p50".strip()),
        PanelQuery(quantile(0.99, histogram, *by, only=only), f"{start} p99".strip()),
    )
