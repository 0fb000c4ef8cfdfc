"""Prometheus and the metrics and logs of a running loop."""

from __future__ import annotations

import json
import math
import re
import time

import promql_parser as promql
import pytest

from deploy.grafana.__main__ import load
from deploy.watch import scrape
from state import metrics
from state.log import Writer
from state.process.environment import wall_ms
from tests import rules
from tests.dashboards import queries
from tests.e2e.running import Loop, until
from tests.e2e.watching import Watching
from tests.promql import selectors


@pytest.fixture(autouse=True)
def installed() -> None:
    rules.program("prometheus")


def test_each_process_is_a_target_that_answers(loop: Loop, watching: Watching) -> None:
    jobs = {f"springtide-{name}" for name in scrape.targets(loop.settings)}

    def answering() -> bool:
        found = (watching.ask("targets") or {"activeTargets": []})["activeTargets"]
        return {one["labels"]["job"] for one in found if one["health"] == "up"} == jobs

    until(answering, lambda: f"some target is not up: {watching.ask('targets')}")


def test_up_says_where_it_is(loop: Loop, watching: Watching) -> None:
    assert f"alerts: http://127.0.0.1:{loop.settings.up.prometheus_port}/alerts" in loop.said_since_start()


def test_each_rule_is_computed_without_a_fault(watching: Watching) -> None:
    def computed() -> bool:
        return all(rule["health"] != "unknown" for rule in watching.rules()) and bool(watching.rules())

    until(computed, "some rule was never computed")
    found = watching.rules()
    assert {rule["name"] for rule in found} == {*rules.ALERTS, *rules.RECORDED}
    assert [rule for rule in found if rule["health"] != "ok"] == []


NOT_YET = (
    "instance:springtide_serving_weight_freshness_seconds:above_5s",
    "job:springtide_serving_weight_freshness_seconds_above_5s:",
    "instance:springtide_up_settled:starting",
)
"""Recorded series without a sample here: a host's first ten minutes are left out, and `up` has settled. promtool tries both rules."""


def elsewhere(name: str) -> bool:
    """Whether a series is none of this loop's: it sends no probes, has its registry alone, no schedule and one trainer, and a rollout in its test."""
    others = (
        "springtide_probe_",
        "springtide_retrain_",
        "springtide_rollout_",
        "springtide_shared_",
        "springtide_trainer_worker_",
    )
    return name.startswith((*others, *NOT_YET, "instance:springtide_shared_"))


def test_each_series_that_a_rule_asks_for_is_there(loop: Loop, watching: Watching) -> None:
    # What only a fault makes: a dead letter, and a clock that is wrong.
    with Writer(loop.settings.kafka) as writer:
        topic, ahead_ms = loop.settings.kafka.clicks_topic, wall_ms() + 3_000_000
        click = {"user": "bob", "item": "kettle", "category": "kitchen", "action": "view", "time": ahead_ms}
        writer.send(topic, 0, None, b"no json")
        writer.send(topic, None, b"bob", json.dumps(click).encode(), (), ahead_ms)
        writer.flush()
    loop.profile("one-who-is-counted")
    wanted = {
        selector.name
        for rule in (*rules.ALERTS.values(), *rules.RECORDED.values())
        for selector, _ in selectors(promql.parse(rule["expr"]))
        if not elsewhere(selector.name)
    }
    assert "probe" not in scrape.targets(loop.settings)
    began_s = time.monotonic()

    def missing() -> set[str]:
        return wanted - set(watching.ask("label/__name__/values") or ())

    until(lambda: not missing(), lambda: f"nobody measures {missing()}")
    print(f"{len(wanted)} series were there after {time.monotonic() - began_s:.1f} s")
    # A recorded expression has a value too, not only what it is made of.
    empty = [name for name in rules.RECORDED if not elsewhere(name) and not watching.query(name)]
    assert empty == []


def test_what_an_operator_holds_is_an_alert_until_it_is_released(loop: Loop, watching: Watching) -> None:
    loop.springtide("hold", "--reason", "a test")
    watching.wait_for("SpringtideHeldByOperator")
    loop.springtide("release", "--reason", "a test")
    watching.wait_until_over("SpringtideHeldByOperator")


def test_every_query_of_a_dashboard_returns_a_number(loop: Loop, watching: Watching) -> None:
    asked = {query.where: query.expr for query in queries(load(), "30s") if not query.may_be_empty}

    def silent() -> list[str]:
        # Rates need requests while they are polled.
        loop.profile("one-who-is-counted")
        for where, expr in list(asked.items()):
            if any(not math.isnan(float(one["value"][1])) for one in watching.query(expr)):
                del asked[where]
        return list(asked)

    until(lambda: not silent(), lambda: f"no number from {asked}")


MOST_SERIES = 300
USER = "ada-who-is-in-no-log"


def url(loop: Loop, part: str) -> str:
    return scrape.targets(loop.settings)[part]


@pytest.mark.parametrize("part", ["stream", "trainer", "applier", "worker", "up", "validation", "segments", "console"])
def test_a_process_has_few_series_and_all_of_them_are_declared(loop: Loop, part: str) -> None:
    status, text = scrape.fetch(url(loop, part), timeout_s=30.0)
    assert status == 200
    series = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(series) <= MOST_SERIES, f"{len(series)} series of {part}"
    names = {line.partition("{")[0].partition(" ")[0] for line in series}
    assert names <= metrics.names()
    assert names >= {"process_cpu_seconds_total", "process_start_time_seconds", "springtide_build_info"}


def test_no_log_names_a_user_as_it_was_sent(loop: Loop) -> None:
    """Neither one who clicks and is answered, nor one in a click that is refused, nor one in a question that is."""
    loop.answer_trained_on(
        USER, loop.click([(USER, "kettle", "kitchen", "view"), (USER, "kettle", "kitchen", "stare")])
    )
    assert loop.get(f"/v1/profiles/{USER}?at=never")[0] == 400
    said = {
        path.name: path.read_text() for path in loop.settings.logs_dir.glob("*.log*") if "shoppers" not in path.name
    }
    assert said
    assert [name for name, text in said.items() if USER in text or re.search(r"shopper-\d", text)] == []
