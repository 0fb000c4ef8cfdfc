"""Several workers train one model, as processes on a real log."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from deploy.kafka.configuration import free_port
from state.config.settings import Settings
from state.log import Log
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.trainer.clicks import SALT, SPEC, microbatch, small_settings
from tests.trainer.logs import write_transform
from trainer.versions import checkpoint, content

RECORDS = [microbatch(number) for number in range(24)]
DEADLINE_S = 300.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def settings_of(kafka: KafkaFactory, state: Path, workers: int) -> Settings:
    own = kafka()
    names = ("bootstrap_servers", "clicks_topic", "microbatches_topic", "dead_letters_topic", "group", "port")
    flags = [word for name in names for word in (f"--kafka.{name}", str(getattr(own, name)))]
    flags += ["--paths.state", str(state), "--trainer.metrics_port", str(free_port()), "--trainer.device", "cpu"]
    flags += ["--trainer.publish_s", "0.05", "--registry.durable_s", "0.05", "--trainer.workers", str(workers)]
    return small_settings(*flags)


def write(settings: Settings, first: int, last: int) -> None:
    log, topic = Log(settings.kafka), settings.kafka.microbatches_topic
    with log.topics() as topics, log.writer(topic) as writer:
        topics.ensure(topic, 1)
        for value in RECORDS[first:last]:
            with writer.transaction():
                writer.send(topic, 0, None, value)


def prepared(settings: Settings) -> Registry:
    registry = Registry(settings.registry_dir)
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    return registry


def learned(registry: Registry, steps: int) -> int:
    """The newest durable version if it has so many steps; else 0."""
    version = registry.newest(1)
    return version if version is not None and registry.manifest(version).steps == steps else 0


def digest(registry: Registry, version: int) -> str:
    return content.digest(checkpoint.full_state(registry, version)[1])


def others(leader: Part) -> list[psutil.Process]:
    return [each for each in psutil.Process(leader.pid).children() if "trainer.worker" in each.cmdline()]


def run_through(settings: Settings, registry: Registry, log: Path, stack: ExitStack) -> int:
    """Starts a trainer, waits until all records are learned, and stops it; returns the last version."""
    leader = Part("trainer", settings, log)
    stack.callback(leader.kill)
    version = until(lambda: ended(leader) or learned(registry, len(RECORDS)), leader.said, DEADLINE_S)
    assert leader.stop() == 0, leader.said()
    return version


def ended(leader: Part) -> None:
    assert leader.end() is None, leader.said()


FAULTS: list[Callable[[Part], None]] = [
    lambda leader: others(leader)[0].kill(),
    lambda leader: others(leader)[-1].suspend(),
    lambda leader: leader.signal(signal.SIGKILL),
]


def suffer(leader: Part, settings: Settings, registry: Registry, first: int, fault: Callable[[Part], None]) -> None:
    """Lets a fault end the group between two halves of six records from `first` on."""
    write(settings, first, first + 3)
    until(lambda: ended(leader) or learned(registry, first + 3), leader.said, DEADLINE_S)
    children = others(leader)
    fault(leader)
    write(settings, first + 3, first + 6)
    until(leader.end, leader.said, DEADLINE_S)
    until(lambda: not any(each.is_running() and each.status() != "zombie" for each in children), "workers remain")


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_killed_or_frozen_worker_changes_no_bit_of_what_the_group_learns(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack, workers: int
) -> None:
    settings = settings_of(kafka_settings, tmp_path / "faults", workers)
    registry = prepared(settings)

    # One fault in `make test`; the others take a start of TensorFlow each.
    faults = FAULTS if workers > 2 else FAULTS[:1]
    for number, fault in enumerate(faults):
        leader = Part("trainer", settings, tmp_path / f"fault{number}.log")
        stack.callback(leader.kill)
        suffer(leader, settings, registry, 6 * number, fault)
    write(settings, 6 * len(faults), len(RECORDS))
    version = run_through(settings, registry, tmp_path / "last.log", stack)

    if workers == 2:
        # Another group learns the whole log without a fault, and has the same bits.
        verifying = Part("command", settings, tmp_path / "verify.log", words=["verify", str(version)])
        assert verifying.process.wait(DEADLINE_S) == 0, verifying.said()
        return
    whole = settings_of(kafka_settings, tmp_path / "whole", workers)
    write(whole, 0, len(RECORDS))
    undisturbed = prepared(whole)
    expected = digest(undisturbed, run_through(whole, undisturbed, tmp_path / "whole.log", stack))
    assert digest(registry, version) == expected
