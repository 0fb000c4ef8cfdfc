"""What tests of several folders share: one real Kafka for each test process, and which tests share a process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from deploy.kafka.broker import Broker, free_port
from state.sections import Kafka

KafkaFactory = Callable[..., Kafka]

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file's tests in one process, and all tests of the running loop: what they share is made once."""
    for item in items:
        shares_loop = "one_loop" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("loop" if shares_loop else str(item.path)))


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running broker; `.bootstrap_servers` says where. Do not stop it: start your own for that."""
    broker = Broker(tmp_path_factory.mktemp("kafka"), free_port(), heap_mb=320)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def kafka_settings(kafka: Broker) -> KafkaFactory:
    """Makes the section `kafka` for a test: the broker, and topics and a group no other test has.

    The topics are named, not created. Keyword arguments replace further fields.
    """

    def make(**changes: object) -> Kafka:
        suffix = f"{os.getpid()}-{next(_numbers)}"
        return replace(
            Kafka(
                bootstrap_servers=kafka.bootstrap_servers,
                clicks_topic=f"clicks-{suffix}",
                dead_letters_topic=f"dlq-{suffix}",
                microbatches_topic=f"microbatches-{suffix}",
                group=f"group-{suffix}",
                clicks_partitions=2,
                port=kafka.port,
                request_timeout_s=10.0,
            ),
            **changes,  # type: ignore[arg-type]
        )

    return make
