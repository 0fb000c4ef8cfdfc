"""A small memory for the stores of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from state.disk import lmdb_store, memory_place
from tests.disks import Disk, small_disk
from tests.state.disk.held_histories import MIB


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(memory_place, "LEAST_BYTES", MIB)
    monkeypatch.setattr(lmdb_store, "RESERVE_BYTES", MIB)
    with small_disk(tmp_path / "memory", "8m") as disk:
        yield disk
