"""Writes the Grafana dashboards from `dashboards.yml`: `python -m deploy.grafana`."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

SOURCE = Path(__file__).parent / "dashboards.yml"
FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE_UID = "springtide-prometheus"
"""The datasource of `provisioning`; `$datasource` starts with it."""
RATE_INTERVAL = "$__rate_interval"
"""Grafana's variable: the longer of four scrapes, and a graph step plus one scrape."""
COLUMNS = 24

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DASHED = [
    {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
    {"id": "custom.fillOpacity", "value": 0},
]


class Annotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event that is marked in every graph while `expr` is above 0."""

    name: str
    expr: str
    title: str
    colour: str
    shown: bool = True


class Panel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One panel."""

    title: str
    unit: str
    shows: str
    normal: str
    otherwise: str
    runbook: str
    queries: dict[str, str]
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    alerts: tuple[str, ...] = ()
    warning: float | None = None
    critical: float | None = None
    low_is_bad: bool = False
    may_be_empty: str = ""
    dashed: tuple[str, ...] = ()
    states: dict[int, tuple[str, str]] = {}

    @property
    def height(self) -> int:
        """Grid rows of 30 pixels."""
        return 4 if self.kind == "stat" else 8

    @property
    def description(self) -> str:
        """Markdown: what the panel shows, what is normal, what to do, its alerts and its section of the runbook."""
        alerts = f"Alerts: {', '.join(self.alerts)}. " if self.alerts else ""
        return (
            f"{self.shows}\n\nNormal: {self.normal}\n\nOtherwise: {self.otherwise}\n\n"
            f"{alerts}Runbook: docs/operate/runbook.md#{self.runbook}"
        )


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Panels below one heading."""

    title: str
    panels: tuple[Panel, ...]


class Dashboard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One dashboard; its address in Grafana is `/d/UID`."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def file(self) -> str:
        """Name of its JSON file."""
        return self.uid.removeprefix("springtide-") + ".json"

    def panels(self) -> Iterator[Panel]:
        """All panels, in order."""
        return (panel for row in self.rows for panel in row.panels)


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`dashboards.yml`."""

    annotations: tuple[Annotation, ...]
    dashboards: tuple[Dashboard, ...]


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


def load() -> Source:
    """Reads `dashboards.yml`.

    Raises:
        msgspec.ValidationError: A field is unknown, missing or of another type; the message has its path.
    """
    return msgspec.yaml.decode(SOURCE.read_bytes(), type=Source)


def queries(source: Source, rate_interval: str = "1m") -> Iterator[Query]:
    """Yields the queries of all panels and annotations, with `rate_interval` in place of Grafana's variable."""
    for dashboard in source.dashboards:
        for panel in dashboard.panels():
            for legend, expr in panel.queries.items():
                where = f"{dashboard.uid}, {panel.title}, {legend}"
                yield Query(where, expr.replace(RATE_INTERVAL, rate_interval), panel.may_be_empty)
    for annotation in source.annotations:
        expr = annotation.expr.replace(RATE_INTERVAL, rate_interval)
        yield Query(f"annotation, {annotation.name}", expr, "nothing changed")


def render(dashboard: Dashboard, annotations: tuple[Annotation, ...]) -> str:
    """Returns the JSON text that Grafana reads."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["springtide"],
        "schemaVersion": 36,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_annotation(annotation) for annotation in annotations]},
        "links": [
            {
                "type": "dashboards",
                "title": "Springtide",
                "tags": ["springtide"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {
            "list": [
                {
                    "type": "datasource",
                    "name": "datasource",
                    "label": "Prometheus",
                    "query": "prometheus",
                    "current": {"selected": True, "text": "Prometheus", "value": DATASOURCE_UID},
                }
            ]
        },
        "panels": list(_panels(dashboard.rows)),
    }
    return json.dumps(document, indent=1) + "\n"


def _annotation(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.name,
        "expr": annotation.expr,
        "titleFormat": annotation.title,
        "iconColor": annotation.colour,
        "enable": annotation.shown,
        "datasource": _DATASOURCE,
        # The interval of scrapes, so that events of a few seconds are found.
        "step": "5s",
    }


def _panels(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    """Arranges panels in a grid of `COLUMNS` columns: four stats or three graphs per row; a shorter row is widened."""
    ids, y = itertools.count(1), 0
    for row in rows:
        yield {
            "id": next(ids),
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        y += 1
        for height, group in itertools.groupby(row.panels, key=lambda panel: panel.height):
            remaining, most = list(group), 4 if height == 4 else 3
            while remaining:
                # Four graphs become two rows of two, so that no row has a single graph.
                count = 2 if len(remaining) == 4 and most == 3 else min(most, len(remaining))
                width = COLUMNS // count
                for column, panel in enumerate(remaining[:count]):
                    grid = {"h": height, "w": width, "x": column * width, "y": y}
                    yield {"id": next(ids), "gridPos": grid, **_panel(panel)}
                remaining, y = remaining[count:], y + height


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _thresholds(panel)}}
    limited = panel.warning is not None or panel.critical is not None
    reduce_options = {"calcs": ["lastNotNull"], "values": False}
    options: dict[str, Any]
    if panel.kind == "stat":
        options = {"graphMode": "area", "colorMode": "value" if limited else "none", "reduceOptions": reduce_options}
    elif panel.kind == "state-timeline":
        states = {str(value): {"text": text, "color": colour} for value, (text, colour) in panel.states.items()}
        defaults |= {"mappings": [{"type": "value", "options": states}], "custom": {"lineWidth": 0, "fillOpacity": 70}}
        options = {"legend": _legend(False), "rowHeight": 0.8, "showValue": "auto"}
    else:
        custom: dict[str, Any] = {"fillOpacity": 8, "showPoints": "never"}
        if limited:
            custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["custom"] = custom
        options = {"legend": _legend(True), "tooltip": {"mode": "multi", "sort": "desc"}}
    targets = [
        {"refId": ref, "expr": expr, "legendFormat": legend, "range": True, "instant": False, "datasource": _DATASOURCE}
        for ref, (legend, expr) in zip(string.ascii_uppercase, panel.queries.items(), strict=False)
    ]
    overrides = [
        {"matcher": {"id": "byFrameRefID", "options": target["refId"]}, "properties": _DASHED}
        for target in targets
        if target["legendFormat"] in panel.dashed
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": targets,
    }


def _legend(shown: bool) -> dict[str, Any]:
    calcs = ["lastNotNull"] if shown else []
    return {"showLegend": shown, "displayMode": "list", "placement": "bottom", "calcs": calcs}


def _thresholds(panel: Panel) -> list[dict[str, Any]]:
    """Green, orange from `warning` on, red from `critical` on; with `low_is_bad` red below `critical`, and so on."""
    levels = [(panel.warning, "orange"), (panel.critical, "red")]
    thresholds = [(value, colour) for value, colour in levels if value is not None]
    if panel.low_is_bad:
        thresholds.reverse()
        colours = [*(colour for _, colour in thresholds), "green"]
        values = [None, *(value for value, _ in thresholds)]
    else:
        colours = ["green", *(colour for _, colour in thresholds)]
        values = [None, *(value for value, _ in thresholds)]
    return [{"value": value, "color": colour} for value, colour in zip(values, colours, strict=True)]


if __name__ == "__main__":
    source = load()
    for dashboard in source.dashboards:
        (FOLDER / dashboard.file).write_text(render(dashboard, source.annotations))
