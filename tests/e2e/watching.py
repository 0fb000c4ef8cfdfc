"""Asks a real Prometheus what it knows of a loop: its targets, rules, series, and which alerts are on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from deploy.startup import prometheus
from deploy.watch import scrape
from state.config.settings import Settings
from state.process.network import free_port
from state.process.part import die_with
from tests import rules
from tests.e2e.running import until

FAST_S = 1.0
ALERT_S = 180.0


class Watching:
    """What a Prometheus says."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    def wait_for(self, alert: str, **labels: str) -> None:
        """Returns once the alert is on."""
        until(lambda: self._url is None or self.on(alert, **labels), f"{alert} is not on", ALERT_S)

    def wait_until_over(self, alert: str) -> None:
        """Returns once the alert is not on, and Prometheus answers."""
        until(lambda: self._url is None or (self.ask("alerts") and not self.on(alert)), f"{alert} stays on", ALERT_S)

    def ask(self, path: str, **query: str) -> Any:
        """The `data` of an answer of its API; None where it does not answer."""
        status, body = scrape.fetch(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout_s=10.0)
        if status in (0, 503):  # 503: it is starting
            return None
        assert status == 200, f"{path} {query}: {body}"
        return json.loads(body)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector of an expression at this moment."""
        found: list[dict[str, Any]] = (self.ask("query", query=expression) or {"result": []})["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that it computes."""
        groups = (self.ask("rules") or {"groups": []})["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def on(self, alert: str, **labels: str) -> bool:
        """Whether the alert's expression holds: it is pending or firing.

        Its `for` is waited for by no test: promtool's cases have it.
        """
        assert alert in rules.ALERTS
        found = (self.ask("alerts") or {"alerts": []})["alerts"]
        return any(one["labels"].items() >= {"alertname": alert, **labels}.items() for one in found)


@contextlib.contextmanager
def beside(settings: Settings, directory: Path) -> Iterator[Watching]:
    """A Prometheus of `up`'s making, with its data in another directory than the loop's."""
    program = rules.found("prometheus")
    if program is None:
        yield Watching(None)
        return
    own = replace(
        settings,
        paths=replace(settings.paths, state=str(directory)),
        up=replace(settings.up, prometheus_port=free_port()),
    )
    with mock.patch.object(prometheus, "INTERVAL_S", FAST_S):
        prometheus.write_configuration(own)
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            prometheus.plan(own, str(program)).command,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid()),
        )
    try:
        watching = Watching(prometheus.address(own))
        until(lambda: watching.ask("targets"), "Prometheus does not answer", 30.0)
        yield watching
    finally:
        process.terminate()
        process.wait(15)
