"""Several workers train one model, as processes on a real log."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

from state.config.settings import Settings
from state.errors import PortTaken
from state.features.erased import MaskedUsers
from state.log import Log
from state.microbatch.codec import decode
from state.positions import Source
from state.process.network import free_port, free_ports
from state.registry.control import erase, roll_back
from state.registry.registry import Registry
from tests import forked
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.slow_link import SlowLink
from tests.trainer.batches import without_network
from tests.trainer.clicks import SALT, SPEC, TOPIC, microbatch, small_settings
from tests.trainer.logs import without, write_transform
from tests.trainer.test_control_changes import WHO
from tests.trainer.test_learner import POISON
from trainer.engine.adam import FastMoves, FastSlots, move
from trainer.group import await_others
from trainer.versions import checkpoint, content

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


def write(settings: Settings, records: Sequence[bytes]) -> None:
    log, topic = Log(settings.kafka), settings.kafka.microbatches_topic
    with log.topics() as topics, log.writer(topic) as writer:
        topics.ensure(topic, 1)
        for value in records:
            with writer.transaction():
                writer.send(topic, 0, None, value)


def prepared(settings: Settings) -> Registry:
    registry = Registry(settings.registry_dir)
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    return registry


def learned(registry: Registry, steps: int, epoch: int = 1, erased: int = 0) -> int:
    """The newest durable version if it has so many steps, and applied so many erasures; else 0."""
    version = registry.newest(epoch)
    if version is None or (made := registry.manifest(version)).steps != steps or made.erased != erased:
        return 0
    return version


def version_of(leader: Part, registry: Registry, steps: int, epoch: int = 1, erased: int = 0) -> int:
    """Waits for the durable version with so many steps."""

    def made() -> int:
        assert leader.end() is None, leader.said()
        return learned(registry, steps, epoch, erased)

    return until(made, leader.said, DEADLINE_S)


def digest(registry: Registry, version: int) -> str:
    return content.digest(checkpoint.full_state(registry, version)[1])


def users_of(registry: Registry, version: int) -> list[int]:
    users: list[int] = checkpoint.full_state(registry, version)[1]["user.ids"].tolist()
    return users


def require_verified(settings: Settings, version: int) -> None:
    words = ["verify", str(version)]
    verifying = Part("command", settings, settings.logs_dir / "verify.log", words=words, start=forked.Popen)
    assert verifying.process.wait(DEADLINE_S) == 0, verifying.said()


def others(leader: Part) -> list[psutil.Process]:
    return [each for each in psutil.Process(leader.pid).children() if "trainer.worker" in each.cmdline()]


Fault = Callable[[Part], None]
FAULTS: list[Fault] = [
    lambda leader: others(leader)[0].kill(),
    lambda leader: others(leader)[-1].suspend(),
    lambda leader: leader.signal(signal.SIGKILL),
]
WHILE_STARTING: Fault = lambda leader: [leader, *others(leader)][-1].kill()  # noqa: E731
CHANCE = random.Random(7)
MANY = [*FAULTS, WHILE_STARTING] * 2 + [FAULTS[0], FAULTS[2], WHILE_STARTING] * 4


def started(settings: Settings, stack: ExitStack, start: type[subprocess.Popen[bytes]] = forked.Popen) -> Part:
    leader = Part("trainer", settings, settings.logs_dir / "trainer.log", start=start)
    stack.callback(leader.kill)
    return leader


def suffer(
    leader: Part, settings: Settings, registry: Registry, records: Sequence[bytes], learn: range, fault: Fault
) -> None:
    """Lets a fault end the group between two halves of the records `learn`. It is noticed without new ones."""
    half = (learn.start + learn.stop) // 2
    write(settings, records[learn.start : half])
    if fault is WHILE_STARTING:
        time.sleep(CHANCE.uniform(1.0, 12.0))
    else:
        version_of(leader, registry, half)
    children = others(leader)
    fault(leader)
    until(leader.end, leader.said, DEADLINE_S)
    write(settings, records[half : learn.stop])
    until(lambda: not any(each.is_running() and each.status() != "zombie" for each in children), "workers remain")


def trained(
    settings: Settings, records: Sequence[bytes], faults: Sequence[Fault], stack: ExitStack
) -> tuple[Registry, int]:
    """Trains a group on all records through faults; returns the last version."""
    registry, part = prepared(settings), len(records) // (len(faults) + 1)
    for number, fault in enumerate(faults):
        learn = range(part * number, part * (number + 1))
        # A fault while a leader starts may come during its imports.
        start: type[subprocess.Popen[bytes]] = subprocess.Popen if fault is WHILE_STARTING else forked.Popen
        suffer(started(settings, stack, start), settings, registry, records, learn, fault)
    leader = started(settings, stack)
    write(settings, records[part * len(faults) :])
    version = version_of(leader, registry, len(records))
    assert leader.stop() == 0, leader.said()
    return registry, version


@pytest.mark.parametrize(
    ("workers", "records", "rows", "faults"),
    [
        # One fault in `make test`: each takes a start of TensorFlow.
        (2, 24, 40, FAULTS[:1]),
        pytest.param(2, 105, 1000, MANY, marks=pytest.mark.nightly),
        pytest.param(4, 100, 1000, FAULTS, marks=pytest.mark.nightly),
    ],
)
def test_killed_and_frozen_workers_change_no_bit_of_what_the_group_learns(
    kafka_settings: KafkaFactory,
    tmp_path: Path,
    stack: ExitStack,
    workers: int,
    records: int,
    rows: int,
    faults: Sequence[Fault],
) -> None:
    written = [microbatch(number, rows, users=rows) for number in range(records)]
    settings = settings_of(kafka_settings, tmp_path / "faults", workers)
    registry, version = trained(settings, written, faults, stack)
    if workers == 2:
        # Another group learns the whole log without a fault, and has the same bits.
        require_verified(settings, version)
    else:
        whole = settings_of(kafka_settings, tmp_path / "whole", workers)
        assert digest(registry, version) == digest(*trained(whole, written, [], stack))


def test_a_worker_that_is_lost_while_the_others_join_ends_them() -> None:
    one, other = free_ports("01").values()
    join = f"from trainer import group; group.JOIN_S = 2; group.Group(['127.0.0.1:{one}', '127.0.0.1:{other}'], 0)"
    assert subprocess.run([sys.executable, "-c", join], capture_output=True, check=False).returncode == -signal.SIGALRM


class Hosts:
    """A leader and a worker, each with its own address and state directory; the network between them can be cut.

    Both share the registry through an object store. The one that ends is started again, as a supervisor does.
    """

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        ports = list(free_ports("01").values())
        self.links = [
            stack.enter_context(SlowLink(port, host=host))
            for port, host in zip(ports, ("127.0.0.2", "127.0.0.3"), strict=True)
        ]
        reached = [f"127.0.0.1:{link.port}" for link in self.links]
        addresses = (f"127.0.0.2:{ports[0]}", reached[1]), (reached[0], f"127.0.0.3:{ports[1]}")
        state = Path(settings.paths.state)
        self.settings = [
            replace(
                settings,
                paths=replace(settings.paths, state=str(state / name), shared_registry=str(state / "shared")),
                trainer=replace(settings.trainer, worker_addresses=known, metrics_port=free_port()),
            )
            for name, known in zip(("leader", "worker"), addresses, strict=True)
        ]
        self._stack, self.starts = stack, [0, 0]
        self.registry = prepared(self.settings[0])
        self.parts = [self._started(index) for index in (0, 1)]

    def _started(self, index: int) -> Part:
        name, words = ("command", ("train-worker", "--index", "1")) if index else ("trainer", ())
        own = self.settings[index]
        part = Part(name, own, own.logs_dir / "process.log", words=words)
        self._stack.callback(part.kill)
        self.starts[index] += 1
        return part

    def supervise(self) -> None:
        """Starts again what has ended."""
        for index, part in enumerate(self.parts):
            if part.end() is not None:
                self.parts[index] = self._started(index)

    def said(self) -> str:
        return "\n".join(part.log.read_text() for part in self.parts)

    def until(self, is_so: Callable[[], object]) -> None:
        def supervised() -> bool:
            self.supervise()
            return bool(is_so())

        until(supervised, self.said, DEADLINE_S)


@pytest.mark.nightly
def test_workers_on_other_hosts_lose_nothing_if_the_network_between_them_is_cut_or_the_coordinator_is_lost(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack
) -> None:
    records, hosts = (
        [microbatch(number) for number in range(24)],
        Hosts(settings_of(kafka_settings, tmp_path, 2), stack),
    )
    settings, registry = hosts.settings[0], hosts.registry

    def learn(part: slice, since_s: float) -> None:
        write(settings, records[part])
        hosts.until(lambda: learned(registry, part.stop))
        print(f"learned {part.stop} records {time.monotonic() - since_s:.1f} s after the start or the fault's end")

    learn(slice(0, 8), time.monotonic())
    assert hosts.starts == [1, 1], hosts.said()
    for link in hosts.links:
        link.cut()
    cut_s = time.monotonic()
    write(settings, records[8:12])
    hosts.until(lambda: min(hosts.starts) == 2)
    print(f"both had noticed the cut after {time.monotonic() - cut_s:.1f} s")
    hosts.until(lambda: all("waiting for worker" in part.said() for part in hosts.parts))
    assert not learned(registry, 12)
    for link in hosts.links:
        link.mend()
    learn(slice(12, 16), time.monotonic())
    hosts.parts[0].kill()
    learn(slice(16, 24), time.monotonic())
    leader, worker = hosts.parts
    assert leader.stop() == 0, hosts.said()
    assert worker.process.wait(DEADLINE_S) == 0, hosts.said()
    # Two workers on this machine learn the whole log without a fault, and have the same bits.
    require_verified(settings, learned(registry, 24))


@pytest.mark.parametrize("workers", [1, 4])
def test_means_of_the_moves_within_a_record_lead_as_far_as_the_moves(workers: int) -> None:
    def moved(slots: FastSlots, moves: int) -> FastSlots:
        after = FastSlots(*(slot.copy() for slot in slots))
        for _ in range(moves):
            cast(Any, move).py_func(after, np.array([0.5, -2.0, 0.0], np.float32), np.float32(0.01), 0)
        return after

    before = moved(FastSlots.of(np.zeros(3, np.float32)), 3000)
    mean = FastMoves.between(before, moved(before, 16 // workers))
    one, several = moved(before, 16), mean.applied(before, 16)
    for name, alone, together in zip(one._fields, one, several, strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-6 if workers == 1 else 1e-3, err_msg=name)
    # The tolerance is small against the moves.
    assert not np.allclose(one.weights, before.weights, rtol=4e-3)


def test_a_worker_waits_for_the_others_and_names_those_that_are_missing(stack: ExitStack) -> None:
    ports = list(free_ports("012").values())
    addresses, reported = [f"127.0.0.1:{port}" for port in ports], list[Sequence[int]]()

    def wait(index: int, report: Callable[[Sequence[int]], object]) -> None:
        await_others(addresses, index, report)
        # From here on, TensorFlow's server listens on the port.
        stack.enter_context(socket.create_server(("127.0.0.1", ports[index])))

    def started(index: int, report: Callable[[Sequence[int]], object]) -> threading.Thread:
        thread = threading.Thread(target=wait, args=(index, report), daemon=True)
        thread.start()
        return thread

    threads = [started(0, reported.append)]
    until(lambda: reported and list(reported[-1]) == [1, 2], "both are missing")
    threads.append(started(2, len))
    until(lambda: list(reported[-1]) == [1], "worker 1 is missing")
    with pytest.raises(PortTaken, match="worker 2 of the trainer cannot listen"):
        await_others(addresses, 2, len)
    threads.append(started(1, len))
    until(lambda: not any(thread.is_alive() for thread in threads), "all have found the others")
    assert list(reported[-1]) == []


@pytest.mark.nightly
def test_a_group_that_rolled_back_equals_one_that_never_saw_the_clicks_and_no_worker_keeps_an_erased_user(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack
) -> None:
    seen = [microbatch(number) for number in range(24)]
    unseen = [*seen[:8], *(without(value, POISON) for value in seen[8:])]
    # A record without rows to learn is no step.
    steps = sum(len(decode(value)) > 0 for value in unseen)
    user, offsets = int(decode(seen[15]).user[30]), [(Source(TOPIC, part).topic, part, 320) for part in (0, 1)]

    def learn(records: Sequence[bytes], settings: Settings) -> tuple[Registry, int]:
        registry, epoch, leader = prepared(settings), 1, started(settings, stack)
        write(settings, records[:8])
        before = version_of(leader, registry, 8)
        write(settings, records[8:16])
        version = version_of(leader, registry, 16)
        if records is seen:
            registry.change(lambda control: roll_back(control, before, POISON, **WHO))
            epoch, version = 2, version_of(leader, registry, 16, 2)
        assert user in users_of(registry, version)
        registry.change(lambda control: erase(control, MaskedUsers.of([user]), offsets, **WHO))
        assert user not in users_of(registry, version_of(leader, registry, 16, epoch, erased=1))
        write(settings, records[16:])
        version = version_of(leader, registry, steps, epoch, erased=1)
        assert leader.stop() == 0, leader.said()
        return registry, version

    settings = settings_of(kafka_settings, tmp_path / "seen", 2)
    registry, version = learn(seen, settings)
    assert digest(registry, version) == digest(*learn(unseen, settings_of(kafka_settings, tmp_path / "unseen", 2)))
    require_verified(settings, version)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["compiled", "tensorflow"])
def test_another_number_of_workers_continues_a_version_and_facts_of_the_log_do_not_depend_on_it(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack, engine: str
) -> None:
    records = [microbatch(number) for number in range(24)]

    def learn(settings: Settings, numbers: Sequence[int]) -> Mapping[str, Any]:
        registry, part = prepared(settings), len(records) // len(numbers)
        for place, workers in enumerate(numbers, 1):
            trainer = replace(settings.trainer, workers=workers, engine=engine)
            leader = started(replace(settings, trainer=trainer), stack)
            write(settings, records[part * (place - 1) : part * place])
            version = version_of(leader, registry, part * place)
            assert leader.stop() == 0, leader.said()
        return checkpoint.full_state(registry, version)[1]

    # The share of the network depends on its scores.
    one = without_network(learn(settings_of(kafka_settings, tmp_path / "one", 1), [1]))
    several = without_network(learn(settings_of(kafka_settings, tmp_path / "several", 1), [2, 3, 1]))
    facts = [
        name for name in one if name.endswith((".ids", ".last_seen_ms")) or name.startswith(("cross.", "transition."))
    ]
    assert len(facts) > 10
    assert [name for name in facts if not np.array_equal(one[name], several[name])] == []
    assert not np.array_equal(one["item.rows"], several["item.rows"]), "sums have another order"
