"""Compactor and exports are children of the trainer: one at a time, when it is due, and a failure only delays the next."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from state.metrics import TrainerMetrics
from trainer.loop import HURRY_S, Compaction, ScheduledExports

WRONG = ["--no-such-option"]


@pytest.mark.parametrize(
    "make",
    [
        lambda now: Compaction(WRONG, 10.0, elapsed=now),
        lambda now: ScheduledExports(WRONG, 10.0, now, "json.tool"),
    ],
    ids=["compactor", "export"],
)
def test_one_is_started_when_it_is_due_and_a_failure_is_said(
    make: Callable[[Callable[[], float]], Compaction | ScheduledExports], caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    children = make(lambda: now)
    children.tick()
    assert children._child is None
    now = 10.0
    children.tick()
    first = children._child
    children.tick()
    assert first is not None and children._child in (first, None), "no second one"
    first.wait()
    with caplog.at_level(logging.ERROR):
        children.tick()
    assert "exit code 2; " in caplog.text and children._child is None
    now = 20.0
    children.tick()
    assert children._child is not None
    children.close()


def test_no_export_is_started_where_nobody_asks() -> None:
    exports = ScheduledExports([], 0.0, lambda: 1e9)
    exports.tick()
    assert exports._child is None
    exports.close()


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


def test_a_compactor_is_started_sooner_where_there_is_no_room(tmp_path: Path) -> None:
    now_s = 0.0
    compaction = Compaction(["--paths.state", str(tmp_path)], every_s=600, elapsed=lambda: now_s)
    for now_s, hurry, runs in ((HURRY_S - 1, True, False), (HURRY_S, False, False), (HURRY_S, True, True)):  # noqa: B007
        compaction.tick(hurry)
        assert (compaction._child is not None) == runs
    compaction.close()
