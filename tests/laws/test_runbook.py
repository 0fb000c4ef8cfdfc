"""The runbook and the alerts lead to each other, and each section says what to type."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client import CollectorRegistry

from deploy.watch.figures import STANDS_BY, WAITS, BudgetLeft, ClocksOff, Figures, full_parts
from deploy.watch.scrape import Scrape, parsed
from deploy.watch.snapshot import Snapshot
from state import errors
from state.errors import CorruptStore, GapError, MicroBatchError, MissingSalt, SpringtideError, StoreFull
from state.history.store import HistoryStore
from state.log import client
from state.log.accepted_gaps import Consent, Journal, how_to_go_on
from state.metrics import TrainerMetrics
from state.positions import Gap, Source
from tests import rules, runbook
from tests.laws.test_commands_documented import check
from tests.promql import selectors
from tests.rules import ALERTS
from trainer.intake import Passages

ROOT = Path(__file__).parents[2]
STREAM = "springtide stream (or up)"
ANCHORS = {one.anchor for one in runbook.SECTIONS.values()}
CLASSES = {
    name: one for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, SpringtideError)
}
MOST_LINES, WIDTH = 14, 120
SEVERITIES = ("critical", "warning", "info", "task")
SECTIONS = {
    "registry": {"answers": False},
    "rollout": {"stopped": True, "unwatched_s": 90.0},
    "retrain": {"problem": "", "outcome": "failed"},
    "hosts": {"without_host": [*range(32)], "with_one_host": [*range(32)]},
    "live_clicks": {"anomalies": {"ENUM_TYPE_UNEXPECTED_STRING_VALUES": 1}},
}
STORAGE = "\n".join(
    f'springtide_storage_{name}{{part="{part}"}} {value}'
    for part in WAITS
    for name, value in (("waiting", 1), ("used_bytes", 95 if part == "registry" else 9), ("limit_bytes", 100))
    if part != "logs"
)


def of_table(section: runbook.Section) -> dict[str, list[str]]:
    """Each name in a table's first cells that are code -> the anchors of its row."""
    found: dict[str, list[str]] = {}
    for *names, where in runbook.rows(section):
        for name in re.findall(r"`(\w+)`", " ".join(names)):
            found.setdefault(name, []).extend(runbook.links(where))
    return found


def test_each_alert_leads_to_a_section_and_the_table_to_the_same() -> None:
    for name, rule in ALERTS.items():
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / document) == runbook.DOCUMENT, name
        assert anchor in ANCHORS, f"{name} leads to #{anchor}, which is not there"
        assert of_table(runbook.STATUS).get(name) == [anchor], f"{name} stands elsewhere in the table"


def test_each_alert_of_the_table_is_one() -> None:
    assert {name for name in of_table(runbook.STATUS) if name.startswith("Springtide")} == set(ALERTS)


def test_each_class_of_the_error_tree_is_in_the_table_and_no_other() -> None:
    named = of_table(runbook.ERRORS)
    assert set(CLASSES) - set(named) == set()
    assert {name for name in named if re.fullmatch(r"[A-Z]\w+", name)} - set(CLASSES) == set()


def test_each_section_is_reached_from_a_table_and_each_link_arrives() -> None:
    from_tables = {*runbook.links("\n".join((*runbook.STATUS.lines, *runbook.ERRORS.lines)))}
    assert {one.anchor for one in runbook.ADVICE} - from_tables == {"first-steps"}
    assert set(runbook.links(runbook.TEXT)) <= ANCHORS


def test_a_section_is_as_severe_as_its_worst_alert_and_the_worst_come_first() -> None:
    severities: dict[str, set[str]] = {}
    for rule in ALERTS.values():
        severities.setdefault(rule["annotations"]["runbook"].partition("#")[2], set()).add(rule["labels"]["severity"])
    for section in runbook.ADVICE:
        known = severities.get(section.anchor, {section.severity})
        assert section.severity == min(known, key=SEVERITIES.index), section.title
        rows = [row for row in runbook.rows(runbook.STATUS) if runbook.links(row[-1]) == [section.anchor]]
        assert all(row[-2] == section.severity for row in rows), section.title
    first, *others = [section.severity for section in runbook.ADVICE]
    assert first == "info" and others == sorted(others, key=SEVERITIES.index)


@pytest.mark.parametrize("section", runbook.ADVICE, ids=lambda one: one.anchor)
def test_a_section_is_read_at_a_glance_says_what_to_type_and_when_it_is_over(section: runbook.Section) -> None:
    assert sum(math.ceil(len(line) / WIDTH) for line in section.lines) <= MOST_LINES
    assert section.commands
    said = " ".join(section.lines)
    assert re.search(r"over (when|by itself)|when it is over|Report it", said), "nobody knows when it is over"


def test_what_status_says_is_what_the_table_shows() -> None:
    wrong = Figures(
        up_s={"worker": 1.0},
        away={"stream": "refused"},
        dying={"trainer": 5.0},
        kafka_away=True,
        starting={"trainer": "starting", "stream": "compiling kernels, 12 of 30", "applier": "lag unknown"},
        behind={
            "trainer": "5,673 records wait and none is processed",
            "stream": "12,000 clicks wait and their number grows",
            "segments": "4,000 records and 0 users wait",
        },
        clocks_off={"ahead": ClocksOff(1.0, 0, 7, 3000.0, 1.0)},
        events_per_s=100.0,
        weights_s=75.0,
        features_s=75.0,
        lag_events=12_000.0,
        dead_per_s=7.0,
        failed_per_s=3.0,
        faults=1.0,
        held=True,
        budget=BudgetLeft(8.0, 0.1, True),
        full=full_parts([Scrape(parsed(STORAGE))]),
        corrupt=1.0,
        degraded=["version"],
        refused=17.0,
        differing=1.0,
    )
    begins = Figures(away={"stream": "refused"}, up="starting")
    nearly = Figures(up="starting")
    stopped = Figures(away={"stream": "refused", "segments": "refused"})
    many = Figures(up_s={"worker": 1.0}, lag_events=12_000.0)
    skips = Figures(up_s={"worker": 1.0}, rows_per_s=10.0, skipped_per_s=3.0, withheld=True)
    waits = Figures(up_s={"worker": 1.0}, starting={"trainer": STANDS_BY})
    held = Figures(up_s={"worker": 1.0}, paused=True, publishing_held=True, pinned=True)
    shown = [Snapshot(figures) for figures in (wrong, begins, nearly, stopped, many, skips, waits, held)]
    shown.append(Snapshot(many).having(SECTIONS))
    shown.append(Snapshot(many).having({"kafka": {"answers": False, "away": False}, "accounting": {"balanced": None}}))
    for problem in (problem for snapshot in shown for problem in snapshot.problems):
        text = re.sub(r" by an operator$| \(partition.*", "", problem.text)
        rows = [row for row in runbook.rows(runbook.STATUS) if text in row[0]]
        assert any(runbook.links(row[-1]) == [problem.section] for row in rows), f"status shows {text!r}"


def test_each_springtide_command_of_the_runbook_and_of_an_alert_is_taken() -> None:
    typed = [command for one in runbook.ADVICE for command in one.commands]
    typed += re.findall(r"`(?:\.venv/bin/)?(springtide [^`]+)`", runbook.TEXT)
    for rule in ALERTS.values():
        typed += re.findall(r"`(springtide [^`]+)`", rule["annotations"]["action"])
    ours = [line for line in typed if line.startswith("springtide ")]
    assert len(ours) > 20
    for line in ours:
        check(shlex.split(runbook.filled(line))[1:])


def section_of(error: type[SpringtideError]) -> str:
    """The row of a class in the table of errors, and the sections that it leads to."""
    row = next(row for row in runbook.rows(runbook.ERRORS) if f"`{error.__name__}`" in row[0])
    found = [one for one in runbook.ADVICE if one.anchor in runbook.links(row[1])]
    return "\n".join([*row, *(line for one in found for line in one.lines)])


@pytest.mark.parametrize("error", CLASSES.values(), ids=lambda one: one.__name__)
def test_the_command_that_an_error_names_is_the_one_of_its_section(error: type[SpringtideError]) -> None:
    for command in re.findall(r"`(springtide [a-z-]+)", error.__doc__ or ""):
        assert command in section_of(error)
    for option in re.findall(r"--[a-z-]+", error.__doc__ or ""):
        assert option in section_of(error) or option == "--to"


def typed(error: SpringtideError) -> str:
    """What a message says to type where `up` runs, as the runbook writes it."""
    (found,) = re.findall(r"springtide \w+ \(or up\)( --[^;`]*)$", str(error))
    return f"springtide up{found}"


def test_what_a_gap_a_cut_and_a_bad_record_say_to_type_is_in_their_sections(tmp_path: Path) -> None:
    source = Source("ab" * 16, 0)
    with pytest.raises(GapError) as gap:
        client.require_kept("clicks", source.topic_id, source.partition, 5, 10, 20)
    cut = client.truncated("clicks", source.topic_id, source.partition, 10, 5, 20)
    passages = Passages(Journal(tmp_path), Consent(), TrainerMetrics(CollectorRegistry()), lambda: 0.0)
    with pytest.raises(MicroBatchError) as bad:
        passages.leave_out(Gap(source, 7, 8), {}, MicroBatchError("it is none", "see who writes"))
    for error in (how_to_go_on(gap.value, STREAM), how_to_go_on(cut, STREAM), bad.value):
        lines = [
            runbook.filled(line, {**runbook.EXAMPLES, "TEXT": "TEXT"}) for line in section_of(type(error)).splitlines()
        ]
        assert typed(error) in lines


def test_a_lost_salt_a_full_store_and_a_power_cut_name_what_their_sections_do() -> None:
    assert "paths.salt_file" in str(MissingSalt.at("salt")) and "springtide config paths.salt_file" in section_of(
        MissingSalt
    )
    assert {"storage.budget_gb"} <= set(re.findall(r"`(\w+\.\w+)`", section_of(StoreFull)))
    assert re.findall(r"`(springtide \S+)`", HistoryStore.remedy)[0] in section_of(CorruptStore).splitlines()


CASES = {alert: both for of_file in rules.CASES_OF.values() for alert, both in of_file.items()}


def test_no_two_rules_have_one_name() -> None:
    assert sum(map(len, rules.ALERTS_OF.values())) == len(rules.ALERTS)


@pytest.mark.parametrize("file", rules.CASES_OF)
def test_each_alert_has_one_case_where_it_fires_and_one_where_it_is_silent(file: str) -> None:
    assert set(rules.CASES_OF[file]) == set(rules.ALERTS_OF[file])
    for alert, both in rules.CASES_OF[file].items():
        assert {"fires", "silent"} <= set(both), alert
        # More cases say in their names what they add.
        for name, case in both.items():
            assert bool(case.summary) == (name.split()[0] == "fires"), (alert, name)


def used(name: str) -> set[str]:
    """The series that a rule's expression needs, what it takes from recording rules resolved."""
    rule = rules.RECORDED.get(name) or rules.ALERTS[name]
    return {
        needed
        for selector, _ in selectors(promql.parse(rule["expr"]))
        for needed in (used(selector.name) if selector.name in rules.RECORDED else {selector.name})
    }


@pytest.mark.parametrize("alert", rules.ALERTS)
def test_an_alert_is_silent_of_what_is_measured_and_not_for_want_of_it(alert: str) -> None:
    given = {re.split(r"[{ ]", series)[0] for series in CASES[alert]["silent"].series}
    assert used(alert) <= given


@pytest.mark.parametrize("rule", rules.ALERTS.values(), ids=list(rules.ALERTS))
def test_an_alert_waits_and_says_how_much_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "action", "runbook"}
    assert all(rule["annotations"][name].strip().endswith(".") for name in ("summary", "action"))
    assert re.search(r"\{\{ (\$value|printf \S+ \$value)", rule["annotations"]["summary"]), "how much is it?"


def test_a_recording_rule_is_named_by_level_metric_and_operation() -> None:
    level_metric_operation = re.compile(r"[a-z_]+:springtide_[a-z0-9_]+:[a-z0-9_]+")
    assert [name for name in rules.RECORDED if not level_metric_operation.fullmatch(name)] == []
