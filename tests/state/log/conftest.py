"""A topic of clicks on the shared broker, and a broker of one's own."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from deploy.local_kafka import Broker
from state.config.sections import Kafka
from state.log import Topics
from tests.conftest import KafkaFactory
from tests.one_kafka import Running, broker_like


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


@pytest.fixture(scope="session")
def mortal(kafka: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = broker_like(kafka, tmp_path_factory.mktemp("kafka"), retention_h=876_000)
    yield broker
    broker.kill()


@pytest.fixture
def own(mortal: Broker) -> Broker:
    """A running broker that may die; tests have topics of their own."""
    return mortal.start()
