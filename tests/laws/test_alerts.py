"""An alert is tested in both directions, and tells whoever it wakes how much, what to do, and where more is said."""

from __future__ import annotations

import re
from typing import Any

import promql_parser as promql
import pytest

from tests import rules
from tests.promql import selectors

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
