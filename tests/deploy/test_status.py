"""`status` shows whatever runs, and says what is away."""

from __future__ import annotations

import gc
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy import sections, status
from deploy.sections import kafka_lag
from deploy.status import CONDITIONS
from deploy.watch.figures import BORN, SPREADS
from deploy.watch.snapshot import Poller, Snapshot
from state.config.loading import load
from state.config.sections import Kafka, SegmentSettings
from state.config.settings import Settings
from state.log import Topics, Writer
from state.metrics import ApplierMetrics, SegmentMetrics, names, serve
from state.process.network import free_port, free_ports
from state.registry import control
from state.registry.registry import Registry
from tests.e2e.running import until


def settings_of(state: Path, kafka: Kafka | None = None) -> Settings:
    ports = ("stream.metrics_port", "trainer.metrics_port", "serving.metrics_port", "serving.port", "up.metrics_port")
    flags = [f"--{name}={port}" for name, port in free_ports(ports).items()]
    servers = kafka.bootstrap_servers if kafka else f"127.0.0.1:{free_port()}"
    topics = (
        ["--kafka.clicks_topic", kafka.clicks_topic, "--kafka.microbatches_topic", kafka.microbatches_topic]
        if kafka
        else []
    )
    group = ["--kafka.group", kafka.group] if kafka else []
    common = ["--paths.state", str(state), "--bootstrap-servers", servers]
    common += ["--kafka.request_timeout_s", "60" if kafka else "1"]
    return load([*flags, *topics, *group, *common], env={})


def test_every_figure_is_a_metric_that_its_process_offers() -> None:
    named = {f"{series}_bucket" for _, series, _ in SPREADS.values()} | {*BORN.values()}
    assert named <= names()


def showing(settings: Settings) -> tuple[dict[str, Any], str]:
    """What status prints as JSON and as text."""
    snapshot = status.take(settings, between_s=0.0)
    return status.document(settings, snapshot), status.as_text(settings, snapshot)


# The Kafka client leaves its sockets to the garbage collector when nobody answers.
NOBODY_ANSWERS = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_with_everything_away_each_part_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "none")
    state, shown = showing(settings)
    assert [one["answers"] for one in state["processes"].values()] == [False] * 4
    assert "no broker" in state["kafka"]["problem"]
    assert "no registry" in state["registry"]["problem"]
    assert not (tmp_path / "none").exists()
    assert len(re.findall(r" (unreachable|unreadable) ", shown)) == 6
    assert shown.startswith("state           nothing answers")
    assert "see             docs/operate/runbook.md#a-process-cannot-run (nothing answers)" in shown
    json.dumps(state, allow_nan=False)


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_what_answers_is_shown_while_the_rest_is_away(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    registry = CollectorRegistry()
    metrics = ApplierMetrics(registry)
    metrics.version.set(41)
    metrics.epoch.set(2)
    metrics.pinned.set(1)
    metrics.weight_age_seconds.observe(0.25)
    stop = serve(registry, settings.serving.metrics_port)
    try:
        state, shown = showing(settings)
    finally:
        stop()
    assert state["figures"]["version"] == 41.0
    assert state["processes"]["applier"]["up_s"] >= 0
    assert state["figures"]["spreads"]["weights_s"]["count"] == 1
    assert state["urls"]["profile"] == f"http://127.0.0.1:{settings.serving.port}/v1/profiles/USER"
    lines = {line[:16].strip(): line for line in shown.splitlines() if line}
    assert (
        "Kafka unreachable, stream unreachable, trainer unreachable, worker unreachable, applier lag unknown, "
        in lines["state"]
    )
    assert "pinned by an operator" in lines["state"]
    assert lines["served version"].split() == [
        "served",
        "version",
        "41",
        "epoch",
        "2,",
        "pinned",
        "newest",
        "-,",
        "serving",
        "-",
        "behind",
    ]
    assert lines["applier"].split()[:3] == ["applier", "runs", "up"]
    assert f"curl -s http://127.0.0.1:{settings.serving.port}/v1/profiles/USER (USER: an id" in lines["try"]


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_segments_are_told_with_their_sizes_and_a_keeper_that_is_away_is_wrong(tmp_path: Path) -> None:
    port, own = free_port(), SegmentSettings(("busy=view.count_1h >= 2", "idle=view.count_1h == 0"))
    settings = settings_of(tmp_path)
    settings = replace(settings, segments=own, up=replace(settings.up, metrics_port=port - 4))
    registry = CollectorRegistry()
    metrics = SegmentMetrics(registry)
    metrics.members.labels("busy").set(1200)
    metrics.lag_records.set(3)
    stop = serve(registry, port)
    try:
        state, shown = showing(settings)
    finally:
        stop()
    assert "segments" not in state["figures"]["away"]
    assert [(one["name"], one["users"]) for one in state["segments"]["segments"]] == [("busy", 1200), ("idle", None)]
    assert "segments        kept        busy 1,200, idle 0 users" in shown
    snapshot = Poller(settings).poll()
    snapshot = Snapshot(replace(snapshot.figures, up_s={"stream": 1.0}), snapshot.scrapes)
    assert "segments unreachable" in snapshot.texts
    problem = f"segments        UNREACHABLE http://127.0.0.1:{port}/metrics does not answer"
    assert problem in status.as_text(settings, snapshot)


def test_kafka_lag_is_the_end_less_the_groups_position(tmp_path: Path, kafka_settings: Callable[..., Kafka]) -> None:
    kafka = kafka_settings()

    def reached() -> dict[str, Any] | None:
        lag = kafka_lag(settings_of(tmp_path, kafka))
        return None if lag["away"] else lag

    found = until(reached, "Kafka does not answer")
    assert "topic" in found["problem"], "a broker without our topics is there"
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2)
        topics.ensure(kafka.microbatches_topic, 1)
        writer = Writer(kafka)
        for number in range(10):
            writer.send(kafka.clicks_topic, number % 2, None, b"{}")
        writer.flush()
        writer.close()
        topics.commit(kafka.group, kafka.clicks_topic, {0: 3})
    found = until(lambda: (one := kafka_lag(settings_of(tmp_path, kafka)))["answers"] and one, "Kafka does not answer")
    assert (found["clicks"], found["lag"], found["training_log"]) == (10, 2 + 5, 0)


@pytest.mark.usefixtures("collected")
def test_a_broker_that_hangs_is_reported(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    settings = settings_of(tmp_path)
    ApplierMetrics(registry).version.set(41)
    stop = serve(registry, settings.serving.metrics_port)
    # As a stopped process does, it accepts connections and answers nothing.
    with socket.create_server(("127.0.0.1", int(settings.kafka.bootstrap_servers.rpartition(":")[2]))):
        try:
            state, _ = showing(settings)
            said = CONDITIONS["well"].missing(settings)
        finally:
            stop()
    assert state["problems"][0]["text"] == "Kafka unreachable"
    assert said.startswith("Kafka unreachable, ")


def test_control_is_shown_with_who_decided_and_why(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    registry = Registry(settings.registry_dir)
    registry.propose(control.start(actor="trainer", reason="first start", now_ms=0))
    registry.change(lambda now: control.pin(now, 7, actor="ann", reason="odd answers", now_ms=5))
    found = sections.registry_state(settings, now_ms=10)
    assert found["control"]["version"] == 7
    assert "version 7 (pinned) in epoch 1, by ann's pin: odd answers" in sections.registry_text(found)[1]
