"""The rules and queries of Prometheus: each alert fires where it must, by metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from state.config.settings import Settings
from tests import rules
from tests.promql import misused
from tests.rules import ALERTS, RECORDED


def told(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What promtool says."""
    return subprocess.run(
        [rules.program("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def as_promtool_has_it(alert: str, name: str, case: rules.Case) -> dict[str, Any]:
    """A case as one test of a promtool file: what it fires says the summary, and the rule's own advice."""
    rule = rules.ALERTS[alert]
    firing = {
        "exp_labels": {"severity": rule["labels"]["severity"], **(case.labels or {})},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    return {
        "name": f"{alert}, {name}",
        "interval": case.interval,
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": alert, "exp_alerts": [firing] if case.summary else []},
        ],
    }


def test_promtool_takes_the_configuration_and_each_rule() -> None:
    said = told("check", "config", rules.PROMETHEUS / "prometheus.yml")
    assert said.returncode == 0, said.stdout + said.stderr


def with_what_it_reads(alert: str) -> list[dict[str, Any]]:
    """The alert behind the recording rules that it reads: promtool computes all that it is given at each step."""
    read, texts = set[str](), [ALERTS[alert]["expr"]]
    for text in texts:
        new = {name for name in RECORDED if name in text} - read
        read |= new
        texts += [RECORDED[name]["expr"] for name in new]
    return [*(rule for name, rule in RECORDED.items() if name in read), ALERTS[alert]]


@pytest.mark.parametrize("file", [file for file, cases in rules.CASES_OF.items() if cases])
def test_each_alert_fires_where_it_must_and_is_silent_where_it_must(file: str, tmp_path: Path) -> None:
    # One promtool for all alerts of a file: its start takes longer than its work.
    paths = []
    for alert, cases in rules.CASES_OF[file].items():
        rule_file = tmp_path / f"{alert}.json"  # JSON is YAML
        rule_file.write_text(json.dumps({"groups": [{"name": alert, "rules": with_what_it_reads(alert)}]}))
        for interval in sorted({case.interval for case in cases.values()}):
            tests = [as_promtool_has_it(alert, name, case) for name, case in cases.items() if case.interval == interval]
            document = {"rule_files": [str(rule_file)], "evaluation_interval": interval, "tests": tests}
            paths.append(tmp_path / f"{alert} {interval} cases.json")
            paths[-1].write_text(json.dumps(document))
    said = told("test", "rules", *paths)
    assert said.returncode == 0, said.stdout + said.stderr


PROVED_BY = {
    "a minute": "[1m]",
    "two minutes": "[2m]",
    "five minutes": "[5m]",
    "half an hour": "[30m]",
    "an hour": "[1h]",
}


@pytest.mark.parametrize("alert", rules.ALERTS)
def test_what_an_alert_says_is_true_from_its_first_moment(alert: str) -> None:
    # Whoever looks reads the summary while the alert is pending: `for` has proved nothing yet.
    rule = rules.ALERTS[alert]
    spans = re.findall(r"\bfor ((?:half )?an? (?:hour|minute)|\w+ (?:minutes|hours))\b", rule["annotations"]["summary"])
    assert [span for span in spans if PROVED_BY.get(span, span) not in rule["expr"]] == []


DEPLOY = Path(__file__).parents[3] / "deploy"
SCRAPE = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())


def test_every_expression_uses_metrics_that_exist_as_their_type_and_labels_allow() -> None:
    wrong = {name: misused(rule["expr"]) for name, rule in {**RECORDED, **ALERTS}.items()}
    assert {name: said for name, said in wrong.items() if said} == {}


def test_prometheus_scrapes_all_processes_at_their_default_ports() -> None:
    settings = Settings()
    ports = {
        "springtide-stream": settings.stream.metrics_port,
        "springtide-trainer": settings.trainer.metrics_port,
        "springtide-applier": settings.serving.metrics_port,
        "springtide-worker": settings.serving.port,
        "springtide-validation": settings.up.validation_port,
        "springtide-console": settings.console.port,
        "springtide-up": settings.up.metrics_port,
    }
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in SCRAPE["scrape_configs"]}
    assert scraped == {job: [f"127.0.0.1:{port}"] for job, port in ports.items()}
    assert SCRAPE["rule_files"] == ["rules/*.yml"]
