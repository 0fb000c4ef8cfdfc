"""A trainer and its compactor on a full, damaged or read-only disk."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from state import storage
from state.errors import CorruptVersion, UnusableRegistry, WrongEpoch
from state.metrics import StorageMetrics
from state.registry.control import roll_back
from state.registry.registry import Registry
from state.storage import Room
from tests import forked
from tests.disks import ROOT, small_disk
from tests.streaming.streams import DEADLINE_S, until
from tests.trainer.clicks import microbatch, small_settings
from tests.trainer.logs import append, bits_of, learner, publish_all, run_to_end, settle, started, written
from trainer import compactor
from trainer.loop import Scheduled, doubt

RECORDS = [microbatch(number) for number in range(10)]


def test_a_compactor_on_a_full_disk_removes_what_is_old_before_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("--paths.state", str(tmp_path))
    done: list[str] = []

    def refuse(*_: object) -> None:
        raise UnusableRegistry("full")

    monkeypatch.setattr(compactor, "compact", refuse)
    monkeypatch.setattr(compactor, "thin", lambda *_: done.append("retained"))
    with pytest.raises(UnusableRegistry):
        compactor.run(settings)
    assert done == ["retained"]


def test_a_trainer_that_builds_on_a_damaged_version_ends_when_its_compactor_fails(tmp_path: Path) -> None:
    """Else it would add versions that nobody can restore; started again it sets the damage aside."""
    registry = started(tmp_path / "registry")
    running = learner(registry, written(RECORDS[:5]))
    run_to_end(running)
    running.close()
    expected = bits_of(running)
    damaged, newest = registry.versions()[1], registry.versions()[-1]
    assert damaged < newest == running.place.parent
    file = registry.folder("delta", damaged) / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    now = 0.0
    arguments = ["--paths.state", str(tmp_path)]
    compaction = Scheduled("trainer.compactor", arguments, 1.0, lambda *_: doubt(registry, newest), lambda: now)
    now = 2.0
    compaction.tick()
    assert compaction._child is not None and compaction._child.wait() == 1
    with pytest.raises(CorruptVersion, match=rf"version {damaged}: .*training.safetensors.*start the trainer again"):
        compaction.tick()
    again = learner(Registry(registry.path), written(RECORDS[:5]))
    assert again.place.parent < damaged
    run_to_end(again)
    assert bits_of(again) == expected
    again.close()


@pytest.mark.parametrize(
    "module",
    [
        "trainer.loop",
        "deploy.serving.applier",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("trainer.compactor", "streaming.pipeline")),
    ],
)
def test_on_a_read_only_disk_a_process_ends_with_one_line(tmp_path: Path, module: str) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        disk.remount("ro")
        done = forked.run(
            [sys.executable, "-m", module, "--paths.state", str(disk.path / "state")],
            cwd=ROOT, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "Read-only file system" in line and "access rights" in line


FULL_DISK_RECORDS = [microbatch(number) for number in range(12)]


@pytest.fixture
def metrics() -> StorageMetrics:
    return StorageMetrics(CollectorRegistry())


def waits(metrics: StorageMetrics) -> float:
    return float(metrics.waiting.labels("registry")._value.get())


def test_the_trainer_learns_on_and_publishes_everything_once_there_is_space(
    tmp_path: Path, metrics: StorageMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = learner(started(tmp_path / "whole"), written(FULL_DISK_RECORDS))
    run_to_end(undisturbed)
    expected = bits_of(undisturbed)
    stopping = threading.Event()
    with small_disk(tmp_path / "disk", "32m") as disk, caplog.at_level(logging.WARNING):
        registry, log = started(disk.path / "registry"), written(FULL_DISK_RECORDS[:4])
        running = learner(registry, log, room=Room("registry", metrics, stopping.wait))
        before = publish_all(running)
        full = disk.fill()
        append(log, FULL_DISK_RECORDS[4:8])
        run_to_end(running)
        until(lambda: waits(metrics) == 1, "publishing waits")
        append(log, FULL_DISK_RECORDS[8:])
        run_to_end(running)
        assert (running.place.next, registry.versions()[-1]) == (undisturbed.place.next, before)
        warnings = [record.message for record in caplog.records if record.name == storage.__name__]
        assert warnings and all(message.startswith("publishing waits for space: ") for message in warnings)
        full.unlink()
        running.close()
        assert (waits(metrics), metrics.waits.labels("registry")._value.get()) == (0, 1)
        assert caplog.messages[-1] == "publishing continues: there is space again"
        # A new trainer has all of it from the registry alone.
        again = learner(Registry(registry.path), log)
        assert again.place.marks == undisturbed.place.marks
        assert bits_of(again) == expected


def test_a_stopping_trainer_does_not_wait_for_disk_space_and_learns_the_rest_again(
    tmp_path: Path, metrics: StorageMetrics
) -> None:
    stopping = threading.Event()
    with small_disk(tmp_path / "disk", "32m") as disk:
        registry, log = started(disk.path / "registry"), written(FULL_DISK_RECORDS[:4])
        running = learner(registry, log, room=Room("registry", metrics, stopping.wait))
        publish_all(running)
        kept = bits_of(running), running.place.marks
        full = disk.fill()
        append(log, FULL_DISK_RECORDS[4:])
        run_to_end(running)
        until(lambda: waits(metrics) == 1, "publishing waits")
        learned = bits_of(running), running.place.marks
        stopping.set()
        with pytest.raises(UnusableRegistry, match="No space left on device"):
            running.close()
        full.unlink()
        again = learner(Registry(registry.path), log)
        assert (bits_of(again), again.place.marks) == kept
        run_to_end(again)
        assert (bits_of(again), again.place.marks) == learned


def test_a_waiting_version_is_dropped_at_a_rollback(tmp_path: Path, metrics: StorageMetrics) -> None:
    with small_disk(tmp_path / "disk", "32m") as disk:
        registry, log = started(disk.path / "registry"), written(FULL_DISK_RECORDS[:4])
        turned = threading.Event()
        running = learner(registry, log, room=Room("registry", metrics, lambda _: not turned.wait(DEADLINE_S)))
        to = publish_all(running)
        full = disk.fill()
        append(log, FULL_DISK_RECORDS[4:])
        run_to_end(running)
        until(lambda: waits(metrics) == 1, "publishing waits")
        # There is room for a generation and for no version.
        with full.open("r+b") as filler:
            filler.truncate(full.stat().st_size - (128 << 10))
        Registry(registry.path).change(
            lambda control: roll_back(control, to, control.mask, actor="ann", reason="test", now_ms=5)
        )
        turned.set()
        with pytest.raises(WrongEpoch):
            settle(running)
        full.unlink()
        run_to_end(running)
        assert running.place.epoch == 2


def test_other_disk_errors_are_not_awaited(metrics: StorageMetrics) -> None:
    tried = []

    def act() -> None:
        tried.append(1)
        raise UnusableRegistry("the registry cannot be read (Permission denied)") from PermissionError(13, "denied")

    with pytest.raises(UnusableRegistry):
        Room("registry", metrics, lambda _: False).wait_for(act, "publishing")
    said: list[str] = []
    with pytest.raises(PermissionError), storage.unless_full(said.append):
        raise PermissionError(13, "denied")
    with storage.unless_full(said.append):
        raise UnusableRegistry("the registry is full") from OSError(28, "No space left on device")
    assert (tried, said) == ([1], ["the registry is full"])
