"""The trainer's process: its wait for the bootstrap, its phases and child runs, its lag, and the metrics of its device."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import tensorflow as tf
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from state.config.sections import Kafka
from state.config.settings import Settings
from state.log import Topics, Writer
from state.metrics import TrainerMetrics
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.reading import eventually
from tests.trainer.clicks import SPEC
from trainer import device
from trainer import loop as phases
from trainer.gauges import Taken, TrainingLag
from trainer.loop import CATCHING_UP, HURRY_S, LEARNING, PHASES, VERSION, Phases, Scheduled, await_spec


def test_the_wait_for_the_bootstrap_is_logged_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = threading.Event()
    stopping.set()
    with caplog.at_level(logging.INFO):
        assert not await_spec(Registry(tmp_path), SPEC.digest, Settings().model, stopping)
    assert "springtide bootstrap" in caplog.text


def test_one_run_is_started_when_it_is_due_and_failures_in_a_row_are_counted() -> None:
    now, ends = 0.0, list[tuple[int, int]]()
    runs = Scheduled("json.tool", ["--no-such-option"], 10.0, lambda *end: ends.append(end), lambda: now)
    for number in range(3):
        runs.tick()
        assert runs._child is None
        now += 10.0
        runs.tick()
        child = runs._child
        runs.tick()
        assert child is not None and runs._child in (child, None), "no second one"
        child.wait()
        if number == 1:
            runs._command[-1] = "--help"
        runs.tick()
    assert ends == [(2, 1), (2, 2), (0, 0)]
    runs.close()


def test_a_run_starts_sooner_on_a_full_disk_and_none_without_an_interval() -> None:
    never = Scheduled("json.tool", [], 0.0, lambda *_: None, lambda: 1e9)
    never.tick()
    assert never._child is None
    now_s = 0.0
    runs = Scheduled("json.tool", ["--help"], 600.0, lambda *_: None, lambda: now_s)
    for now_s, hurry, started in ((HURRY_S - 1, True, False), (HURRY_S, False, False), (HURRY_S, True, True)):  # noqa: B007
        runs.tick(hurry)
        assert (runs._child is not None) == started
    runs.close()


def test_one_phase_is_shown_at_a_time_and_records_left_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "LOG_S", 0.0)
    caplog.set_level("INFO")
    registry = CollectorRegistry()
    shown = Phases(TrainerMetrics(registry))

    def now() -> list[str]:
        return [one for one in PHASES if registry.get_sample_value("springtide_trainer_phase", {"phase": one})]

    shown.enter(VERSION)
    assert now() == [VERSION]
    shown.follow(False, None)
    shown.follow(False, 5673)
    assert now() == [CATCHING_UP]
    shown.follow(True, 0)
    shown.follow(True, 0)
    assert now() == [LEARNING]
    said = [record.getMessage() for record in caplog.records]
    assert said[1:3] == ["catching up, unknown records left", "catching up, 5,673 records left"]
    assert said[0].endswith("now catching up") and said[3].endswith("now learning") and len(said) == 4


TOPIC = Kafka().microbatches_topic


class Trainer:
    """Somebody who has taken so much of a training log in memory, of whose records Kafka took one a second."""

    def __init__(self, records: int) -> None:
        self.log, self.metrics = MemoryLog(), TrainerMetrics(CollectorRegistry())
        self.log.topics().ensure(TOPIC, 1)
        with self.log.writer() as writer:
            for number in range(records):
                writer.send(TOPIC, 0, None, b"", timestamp_ms=(number + 1) * 1000)
        self.taken = Taken(0, 0)
        self.lag = TrainingLag(Kafka(), lambda: self.taken, self.metrics, self.log, wall_s=lambda: 100.0)

    def shown(self) -> tuple[float, float]:
        """Positions and seconds."""
        self.lag.poll()
        return self.metrics.lag_records._value.get(), self.metrics.lag_seconds._value.get()


def test_lag_is_in_positions_and_in_seconds_since_the_newest_record_taken() -> None:
    trainer = Trainer(9)
    assert trainer.shown() == (9, 0.0), "before the first record the seconds are unknown"
    trainer.taken = Taken(4, 4000)
    assert trainer.shown() == (5, 96.0)
    trainer.taken = Taken(9, 9000)
    assert trainer.shown() == (0, 0.0)


def test_an_unreachable_broker_is_logged_once_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.gauges.POLL_S", 0.001)
    trainer = Trainer(3)
    trainer.lag.poll()
    trainer.log.go_away()
    polls: list[int] = []

    def position() -> Taken:
        polls.append(0)
        return trainer.taken

    monkeypatch.setattr(trainer.lag, "_position", position)
    with caplog.at_level(logging.WARNING):
        trainer.lag.start()
        assert eventually(lambda: len(polls) > 5)
        trainer.taken = Taken(2, 1)
        trainer.log.come_back()
        assert eventually(lambda: trainer.metrics.lag_records._value.get() == 1)
        trainer.lag.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("the lag of the training log is unknown for now: ")


def test_the_groups_lag_of_any_client_is_that_of_the_metric(kafka_settings: KafkaFactory) -> None:
    kafka = kafka_settings()
    metrics = TrainerMetrics(CollectorRegistry())
    with Topics(kafka) as topics, Writer(kafka) as writer:
        topics.ensure(kafka.microbatches_topic, 1)
        for _ in range(7):
            writer.send(kafka.microbatches_topic, 0, None, b"")
        writer.flush()
    TrainingLag(kafka, lambda: Taken(3, 1), metrics).poll()
    where = TopicPartition(kafka.microbatches_topic, 0)
    asked = KafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group, enable_auto_commit=False)
    seen = asked.end_offsets([where])[where] - asked.committed(where)
    asked.close()
    assert seen == metrics.lag_records._value.get() == 4


HELD = "springtide_trainer_device_memory_bytes"


def test_a_cpu_has_no_device_metrics() -> None:
    registry = CollectorRegistry()
    device.show("/CPU:0", TrainerMetrics(registry))
    assert registry.get_sample_value(HELD, {"kind": "current"}) is None


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow finds no GPU here")
def test_the_memory_of_a_gpu_is_shown() -> None:
    registry = CollectorRegistry()
    device.show("/GPU:0", TrainerMetrics(registry))
    with tf.device("/GPU:0"):
        kept = tf.Variable(tf.zeros([1 << 20], tf.float32))
    assert (registry.get_sample_value(HELD, {"kind": "current"}) or 0.0) >= kept.shape[0] * 4
    assert (registry.get_sample_value(HELD, {"kind": "peak"}) or 0.0) >= kept.shape[0] * 4
