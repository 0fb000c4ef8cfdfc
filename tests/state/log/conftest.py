"""A topic of clicks on the shared broker, and a broker of one's own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port
from state.config.sections import Kafka
from state.log import Topics
from tests.conftest import KafkaFactory


@pytest.fixture
def settings(kafka_settings: KafkaFactory) -> Kafka:
    return kafka_settings()


@pytest.fixture
def topics(settings: Kafka) -> Iterator[Topics]:
    with Topics(settings) as topics:
        yield topics


@pytest.fixture
def clicks(topics: Topics, settings: Kafka) -> str:
    topics.ensure(settings.clicks_topic, 2)
    return settings.clicks_topic


@pytest.fixture
def refused() -> Iterator[None]:
    """For tests in which connections fail: kafka-python leaves such sockets to the garbage collector."""
    yield
    gc.collect()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "kafka", free_port(), heap_mb=256, retention_h=876_000)
    broker.start()
    yield broker
    broker.stop()
