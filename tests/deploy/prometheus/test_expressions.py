"""Rules name only metrics that exist, used as their type and labels allow."""

from __future__ import annotations

from tests.metric_use import misused
from tests.rules import ALERTS, RECORDED


def test_every_expression_uses_metrics_that_exist_as_their_type_and_labels_allow() -> None:
    wrong = {name: misused(rule["expr"]) for name, rule in {**RECORDED, **ALERTS}.items()}
    assert {name: said for name, said in wrong.items() if said} == {}
