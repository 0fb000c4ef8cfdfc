"""Processes of trainers of one registry: a standby takes over, and the next start learns without TensorFlow."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.watch import scrape
from state import probe
from state.config.settings import Settings
from state.file_store import open_store
from state.log import Log
from state.process.environment import wall_ms
from state.process.network import free_port
from state.registry.registry import Registry
from state.registry.sync import CATALOG, read_catalog
from tests import forked
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.one_s3 import S3Server
from tests.trainer.clicks import SALT, SPEC, microbatch, small_settings
from tests.trainer.logs import write_transform
from trainer import verify
from trainer.model.default_model import DefaultModel
from trainer.versions import checkpoint
from trainer.versions.program import Program

RECORDS = [microbatch(number) for number in range(24)]
PACE = ("--trainer.publish_s", "0.05", "--registry.durable_s", "0.3", "--trainer.metrics_port", "0")
DEADLINE_S = 300.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test started."""
    with ExitStack() as made:
        yield made


class Registered:
    """A registry with a bootstrap, and its training log."""

    def __init__(self, settings: Settings, bootstrapped: bool = False) -> None:
        self.settings, self.registry, self._log = settings, Registry(settings.registry_dir), Log(settings.kafka)
        if bootstrapped:
            return
        self.registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
        with self._log.topics() as topics:
            topics.ensure(settings.kafka.microbatches_topic, 1)

    def write(self, records: Sequence[bytes]) -> None:
        with self._log.writer(self.settings.kafka.microbatches_topic) as writer:
            for value in records:
                with writer.transaction():
                    writer.send(self.settings.kafka.microbatches_topic, 0, None, value)

    def steps(self) -> int:
        """Steps of the newest durable version."""
        newest = self.registry.newest(1)
        return 0 if newest is None else self.registry.manifest(newest).steps

    def first_after(self, struck_ms: int) -> float:
        """Seconds from a moment to the first durable version after it."""
        made = (self.registry.manifest(number).created_at_ms for number in self.registry.versions())
        return (min(at_ms for at_ms in made if at_ms > struck_ms) - struck_ms) / 1000

    def durable(self) -> list[tuple[int, int | None]]:
        """Number and parent of each durable version."""
        return [(number, self.registry.manifest(number).parent) for number in self.registry.versions()]


def trainer(
    stack: ExitStack,
    settings: Settings,
    log: Path,
    kill_at: str = "",
    start: type[subprocess.Popen[bytes]] = forked.Popen,
) -> tuple[Part, Settings]:
    own = replace(settings, trainer=replace(settings.trainer, metrics_port=free_port()))
    part = Part("trainer", own, log, kill_at, start=start)
    stack.callback(part.kill)
    return part, own


def is_warm_standby(part: Part, settings: Settings) -> bool:
    """Whether a trainer shows on /metrics that it stands by with its modules and kernels loaded."""
    assert part.end() is None, part.said()
    metrics = scrape.scrape_one(settings, "trainer")
    phase = metrics.value("springtide_trainer_phase", phase="standing by")
    return metrics.value("springtide_trainer_standby") == 1.0 and phase == 1.0


def has_tensorflow(part: Part) -> bool:
    """Whether the process has mapped TensorFlow's libraries."""
    maps = psutil.Process(part.pid).memory_maps()
    return any("/tensorflow/" in library.path for library in maps)


@pytest.mark.parametrize(
    "struck",
    [
        pytest.param("killed", marks=pytest.mark.nightly),
        "recent.checked",
        pytest.param("publish.checked", marks=pytest.mark.nightly),
    ],
)
def test_a_standby_learns_on_what_wakes_publishes_nothing_and_the_next_start_needs_no_tensorflow(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack, struck: str
) -> None:
    settings = replace(small_settings(*PACE, "--paths.state", str(tmp_path / "state")), kafka=kafka_settings())
    own = Registered(settings)
    # Frozen after its last check and before the rename that would publish a version.
    first, _ = trainer(stack, settings, tmp_path / "first.log", "" if struck == "killed" else f"{struck}:4:stop")
    until(lambda: own.registry.control(), first.said, DEADLINE_S)
    standby, its = trainer(stack, settings, tmp_path / "standby.log")
    until(lambda: is_warm_standby(standby, its), standby.said, DEADLINE_S)
    assert has_tensorflow(first) and "with TensorFlow" in first.said()
    for record in RECORDS[:16]:
        own.write([record])
        time.sleep(0.1)
    if struck == "killed":
        until(lambda: own.steps() >= 4, first.said, DEADLINE_S)
        first.kill()
    else:
        until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, first.said, DEADLINE_S)
    struck_ms = wall_ms()
    own.write(RECORDS[16:20])
    until(lambda: "learning" in standby.said() and own.steps() == 20, standby.said, DEADLINE_S)
    print(f"{struck}: the standby's first durable version after {own.first_after(struck_ms):.1f} s")
    if struck != "killed":
        before = own.durable()
        first.signal(signal.SIGCONT)
        end = until(first.end, first.said, DEADLINE_S)
        assert end.code == 1 and "this trainer lost its claim" in end.said, first.said()
        assert own.durable() == before
    assert "this trainer takes over" in standby.said()
    assert standby.stop() == 0
    # Not forked from a process that has imported TensorFlow.
    second, _ = trainer(stack, settings, tmp_path / "second.log", start=subprocess.Popen)
    own.write(RECORDS[20:])
    until(lambda: own.steps() == len(RECORDS), second.said, DEADLINE_S)
    assert not has_tensorflow(second) and "without TensorFlow" in second.said(), second.said()
    assert second.stop() == 0
    # One line of versions, each on the one before, learned as if one trainer had read the whole log.
    durable = own.durable()
    assert [parent for _, parent in durable] == [None, *(number for number, _ in durable[:-1])]
    manifests = [own.registry.manifest(number) for number, _ in durable]
    assert len({(manifest.program, *sorted(manifest.environment.items())) for manifest in manifests}) == 1
    newest = manifests[-1]
    comparison = verify.run(settings, newest.version, None, lambda line: None)
    assert comparison.outcome == "equal", comparison.text()
    # Serving accepts the answers of the last one.
    tensors = checkpoint.tensors_of(own.registry, newest)
    program = Program(own.registry.specs.program(newest.program))
    program.load({name.removeprefix("dense."): weight for name, weight in tensors.items() if name.startswith("dense.")})
    asked = probe.inputs(DefaultModel(settings.model, SPEC, len(SPEC.names)).shapes())
    assert probe.check(newest.version, probe.answers_in(tensors), program.predict(asked)) < probe.TOLERANCE


@pytest.mark.nightly
def test_a_standby_on_another_host_learns_on_over_s3_and_a_trainer_that_wakes_publishes_nothing(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack
) -> None:
    place = stack.enter_context(S3Server()).bucket("failover") + "/registry"
    flags = (*PACE, "--paths.shared_registry", place, "--paths.salt_file", str(tmp_path / "salt"))
    kafka = kafka_settings()
    hosts = [
        replace(small_settings(*flags, "--paths.state", str(tmp_path / name)), kafka=kafka) for name in ("one", "two")
    ]
    own = Registered(hosts[0])
    first, _ = trainer(stack, hosts[0], tmp_path / "first.log", "share.file:12:stop")
    until(lambda: own.registry.control(), first.said, DEADLINE_S)
    standby, its = trainer(stack, hosts[1], tmp_path / "standby.log")
    until(lambda: is_warm_standby(standby, its), standby.said, DEADLINE_S)
    for record in RECORDS[:16]:
        own.write([record])
        time.sleep(0.1)
    other = Registered(hosts[1], bootstrapped=True)
    until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, first.said, DEADLINE_S)
    struck_ms = wall_ms()
    other.write(RECORDS[16:])
    until(lambda: "learning" in standby.said() and other.steps() == len(RECORDS), standby.said, DEADLINE_S)
    print(f"S3: the standby's first durable version after {other.first_after(struck_ms):.1f} s")
    store = open_store(place)
    before = read_catalog(lambda: store.read(CATALOG))
    first.signal(signal.SIGCONT)
    end = until(first.end, first.said, DEADLINE_S)
    assert end.code == 1 and "has another trainer" in end.said, first.said()
    after = read_catalog(lambda: store.read(CATALOG))
    assert (after.claim, before.folders.items() - after.folders.items()) == (2, set())
    control = other.registry.control()
    assert control is not None and control.action == "take over"
    # Started again it stands by, and has what the other one published.
    again, its = trainer(stack, hosts[0], tmp_path / "again.log")
    until(lambda: is_warm_standby(again, its), again.said, DEADLINE_S)
    until(lambda: own.steps() == len(RECORDS), again.said, DEADLINE_S)
    assert own.durable() == other.durable()
    assert standby.stop() == 0
    newest = other.durable()[-1][0]
    assert verify.run(hosts[1], newest, None, lambda line: None).outcome == "equal"
    until(lambda: "this trainer takes over" in again.said(), again.said, DEADLINE_S)
    assert again.stop() == 0
