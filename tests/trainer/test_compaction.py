"""The compactor beside the trainer: one at a time, when it is due."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.compaction import Compaction


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
    now, noted = 0.0, list[int]()
    compaction = Compaction(["--paths.state", str(tmp_path)], every_s=10, elapsed=lambda: now, note=noted.append)
    for program in ("exit(1)", "exit(1)", ""):
        compaction._command = [sys.executable, "-S", "-c", program]
        now += 11.0
        compaction.tick()
        assert compaction._child is not None
        compaction._child.wait()
        compaction.tick()
    assert noted == [1, 2, 0]
