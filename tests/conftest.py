"""What tests of several folders share: one real Kafka, and how tests are divided among test processes."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as property_tests
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from state.config.sections import Kafka
from tests import forked
from tests.disks import forget_memory
from tests.one_kafka import OneKafka, Running, ask

KafkaFactory = Callable[..., Kafka]

LOOP = "tests/e2e/loop/"
TOGETHER = (LOOP, "tests/laws/", "tests/trainer/privacy/")
"""Tests that share what is made once in a process: the running loop, parsed sources, and a trainer whose tracing takes seconds."""
FIRST = (LOOP, "tests/e2e/", "tests/streaming/", "tests/conformance/", "tests/trainer/", "tests/deploy/")
"""Folders by the time that one of their files takes."""
KAFKA = pytest.StashKey[OneKafka]()
FORKS = pytest.StashKey[forked.Server]()
YIELDS = pytest.StashKey[bool]()
# A busy machine makes slow examples of all of them.
for profile, examples in (("quick", 40), ("thorough", 300)):
    property_tests.register_profile(
        profile, max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
property_tests.load_profile("quick")
# Test brokers live for minutes: the quick compiler alone costs half of what both do.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

_numbers = itertools.count(1)


def group(file: str) -> str:
    """Which files one test process takes together: those of a folder in `TOGETHER`, or the file alone."""
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


class ByFile(LoadScopeScheduling):
    """Gives each test process whole groups of files."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """What pytest-xdist asks for; its own groups do not know the node ids of pytest 9.2."""
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts with what takes longest, so that at the end no test process waits for another one."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((n for n, at in enumerate(FIRST) if item.nodeid.startswith(at)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tells each test process where it can ask for the broker, and for processes."""
    config = node.config
    if KAFKA not in config.stash:
        config.stash[KAFKA], config.stash[FORKS] = OneKafka(), forked.Server()
        config.add_cleanup(config.stash[KAFKA].stop)
        config.add_cleanup(config.stash[FORKS].stop)
    node.workerinput["kafka"], node.workerinput["forks"] = config.stash[KAFKA].address, config.stash[FORKS].address


def pytest_configure(config: pytest.Config) -> None:
    """Takes the address of the server of forks."""
    if hasattr(config, "workerinput"):
        forked.use(config.workerinput["forks"])
    config.add_cleanup(forked.stop)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets all test processes but that of the running loop yield to it: it costs half a core for as long as it runs."""
    config = item.config
    if hasattr(config, "workerinput") and YIELDS not in config.stash:
        config.stash[YIELDS] = group(item.nodeid) != LOOP
        if config.stash[YIELDS]:
            os.nice(5)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Collects what a test leaves to the collector, such as sockets of a broker that was killed, while its own filters hold."""
    yield
    if item.get_closest_marker("filterwarnings") is not None:
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def rows_forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leaves no rows in memory of serving directories that tests made."""
    yield
    forget_memory(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A running broker; `.bootstrap_servers` says where. All tests share it: start your own to stop it."""
    led = getattr(request.config, "workerinput", None)
    if led is not None:
        yield ask(led["kafka"])
        return
    own = OneKafka()
    yield own.running()
    own.stop()


@pytest.fixture
def kafka_settings(kafka: Running) -> KafkaFactory:
    """Makes the section `kafka` for a test: the broker, and topics and a group no other test has.

    The topics are named, not created. Keyword arguments replace further fields.
    """

    def make(**changes: Any) -> Kafka:
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
                request_timeout_s=60.0,
            ),
            **changes,
        )

    return make
