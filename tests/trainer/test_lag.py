"""The trainer's lag: in positions, in seconds, and as any client of Kafka sees the group's."""

from __future__ import annotations

import logging

import pytest
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from state.config.sections import Kafka
from state.log import Topics, Writer
from state.metrics import TrainerMetrics
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.reading import eventually
from trainer.lag import Taken, TrainingLag

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
        self.lag = TrainingLag(Kafka(), 0, lambda: self.taken, self.metrics, self.log, wall_s=lambda: 100.0)

    def shown(self) -> tuple[float, float]:
        """Positions and seconds."""
        self.lag.poll()
        return self.metrics.lag_records._value.get(), self.metrics.lag_seconds._value.get()


def test_lag_is_in_positions_and_in_seconds_since_the_newest_record_taken() -> None:
    trainer = Trainer(9)
    trainer.taken = Taken(4, 4000)
    assert trainer.shown() == (5, 96.0)
    trainer.taken = Taken(9, 9000)
    assert trainer.shown() == (0, 0.0)


def test_before_the_first_record_the_seconds_are_unknown() -> None:
    assert Trainer(9).shown() == (9, 0.0)


def test_an_unreachable_broker_is_logged_once_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.lag.POLL_S", 0.001)
    trainer = Trainer(3)
    trainer.lag.poll()
    trainer.log.go_away()
    polls: list[int] = []
    trainer.lag._position = lambda: (polls.append(0), trainer.taken)[1]
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
    TrainingLag(kafka, 0, lambda: Taken(3, 1), metrics).poll()
    where = TopicPartition(kafka.microbatches_topic, 0)
    asked = KafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group, enable_auto_commit=False)
    seen = asked.end_offsets([where])[where] - asked.committed(where)
    asked.close()
    assert seen == metrics.lag_records._value.get() == 4
