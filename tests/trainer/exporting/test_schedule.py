"""A scheduled export is a child of its own: one at a time, when it is due, and a failure only delays the next."""

from __future__ import annotations

import logging
import time

import pytest

from trainer.loop import ScheduledExports


def ended(exports: ScheduledExports) -> None:
    """Waits for the child."""
    until = time.monotonic() + 30
    while exports._child is not None and exports._child.poll() is None:
        assert time.monotonic() < until


def test_one_is_started_when_it_is_due_and_a_failure_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """By the clock; the next in its turn."""
    now = [0.0]
    exports = ScheduledExports(["--no-such-option"], 10.0, lambda: now[0], "json.tool")
    exports.tick()
    assert exports._child is None
    now[0] = 10.0
    exports.tick()
    first = exports._child
    exports.tick()
    assert first is not None and exports._child in (first, None), "no second one"
    ended(exports)
    with caplog.at_level(logging.ERROR):
        exports.tick()
    assert "exit code 2; the next one is tried in 10 s" in caplog.text and exports._child is None
    now[0] = 20.0
    exports.tick()
    assert exports._child is not None and exports._child is not first
    exports.close()


def test_none_is_started_where_nobody_asks() -> None:
    """0 is never."""
    exports = ScheduledExports([], 0.0, lambda: 1e9)
    exports.tick()
    assert exports._child is None
    exports.close()
