"""The trainer's process: it waits for its bootstrap, is killed, started again and rolled back on a real log."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from state.config.settings import Settings
from state.registry.registry import Registry
from tests.trainer.clicks import SPEC
from trainer.loop import await_spec


def test_the_wait_for_the_bootstrap_is_logged_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = threading.Event()
    stopping.set()
    with caplog.at_level(logging.INFO):
        assert not await_spec(Registry(tmp_path), SPEC.digest, Settings().model, stopping)
    assert "springtide bootstrap" in caplog.text
