"""Every panel of the dashboards shows something on the running loop, but for what only trouble makes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deploy.children.parent_death import die_with
from deploy.grafana.queries import queries
from deploy.kafka.configuration import free_port
from deploy.watch import scrape
from state.config.settings import Settings
from tests import rules
from tests.e2e.running import Loop, until

Ask = Callable[[str], list[dict[str, Any]]]


def configuration(settings: Settings) -> str:
    """The scrape file and its rules, for a loop at ports of its own, once a second."""
    usual, text = Settings(), (rules.PROMETHEUS / "prometheus.yml").read_text()
    for section, name in (
        ("stream", "metrics_port"),
        ("trainer", "metrics_port"),
        ("serving", "metrics_port"),
        ("serving", "port"),
        ("up", "metrics_port"),
    ):
        was, now = (getattr(getattr(one, section), name) for one in (usual, settings))
        text = text.replace(f"127.0.0.1:{was}", f"127.0.0.1:{now}")
    return text.replace("_interval: 5s", "_interval: 1s").replace("rules/*", f"{rules.PROMETHEUS}/rules/*")


@contextlib.contextmanager
def prometheus(settings: Settings, directory: Path) -> Iterator[Ask]:
    """Debian's Prometheus over a loop; the test is skipped where there is none. Gives what asks it."""
    program, port = rules.program("prometheus"), free_port()
    (directory / "prometheus.yml").write_text(configuration(settings))
    words = (f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/series")
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *words, f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid()),
        )

    def ask(expression: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        status, body = scrape.fetch(url, timeout_s=10.0)
        assert status in (0, 200, 503), f"{expression}: {body}"
        found: list[dict[str, Any]] = json.loads(body)["data"]["result"] if status == 200 else []
        return found

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(15)


def test_every_query_of_a_board_says_something(loop: Loop, tmp_path: Path) -> None:
    asked = {query.where: query.expr for query in queries("30s") if not query.empty}
    with prometheus(loop.settings, tmp_path) as ask:

        def silent() -> list[str]:
            # Rates are of what comes while it is looked at.
            loop.profile("one-who-is-counted")
            for where, expression in list(asked.items()):
                if any(not math.isnan(float(one["value"][1])) for one in ask(expression)):
                    del asked[where]
            return list(asked)

        until(lambda: not silent(), lambda: f"nothing is said by {asked}")
