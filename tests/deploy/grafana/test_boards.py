"""The dashboards are what their code makes, and ask of Prometheus only what is there, with what to make of it."""

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

from deploy.grafana.boards import BOARDS
from deploy.grafana.building import SOURCE_UID, as_json
from deploy.grafana.marks import MARKS
from deploy.grafana.queries import queries
from tests import runbook
from tests.metric_use import misused
from tests.rules import ALERTS

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
DOCUMENTS: dict[str, dict[str, Any]] = {
    path.name: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS = [panel for board in BOARDS for panel in board.panels()]
UNITS = {value for name, value in vars(units).items() if name[0].isupper()}
ANCHORS = {section.anchor for section in runbook.SECTIONS.values()}


def drawn(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a board without the headings of its groups."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def test_each_file_is_what_the_code_makes() -> None:
    made = {board.file: as_json(board) for board in BOARDS}
    assert set(made) == set(DOCUMENTS), "python -m deploy.grafana"
    for file, text in made.items():
        assert (GRAFANA / "dashboards" / file).read_text() == text, "python -m deploy.grafana"


def test_there_is_a_board_for_each_question_at_an_address_of_its_own() -> None:
    assert [board.uid.removeprefix("springtide-") for board in BOARDS] == [
        "overview",
        "stream",
        "trainer",
        "serving",
        "quality",
        "fairness",
    ]
    assert {document["uid"] for document in DOCUMENTS.values()} == {board.uid for board in BOARDS}


@pytest.mark.parametrize("file", DOCUMENTS)
def test_a_board_has_a_title_is_found_by_its_tag_and_leads_to_the_others(file: str) -> None:
    document = DOCUMENTS[file]
    assert document["title"].startswith("Springtide: ") and document["tags"] == ["springtide"]
    assert [(link["type"], link["tags"]) for link in document["links"]] == [("dashboards", ["springtide"])]


@pytest.mark.parametrize("file", DOCUMENTS)
def test_everything_on_a_board_is_asked_of_the_datasource_that_the_reader_chose(file: str) -> None:
    document = DOCUMENTS[file]
    (variable,) = document["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    asked = [*document["annotations"]["list"], *drawn(document)]
    asked += [target for panel in drawn(document) for target in panel["targets"]]
    assert {json.dumps(one["datasource"], sort_keys=True) for one in asked} == {
        '{"type": "prometheus", "uid": "${datasource}"}'
    }


def test_provisioning_leads_to_the_boards_and_to_the_datasource_that_they_begin_with() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/springtide.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] == "${SPRINGTIDE_DASHBOARDS}"
    assert (source["type"], source["uid"]) == ("prometheus", SOURCE_UID)
    assert {document["templating"]["list"][0]["current"]["value"] for document in DOCUMENTS.values()} == {SOURCE_UID}


def test_rates_are_taken_over_as_many_scrapes_as_prometheus_makes() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    scrape = yaml.safe_load((GRAFANA.parent / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape


@pytest.mark.parametrize("file", DOCUMENTS)
def test_panels_have_numbers_of_their_own_do_not_overlap_and_fill_their_lines(file: str) -> None:
    panels = DOCUMENTS[file]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
    for y in {panel["gridPos"]["y"] for panel in panels}:
        assert {x for x, at in cells if at == y} == set(range(24)), f"a hole in line {y}"


@pytest.mark.parametrize("file", DOCUMENTS)
def test_grafanas_own_types_read_a_board_and_write_it_alike(file: str) -> None:
    plugins.register_default_plugins()
    document = DOCUMENTS[file]
    read = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(document)))
    # What Prometheus' plugin reads of an annotation, and the type does not know.
    for mark in document["annotations"]["list"]:
        assert mark.pop("titleFormat") and mark.pop("step")
    assert read == document


@pytest.mark.parametrize("board", [*(board.uid for board in BOARDS), "mark"])
def test_a_query_uses_metrics_that_exist_as_their_type_and_labels_allow(board: str) -> None:
    mine = [query for query in queries() if query.where.startswith(f"{board}, ")]
    assert mine
    assert {query.where: misused(query.expr) for query in mine if misused(query.expr)} == {}


def test_a_legend_names_labels_that_its_query_keeps() -> None:
    for target in (target for panel in PANELS for target in panel.targets):
        named = set(re.findall(r"\{\{(\w+)\}\}", target.legend))
        kept = {label for labels in re.findall(r"by \(([^)]*)\)", target.expr) for label in labels.split(", ")}
        if re.match(r"\(?(sum|max|min|count|histogram_quantile)\b", target.expr):
            assert named == kept - {"le"}, f"{target.expr} has the legend {target.legend!r}"


def test_a_panel_says_what_is_normal_and_what_to_do_with_a_unit_and_the_runbooks_section() -> None:
    for panel in PANELS:
        assert panel.unit in UNITS, panel.title
        assert all(said.endswith(".") for said in (panel.says, panel.normal, panel.otherwise)), panel.title
        assert panel.runbook in ANCHORS and f"RUNBOOK.md#{panel.runbook}" in panel.description, panel.title
        assert 0 < len(panel.targets) <= len(string.ascii_uppercase), panel.title


def test_no_panel_is_defined_twice_on_a_board() -> None:
    for board in BOARDS:
        titles = [panel.title for panel in board.panels()]
        assert len(set(titles)) == len(titles), board.title


def test_a_panel_turns_red_where_its_alert_fires_and_leads_to_the_same_section() -> None:
    for panel in (panel for panel in PANELS if panel.alerts):
        rules = [ALERTS[alert] for alert in panel.alerts]
        assert rules[0]["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{panel.runbook}", panel.title
        limits = {float(number) for rule in rules for number in re.findall(r"[<>]=? (\d[\d.]*)", rule["expr"])}
        # Above 0 is from 1 on, of what is counted.
        assert panel.alarm is None or {panel.alarm, panel.alarm - 1} & limits, panel.title


def test_each_alert_has_a_panel() -> None:
    assert set(ALERTS) - {alert for panel in PANELS for alert in panel.alerts} == set()


def test_a_rollback_a_pin_and_versions_are_marked_on_every_board() -> None:
    for document in DOCUMENTS.values():
        marks = {mark["name"]: mark for mark in document["annotations"]["list"]}
        assert set(marks) == {mark.name for mark in MARKS} >= {"Rollbacks", "Pins", "Versions"}
        assert "springtide_serving_epoch" in marks["Rollbacks"]["expr"] and marks["Rollbacks"]["enable"]
        assert "springtide_serving_version" in marks["Versions"]["expr"]


def test_a_threshold_is_red_on_the_bad_side() -> None:
    by_title = {panel["title"]: panel for document in DOCUMENTS.values() for panel in drawn(document)}
    rising = by_title["Clicks that wait"]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    falling = by_title["AUC of the engagement"]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [(step["value"], step["color"]) for step in rising] == [(None, "green"), (10_000, "red")]
    assert [(step["value"], step["color"]) for step in falling] == [(None, "red"), (0.5, "green")]
