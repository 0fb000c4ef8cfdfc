"""Writes the Grafana dashboards from `dashboards.yml`: `python -m deploy.grafana`."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

SOURCE = Path(__file__).parent / "dashboards.yml"
FOLDER = Path(__file__).parent / "dashboards"
COLUMNS = 24


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


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all panels of a kind have in common.

    Attributes:
        height: Grid rows of 30 pixels.
        most: Panels next to each other.
    """

    height: int
    most: int
    options: dict[str, Any]
    custom: dict[str, Any] = {}


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`dashboards.yml`.

    Attributes:
        common: Fields of Grafana's JSON that all dashboards have.
        dashed: Grafana's properties of a dashed line.
    """

    common: dict[str, Any]
    datasource: dict[str, str]
    dashed: list[dict[str, Any]]
    kinds: dict[str, Kind]
    annotations: tuple[Annotation, ...]
    dashboards: tuple[Dashboard, ...]


def load() -> Source:
    """Reads `dashboards.yml`.

    Raises:
        msgspec.ValidationError: A field is unknown, missing or of another type; the message has its path.
    """
    return msgspec.yaml.decode(SOURCE.read_bytes(), type=Source)


def render(dashboard: Dashboard, source: Source) -> str:
    """Returns the JSON text that Grafana reads."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        **source.common,
        "annotations": {"list": [_annotation(annotation, source) for annotation in source.annotations]},
        "panels": list(_panels(dashboard.rows, source)),
    }
    return json.dumps(document, indent=1) + "\n"


def _annotation(annotation: Annotation, source: Source) -> dict[str, Any]:
    return {
        "name": annotation.name,
        "expr": annotation.expr,
        "titleFormat": annotation.title,
        "iconColor": annotation.colour,
        "enable": annotation.shown,
        "datasource": source.datasource,
        # The interval of scrapes, so that events of a few seconds are found.
        "step": "5s",
    }


def _panels(rows: tuple[Row, ...], source: Source) -> Iterator[dict[str, Any]]:
    """Arranges panels in a grid of `COLUMNS` columns: four stats or three graphs per row; a shorter row is widened."""
    ids, y = itertools.count(1), 0
    for row in rows:
        grid = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        yield {"id": next(ids), "type": "row", "title": row.title, "collapsed": False, "gridPos": grid, "panels": []}
        y += 1
        sizes = ((source.kinds[panel.kind].height, source.kinds[panel.kind].most) for panel in row.panels)
        sized = zip(sizes, row.panels, strict=True)
        for (height, most), group in itertools.groupby(sized, key=lambda entry: entry[0]):
            remaining = [panel for _, panel in group]
            while remaining:
                # Four graphs become two rows of two, so that no row has a single graph.
                count = 2 if len(remaining) == 4 and most == 3 else min(most, len(remaining))
                width = COLUMNS // count
                for column, panel in enumerate(remaining[:count]):
                    grid = {"h": height, "w": width, "x": column * width, "y": y}
                    yield {"id": next(ids), "gridPos": grid, **_panel(panel, source)}
                remaining, y = remaining[count:], y + height


def _panel(panel: Panel, source: Source) -> dict[str, Any]:
    kind = source.kinds[panel.kind]
    custom, options = dict(kind.custom), dict(kind.options)
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _thresholds(panel)}}
    limited = panel.warning is not None or panel.critical is not None
    if panel.kind == "stat":
        options["colorMode"] = "value" if limited else "none"
    elif panel.kind == "state-timeline":
        states = {str(value): {"text": text, "color": colour} for value, (text, colour) in panel.states.items()}
        defaults["mappings"] = [{"type": "value", "options": states}]
    elif limited:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    if custom:
        defaults["custom"] = custom
    common = {"range": True, "instant": False, "datasource": source.datasource}
    targets = [
        {"refId": ref, "expr": expr, "legendFormat": legend, **common}
        for ref, (legend, expr) in zip(string.ascii_uppercase, panel.queries.items(), strict=False)
    ]
    overrides = [
        {"matcher": {"id": "byFrameRefID", "options": target["refId"]}, "properties": source.dashed}
        for target in targets
        if target["legendFormat"] in panel.dashed
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": source.datasource,
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": targets,
    }


def _thresholds(panel: Panel) -> list[dict[str, Any]]:
    """Green, orange from `warning` on, red from `critical` on; with `low_is_bad` red below `critical`, and so on."""
    levels = [(panel.warning, "orange"), (panel.critical, "red")]
    thresholds = [(value, colour) for value, colour in levels if value is not None]
    values, colours = [value for value, _ in thresholds], [colour for _, colour in thresholds]
    if panel.low_is_bad:
        values, colours = values[::-1], [*colours[::-1], "green"]
    else:
        colours = ["green", *colours]
    return [{"value": value, "color": colour} for value, colour in zip([None, *values], colours, strict=True)]


if __name__ == "__main__":
    source = load()
    for dashboard in source.dashboards:
        (FOLDER / dashboard.file).write_text(render(dashboard, source))
