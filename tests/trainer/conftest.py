"""Fixes TensorFlow's threads before any test runs an operation: bits depend on them. Tables begin small, so that they grow."""

from __future__ import annotations

import pytest

from trainer.device import prepare
from trainer.engine import build

prepare("cpu", threads=1)


@pytest.fixture(autouse=True)
def _small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CAPACITY", 64)
