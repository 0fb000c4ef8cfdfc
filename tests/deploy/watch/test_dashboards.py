"""Rules name only metrics that exist, used as their type allows, and Prometheus asks every process for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import pytest
import yaml
from prometheus_client import CollectorRegistry

from state import metrics
from state.config.settings import Settings
from tests.promql import selectors
from tests.rules import ALERTS, RECORDED

DEPLOY = Path(__file__).parents[3] / "deploy"
SCRAPE = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())

# Series that Prometheus itself makes.
PROMETHEUS_OWN = {"up": "gauge"}
GROWING = {"rate", "irate", "increase"}


def series() -> dict[str, tuple[str, frozenset[str]]]:
    """Series name -> (type, labels), from the metrics that the processes make."""
    registry = CollectorRegistry()
    for process in metrics.PROCESSES:
        process(registry)
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for collector in list(registry._collector_to_names):
        labels = frozenset(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            if family.type == "counter":
                found[family.name + "_total"] = ("counter", labels)
            elif family.type == "histogram":
                found[family.name + "_bucket"] = ("counter", labels | {"le"})
                found[family.name + "_sum"] = found[family.name + "_count"] = ("counter", labels)
            else:
                found[family.name] = (family.type, labels)
    return found


SERIES = series()


def expressions() -> Iterator[tuple[str, str]]:
    """Yields (name, expression) of every rule."""
    for name, rule in {**RECORDED, **ALERTS}.items():
        yield name, rule["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=[where for where, _ in expressions()])
def test_every_expression_uses_metrics_that_exist_as_their_type_allows(where: str, expression: str) -> None:
    used = list(selectors(promql.parse(expression)))
    assert used, f"{where} selects nothing"
    for selector, function in used:
        name = selector.name
        if name in PROMETHEUS_OWN or name in RECORDED:
            continue
        assert name in SERIES, f"{where}: {name} is no metric of state/metrics.py"
        kind, labels = SERIES[name]
        counts = function in GROWING
        assert counts == (kind == "counter"), f"{where}: {name} is a {kind} and stands in {function or 'no function'}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels | {"job", "instance"}, f"{where}: {name} has no label {matcher.name}"


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=[where for where, _ in expressions()])
def test_every_grouping_label_belongs_to_the_metric(where: str, expression: str) -> None:
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    wanted = {label.strip() for labels in grouped for label in labels.split(",")}
    offered = {
        label
        for selector, _ in selectors(promql.parse(expression))
        for label in SERIES.get(selector.name, ("", frozenset()))[1]
    }
    assert wanted <= offered, f"{where} groups by {wanted - offered}"


def test_the_alerts_that_the_loop_needs_are_there() -> None:
    assert set(ALERTS) >= {
        "SpringtideLagGrowing",
        "SpringtideNoNewVersion",
        "SpringtideDeadLetters",
        "SpringtideWeightsStale",
        "SpringtideTrainingHeld",
        "SpringtideTargetDown",
        "SpringtidePartDying",
    }


def test_prometheus_scrapes_all_processes_at_their_default_ports() -> None:
    settings = Settings()
    ports = {
        "springtide-stream": settings.stream.metrics_port,
        "springtide-trainer": settings.trainer.metrics_port,
        "springtide-applier": settings.serving.metrics_port,
        "springtide-worker": settings.serving.port,
        "springtide-up": settings.up.metrics_port,
    }
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in SCRAPE["scrape_configs"]}
    assert scraped == {job: [f"127.0.0.1:{port}"] for job, port in ports.items()}
    assert SCRAPE["rule_files"] == ["rules/*.yml"]
