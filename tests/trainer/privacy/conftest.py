"""Periods of ten minutes of log time, so that few records take several."""

from __future__ import annotations

import pytest

from trainer.engine import private_step


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_step, "PERIOD_MS", 600_000)
