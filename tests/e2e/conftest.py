"""What tests of a small loop in memory share: a salt, and kill points that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from state.events.identity import load_salt
from state.process import killpoints


@pytest.fixture(scope="module")
def salt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("salt") / "salt"
    load_salt(path)
    return path


@pytest.fixture
def no_plan() -> Iterator[None]:
    """A test's kill points end with it."""
    # Only now: other tests of this folder need no TensorFlow in their own process.
    from tests.e2e import small_loop

    yield
    small_loop.plan.clear()
    killpoints.armed = None
