"""Where histories lie in tests: a link in a state directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from state import layout


@pytest.fixture
def link(tmp_path: Path) -> Path:
    (tmp_path / "state" / "stream-0").mkdir(parents=True)
    return tmp_path / "state" / "stream-0" / layout.HISTORIES
