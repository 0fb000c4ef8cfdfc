"""The compactor beside the trainer: one at a time, when it is due."""

from __future__ import annotations

import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from state.metrics import TrainerMetrics
from trainer.loop import Compaction


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


def test_failures_in_a_row_are_counted_until_one_succeeds(tmp_path: Path) -> None:
    now, told, collected = 0.0, list[float | None](), CollectorRegistry()
    arguments, metrics = ["--paths.state", str(tmp_path)], TrainerMetrics(collected)
    compaction = Compaction(arguments, every_s=10, metrics=metrics, elapsed=lambda: now)
    for program in ("exit(1)", "exit(1)", ""):
        compaction._command = [sys.executable, "-S", "-c", program]
        now += 11.0
        compaction.tick()
        assert compaction._child is not None
        compaction._child.wait()
        compaction.tick()
        told.append(collected.get_sample_value("springtide_trainer_compactor_failures_in_a_row"))
    assert told == [1.0, 2.0, 0.0]
