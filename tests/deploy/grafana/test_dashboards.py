"""The dashboards are valid for Grafana, query only metrics that exist, and agree with the alerts and the runbook."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard, units

from deploy.grafana.__main__ import FOLDER, load, render
from tests import runbook
from tests.dashboards import queries
from tests.promql import misused
from tests.rules import ALERTS

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
SOURCE = load()
DOCUMENTS: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
PANELS = [panel for made in SOURCE.dashboards for row in made.rows for panel in row.panels]
UNITS = {value for name, value in vars(units).items() if name[0].isupper()}
ANCHORS = {section.anchor for section in runbook.SECTIONS.values()}


def drawn(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a dashboard without the headings of its rows."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def missing(written: Any, read: Any, path: str = "") -> list[str]:
    """Paths of the fields that `written` has and `read` lacks or changes."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [one for key, value in written.items() for one in missing(value, read.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = enumerate(zip(written, read, strict=True))
        return [one for number, pair in pairs for one in missing(*pair, f"{path}[{number}]")]
    return [] if written == read else [path]


def test_each_file_is_what_the_source_renders() -> None:
    rendered = {made.file: render(made, SOURCE) for made in SOURCE.dashboards}
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == rendered, "python -m deploy.grafana"
    uids = [made.uid for made in SOURCE.dashboards]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize("file", DOCUMENTS)
def test_grafanas_own_types_know_every_field(file: str) -> None:
    plugins.register_default_plugins()
    document = DOCUMENTS[file]
    read = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(document)))
    unknown = {re.sub(r"\[\d+\]", "", path) for path in missing(document, read)}
    # Fields of the Prometheus plugin that the type of an annotation lacks.
    assert unknown == {".annotations.list.titleFormat", ".annotations.list.step"}


@pytest.mark.parametrize("file", DOCUMENTS)
def test_all_queries_use_the_datasource_that_the_reader_chose(file: str) -> None:
    document = DOCUMENTS[file]
    (variable,) = document["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    asked = [*document["annotations"]["list"], *drawn(document)]
    asked += [target for panel in drawn(document) for target in panel["targets"]]
    assert all(one["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for one in asked)


def test_provisioning_has_the_datasource_and_its_scrape_interval() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/springtide.yml").read_text())["providers"]
    scrape = yaml.safe_load((GRAFANA.parent / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert provider["type"] == "file" and provider["options"]["path"] == "${SPRINGTIDE_DASHBOARDS}"
    (first,) = SOURCE.common["templating"]["list"]
    assert (source["type"], source["uid"]) == ("prometheus", first["current"]["value"])
    assert source["jsonData"]["timeInterval"] == scrape, "rates cover four scrapes"


@pytest.mark.parametrize("file", DOCUMENTS)
def test_panels_have_distinct_ids_do_not_overlap_and_leave_no_hole(file: str) -> None:
    panels = DOCUMENTS[file]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    bottom = max(y for _, y in cells) + 1
    assert sorted(cells) == [(x, y) for x in range(24) for y in range(bottom)]


def test_a_query_uses_metrics_that_exist_as_their_type_and_labels_allow() -> None:
    found = {query.where: misused(query.expr) for query in queries(SOURCE)}
    assert {where: wrong for where, wrong in found.items() if wrong} == {}


def test_a_legend_names_the_labels_that_its_query_keeps() -> None:
    for legend, expr in ((legend, expr) for panel in PANELS for legend, expr in panel.queries.items()):
        named = set(re.findall(r"\{\{(\w+)\}\}", legend))
        kept = {label for labels in re.findall(r"by \(([^)]*)\)", expr) for label in labels.split(", ")}
        if re.match(r"\(?(sum|max|min|count|histogram_quantile)\b", expr):
            assert named == kept - {"le"}, f"{expr} has the legend {legend!r}"


def test_a_panel_has_a_known_unit_full_sentences_and_a_section_of_the_runbook() -> None:
    for panel in PANELS:
        assert panel.unit in UNITS, panel.title
        assert all(text.endswith(".") for text in (panel.shows, panel.normal, panel.otherwise)), panel.title
        assert panel.runbook in ANCHORS and f"runbook.md#{panel.runbook}" in panel.description, panel.title
        assert 0 < len(panel.queries) <= len(string.ascii_uppercase), panel.title
        assert set(panel.dashed) <= panel.queries.keys(), panel.title
        assert bool(panel.states) == (panel.kind == "state-timeline"), panel.title
    for made in SOURCE.dashboards:
        titles = [panel.title for row in made.rows for panel in row.panels]
        assert len(set(titles)) == len(titles), made.title


def test_a_panel_turns_red_where_its_alert_fires_and_names_the_same_section() -> None:
    for panel in (panel for panel in PANELS if panel.alerts):
        rules = [ALERTS[alert] for alert in panel.alerts]
        assert rules[0]["annotations"]["runbook"] == f"docs/operate/runbook.md#{panel.runbook}", panel.title
        limits = {float(number) for rule in rules for number in re.findall(r"[<>]=? (\d[\d.]*)", rule["expr"])}
        # For a count, "above 0" is the same as "from 1 on".
        assert panel.critical is None or {panel.critical, panel.critical - 1} & limits, panel.title


def test_each_alert_has_a_panel() -> None:
    assert set(ALERTS) - {alert for panel in PANELS for alert in panel.alerts} == set()


def test_a_threshold_is_red_on_the_bad_side() -> None:
    by_title = {panel["title"]: panel for document in DOCUMENTS.values() for panel in drawn(document)}

    def steps(title: str) -> list[tuple[float | None, str]]:
        found = by_title[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        return [(step["value"], step["color"]) for step in found]

    assert steps("Clicks that wait") == [(None, "green"), (10_000, "red")]
    assert steps("AUC of the engagement") == [(None, "red"), (0.5, "green")]
    assert steps("Free disk space") == [(None, "red"), (0.05, "orange"), (0.1, "green")]
