"""Rules name only metrics that exist, used as their type and labels allow, and Prometheus asks every process for them."""

from __future__ import annotations

from pathlib import Path

import yaml

from state.config.settings import Settings
from tests.metric_use import misused
from tests.rules import ALERTS, RECORDED

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
        "springtide-validation": settings.validation.metrics_port,
        "springtide-console": settings.console.port,
        "springtide-up": settings.up.metrics_port,
    }
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in SCRAPE["scrape_configs"]}
    assert scraped == {job: [f"127.0.0.1:{port}"] for job, port in ports.items()}
    assert SCRAPE["rule_files"] == ["rules/*.yml"]
