"""The trainer's loop: whatever happens to it, the weights are a function of base, log range and mask."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from state.errors import GapError, LockHeld, MicroBatchError, SaltMismatch, SpecMismatch, UnknownTopic
from state.features.mask import Mask
from state.layout import TRAINER_LOCK
from state.log import Topics, Writer
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control, follow, pin, roll_back
from state.registry.registry import SERVING, Registry
from tests.conftest import KafkaFactory
from tests.trainer.clicks import SALT, SPEC, START_MS, TOPIC, microbatch, small_settings
from tests.trainer.logs import (
    append,
    learner,
    run_to_end,
    shared,
    started,
    with_weight,
    without,
    write_transform,
    written,
)
from trainer.engine.step import Trainer
from trainer.intake import take_in
from trainer.learner import Learner
from trainer.loop import Compaction, await_spec
from trainer.versions import checkpoint
from trainer.versions.program import preprocessing_of

RECORDS = [microbatch(number) for number in range(24)]
POISON = Mask(
    offsets=((Source(TOPIC, 0).topic, 0, 200, 330),), times=((START_MS + 20 * 150_000, START_MS + 21 * 150_000),)
)


def who(reason: str = "test") -> dict[str, object]:
    return {"actor": "ann", "reason": reason, "now_ms": 5}


def state(running: Learner) -> tuple[str, int, dict[Source, int]]:
    return checkpoint.digest(running._trainer), running.place.next, running.place.marks


def rolled_back(to: int, mask: Mask) -> Callable[[Control], Control]:
    return lambda control: roll_back(control, to, mask, actor="ann", reason="poison", now_ms=5)


def test_after_a_rollback_the_bits_are_those_of_the_filtered_log(tmp_path: Path) -> None:
    registry, log = started(tmp_path / "ours"), written(RECORDS[:8])
    ours = learner(registry, log)
    run_to_end(ours)
    ours.tick(0.0)
    ours._settle(wait=True)
    to = ours.place.parent
    append(log, RECORDS[8:])
    run_to_end(ours)
    poisoned = state(ours)
    registry.change(rolled_back(to, POISON))
    run_to_end(ours)
    assert ours.place.epoch == 2
    assert ours.place.masked > 100

    other = started(tmp_path / "theirs")
    log = written([*RECORDS[:8], *(without(value, POISON) for value in RECORDS[8:])])
    theirs = learner(other, log, trainer=shared(1))
    run_to_end(theirs)
    assert state(ours) == state(theirs)
    assert state(ours) != poisoned
    ours.close()
    newest = registry.manifest(registry.newest(2) or 0)
    assert newest.log.next in (ours.place.next - 1, ours.place.next), "a marker follows the last record"
    assert newest.visible == ((_first_of(registry, 2), newest.version), (1, to))
    assert newest.mask_generation == 2


def _first_of(registry: Registry, epoch: int) -> int:
    return min(version for version in registry.versions() if registry.manifest(version).epoch == epoch)


def test_a_restart_goes_on_with_the_same_bits_in_another_layout(tmp_path: Path) -> None:
    whole = learner(started(tmp_path / "whole"), written(RECORDS))
    run_to_end(whole)
    expected = state(whole)
    registry, log, known = started(tmp_path / "cut"), written([]), 0
    for capacity, records in (("64", 13), ("1024", 17), ("64", 24)):
        append(log, RECORDS[known:records])
        known = records
        running = learner(registry, log, trainer=shared(1, "--trainer.capacity", capacity))
        run_to_end(running)
        # Killed: what was not published is lost, and learned again.
        running._publisher.close()
    assert state(running) == expected
    assert (running.place.rows, running.place.duplicate) == (whole.place.rows, 0)


def test_rows_written_again_by_a_crashed_stream_change_nothing(tmp_path: Path) -> None:
    once = learner(started(tmp_path / "once"), written(RECORDS[:6]))
    run_to_end(once)
    expected = state(once)
    again = learner(started(tmp_path / "again"), written([*RECORDS[:4], *RECORDS[2:6]]))
    run_to_end(again)
    assert (state(again)[0], again.place.marks) == (expected[0], expected[2])
    assert again.place.duplicate == 80
    assert again.place.rows == again._trainer.counters.trained + again.place.duplicate


def test_nothing_is_published_when_nothing_changed(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:2]))
    run_to_end(running)
    for _ in range(20):
        running.tick(0.0)
        running._settle(wait=True)
    before = registry.versions()
    for _ in range(20):
        running.tick(0.0)
    running.close()
    assert registry.versions() == before


def test_a_version_says_what_it_was_trained_on(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:3]), "--trainer.publish_s", "3600")
    run_to_end(running)
    running.close()
    made = registry.manifest(registry.newest(1) or 0)
    assert (made.log.first, made.log.next, made.steps, made.rows) == (0, 6, 3, 120)
    assert made.marks == {Source(TOPIC, 0): 60, Source(TOPIC, 1): 60}
    assert (made.salt, made.spec) == (SALT, SPEC.digest)
    assert made.environment["threads"] == "1"
    assert made.metrics["account.rows"] == made.metrics["account.trained"] == 120
    assert made.metrics["log_loss"] > 0


def test_a_rollback_between_two_records_leaves_the_rest_of_the_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS))
    strike = killpoints.parse("loop.stepped:5", lambda: print(Registry(tmp_path).change(rolled_back(1, POISON))))
    monkeypatch.setattr(killpoints, "armed", strike)
    run_to_end(running)
    assert running.place.epoch == 2
    log = written([without(value, POISON) for value in RECORDS])
    theirs = learner(started(tmp_path / "theirs"), log, trainer=shared(1))
    run_to_end(theirs)
    assert state(running) == state(theirs)
    running.close()
    epochs = [registry.manifest(version).epoch for version in registry.versions()]
    assert epochs == sorted(epochs)


def test_a_held_trainer_says_what_to_do_and_goes_on_with_a_new_generation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = started(tmp_path)
    bad = [with_weight(value, np.inf) for value in RECORDS[4:8]]
    log = written([*RECORDS[:4], *bad, *RECORDS[8:12]])
    running = learner(registry, log, trainer=shared(1, "--trainer.guard_patience", "3"))
    run_to_end(running)
    assert running._trainer.guard.held
    assert "springtide rollback --to V --skip" in caplog.text
    at = running.place.next
    for _ in range(5):
        assert running.tick(0.0) == 0
    assert running.place.next == at == 13
    running.close()
    running = learner(registry, log, trainer=shared(1, "--trainer.guard_patience", "3"))
    assert running._trainer.guard.held, "a restart does not let it go"

    registry.change(lambda control: pin(control, 1, actor="ann", reason="look", now_ms=5))
    assert running.tick(0.0) == 0, "a pin is no word about training"
    registry.change(lambda control: follow(control, actor="ann", reason="fine", now_ms=6))
    running.tick(0.0)
    run_to_end(running)
    assert running.place.next == 24
    assert running._trainer.counters.skipped == 160


def test_a_corrupt_newest_version_is_learned_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry, log = started(tmp_path), written(RECORDS[:9])
    first = learner(registry, log)
    run_to_end(first)
    first.close()
    expected = state(first)
    newest = registry.newest(1) or 0
    (registry.folder("delta", newest) / SERVING).write_bytes(b"spoiled")
    second = learner(Registry(tmp_path), log)
    assert second.place.parent < newest
    assert ".bad" in caplog.text
    run_to_end(second)
    assert state(second) == expected


def test_a_log_made_anew_or_cut_off_is_not_read_on(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:4]))
    run_to_end(running)
    running.close()
    with pytest.raises(UnknownTopic, match="made again"):
        learner(registry, written(RECORDS, topic_id="ef" * 16))
    with pytest.raises(GapError):
        learner(registry, written(RECORDS, begin=20))


@pytest.mark.parametrize(
    ("value", "spec", "salt", "error"),
    [
        (b"noise", SPEC.digest, SALT, MicroBatchError),
        (None, SPEC.digest, SALT, MicroBatchError),
        (RECORDS[0], "f" * 64, SALT, SpecMismatch),
        (RECORDS[0], SPEC.digest, "f" * 16, SaltMismatch),
    ],
)
def test_a_record_of_another_kind_is_refused_with_its_place(
    value: bytes | None, spec: str, salt: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="here offset 7"):
        take_in(value, {}, Mask.NONE, spec, salt, "here offset 7")


def test_the_wait_for_the_bootstrap_says_so_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    stopping = threading.Event()
    stopping.set()
    with caplog.at_level(logging.INFO):
        assert not await_spec(Registry(tmp_path), SPEC.digest, stopping)
    assert "springtide bootstrap" in caplog.text


def test_a_compactor_is_started_when_due_and_one_at_a_time(tmp_path: Path) -> None:
    now = 0.0
    compaction = Compaction(["--paths.state", str(tmp_path)], every_s=10, elapsed=lambda: now)
    compaction.tick()
    assert compaction._child is None
    now = 11.0
    compaction.tick()
    child = compaction._child
    assert child is not None
    now = 22.0
    compaction.tick()
    assert compaction._child in (child, None) or child.poll() is not None
    assert child.wait() == 0
    compaction.close()


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
    registry.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
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
        until(lambda: "caught up" in log.read_text() and newest(1)[1] >= 16, running)
        with pytest.raises(LockHeld):
            from state.disk.lock import DirectoryLock

            DirectoryLock(settings.registry_dir, TRAINER_LOCK).acquire()
        written = number + 1
        to = newest(1)[0]
        write(RECORDS[written:])
        end = topics.ends(kafka.microbatches_topic)[0][1]
        until(lambda: newest(1)[1] >= end - 1, running)
        # 3. Rolled back under way.
        registry.change(rolled_back(to, POISON))
        until(lambda: newest(2)[1] >= end - 1, running)
        assert running.end() == 0
        assert "Traceback" not in running.said()

    # 4. The same in one process, on the filtered log.
    trainer = Trainer(settings, SPEC, preprocessing_of(registry.transform(SPEC.digest)))
    filtered = [*RECORDS[:written], *(without(value, POISON) for value in RECORDS[written:])]
    theirs = learner(started(tmp_path / "theirs"), written(filtered), trainer=trainer)
    theirs._about = {"salt": SALT, "popular": [], "newest_ms": 0}
    theirs._begin(theirs.control)
    run_to_end(theirs)
    expected = checkpoint.digest(trainer)
    made = checkpoint.restore(registry, newest(2)[0], trainer, SPEC.digest)
    assert checkpoint.digest(trainer) == expected
    assert made.marks == theirs.place.marks
    assert made.environment == checkpoint.environment(settings, trainer.device)
