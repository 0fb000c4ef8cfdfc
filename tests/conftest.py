"""What tests of several folders share: one real Kafka for each test process, and which tests share a process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from xdist.scheduler import LoadScopeScheduling

from deploy.kafka.broker import Broker, free_port
from state.config.sections import Kafka

KafkaFactory = Callable[..., Kafka]

LOOP = "tests/e2e/loop/"

_numbers = itertools.count(1)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each test process whole files, and all of the running loop's to one: what tests share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = nodeid.partition("::")[0]
        return LOOP if file.startswith(LOOP) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """What pytest-xdist asks for; its own groups do not know the node ids of pytest 9.2."""
    return ByFile(config, log)


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
