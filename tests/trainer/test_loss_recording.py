"""A trainer lets others have the loss of each row while somebody reads it, and writes nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from state.experiments.comparison import LossReader, RowLosses, segments, unwant, want
from state.microbatch.batch import MicroBatch, in_log_time
from state.registry.registry import Registry
from tests.trainer.clicks import batches, microbatch
from tests.trainer.logs import append, kill, learner, run_to_end, started, trainer_of, with_weight, written
from trainer.engine.guard import Verdict
from trainer.learner import Learner, LossRecorder

RECORDS = [microbatch(number) for number in range(8)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started(tmp_path / "registry")


def learned(registry: Registry, count: int = len(RECORDS)) -> Learner:
    running = learner(registry, written(RECORDS[:count]))
    run_to_end(running)
    return running


def read(registry: Registry) -> list[RowLosses]:
    reader, found = LossReader(registry.path), list[RowLosses]()
    while some := reader.read():
        found += some
    return found


def test_each_row_with_a_category_has_the_loss_that_the_measures_count(registry: Registry) -> None:
    want(registry.path, "wider")
    running = learned(registry)
    found = read(registry)
    # A record lies at each even offset.
    assert [one.offset for one in found] == list(range(0, 2 * len(RECORDS), 2))
    losses = np.concatenate([one.losses for one in found])
    total = trainer_of(running).measures.progressive.values()["total.log_loss"]
    assert losses.mean() == pytest.approx(total, rel=1e-12)
    assert all(len(one.blocks) == len(one.losses) > 0 for one in found)
    running.close()


def test_rows_of_a_record_that_the_guard_skipped_are_left_out(registry: Registry) -> None:
    want(registry.path, "wider")
    skipped = (3, 5)
    records = [with_weight(value, np.inf) if number in skipped else value for number, value in enumerate(RECORDS)]
    running = learner(registry, written(records))
    run_to_end(running)
    assert [one.offset for one in read(registry)] == [2 * n for n in range(len(RECORDS)) if n not in skipped]
    assert trainer_of(running).counters.skipped > 0
    running.close()


def test_what_is_learned_again_after_a_crash_has_the_same_losses(registry: Registry) -> None:
    want(registry.path, "wider")
    log = written(RECORDS[:5])
    running = learner(registry, log)
    run_to_end(running)
    # As after kill -9: only what was published is there.
    kill(running)
    append(log, RECORDS[5:])
    again = learner(registry, log)
    run_to_end(again)
    again.close()
    by_offset: dict[int, list[float]] = {}
    for one in read(registry):
        assert by_offset.setdefault(one.offset, one.losses.tolist()) == one.losses.tolist()
    assert sorted(by_offset) == list(range(0, 2 * len(RECORDS), 2))


def test_nothing_is_written_without_a_reader_and_files_are_removed_once_there_is_none(registry: Registry) -> None:
    learned(registry, 1).close()
    assert not (registry.path / "losses").exists()
    want(registry.path, "wider")
    running = learned(registry, 2)
    assert segments(registry.path)
    unwant(registry.path, "wider")
    now_s = [0.0]
    recorder = LossRecorder(registry.path, lambda: now_s[0])
    report = trainer_of(running).step(_batch(3))
    recorder.take(6, _batch(3).user, report)
    assert segments(registry.path) == []
    want(registry.path, "other")
    recorder.take(8, _batch(3).user, report)
    assert segments(registry.path) == []
    now_s[0] = 1.0
    recorder.take(8, _batch(3).user, report)
    assert [one.offset for one in read(registry)] == [8]
    running.close()


def _batch(number: int) -> MicroBatch:
    return in_log_time(batches(number, number + 1)[0])


def test_a_disk_error_stops_no_training(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    want(registry.path, "wider")
    running = learned(registry, 2)
    recorder = LossRecorder(registry.path, lambda: 0.0)
    report = trainer_of(running).step(_batch(3))
    recorder.take(5, _batch(3).user, replace(report, verdict=Verdict.SKIP))
    shutil.rmtree(registry.path / "losses")
    recorder.take(6, _batch(3).user, report)
    recorder.take(8, _batch(3).user, report)
    assert "no experiment is compared meanwhile" in caplog.text
    running.close()
