"""The trainer's process: it waits for its bootstrap, is killed, started again and rolled back on a real log."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld
from state.layout import TRAINER_LOCK
from state.log import Topics, Writer
from state.process import killpoints
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.trainer.clicks import SALT, SPEC, small_settings
from tests.trainer.logs import (
    learner,
    run_to_end,
    started,
    without,
    write_transform,
    written,
)
from tests.trainer.test_learner import POISON, RECORDS, rolled_back
from trainer import loop
from trainer.engine.step import Trainer
from trainer.loop import await_spec
from trainer.versions import checkpoint
from trainer.versions.program import preprocessing_of


def test_the_wait_for_the_bootstrap_says_so_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = threading.Event()
    stopping.set()
    with caplog.at_level(logging.INFO):
        assert not await_spec(Registry(tmp_path), SPEC.digest, Settings().model, stopping)
    assert "springtide bootstrap" in caplog.text


def test_a_second_trainer_of_a_registry_is_refused(tmp_path: Path) -> None:
    settings = small_settings("--paths.state", str(tmp_path), "--trainer.metrics_port", "0")
    with (
        DirectoryLock(settings.registry_dir, TRAINER_LOCK),
        pytest.raises(LockHeld, match=f"process {os.getpid()}"),
    ):
        loop.run(settings, [], threading.Event())


class Process:
    """`python -m trainer.loop` with its standard error."""

    def __init__(self, argv: list[str], error: Path, kill_at: str = "") -> None:
        self.error = error
        environment = {**os.environ, killpoints.VARIABLE: kill_at}
        with error.open("ab") as stream:
            self.child = subprocess.Popen([sys.executable, "-m", "trainer.loop", *argv], stderr=stream, env=environment)

    def said(self) -> str:
        return self.error.read_text()

    def end(self) -> int:
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(timeout=60)


def until(condition: Callable[[], object], child: Process, deadline_s: float = 90.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, child.said()
        assert child.child.poll() is None, child.said()
        time.sleep(0.02)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for process in made:
        process.child.kill()
        process.child.wait()


@pytest.mark.nightly
def test_processes_killed_restarted_and_rolled_back_on_a_real_log(
    kafka_settings: KafkaFactory, tmp_path: Path, processes: list[Process]
) -> None:
    kafka = kafka_settings()
    argv = [
        "--kafka.bootstrap_servers",
        kafka.bootstrap_servers,
        "--kafka.microbatches_topic",
        kafka.microbatches_topic,
    ]
    argv += ["--paths.state", str(tmp_path / "state"), "--trainer.metrics_port", "0", "--trainer.publish_s", "0.05"]
    settings = small_settings(*argv)
    argv = [*argv, "--model.dim", "8", "--model.hidden", "16,8", "--model.popular", "4"]
    registry = Registry(settings.registry_dir)
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    with Topics(settings.kafka) as topics, Writer(settings.kafka, transactional_id=kafka.microbatches_topic) as writer:
        topics.ensure(kafka.microbatches_topic, 1)

        def write(records: list[bytes]) -> None:
            for value in records:
                with writer.transaction():
                    writer.send(kafka.microbatches_topic, 0, None, value)

        def newest(epoch: int) -> tuple[int, int]:
            version = registry.newest(epoch)
            return (0, 0) if version is None else (version, registry.manifest(version).log.next)

        # 1. Killed between the rename and its sync of the third version.
        write(RECORDS[:6])
        log = tmp_path / "trainer.log"
        killed = Process(argv, log, kill_at="publish.renamed:3")
        processes.append(killed)
        for number in range(6, 9):
            until(lambda: newest(1)[0], killed)
            write([RECORDS[number]])
            deadline = time.monotonic() + 5
            seen = newest(1)[0]
            while killed.child.poll() is None and newest(1)[0] == seen and time.monotonic() < deadline:
                time.sleep(0.02)
            if killed.child.poll() is not None:
                break
        assert killed.child.wait(timeout=60) == -signal.SIGKILL, killed.said()
        # 2. Started again with another layout, it goes on; a second one is refused.
        log = tmp_path / "restarted.log"
        running = Process([*argv, "--trainer.capacity", "4096"], log)
        processes.append(running)
        until(lambda: "caught up" in log.read_text() and newest(1)[1] > 2 * number, running)
        with pytest.raises(LockHeld):
            DirectoryLock(settings.registry_dir, TRAINER_LOCK).acquire()
        sent = number + 1
        to = newest(1)[0]
        write(RECORDS[sent:])
        end = topics.ends(kafka.microbatches_topic)[0][1]
        until(lambda: newest(1)[1] >= end - 1, running)
        # 3. Rolled back under way.
        registry.change(rolled_back(to, POISON))
        until(lambda: newest(2)[1] >= end - 1, running)
        assert running.end() == 0
        assert "Traceback" not in running.said()

    # 4. The same in one process, on the filtered log.
    trainer = Trainer(settings, SPEC, preprocessing_of(registry.specs.transform(SPEC.digest)))
    filtered = [*RECORDS[:sent], *(without(value, POISON) for value in RECORDS[sent:])]
    theirs = learner(started(tmp_path / "theirs"), written(filtered), trainer=trainer)
    # The bootstrap of the processes knew no popular categories.
    checkpoint.begin(trainer, {"salt": SALT, "popular": [], "newest_ms": 0})
    run_to_end(theirs)
    expected = checkpoint.digest(trainer)
    made = checkpoint.restore(registry, newest(2)[0], trainer, SPEC.digest)
    assert checkpoint.digest(trainer) == expected
    assert made.marks == theirs.place.marks
    assert made.environment == checkpoint.environment(settings, trainer.device, trainer.engine.name)
