"""`status` shows whatever runs, and says what is away."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import status
from deploy.kafka.broker import free_port
from state import control
from state.config import Settings, load
from state.log import Topics, Writer
from state.metrics import PROCESSES, ApplierMetrics, names, serve
from state.registry import Registry
from state.sections import Kafka


def settings_of(state: Path, kafka: Kafka | None = None) -> Settings:
    ports = ("stream.metrics_port", "trainer.metrics_port", "serving.metrics_port", "serving.port")
    flags = [word for name in ports for word in (f"--{name}", str(free_port()))]
    servers = kafka.bootstrap_servers if kafka else f"127.0.0.1:{free_port()}"
    topics = (
        ["--kafka.clicks_topic", kafka.clicks_topic, "--kafka.microbatches_topic", kafka.microbatches_topic]
        if kafka
        else []
    )
    group = ["--kafka.group", kafka.group] if kafka else []
    common = ["--paths.state", str(state), "--bootstrap-servers", servers, "--kafka.request_timeout_s", "1"]
    return load([*flags, *topics, *group, *common], env={})


def test_every_figure_is_a_metric_that_its_process_offers() -> None:
    named = {series for figures in status.FIGURES.values() for _, series, _ in figures}
    assert named <= names()
    assert len(PROCESSES) == len(status.FIGURES)


# The Kafka client leaves its sockets to the garbage collector when nobody answers.
NOBODY_ANSWERS = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_with_everything_away_each_part_says_so(tmp_path: Path) -> None:
    state = status.status(settings_of(tmp_path / "none"), now_ms=0)
    assert [one["answers"] for one in state["processes"].values()] == [False] * 4
    assert "no broker" in state["kafka"]["problem"]
    assert "no registry" in state["registry"]["problem"]
    assert not (tmp_path / "none").exists()
    shown = status.as_table(state)
    assert shown.count("  away  ") == 6
    json.dumps(state)


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_what_answers_is_shown_while_the_rest_is_away(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    registry = CollectorRegistry()
    metrics = ApplierMetrics(registry)
    metrics.version.set(41)
    metrics.pinned.set(1)
    stop = serve(registry, settings.serving.metrics_port)
    try:
        state = status.status(settings, now_ms=0)
    finally:
        stop()
    assert state["processes"]["applier"]["figures"]["version"] == 41.0
    row = next(line for line in status.as_table(state).splitlines() if line.startswith("applier"))
    assert "version 41" in row
    assert "pinned yes" in row


def test_kafka_lag_is_the_end_less_the_groups_position(tmp_path: Path, kafka_settings: Callable[..., Kafka]) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2)
        topics.ensure(kafka.microbatches_topic, 1)
        writer = Writer(kafka)
        for number in range(10):
            writer.send(kafka.clicks_topic, number % 2, None, b"{}")
        writer.flush()
        writer.close()
        topics.commit(kafka.group, kafka.clicks_topic, {0: 3})
    found = status.kafka_lag(settings_of(tmp_path, kafka))
    assert (found["clicks"], found["lag"], found["training_log"]) == (10, 2 + 5, 0)


def test_control_is_shown_with_who_decided_and_why(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    registry = Registry(settings.registry_dir)
    registry.propose(control.start(actor="trainer", reason="first start", now_ms=0))
    registry.change(lambda now: control.pin(now, 7, actor="ann", reason="odd answers", now_ms=5))
    found = status.registry_state(settings, now_ms=10)
    assert found["control"]["version"] == 7
    assert "version 7 (pinned) in epoch 1, by ann's pin: odd answers" in status.as_table(
        {"processes": {}, "kafka": {"answers": False, "problem": "away"}, "registry": found}
    )


@NOBODY_ANSWERS
@pytest.mark.usefixtures("collected")
def test_main_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path / "none")
    flags = [word for name, value in _flags(settings) for word in (f"--{name}", str(value))]
    assert status.main(["-o", "json", *flags]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"processes", "kafka", "registry", "accounting"}


def _flags(settings: Settings) -> list[tuple[str, object]]:
    return [(name, settings.value(name)) for name in settings.origins]
