"""Windows of fewer examples, so that traffic that is made up fills them."""

from __future__ import annotations

import pytest

from trainer import holding


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "WINDOW_ROWS", 500)
